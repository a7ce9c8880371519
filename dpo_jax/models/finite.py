"""Weights that hold NaN or infinity: which they are, in one pass."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.models.huggingface import names as huggingface_names
from dpo_jax.types import Array, Params


def broken(params: Params) -> list[str]:
  """Returns the paths of the parameters that hold NaN or infinity.

  Every process calls this alike, and all get the same.
  """
  leaves = {
    huggingface_names.leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  # One program for all, as for fingerprints of checkpoints.
  sums = jax.device_get(_sums(list(leaves.values())))
  return [
    name
    for name, total in zip(leaves, sums, strict=True)
    # A sum of what is finite may pass what its dtype holds.
    if not np.isfinite(total) and not _is_finite(leaves[name])
  ]


def check(params: Params, where: str) -> None:
  """Raises ValueError that names the first of them, if there are any."""
  if names := broken(params):
    raise ValueError(f"{where}: {names[0]} holds NaN or infinity")


@jax.jit
def _sums(leaves: list[Array]) -> list[Array]:
  # XLA on CPUs would make an array of whatever is computed of each element
  # before, and least and largest lose a NaN on the way between devices.
  return [jnp.sum(leaf) for leaf in leaves]


@jax.jit
def _is_finite(leaf: Array) -> Array:
  return jnp.isfinite(leaf).all()

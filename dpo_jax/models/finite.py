"""Weights that hold NaN or infinity: which they are, in one pass."""

import jax
import jax.numpy as jnp

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
  found = jax.device_get(_are_finite(list(leaves.values())))
  return [name for name, is_finite in zip(leaves, found) if not is_finite]


def check(params: Params, where: str) -> None:
  """Raises ValueError that names the first of them, if there are any."""
  if names := broken(params):
    raise ValueError(f"{where}: {names[0]} holds NaN or infinity")


@jax.jit
def _are_finite(leaves: list[Array]) -> list[Array]:
  # Both pass on NaN. XLA on CPUs would make an array of whatever is computed
  # of each element before a sum.
  return [
    jnp.isfinite(jnp.min(leaf)) & jnp.isfinite(jnp.max(leaf)) for leaf in leaves
  ]

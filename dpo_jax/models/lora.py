"""Adapters of low rank (LoRA; Hu et al. 2021, arXiv 2106.09685).

A projection computes y = x W + s (x B) A with s = alpha / rank. B, the factor
next to the input, is drawn from a Gaussian and A begins as zero. So the policy
equals its base exactly before the first update, which moves A alone (the
gradient of B has the factor A); from the second on both move.

Adapters are parameters `{"lora": tree}`. They are a linen collection: there
for a policy, left out for a reference that is its base.
"""

import dataclasses
import importlib
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dpo_jax import sharding
from dpo_jax.models import transformer
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.types import Params

COLLECTION = "lora"
# How many dimensions of a kernel are the input's, where it is not one.
_NUM_INPUTS = {"out": 2}


def with_lora(config: ModelConfig, lora: Lora) -> ModelConfig:
  """Returns the config of the model with adapters.

  Raises:
    ValueError: a value out of range, or targets that no projection has.
  """
  if lora.rank < 1:
    raise ValueError(f"lora.rank={lora.rank}: at least 1, or 0 for no adapters")
  if not 0 < lora.alpha < math.inf:
    raise ValueError(f"lora.alpha={lora.alpha:g}: must be above 0")
  try:
    pattern = re.compile(lora.targets)
  except re.error as error:
    raise ValueError(
      f"lora.targets={lora.targets!r} is not a regular expression: {error}"
    ) from error
  kernels = _kernels(config)
  names = [name for _, name in kernels]
  if not any(map(pattern.fullmatch, names)):
    raise ValueError(
      f"lora.targets={lora.targets!r} matches no projection; there are"
      f" {', '.join(sorted(names))}"
    )
  smallest = min(
    min(math.prod(side) for side in _sides(name, kernel.shape[1:]))
    for (_, name), kernel in kernels.items()
    if pattern.fullmatch(name)
  )
  if lora.rank > smallest:
    raise ValueError(
      f"lora.rank={lora.rank}: a projection is only {smallest} wide"
    )
  return dataclasses.replace(config, lora=lora)


def shapes(config: ModelConfig) -> Params:
  """Returns the tree of the config's adapters as shapes and dtypes.

  A kernel [L, *inputs, *outputs] has `first` [L, *inputs, rank] and `last`
  [L, rank, *outputs].
  """
  rank, dtype = config.lora.rank, jnp.dtype(config.lora.dtype)

  def factors(name, kernel):
    inputs, outputs = _sides(name, kernel.shape[1:])
    shape = lambda *x: jax.ShapeDtypeStruct((config.num_layers, *x), dtype)
    return {"first": shape(*inputs, rank), "last": shape(rank, *outputs)}

  return _tree(config, factors)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
  """Returns, for each adapter, its logical axis (or None) per dimension."""

  def factors(name, _):
    inputs, outputs = _sides(name, transformer.AXES[name, "kernel"])
    return {"first": (None, *inputs, None), "last": (None, None, *outputs)}

  return _tree(config, factors)


def layouts(mesh: Any, config: ModelConfig) -> Params:
  """Returns the layout of each adapter: as the kernel's, the rank whole."""
  return sharding.array_shardings(mesh, logical_axes(config), shapes(config))


def init(config: ModelConfig, rng: PRNGKeyArray) -> Params:
  """Returns new adapters, which add nothing.

  `first` has the variance of PEFT's, 1 / (3 * inputs), so that learning rates
  carry over; Hu et al. say Gaussian and no more.
  """

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if path[-1].key == "last":
      return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
    stddev = (3 * math.prod(leaf.shape[1:-1])) ** -0.5
    return stddev * jax.random.normal(key, leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes(config))


def over(base: Params | None, params: Params | None) -> Params | None:
  """Returns the decoder's parameters that `params` stand for over a base.

  Adapters stand for the base with them, None for the base without; without a
  base, as for the parameters of a whole model, it is `params`.
  """
  if base is None:
    return params
  if params is None:
    return base
  return base | params if params.keys() == {COLLECTION} else params


def merge(config: ModelConfig, base: Params, adapters: Params) -> Params:
  """Returns the base with each kernel W + s B A, summed in float32."""

  def add(kernel, factors):
    product = jax.vmap(
      lambda first, last: jnp.tensordot(
        *(x.astype(jnp.float32) for x in (first, last)),
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
      )
    )(factors["first"], factors["last"])
    total = kernel.astype(jnp.float32) + config.lora.scale * product
    return total.astype(kernel.dtype)

  merged = dict(base, blocks=dict(base["blocks"]))
  for part, projections in adapters[COLLECTION]["blocks"].items():
    merged["blocks"][part] = dict(merged["blocks"][part])
    for name, factors in projections.items():
      leaves = merged["blocks"][part][name]
      kernel = add(leaves["kernel"], factors)
      merged["blocks"][part][name] = leaves | {"kernel": kernel}
  return merged


def quantize(mesh: Any, config: ModelConfig, base: Params) -> Params:
  """Returns the base with the kernels of projections in int8.

  Each has a float32 scale for every output of every layer (the largest weight
  is 127). The kernels that are replaced are deleted.

  Raises:
    ValueError: the package `qwix` is not installed.
  """
  qwix = import_qwix()
  result = dict(base, blocks=dict(base["blocks"]))
  for (part, name), like in _kernels(config).items():
    into, _ = _sides(name, like.shape[1:])
    channels = (0, *range(1 + len(into), len(like.shape)))

    def to_int8(x, channels=channels):
      x = x.astype(jnp.float32)
      return qwix.quantize(x, jnp.int8, channelwise_axes=channels)

    axes = (None, *transformer.AXES[name, "kernel"])
    stored = jax.eval_shape(to_int8, like)
    placed = sharding.array_shardings(
      mesh, jax.tree.map(lambda _, axes=axes: axes, stored), stored
    )
    leaves = base["blocks"][part][name]
    kernel = jax.jit(to_int8, out_shardings=placed)(leaves["kernel"])
    jax.block_until_ready(kernel)
    leaves["kernel"].delete()
    result["blocks"][part] = dict(result["blocks"][part])
    result["blocks"][part][name] = leaves | {"kernel": kernel}
  return result


def import_qwix() -> Any:
  """Returns the package; raises ValueError where it is not installed."""
  try:
    return importlib.import_module("qwix")
  except ImportError as error:
    raise ValueError(
      "lora.base_dtype='int8' needs the package qwix: pip install qwix"
    ) from error


def _kernels(config: ModelConfig) -> dict[tuple[str, str], Any]:
  """Returns the shape of each projection's kernel by block part and name."""
  blocks = transformer.param_shapes(config)["blocks"]
  return {
    (part, name): leaves["kernel"]
    for part in ("attention", "mlp")
    for name, leaves in blocks[part].items()
    if isinstance(leaves, dict) and "kernel" in leaves
  }


def _tree(config: ModelConfig, factors: Any) -> dict[str, Any]:
  """Returns {"lora": ...} with `factors(name, kernel)` at each target."""
  blocks: dict[str, Any] = {}
  for (part, name), kernel in _kernels(config).items():
    if re.fullmatch(config.lora.targets, name):
      blocks.setdefault(part, {})[name] = factors(name, kernel)
  return {COLLECTION: {"blocks": blocks}}


def _sides(name: str, dimensions: tuple) -> tuple[tuple, tuple]:
  """Returns what a kernel's dimensions say of its input and of its output."""
  count = _NUM_INPUTS.get(name, 1)
  return dimensions[:count], dimensions[count:]

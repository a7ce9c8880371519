"""Adapter folders in the format of PEFT, read and written.

Where a family's file holds several of our projections side by side (`c_attn`,
`qkv_proj`, ...), PEFT has one adapter for them all. Ours are written as one
of the sum of their ranks whose last factor is block-diagonal, and one that is
read becomes one of the same first factor for each.
"""

import dataclasses
import itertools
import os
import re
from typing import Any

import jax
import numpy as np

from dpo_jax.host import files, schema
from dpo_jax.models import finite, lora
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.models.huggingface import names as huggingface_names
from dpo_jax.models.huggingface import safetensors, tensors
from dpo_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_RANK = schema.integer(1, 2**20)
# What a config must say, if it says anything, for B A to be all there is; and
# the keys that must be off, as those of variants of LoRA must be.
PLAIN = {"peft_type": "LORA", "bias": "none"}
KINDS = {
  "peft_type": schema.STRING,
  "bias": schema.STRING,
  "base_model_name_or_path": schema.STRING,
  "r": _RANK,
  "rank_pattern": schema.object_of(_RANK),
  "lora_alpha": schema.POSITIVE,
  "alpha_pattern": schema.object_of(schema.POSITIVE),
  "use_rslora": schema.BOOLEAN,
}
OFF = r"""
  use_(?!rslora).*|.*_config|modules_to_save|layer_replication|lora_bias
  |trainable_token_indices|target_parameters|alora_invocation_tokens
"""


@dataclasses.dataclass(frozen=True)
class _Factors:
  """The two tensors of one projection in a PEFT file, and their scale."""

  first: huggingface_names.Place
  last: huggingface_names.Place
  scale: float
  rank: int


def is_adapter(folder: str) -> bool:
  """Returns whether a folder holds an adapter."""
  return os.path.isfile(os.path.join(folder, CONFIG))


def read_config(folder: str) -> dict[str, Any]:
  """Returns what adapter_config.json says.

  Raises:
    ValueError: it is not JSON, has a value of a wrong kind, or asks for more
      than the product of two factors.
  """
  path = os.path.join(folder, CONFIG)
  values = schema.read(path, KINDS, required=("r", "lora_alpha"))
  for name in ("rank_pattern", "alpha_pattern"):
    for pattern in values.get(name) or {}:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f"{path}: {name}: {pattern!r} is not a regular expression: {error}"
        ) from error
  for name, value in values.items():
    if value != PLAIN.get(name, value):
      raise ValueError(
        f"{path}: {name}={value!r}: only {PLAIN[name]!r} can be read"
      )
    if value and re.fullmatch(OFF, name, re.VERBOSE):
      raise ValueError(f"{path}: {name}={value!r}: cannot be read")
  return values


def read_lora(folder: str, config: ModelConfig) -> Lora:
  """Returns what adapters the folder's are of a model of this config.

  All get the largest rank; the scale of each is in its factors (see `load`).

  Raises:
    ValueError: it holds none, or others than of projections.
  """
  found = _factors(folder, config, _open(folder))
  rank = max(factors.rank for factors in found.values())
  names = dict.fromkeys(leaf.split("/")[-2] for leaf in found)
  scale = max(factors.scale for factors in found.values())
  return Lora(rank, scale * rank, "|".join(names))


def load(folder: str, config: ModelConfig, shardings: Params) -> Params:
  """Returns the folder's adapters, on devices.

  One of a lower rank is padded with zeros, and a scale other than that of
  `config.lora` multiplies its last factor.

  Args:
    folder: holds adapter_config.json and the tensors.
    config: the model, with what `read_lora` returns.
    shardings: a NamedSharding for each adapter, in their tree.

  Raises:
    ValueError: they hold NaN or infinity.
  """
  stored = _open(folder)
  found, places = _factors(folder, config, stored), {}

  def read(path, leaf, sharding):
    name = huggingface_names.leaf_name(path)
    _, *parts, which = name.split("/")
    factors = found["/".join([*parts, "kernel"])]
    place = factors.first if which == "first" else factors.last
    places[name] = place
    layers = [place.view(stored, i) for i in range(config.num_layers)]
    array = np.stack(layers).astype(leaf.dtype)
    at = -1 if which == "first" else 1
    padding = [(0, 0)] * array.ndim
    padding[at] = (0, config.lora.rank - factors.rank)
    array = np.pad(array, padding)
    if which == "last" and factors.scale != config.lora.scale:
      array *= np.asarray(factors.scale / config.lora.scale, array.dtype)
    return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
    )

  shapes = lora.shapes(config)
  adapters = jax.tree_util.tree_map_with_path(read, shapes, shardings)
  for name in finite.broken(adapters):
    tensors.raise_broken(stored, places[name], config)
  return adapters


def save(
  folder: str,
  config: ModelConfig,
  adapters: Params,
  *,
  base: str,
  dtype: str = "float32",
) -> None:
  """Writes an adapter folder, whole or not at all.

  Every process calls this; the first one writes.

  Args:
    folder: made if absent; an adapter that it holds is replaced.
    config: the model, with its `lora`.
    adapters: `{"lora": tree}`, laid out in any way.
    base: where the weights are that they are added to.
    dtype: of the tensors written.

  Raises:
    ValueError: an adapter holds NaN or infinity; nothing is written then.
  """
  finite.check(adapters, f"{folder} is not written")
  leaves = {
    huggingface_names.leaf_name(path[1:]): huggingface.to_host(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)
  }
  if jax.process_index() != 0:
    return
  places = huggingface_names.places(config)
  modules = _by_tensor(places, [x for x in leaves if x.endswith("/first")])
  outputs, ranks, targets = [], {}, []
  for tensor, parts in modules.items():
    rank, target = len(parts) * config.lora.rank, _target(tensor)
    targets.append(target)
    if rank != config.lora.rank:
      ranks[target] = rank
    for layer in range(config.num_layers):
      at_layer = {
        part: (leaves[f"{part}/first"][layer], leaves[f"{part}/last"][layer])
        for part in parts
      }
      joined = _join(tensor, at_layer, places)
      for name, array in zip(("lora_A", "lora_B"), joined):
        outputs.append(_output(_key(tensor, name, layer), array, dtype))
  alphas = {name: config.lora.scale * rank for name, rank in ranks.items()}
  values = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": config.lora.rank,
    "lora_alpha": _plain(config.lora.alpha),
    "lora_dropout": 0.0,
    "target_modules": targets,
    "rank_pattern": ranks,
    "alpha_pattern": {name: _plain(x) for name, x in alphas.items()},
    "bias": "none",
    # Of Conv1D, which stores [in,out].
    "fan_in_fan_out": not any(tensor.transposed for tensor in modules),
    "inference_mode": True,
  }
  with files.folder(folder, marker=CONFIG) as part:
    safetensors.write_file(os.path.join(part, WEIGHTS), outputs)
    huggingface.write_json(os.path.join(part, CONFIG), values)


def _open(folder: str) -> dict[str, safetensors.Stored]:
  return safetensors.open_file(os.path.join(folder, WEIGHTS))


def _factors(
  folder: str, config: ModelConfig, stored: dict[str, safetensors.Stored]
) -> dict[str, _Factors]:
  """Returns the factors of each kernel that has some, by the kernel's path."""
  values, left = read_config(folder), set(stored)
  places = huggingface_names.places(config)
  found = {}
  for leaf, place in places.items():
    if not leaf.endswith("/kernel"):
      continue
    if _key(place.tensor, "lora_A", 0) not in stored:
      continue
    rank, scale = _rank_and_scale(folder, values, place.tensor, config)
    into = place.matrix_shape[0]
    sides = {
      "lora_A": (rank, into),
      "lora_B": (sum(place.parts), rank),
    }
    for layer, (which, shape) in itertools.product(
      range(config.num_layers), sides.items()
    ):
      name = _key(place.tensor, which, layer)
      if name not in stored:
        raise ValueError(
          f"{folder}: no tensor {name}: all layers or none must have an adapter"
        )
      if stored[name].shape != shape:
        raise ValueError(
          f"{folder}: {name} is {list(stored[name].shape)}, not {list(shape)}:"
          f" the adapter is of another model, or not of rank {rank}"
        )
      left.discard(name)
    count = len(place.shape) - 1 if leaf.endswith("out/kernel") else 1
    inputs, outputs = place.shape[:count], place.shape[count:]
    tensor = lambda name, by_head, place=place: huggingface_names.Tensor(
      _key(place.tensor, name), place.tensor.leaves, True, by_head
    )
    found[leaf] = _Factors(
      first=huggingface_names.Place(
        tensor("lora_A", False), 0, (rank,), (*inputs, rank), (into, rank)
      ),
      last=huggingface_names.Place(
        tensor("lora_B", place.tensor.by_head),
        place.part,
        place.parts,
        (rank, *outputs),
        (rank, place.matrix_shape[-1]),
      ),
      scale=scale,
      rank=rank,
    )
  if left or not found:
    what = f"{min(left)} is no adapter of a projection" if left else "is empty"
    raise ValueError(
      f"{os.path.join(folder, WEIGHTS)}: {what} of a {config.family} model"
    )
  return found


def _rank_and_scale(
  folder: str,
  values: dict[str, Any],
  tensor: huggingface_names.Tensor,
  config: ModelConfig,
) -> tuple[int, float]:
  """Returns the rank of a module's factors, and what multiplies their product.

  PEFT has patterns of both that may tell layers apart, which we do not.
  """
  module = _module(tensor)
  found = {}
  for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
    of_layers = [
      next(
        (
          value
          for pattern, value in (values.get(patterns) or {}).items()
          if re.match(rf"(.*\.)?({pattern})$", module.format(layer))
        ),
        values[key],
      )
      for layer in range(config.num_layers)
    ]
    if len(set(of_layers)) > 1:
      path = os.path.join(folder, CONFIG)
      raise ValueError(f"{path}: {patterns}: layers of {module} differ")
    found[key] = of_layers[0]
  rank = found["r"]
  root = rank**0.5 if values.get("use_rslora") else rank
  return rank, found["lora_alpha"] / root


def _by_tensor(
  places: dict[str, huggingface_names.Place], firsts: list[str]
) -> dict[huggingface_names.Tensor, list[str]]:
  """Returns the adapted projections that each tensor of a file holds."""
  modules: dict[huggingface_names.Tensor, list[str]] = {}
  parts = [name.removesuffix("/first") for name in firsts]
  for part in sorted(parts, key=lambda x: places[f"{x}/kernel"].part):
    modules.setdefault(places[f"{part}/kernel"].tensor, []).append(part)
  return modules


def _join(
  tensor: huggingface_names.Tensor,
  factors: dict[str, tuple[np.ndarray, np.ndarray]],
  places: dict[str, huggingface_names.Place],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns PEFT's A [rank,in] and B [out,rank] of projections at a layer."""
  firsts = [first.reshape(-1, first.shape[-1]) for first, _ in factors.values()]
  rank, sides = sum(x.shape[-1] for x in firsts), []
  begin = 0
  for leaf in tensor.leaves:
    place = places[leaf]
    heads = place.shape[-2:] if tensor.by_head else place.matrix_shape[-1:]
    side = np.zeros((rank, *heads), np.float32)
    if (part := leaf.removesuffix("/kernel")) in factors:
      last = factors[part][1]
      side[begin : begin + len(last)] = last.reshape(-1, *heads)
      begin += len(last)
    sides.append(side)
  transposed = dataclasses.replace(tensor, transposed=True)
  return np.concatenate(firsts, 1).T, huggingface_names.join(transposed, sides)


def _output(name: str, array: np.ndarray, dtype: str) -> safetensors.Output:
  array = array.astype(jax.numpy.dtype(dtype))
  return safetensors.Output(name, array.shape, array.dtype, lambda: array)


def _module(tensor: huggingface_names.Tensor) -> str:
  return tensor.name.removesuffix(".weight")


def _target(tensor: huggingface_names.Tensor) -> str:
  """Returns a module's name within its layer, as in `target_modules`."""
  return _module(tensor).split("{}.")[1]


def _key(
  tensor: huggingface_names.Tensor, factor: str, layer: int | None = None
) -> str:
  """Returns the name of a factor in a PEFT file, with `{}` for no layer."""
  name = f"{PREFIX}{_module(tensor)}.{factor}.weight"
  return name if layer is None else name.format(layer)


def _plain(x: float) -> int | float:
  return int(x) if x == int(x) else x

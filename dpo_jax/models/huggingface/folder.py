"""Model folders in Hugging Face format, read onto a mesh and written from it.

`huggingface_names.TENSORS` says, once for both ways, which tensor of a file
holds which of our parameters.
"""

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.host import files, schema
from dpo_jax.models import finite, transformer
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.huggingface import config as huggingface_config
from dpo_jax.models.huggingface import names as huggingface_names
from dpo_jax.models.huggingface import safetensors
from dpo_jax.models.huggingface import tensors as huggingface_tensors
from dpo_jax.types import Params

WEIGHTS, INDEX = huggingface_tensors.WEIGHTS, huggingface_tensors.INDEX
SHARD = "model-{:05d}-of-{:05d}.safetensors"
WEIGHT_FILES = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"

# The parts of a hub repository that a model and its tokenizer are made of.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def resolve(path: str) -> str:
  """Returns a local folder: `path` if it is one, else the hub model's files.

  Raises:
    ValueError: it is neither a folder nor a model that the hub gives us.
  """
  if os.path.isdir(path):
    return path
  try:
    return huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES)
  except (OSError, ValueError) as error:
    reason = str(error).strip().split("\n")[0]
    raise ValueError(
      f"no such model {path!r}: not a folder here, and the hub has none for"
      f" us ({reason})"
    ) from error


def read_config(folder: str) -> ModelConfig:
  """Returns the config of the model in `folder`, with default dtypes.

  Raises:
    ValueError: no config.json, or one that asks for what we do not have.
  """
  path = os.path.join(folder, "config.json")
  if not os.path.exists(path):
    raise ValueError(f"no such file {path}: not a model in Hugging Face format")
  values = schema.read(path, {})
  try:
    return huggingface_config.parse(values)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def load_params(
  folder: str, config: ModelConfig, shardings: dict[str, Any]
) -> Params:
  """Returns the folder's parameters in `config.param_dtype`, on devices.

  A device's slice of a parameter is copied from the files tensor by tensor and
  is placed before the next is begun, so the host never holds more than one
  slice, and of the files one tensor.

  Args:
    folder: holds model.safetensors, or an index of several files.
    config: what `read_config` returns; its dtypes may be changed.
    shardings: a NamedSharding for each parameter, in their tree.

  Raises:
    ValueError: tensors are missing, unexpected or of the wrong shape; they hold
      NaN or infinity; or there is a head beside a tied embedding that is not
      the same.
  """
  stored = huggingface_tensors.read(folder, config)
  places = huggingface_names.places(config)

  def load(path, leaf, sharding):
    place = places[huggingface_names.leaf_name(path)]
    num_stacked = place.tensor.num_stacked

    def read(index):
      ranges = [range(size)[at] for size, at in zip(leaf.shape, index)]
      # Rows that pad a vocabulary are in no file.
      out = np.zeros([len(x) for x in ranges], leaf.dtype)
      parts = out.reshape(-1, *out.shape[num_stacked:])
      for part, at in zip(parts, itertools.product(*ranges[:num_stacked])):
        # Converts the dtype while it copies, without an array between.
        view = place.view(stored, *at)[index[num_stacked:]]
        part[: len(view)] = view
      return out

    return _place(leaf.shape, sharding, read)

  shapes = transformer.param_shapes(config)
  params = jax.tree_util.tree_map_with_path(load, shapes, shardings)
  for name in finite.broken(params):
    huggingface_tensors.raise_broken(stored, places[name], config)
  return params


def save_model(
  folder: str,
  config: ModelConfig,
  params: Params,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | list[int] | None = None,
  max_shard_bytes: float = 5e9,
) -> None:
  """Writes config.json and the parameters, in the dtype that they have.

  Every process calls this; the first one writes, whole or not at all (see
  `files.folder`). Parameters come to the host one tensor of the file at a time.

  Args:
    folder: made if absent; a model that it holds is replaced.
    config: the model.
    params: its parameters, laid out in any way.
    bos_token_id: the tokenizer's, for whoever generates from the folder.
    eos_token_id: what ends a response: one id or several.
    max_shard_bytes: several files and an index are written above this.

  Raises:
    ValueError: a parameter holds NaN or infinity; nothing is written then.
  """
  finite.check(params, f"{folder} is not written")
  writes = jax.process_index() == 0
  outputs = _outputs(config, params)
  shards = _shards(outputs, max_shard_bytes)
  if not writes:
    for members in shards.values():
      safetensors.write_file(None, members)
    return
  with files.folder(folder, marker="config.json", stale=WEIGHT_FILES) as part:
    for name, members in shards.items():
      safetensors.write_file(os.path.join(part, name), members)
    if len(shards) > 1:
      total = sum(output.num_bytes for output in outputs)
      weight_map = {
        output.name: name
        for name, members in shards.items()
        for output in members
      }
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      write_json(os.path.join(part, INDEX), index)
    write_config(
      str(part), config, bos_token_id=bos_token_id, eos_token_id=eos_token_id
    )


def write_config(
  folder: str,
  config: ModelConfig,
  *,
  bos_token_id: int | None = None,
  eos_token_id: int | list[int] | None = None,
) -> None:
  """Writes config.json alone; the arguments are those of `save_model`."""
  values = huggingface_config.render(config)
  values |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
  # Some families have a default, which a smaller vocabulary may not hold.
  values["pad_token_id"] = None
  write_json(os.path.join(folder, "config.json"), values)


def write_json(path: str, values: dict[str, Any]) -> None:
  """Writes an indented JSON file."""
  with open(path, "w") as file:
    json.dump(values, file, indent=2)
    file.write("\n")


def _place(
  shape: tuple[int, ...],
  layout: jax.sharding.Sharding,
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Returns the array of which `read` gives any slice, one at a time."""
  devices = {}
  for device, index in layout.addressable_devices_indices_map(shape).items():
    devices.setdefault(str(index), (index, []))[1].append(device)
  pieces = []
  for index, holders in devices.values():
    piece = read(index)
    placed = [jax.device_put(piece, device) for device in holders]
    pieces += jax.block_until_ready(placed)
    del piece
  return jax.make_array_from_single_device_arrays(shape, layout, pieces)


def _outputs(config: ModelConfig, params: Params) -> list[safetensors.Output]:
  """Returns the tensors of a model, layer by layer, in the table's order."""
  leaves = {
    huggingface_names.leaf_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  places = huggingface_names.places(config)
  tensors = [
    tensor
    for tensor in huggingface_names.TENSORS[config.family]
    if tensor.leaves[0] in places
  ]

  def output(tensor, index):
    parts = [(places[leaf], leaves[leaf]) for leaf in tensor.leaves]

    def fetch():
      arrays = [
        to_host(leaf, index)[: place.shape[0]].reshape(
          place.shape if tensor.by_head else place.matrix_shape
        )
        for place, leaf in parts
      ]
      return huggingface_names.join(tensor, arrays)

    place, leaf = parts[0]
    name, dtype = tensor.name.format(*index), np.dtype(leaf.dtype)
    if name == huggingface_names.SCORE and config.head == "classifier":
      shape = (2, config.d_model)
      with_zeros = lambda: np.pad(fetch(), ((1, 0), (0, 0)))
      return safetensors.Output(name, shape, dtype, with_zeros)
    return safetensors.Output(name, place.file_shape, dtype, fetch)

  by_layer = [
    (index[:1], output(tensor, index))
    for tensor in tensors
    for index in huggingface_tensors.indices(tensor, config)
  ]
  return [output for _, output in sorted(by_layer, key=lambda x: x[0])]


@jax.jit
def _part(leaf: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
  """Returns what stands at an index; compiled once for them all."""
  for i in index:
    leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
  return leaf


def to_host(leaf: jax.Array, index: tuple[int, ...] = ()) -> np.ndarray:
  """Returns a parameter, or its part at a layer, on every process."""
  if index:
    with jax.transfer_guard("allow"):  # The index is on the host.
      leaf = _part(leaf, index)
  if leaf.is_fully_addressable:
    # Another object: an array keeps the host's copy of it as long as it lives.
    pieces = [shard.data for shard in leaf.addressable_shards]
    return jax.device_get(
      jax.make_array_from_single_device_arrays(
        leaf.shape, leaf.sharding, pieces
      )
    )
  return multihost_utils.process_allgather(leaf, tiled=True)


def _shards(
  outputs: list[safetensors.Output], max_bytes: float
) -> dict[str, list[safetensors.Output]]:
  """Returns the tensors of each file by its name, filled in order."""
  shards, size = [[]], 0
  for output in outputs:
    if shards[-1] and size + output.num_bytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(output)
    size += output.num_bytes
  if len(shards) == 1:
    return {WEIGHTS: shards[0]}
  return {
    SHARD.format(number, len(shards)): shard
    for number, shard in enumerate(shards, start=1)
  }

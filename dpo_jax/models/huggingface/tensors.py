"""The tensors of a folder in Hugging Face format, found and checked."""

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

from dpo_jax.host import schema
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.huggingface import names as huggingface_names
from dpo_jax.models.huggingface import safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# How many names an error lists of each kind.
MAX_NAMES = 8
_ONLY_HEAD = [[name] for name in huggingface_names.HEADS]
# How many rows of two tensors are compared at once.
_COMPARED_ROWS = 1024


def read(
  folder: str, config: ModelConfig
) -> "dict[str, safetensors.Stored | LogOdds]":
  """Returns the tensors that hold a model's parameters, by name.

  Raises:
    ValueError: some are missing, unexpected, of the wrong shape or there
      twice; or beside a tied embedding is a head that is not the same.
  """
  stored = _open_folder(folder, config)
  heads = {}
  for name in huggingface_names.HEADS:
    if config.tied and name in stored:
      heads[name] = stored.pop(name)
  _check(folder, stored, config)
  for name, head in heads.items():
    _check_tied(name, head, stored[huggingface_names.embedding(config.family)])
  return stored


@dataclasses.dataclass(frozen=True)
class LogOdds:
  """A classifier's tensor for two labels, as the one row that we keep."""

  stored: safetensors.Stored

  @property
  def path(self) -> str:
    return self.stored.path

  @property
  def shape(self) -> tuple[int, ...]:
    count, *rest = self.stored.shape or (0,)
    return (count - 1, *rest)

  def view(self) -> np.ndarray:
    """Returns f32[1,D]."""
    first, second = self.stored.view()
    return (second.astype(np.float32) - first)[None]


def _open_folder(
  folder: str, config: ModelConfig
) -> dict[str, safetensors.Stored | LogOdds]:
  """Returns the tensors by name, but those that hold no parameter."""
  prefix = huggingface_names.prefix(config.family)
  unused = huggingface_names.unused(config.family)
  stored, paths = {}, {}
  for path in _weight_files(folder):
    for key, tensor in safetensors.open_file(path).items():
      bare = key.removeprefix(prefix)
      if re.fullmatch(unused, bare):
        continue
      is_head = bare.startswith(huggingface_names.HEAD_PREFIXES)
      name = bare if is_head else prefix + bare
      if name in stored:
        raise ValueError(
          f"{path}: {key} is in {paths[name]} too, and one must not be"
        )
      if bare == huggingface_names.SCORE and config.head == "classifier":
        tensor = LogOdds(tensor)
      stored[name], paths[name] = tensor, path
  return stored


def _weight_files(folder: str) -> list[str]:
  """Returns the paths of the files that hold the folder's tensors."""
  path = os.path.join(folder, WEIGHTS)
  if os.path.exists(path):
    return [path]
  path = os.path.join(folder, INDEX)
  if not os.path.exists(path):
    raise ValueError(f"{folder} holds no {WEIGHTS} and no {INDEX}")
  kinds = {"weight_map": schema.object_of(schema.STRING)}
  weight_map = schema.read(path, kinds, required=kinds)["weight_map"]
  for key, name in weight_map.items():
    if os.path.basename(name) != name or not name.endswith(".safetensors"):
      raise ValueError(
        f"{path}: weight_map.{key}={name!r}: must be a file *.safetensors of"
        " this folder"
      )
  return [os.path.join(folder, x) for x in sorted(set(weight_map.values()))]


def _check(
  folder: str,
  stored: dict[str, safetensors.Stored | LogOdds],
  config: ModelConfig,
) -> None:
  """Raises ValueError unless the tensors are those that the config has."""
  expected = {
    place.tensor.name.format(*index): place.file_shape
    for place in huggingface_names.places(config).values()
    for index in indices(place.tensor, config)
  }
  shapes = [
    f"{name} is {list(stored[name].shape)}, not {list(shape)}"
    for name, shape in expected.items()
    if name in stored and stored[name].shape != shape
  ]
  problems = {
    "missing tensors": [name for name in expected if name not in stored],
    "unexpected tensors": [name for name in stored if name not in expected],
    "wrong shapes": shapes,
  }
  if any(problems.values()):
    text = "; ".join(
      f"{what}: {', '.join(names[:MAX_NAMES])}"
      + (f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES))
      for what, names in problems.items()
      if names
    )
    if not config.tied and problems["missing tensors"] in _ONLY_HEAD:
      text += " (it says tie_word_embeddings=false, or leaves it to the family)"
    raise ValueError(
      f"{folder} does not hold what its config.json says: {text}"
    )


def _check_tied(
  name: str, head: safetensors.Stored, embedding: safetensors.Stored
) -> None:
  """Raises ValueError unless a head is the embedding over again."""
  is_same = head.shape == embedding.shape
  if is_same:
    ours, theirs = embedding.view(), head.view()
    # A part at a time, for what is compared takes memory.
    parts = range(0, len(ours), _COMPARED_ROWS)
    is_same = all(
      np.array_equal(
        ours[i : i + _COMPARED_ROWS], theirs[i : i + _COMPARED_ROWS]
      )
      for i in parts
    )
  if not is_same:
    raise ValueError(
      f"{head.path}: {name} is not the embedding, and config.json says"
      " tie_word_embeddings=true (or leaves it to the family): say false to"
      " keep this head, or take it out of the file"
    )


def raise_broken(
  stored: dict[str, safetensors.Stored | LogOdds],
  place: huggingface_names.Place,
  config: ModelConfig,
) -> NoReturn:
  """Raises ValueError that names the tensor of a parameter with NaN."""
  dtype = jax.numpy.dtype(config.param_dtype)
  for index in indices(place.tensor, config):
    if not np.isfinite(place.view(stored, *index).astype(dtype)).all():
      break
  name = place.tensor.name.format(*index)
  raise ValueError(
    f"{stored[name].path}: {name} holds NaN or infinity as {dtype.name}"
  )


def indices(
  tensor: huggingface_names.Tensor, config: ModelConfig
) -> Iterator[tuple[int, ...]]:
  """Returns the layers, and experts, for each of which there is a tensor."""
  sizes = (config.num_layers, config.num_experts)[: tensor.num_stacked]
  return itertools.product(*map(range, sizes))

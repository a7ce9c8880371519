"""Where each of our parameters is in a Hugging Face checkpoint.

`TENSORS` says it once, for reading and for writing.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from dpo_jax.models import transformer
from dpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, and the parameters that it holds side by side.

  Attributes:
    name: in the file; `{}` stands for the layer.
    leaves: paths of the parameters, joined along their last dimension.
    transposed: whether it is stored [out,in], which ours never are.
  """

  name: str
  leaves: tuple[str, ...]
  transposed: bool = False


def _linear(name: str, leaf: str) -> Tensor:
  return Tensor(f"model.layers.{{}}.{name}.weight", (leaf,), transposed=True)


def _conv1d(name: str, *modules: str) -> tuple[Tensor, Tensor]:
  return tuple(
    Tensor(
      f"transformer.h.{{}}.{name}.{theirs}",
      tuple(f"blocks/{module}/{ours}" for module in modules),
    )
    for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
  )


def _layer_norm(name: str, module: str) -> tuple[Tensor, Tensor]:
  return (
    Tensor(f"transformer.{name}.weight", (f"{module}/scale",)),
    Tensor(f"transformer.{name}.bias", (f"{module}/bias",)),
  )


TENSORS = {
  "llama": (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    Tensor(
      "model.layers.{}.input_layernorm.weight",
      ("blocks/attention_norm/scale",),
    ),
    _linear("self_attn.q_proj", "blocks/attention/query/kernel"),
    _linear("self_attn.k_proj", "blocks/attention/key/kernel"),
    _linear("self_attn.v_proj", "blocks/attention/value/kernel"),
    _linear("self_attn.o_proj", "blocks/attention/out/kernel"),
    Tensor(
      "model.layers.{}.post_attention_layernorm.weight",
      ("blocks/mlp_norm/scale",),
    ),
    _linear("mlp.gate_proj", "blocks/mlp/gate/kernel"),
    _linear("mlp.up_proj", "blocks/mlp/up/kernel"),
    _linear("mlp.down_proj", "blocks/mlp/down/kernel"),
    Tensor("model.norm.weight", ("final_norm/scale",)),
    Tensor("lm_head.weight", ("head",)),
  ),
  "gpt2": (
    Tensor("transformer.wte.weight", ("embedding",)),
    Tensor("transformer.wpe.weight", ("position_embedding",)),
    *_layer_norm("h.{}.ln_1", "blocks/attention_norm"),
    *_conv1d(
      "attn.c_attn", "attention/query", "attention/key", "attention/value"
    ),
    *_conv1d("attn.c_proj", "attention/out"),
    *_layer_norm("h.{}.ln_2", "blocks/mlp_norm"),
    *_conv1d("mlp.c_fc", "mlp/up"),
    *_conv1d("mlp.c_proj", "mlp/down"),
    *_layer_norm("ln_f", "final_norm"),
    Tensor("lm_head.weight", ("head",)),
  ),
}

# Checkpoints of the bare decoder leave this prefix out of every name.
PREFIXES = {"llama": "model.", "gpt2": "transformer."}

# Constants that old versions of transformers stored with the parameters.
BUFFERS = {
  "llama": r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
  "gpt2": r"h\.\d+\.attn\.(bias|masked_bias)",
}


def leaf_name(path: tuple[Any, ...]) -> str:
  """Returns the keys on the way to a parameter, joined by slashes."""
  return "/".join(entry.key for entry in path)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where in the files a parameter is.

  Attributes:
    tensor: the entry of `TENSORS` that holds it.
    part: its index among the entry's leaves.
    is_stacked: whether it has a tensor for each layer.
    shape: of one layer of it.
    matrix_shape: the same, with heads and their width merged.
  """

  tensor: Tensor
  part: int
  is_stacked: bool
  shape: tuple[int, ...]
  matrix_shape: tuple[int, ...]

  @property
  def file_shape(self) -> tuple[int, ...]:
    """The shape of the stored tensor."""
    *rows, last = self.matrix_shape
    shape = (*rows, last * len(self.tensor.leaves))
    return shape[::-1] if self.tensor.transposed else shape

  def view(self, stored: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """Returns one layer of the parameter, without copying the file."""
    matrix = stored[self.tensor.name.format(layer)]
    matrix = matrix.T if self.tensor.transposed else matrix
    width = self.matrix_shape[-1]
    columns = slice(self.part * width, (self.part + 1) * width)
    return matrix[..., columns].reshape(self.shape)


def places(config: ModelConfig) -> dict[str, Place]:
  """Returns the place of each parameter by its path."""
  entries = {
    leaf: (tensor, part)
    for tensor in TENSORS[config.family]
    for part, leaf in enumerate(tensor.leaves)
  }
  places = {}

  def place(path, leaf, axes):
    name = leaf_name(path)
    tensor, part = entries[name]
    is_stacked = "{}" in tensor.name
    shape, axes = leaf.shape[is_stacked:], axes[is_stacked:]
    merged = shape
    if "heads" in axes:
      heads = axes.index("heads")
      width = math.prod(shape[heads : heads + 2])
      merged = (*shape[:heads], width, *shape[heads + 2 :])
    places[name] = Place(tensor, part, is_stacked, shape, merged)

  jax.tree_util.tree_map_with_path(
    place, transformer.param_shapes(config), transformer.logical_axes(config)
  )
  return places

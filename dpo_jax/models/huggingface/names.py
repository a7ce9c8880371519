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
from dpo_jax.models.huggingface import safetensors


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file, and the parameters that it holds side by side.

  Attributes:
    name: in the file; the first `{}` stands for the layer, the second for the
      expert.
    leaves: paths of the parameters, joined along their last dimension.
    transposed: whether it is stored [out,in], which ours never are.
    by_head: whether the parameters are joined within each head.
  """

  name: str
  leaves: tuple[str, ...]
  transposed: bool = False
  by_head: bool = False

  @property
  def num_stacked(self) -> int:
    """How many leading dimensions of a parameter are tensors of their own."""
    return self.name.count("{}")


def _linear(
  name: str, *modules: str, by_head: bool = False
) -> tuple[Tensor, ...]:
  """Returns a layer's weight [out,in] and bias, a bias that we may lack."""
  leaf = lambda kind: tuple(f"blocks/{module}/{kind}" for module in modules)
  weight, bias = f"{name}.weight", f"{name}.bias"
  return (
    Tensor(weight, leaf("kernel"), transposed=True, by_head=by_head),
    Tensor(bias, leaf("bias"), by_head=by_head),
  )


def _conv1d(name: str, *modules: str) -> tuple[Tensor, ...]:
  """Returns the same where the weight is stored [in,out]."""
  return tuple(
    dataclasses.replace(tensor, transposed=False)
    for tensor in _linear(f"transformer.h.{{}}.{name}", *modules)
  )


def _norm(name: str, module: str) -> tuple[Tensor, ...]:
  """Returns a norm's weight and bias."""
  return (
    Tensor(f"{name}.weight", (f"{module}/scale",)),
    Tensor(f"{name}.bias", (f"{module}/bias",)),
  )


# [1,D]; of a classifier [2,D], of which ours is the difference.
SCORE = "score.weight"

_QKV = ("attention/query", "attention/key", "attention/value")
_HEAD = (
  Tensor("lm_head.weight", ("head",)),
  Tensor("lm_head.bias", ("head_bias",)),
  Tensor(SCORE, ("score",)),
)
# Names of a layer's norms, in the order of the block.
_PRE_NORMS = {
  "input_layernorm": "attention_norm",
  "post_attention_layernorm": "mlp_norm",
}
_POST_NORMS = {
  "post_attention_layernorm": "attention_post_norm",
  "post_feedforward_layernorm": "mlp_post_norm",
}
_BOTH_NORMS = {
  "input_layernorm": "attention_norm",
  "pre_feedforward_layernorm": "mlp_norm",
} | _POST_NORMS


def _llama(
  *,
  norms: dict[str, str] = _PRE_NORMS,
  qk_norm: str = "norm",
  attention: tuple[Tensor, ...] | None = None,
  mlp: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
  """Returns the table of a family that names things as Llama does."""
  layer = "model.layers.{}"
  own = f"{layer}.self_attn"
  attention = attention or (
    *_linear(f"{own}.q_proj", "attention/query"),
    *_linear(f"{own}.k_proj", "attention/key"),
    *_linear(f"{own}.v_proj", "attention/value"),
    *_norm(f"{own}.q_norm", f"blocks/attention/query_{qk_norm}"),
    *_norm(f"{own}.k_norm", f"blocks/attention/key_{qk_norm}"),
  )
  mlp = mlp or (
    *_linear(f"{layer}.mlp.gate_proj", "mlp/gate"),
    *_linear(f"{layer}.mlp.up_proj", "mlp/up"),
    *_linear(f"{layer}.mlp.down_proj", "mlp/down"),
  )
  norms = [_norm(f"{layer}.{k}", f"blocks/{v}") for k, v in norms.items()]
  return (
    Tensor("model.embed_tokens.weight", ("embedding",)),
    *norms[0],
    *attention,
    *_linear(f"{own}.o_proj", "attention/out"),
    *sum(norms[1:], ()),
    *mlp,
    *_norm("model.norm", "final_norm"),
    *_HEAD,
  )


_EXPERT = "model.layers.{}.block_sparse_moe.experts.{}"
_PLAIN = _llama()
_GEMMA2 = _llama(norms=_BOTH_NORMS)

TENSORS: dict[str, tuple[Tensor, ...]] = {
  "llama": _PLAIN,
  "mistral": _PLAIN,
  "qwen2": _PLAIN,
  "qwen3": _PLAIN,
  "gemma": _PLAIN,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA2,
  "olmo2": _llama(norms=_POST_NORMS, qk_norm="heads_norm"),
  "phi3": _llama(
    attention=_linear("model.layers.{}.self_attn.qkv_proj", *_QKV),
    mlp=(
      *_linear("model.layers.{}.mlp.gate_up_proj", "mlp/gate", "mlp/up"),
      *_linear("model.layers.{}.mlp.down_proj", "mlp/down"),
    ),
  ),
  "mixtral": _llama(
    mlp=(
      Tensor(
        "model.layers.{}.block_sparse_moe.gate.weight",
        ("blocks/mlp/router",),
        transposed=True,
      ),
      *(
        Tensor(f"{_EXPERT}.{name}.weight", (f"blocks/mlp/{leaf}",), True)
        for name, leaf in (
          ("w1", "expert_gate"),
          ("w2", "expert_down"),
          ("w3", "expert_up"),
        )
      ),
    )
  ),
  "gpt2": (
    Tensor("transformer.wte.weight", ("embedding",)),
    Tensor("transformer.wpe.weight", ("position_embedding",)),
    *_norm("transformer.h.{}.ln_1", "blocks/attention_norm"),
    *_conv1d("attn.c_attn", *_QKV),
    *_conv1d("attn.c_proj", "attention/out"),
    *_norm("transformer.h.{}.ln_2", "blocks/mlp_norm"),
    *_conv1d("mlp.c_fc", "mlp/up"),
    *_conv1d("mlp.c_proj", "mlp/down"),
    *_norm("transformer.ln_f", "final_norm"),
    *_HEAD,
  ),
  "gptj": (
    Tensor("transformer.wte.weight", ("embedding",)),
    *_norm("transformer.h.{}.ln_1", "blocks/attention_norm"),
    *_linear("transformer.h.{}.attn.q_proj", "attention/query"),
    *_linear("transformer.h.{}.attn.k_proj", "attention/key"),
    *_linear("transformer.h.{}.attn.v_proj", "attention/value"),
    *_linear("transformer.h.{}.attn.out_proj", "attention/out"),
    *_linear("transformer.h.{}.mlp.fc_in", "mlp/up"),
    *_linear("transformer.h.{}.mlp.fc_out", "mlp/down"),
    *_norm("transformer.ln_f", "final_norm"),
    *_HEAD,
  ),
  "gpt_neox": (
    Tensor("gpt_neox.embed_in.weight", ("embedding",)),
    *_norm("gpt_neox.layers.{}.input_layernorm", "blocks/attention_norm"),
    *_linear(
      "gpt_neox.layers.{}.attention.query_key_value", *_QKV, by_head=True
    ),
    *_linear("gpt_neox.layers.{}.attention.dense", "attention/out"),
    *_norm("gpt_neox.layers.{}.post_attention_layernorm", "blocks/mlp_norm"),
    *_linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "mlp/up"),
    *_linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "mlp/down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    Tensor("embed_out.weight", ("head",)),
    Tensor(SCORE, ("score",)),
  ),
}

# Checkpoints of the bare decoder leave this prefix out of every name but
# those of the head.
PREFIXES = {
  "gpt2": "transformer.",
  "gptj": "transformer.",
  "gpt_neox": "gpt_neox.",
}
HEAD_PREFIXES = ("lm_head.", "embed_out.", "score.")
# What a file may hold once more where the embedding is the unembedding.
HEADS = ("lm_head.weight", "embed_out.weight")

# Constants that old versions of transformers stored with the parameters.
BUFFERS = {
  "gpt2": r"h\.\d+\.attn\.(bias|masked_bias)",
  "gptj": r"h\.\d+\.attn\.(bias|masked_bias)",
  "gpt_neox": (
    r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
  ),
}
ROTARY_BUFFER = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def prefix(family: str) -> str:
  """Returns what a checkpoint of the bare decoder leaves out of names."""
  return PREFIXES.get(family, "model.")


def unused(family: str) -> str:
  """Returns a pattern of the names, less prefix, that hold no parameter."""
  return BUFFERS.get(family, ROTARY_BUFFER)


def embedding(family: str) -> str:
  """Returns the name of the embedding."""
  return next(
    tensor.name for tensor in TENSORS[family] if tensor.leaves == ("embedding",)
  )


def leaf_name(path: tuple[Any, ...]) -> str:
  """Returns the keys on the way to a parameter, joined by slashes."""
  return "/".join(entry.key for entry in path)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where in the files a parameter is.

  Attributes:
    tensor: the entry of `TENSORS` that holds it.
    part: its index among the entry's leaves.
    parts: the width of each of those leaves, heads merged.
    shape: of what one tensor holds of it.
    matrix_shape: the same, with heads and their width merged.
  """

  tensor: Tensor
  part: int
  parts: tuple[int, ...]
  shape: tuple[int, ...]
  matrix_shape: tuple[int, ...]

  @property
  def file_shape(self) -> tuple[int, ...]:
    """The shape of the stored tensor."""
    shape = (*self.matrix_shape[:-1], sum(self.parts))
    return shape[::-1] if self.tensor.transposed else shape

  def view(
    self, stored: dict[str, safetensors.Stored], *index: int
  ) -> np.ndarray:
    """Returns the parameter at this layer and expert, without copying it."""
    matrix = stored[self.tensor.name.format(*index)].view()
    matrix = matrix.T if self.tensor.transposed else matrix
    if self.tensor.by_head:
      *rest, heads, width = self.shape
      return matrix.reshape(*rest, heads, -1, width)[..., self.part, :]
    first = sum(self.parts[: self.part])
    columns = slice(first, first + self.matrix_shape[-1])
    return matrix[..., columns].reshape(self.shape)


def join(tensor: Tensor, arrays: list[np.ndarray]) -> np.ndarray:
  """Returns a tensor of the file from its parameters at one layer.

  Args:
    tensor: the entry of `TENSORS`.
    arrays: one for each leaf, those of `matrix_shape`; or, where they are
      joined by head, of `shape`.
  """
  if tensor.by_head:
    joined = np.stack(arrays, axis=-2)
    joined = joined.reshape(*joined.shape[:-3], -1)
  elif len(arrays) == 1:
    (joined,) = arrays
  else:
    joined = np.concatenate(arrays, axis=-1)
  return joined.T if tensor.transposed else joined


def places(config: ModelConfig) -> dict[str, Place]:
  """Returns the place of each parameter by its path; files have no padding."""
  config = dataclasses.replace(config, vocab_multiple=1)
  entries = {
    leaf: (tensor, part)
    for tensor in TENSORS[config.family]
    for part, leaf in enumerate(tensor.leaves)
  }
  shapes = {}

  def merge(path, leaf, axes):
    name = leaf_name(path)
    num_stacked = entries[name][0].num_stacked
    shape, axes = leaf.shape[num_stacked:], axes[num_stacked:]
    merged = shape
    if "heads" in axes:
      heads = axes.index("heads")
      width = math.prod(shape[heads : heads + 2])
      merged = (*shape[:heads], width, *shape[heads + 2 :])
    shapes[name] = shape, merged

  jax.tree_util.tree_map_with_path(
    merge, transformer.param_shapes(config), transformer.logical_axes(config)
  )
  return {
    name: Place(
      *entries[name],
      tuple(shapes[leaf][1][-1] for leaf in entries[name][0].leaves),
      *shapes[name],
    )
    for name in shapes
  }

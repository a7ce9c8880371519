"""What a decoder looks like: `ModelConfig`, and the published sizes by name."""

import dataclasses
import functools
from typing import Any

# For each named field, the values it takes.
CHOICES = {
  "norm": ("rms", "rms_plus_one", "layer"),
  "norms": ("input", "output", "both"),
  "residual": ("sequential", "parallel", "parallel_one_norm"),
  "qk_norm": ("none", "head", "projection"),
  "positions": ("rotary", "learned"),
  "rotary_pairs": ("halves", "neighbours"),
  "activation": ("silu", "gelu_tanh", "gelu"),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "remat": ("none", "full", "dots"),
  "head": ("vocabulary", "reward", "classifier"),
}


# Fields that are at least 1, where they are not None.
SIZES = (
  *("vocab_size", "num_layers", "d_model", "d_mlp", "num_heads"),
  *("head_width", "max_positions", "rotary_width", "window", "vocab_multiple"),
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The stretching of rotary wavelengths beyond the trained length.

  With the factor alone all of them are stretched alike ("linear"); with the
  other three, as `layers.rotary_frequencies` says ("llama3").
  """

  factor: float
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  original_max_positions: int | None = None


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adapters of low rank beside frozen weights; see `lora`.

  Attributes:
    rank: of what an adapter adds to a kernel, at least 1.
    alpha: it is multiplied by alpha / rank; above 0.
    targets: pattern of the whole name of each projection that has one.
    dtype: what they are kept in.
  """

  rank: int
  alpha: float
  targets: str
  dtype: str = "float32"

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder's shape, and how it is computed. Hashable.

  Attributes:
    family: a key of `FAMILIES`; says how files name things, no more.
    norm: `rms_plus_one` multiplies by one plus the scale.
    norms: where a norm stands: before attention and mlp, after, or both.
    residual: `parallel` adds attention and mlp of the same state, each after
      a norm of its own, or `parallel_one_norm` after one that they share.
    qk_norm: RMSNorm of queries and keys, of each head or of all together.
    biases: what has one: names of projections, `norm`, `head`.
    tied: whether the embedding is the unembedding.
    rotary_width: elements of a head that turn, the first; None: all.
    rotary_pairs: whether i turns with i + width/2, or 2i with 2i + 1.
    query_scalar: scores are divided by its square root; None: `head_width`.
    attention_soft_cap: c of scores c * tanh(score / c); None: none.
    logit_soft_cap: the same of logits.
    scaled_embedding: whether embeddings are multiplied by sqrt(d_model).
    window: keys that a query of a sliding layer sees, itself among them.
    sliding: for each layer, whether it is one; () where `window` is None.
    local_rope_theta: of sliding layers, unscaled; None: as the others.
    head: `vocabulary`, or a scalar: a `reward` whose differences count, or a
      `classifier`'s log-odds of label 1; files have one label, or two.
    num_experts: mlps of a layer, of which a router picks; 0: one, no router.
    experts_per_token: how many it picks.
    dtype: what activations are computed in.
    param_dtype: what parameters are kept in.
    wide_dtype: what those are kept in that are computed with in float32,
      whatever `dtype`: norms, a head's bias, a scalar head; None: as all.
    vocab_multiple: embedding and head have rows up to a multiple of it, so
      that a mesh divides them; no token is one of those.
    remat: which activations of a block the backward pass recomputes: `none`
      of them, all of them (`full`), or all but the outputs of its
      projections (`dots`).
    lora: the adapters that the parameters may have; None: they have none.
  """

  family: str
  vocab_size: int
  num_layers: int
  d_model: int
  d_mlp: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  norm: str
  norm_eps: float
  positions: str
  max_positions: int
  activation: str
  gated: bool
  biases: tuple[str, ...]
  tied: bool
  norms: str = "input"
  residual: str = "sequential"
  qk_norm: str = "none"
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rotary_width: int | None = None
  rotary_pairs: str = "halves"
  query_scalar: int | None = None
  attention_soft_cap: float | None = None
  logit_soft_cap: float | None = None
  scaled_embedding: bool = False
  window: int | None = None
  sliding: tuple[bool, ...] = ()
  local_rope_theta: float | None = None
  head: str = "vocabulary"
  num_experts: int = 0
  experts_per_token: int = 0
  dtype: str = "float32"
  param_dtype: str = "float32"
  wide_dtype: str | None = None
  vocab_multiple: int = 1
  remat: str = "none"
  lora: Lora | None = None

  def __post_init__(self):
    for name, known in {**CHOICES, "family": tuple(FAMILIES)}.items():
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f"model {name} {value!r}; known: {', '.join(known)}")
    for name in SIZES:
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"model {name}={value}: must be at least 1")
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"model num_kv_heads={self.num_kv_heads}: must divide"
        f" num_heads={self.num_heads}"
      )
    width = self.rotary_width or self.head_width
    if self.positions == "rotary" and (width % 2 or width > self.head_width):
      raise ValueError(
        f"model head_width={self.head_width}, of which {width} turn: rotary"
        " positions need an even part of it"
      )
    if len(self.sliding) != (self.num_layers if self.window else 0):
      raise ValueError(
        f"model window={self.window} and {len(self.sliding)} entries of"
        f" sliding: there are {self.num_layers} layers"
      )
    if not 0 <= self.experts_per_token <= self.num_experts:
      raise ValueError(
        f"model experts_per_token={self.experts_per_token}: there are"
        f" {self.num_experts} experts"
      )

  @property
  def num_vocab_rows(self) -> int:
    """How many rows the embedding and the head have."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  def frozen(self, dtype: str) -> "ModelConfig":
    """Returns the model with weights that are read and kept in `dtype`.

    Where that is what it computes in, its states are bit for bit those of the
    model that rounds float32 weights at each use: what is computed with in
    float32 stays so.
    """
    return dataclasses.replace(self, param_dtype=dtype, wide_dtype="float32")


_LLAMA = {
  "norm": "rms",
  "norm_eps": 1e-5,
  "positions": "rotary",
  "activation": "silu",
  "gated": True,
  "biases": (),
  "tied": False,
}
_QWEN = _LLAMA | {"norm_eps": 1e-6, "rope_theta": 1e6}
_GEMMA = _LLAMA | {
  "norm": "rms_plus_one",
  "norm_eps": 1e-6,
  "activation": "gelu_tanh",
  "tied": True,
  "scaled_embedding": True,
}
_GPT2 = {
  "vocab_size": 50_257,
  "norm": "layer",
  "norm_eps": 1e-5,
  "positions": "learned",
  "max_positions": 1024,
  "activation": "gelu_tanh",
  "gated": False,
  "biases": ("query", "key", "value", "out", "up", "down", "norm"),
  "tied": True,
}

# What the models of a family have in common, by `model_type` of transformers.
FAMILIES: dict[str, dict[str, Any]] = {
  "llama": _LLAMA,
  "gpt2": _GPT2,
  "gptj": _GPT2
  | {
    "vocab_size": 50_400,
    "positions": "rotary",
    "max_positions": 2048,
    "rotary_pairs": "neighbours",
    "rotary_width": 64,
    "biases": ("up", "down", "norm", "head"),
    "tied": False,
    "residual": "parallel_one_norm",
  },
  "gpt_neox": _GPT2
  | {
    "positions": "rotary",
    "max_positions": 2048,
    "activation": "gelu",
    "tied": False,
    "residual": "parallel",
  },
  "mistral": _LLAMA,
  "mixtral": _LLAMA
  | {"rope_theta": 1e6, "num_experts": 8, "experts_per_token": 2},
  "qwen2": _QWEN | {"biases": ("query", "key", "value")},
  "qwen3": _QWEN | {"head_width": 128, "qk_norm": "head"},
  "gemma": _GEMMA | {"head_width": 256},
  "gemma2": _GEMMA
  | {
    "head_width": 256,
    "norms": "both",
    "query_scalar": 256,
    "attention_soft_cap": 50.0,
    "logit_soft_cap": 30.0,
    "window": 4096,
  },
  "gemma3_text": _GEMMA
  | {
    "head_width": 256,
    "norms": "both",
    "qk_norm": "head",
    "query_scalar": 256,
    "rope_theta": 1e6,
    "local_rope_theta": 10_000.0,
    "window": 4096,
  },
  "phi3": _LLAMA,
  "olmo2": _LLAMA | {"norms": "output", "qk_norm": "projection"},
}

# Every so many layers one is global and the others slide.
GLOBAL_EVERY = {"gemma2": 2, "gemma3_text": 6}


def of_family(family: str, **settings: Any) -> ModelConfig:
  """Returns a config with the settings, and the family's for the others.

  Where they are missing or None, there are as many key heads as query heads
  and heads as wide as they divide `d_model`; the mlp is four times `d_model`
  wide; and where there is a window every layer slides, but for each second of
  a Gemma 2 and each sixth of a Gemma 3.
  """
  fields = {**FAMILIES[family], **settings}
  if fields.get("num_kv_heads") is None:
    fields["num_kv_heads"] = fields["num_heads"]
  if fields.get("head_width") is None:
    fields["head_width"] = fields["d_model"] // fields["num_heads"]
  if fields.get("d_mlp") is None:
    fields["d_mlp"] = 4 * fields["d_model"]
  if fields.get("window") and "sliding" not in fields:
    fields["sliding"] = sliding_layers(family, fields["num_layers"])
  return ModelConfig(family=family, **fields)


def sliding_layers(
  family: str, num_layers: int, global_every: int | None = None
) -> tuple[bool, ...]:
  """Returns which layers of a model with a window slide."""
  every = global_every or GLOBAL_EVERY.get(family, num_layers + 1)
  return tuple((layer + 1) % every != 0 for layer in range(num_layers))


llama = functools.partial(of_family, "llama")
gpt2 = functools.partial(of_family, "gpt2")

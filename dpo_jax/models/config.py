"""What a decoder looks like: `ModelConfig`, and the published sizes by name."""

import dataclasses
import difflib
from typing import Any

# For each named field, the values it takes.
CHOICES = {
  "family": ("llama", "gpt2"),
  "norm": ("rms", "layer"),
  "positions": ("rotary", "learned"),
  "activation": ("silu", "gelu_tanh", "gelu"),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "remat": ("none", "full", "dots"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The "llama3" stretching of rotary wavelengths beyond the trained length."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder's shape, and how it is computed. Hashable.

  The last three fields change no parameter's shape: activations are computed
  in `dtype`, parameters are kept in `param_dtype`, and `remat` says which
  activations of a block the backward pass recomputes: `none` of them, all of
  them (`full`), or all but the outputs of its projections (`dots`).
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
  bias: bool
  tied: bool
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    for name, known in CHOICES.items():
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f"model {name} {value!r}; known: {', '.join(known)}")
    if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"model num_kv_heads={self.num_kv_heads}: must divide"
        f" num_heads={self.num_heads}"
      )
    if self.positions == "rotary" and self.head_width % 2:
      raise ValueError(
        f"model head_width={self.head_width}: rotary positions need it even"
      )


def llama(
  *,
  vocab_size: int,
  num_layers: int,
  d_model: int,
  d_mlp: int,
  num_heads: int,
  max_positions: int,
  num_kv_heads: int | None = None,
  head_width: int | None = None,
  **settings: Any,
) -> ModelConfig:
  """Returns a Llama: RMSNorm, rotary positions, SwiGLU, no biases."""
  return ModelConfig(
    **{
      "family": "llama",
      "vocab_size": vocab_size,
      "num_layers": num_layers,
      "d_model": d_model,
      "d_mlp": d_mlp,
      "num_heads": num_heads,
      "num_kv_heads": num_kv_heads or num_heads,
      "head_width": head_width or d_model // num_heads,
      "norm": "rms",
      "norm_eps": 1e-5,
      "positions": "rotary",
      "max_positions": max_positions,
      "activation": "silu",
      "gated": True,
      "bias": False,
      "tied": False,
      **settings,
    }
  )


def gpt2(
  *, num_layers: int, d_model: int, num_heads: int, **settings: Any
) -> ModelConfig:
  """Returns a GPT-2: LayerNorm, learned positions, biases, tied embedding."""
  return ModelConfig(
    **{
      "family": "gpt2",
      "vocab_size": 50_257,
      "num_layers": num_layers,
      "d_model": d_model,
      "d_mlp": 4 * d_model,
      "num_heads": num_heads,
      "num_kv_heads": num_heads,
      "head_width": d_model // num_heads,
      "norm": "layer",
      "norm_eps": 1e-5,
      "positions": "learned",
      "max_positions": 1024,
      "activation": "gelu_tanh",
      "gated": False,
      "bias": True,
      "tied": True,
      **settings,
    }
  )


PRESETS = {
  # For tests.
  "tiny": llama(
    vocab_size=512,
    num_layers=2,
    d_model=64,
    d_mlp=176,
    num_heads=4,
    num_kv_heads=2,
    max_positions=512,
  ),
  # 10 million parameters with the vocabulary of GPT-2, to train on a laptop.
  "small": llama(
    vocab_size=50_257,
    num_layers=6,
    d_model=160,
    d_mlp=448,
    num_heads=5,
    max_positions=1024,
    tied=True,
  ),
  # 58 million parameters, for benchmarks.
  "bench-58m": llama(
    vocab_size=32_000,
    num_layers=6,
    d_model=512,
    d_mlp=2048,
    num_heads=8,
    max_positions=2048,
  ),
  "gpt2": gpt2(num_layers=12, d_model=768, num_heads=12),
  "gpt2-medium": gpt2(num_layers=24, d_model=1024, num_heads=16),
  "gpt2-large": gpt2(num_layers=36, d_model=1280, num_heads=20),
  "gpt2-xl": gpt2(num_layers=48, d_model=1600, num_heads=25),
  "llama3.2-1b": llama(
    vocab_size=128_256,
    num_layers=16,
    d_model=2048,
    d_mlp=8192,
    num_heads=32,
    num_kv_heads=8,
    max_positions=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    tied=True,
  ),
  "llama2-7b": llama(
    vocab_size=32_000,
    num_layers=32,
    d_model=4096,
    d_mlp=11_008,
    num_heads=32,
    max_positions=4096,
  ),
  "llama3-8b": llama(
    vocab_size=128_256,
    num_layers=32,
    d_model=4096,
    d_mlp=14_336,
    num_heads=32,
    num_kv_heads=8,
    max_positions=8192,
    rope_theta=500_000.0,
  ),
}


def make_config(
  preset: str,
  *,
  vocab_size: int | None = None,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str = "none",
) -> ModelConfig:
  """Returns the preset's config, to be trained from scratch.

  Args:
    preset: a key of `PRESETS`.
    vocab_size: the size of the vocabulary, where it is not the published one.
    dtype: what activations are computed in.
    param_dtype: what parameters are kept in.
    remat: what the backward pass recomputes; see `ModelConfig`.

  Raises:
    ValueError: an unknown preset or setting.
  """
  if preset not in PRESETS:
    near = difflib.get_close_matches(preset, PRESETS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"unknown model preset {preset!r}; known: {', '.join(PRESETS)}{hint}"
    )
  config = PRESETS[preset]
  if vocab_size is not None and vocab_size < 1:
    raise ValueError(f"model vocab_size={vocab_size}: must be at least 1")
  return dataclasses.replace(
    config,
    vocab_size=vocab_size or config.vocab_size,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
  )

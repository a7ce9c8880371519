"""The sizes of known models, by name."""

import dataclasses
import difflib
from typing import Any

from dpo_jax.models import config as model_config
from dpo_jax.models.config import ModelConfig, RopeScaling

# Published models: the family, these fields in order, and what else differs.
_SIZE_FIELDS = (
  *("vocab_size", "num_layers", "d_model", "d_mlp"),
  *("num_heads", "num_kv_heads", "max_positions"),
)


_LLAMA31 = {
  "rope_theta": 500_000.0,
  "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192),
}


_LLAMA32 = {
  "rope_theta": 500_000.0,
  "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
  "tied": True,
}


_SIZES: dict[str, tuple[Any, ...]] = {
  # For tests.
  "tiny": ("llama", 512, 2, 64, 176, 4, 2, 512, {}),
  # 0.6 million with a vocabulary of its own text: a classifier in minutes.
  "mini": ("llama", 8192, 2, 64, 176, 4, 4, 1024, {"tied": True}),
  # 1 million with a vocabulary of 4,096: a policy in minutes.
  "nano": ("llama", 4096, 3, 128, 352, 4, 4, 1024, {"tied": True}),
  # 10 million parameters with the vocabulary of GPT-2, to train on a laptop.
  "small": ("llama", 50_257, 6, 160, 448, 5, 5, 1024, {"tied": True}),
  # 58 million parameters, for benchmarks.
  "bench-58m": ("llama", 32_000, 6, 512, 2048, 8, 8, 2048, {}),
  "gpt2": ("gpt2", 50_257, 12, 768, 3072, 12, 12, 1024, {}),
  "gpt2-medium": ("gpt2", 50_257, 24, 1024, 4096, 16, 16, 1024, {}),
  "gpt2-large": ("gpt2", 50_257, 36, 1280, 5120, 20, 20, 1024, {}),
  "gpt2-xl": ("gpt2", 50_257, 48, 1600, 6400, 25, 25, 1024, {}),
  "gpt-j-6b": ("gptj", 50_400, 28, 4096, 16_384, 16, 16, 2048, {}),
  **{
    f"pythia-{size}": (
      "gpt_neox",
      vocab,
      layers,
      width,
      4 * width,
      heads,
      heads,
      2048,
      {"rotary_width": width // heads // 4},
    )
    for size, vocab, layers, width, heads in (
      ("70m", 50_304, 6, 512, 8),
      ("160m", 50_304, 12, 768, 12),
      ("410m", 50_304, 24, 1024, 16),
      ("1b", 50_304, 16, 2048, 8),
      ("1.4b", 50_304, 24, 2048, 16),
      ("2.8b", 50_304, 32, 2560, 32),
      ("6.9b", 50_432, 32, 4096, 32),
      ("12b", 50_688, 36, 5120, 40),
    )
  },
  "llama-7b": (
    *("llama", 32_000, 32, 4096, 11_008, 32, 32, 2048),
    {"norm_eps": 1e-6},
  ),
  "llama-13b": (
    *("llama", 32_000, 40, 5120, 13_824, 40, 40, 2048),
    {"norm_eps": 1e-6},
  ),
  "llama2-7b": ("llama", 32_000, 32, 4096, 11_008, 32, 32, 4096, {}),
  "llama2-13b": ("llama", 32_000, 40, 5120, 13_824, 40, 40, 4096, {}),
  "llama3-8b": (
    *("llama", 128_256, 32, 4096, 14_336, 32, 8, 8192),
    {"rope_theta": 500_000.0},
  ),
  "llama3.1-8b": (
    *("llama", 128_256, 32, 4096, 14_336, 32, 8, 131_072),
    _LLAMA31,
  ),
  "llama3.1-70b": (
    *("llama", 128_256, 80, 8192, 28_672, 64, 8, 131_072),
    _LLAMA31,
  ),
  "llama3.2-1b": (
    *("llama", 128_256, 16, 2048, 8192, 32, 8, 131_072),
    _LLAMA32,
  ),
  "llama3.2-3b": (
    *("llama", 128_256, 28, 3072, 8192, 24, 8, 131_072),
    _LLAMA32,
  ),
  "mistral-7b": (
    *("mistral", 32_000, 32, 4096, 14_336, 32, 8, 32_768),
    {"window": 4096},
  ),
  "mixtral-8x7b": ("mixtral", 32_000, 32, 4096, 14_336, 32, 8, 32_768, {}),
  "qwen2.5-0.5b": (
    *("qwen2", 151_936, 24, 896, 4864, 14, 2, 32_768),
    {"tied": True},
  ),
  "qwen2.5-1.5b": (
    *("qwen2", 151_936, 28, 1536, 8960, 12, 2, 131_072),
    {"tied": True},
  ),
  "qwen2.5-7b": ("qwen2", 152_064, 28, 3584, 18_944, 28, 4, 131_072, {}),
  "qwen3-0.6b": (
    *("qwen3", 151_936, 28, 1024, 3072, 16, 8, 40_960),
    {"tied": True},
  ),
  "qwen3-1.7b": (
    *("qwen3", 151_936, 28, 2048, 6144, 16, 8, 40_960),
    {"tied": True},
  ),
  "qwen3-4b": (
    *("qwen3", 151_936, 36, 2560, 9728, 32, 8, 40_960),
    {"tied": True},
  ),
  "qwen3-8b": ("qwen3", 151_936, 36, 4096, 12_288, 32, 8, 40_960, {}),
  "gemma-2b": ("gemma", 256_000, 18, 2048, 16_384, 8, 1, 8192, {}),
  "gemma-7b": ("gemma", 256_000, 28, 3072, 24_576, 16, 16, 8192, {}),
  "gemma2-2b": ("gemma2", 256_000, 26, 2304, 9216, 8, 4, 8192, {}),
  "gemma2-9b": ("gemma2", 256_000, 42, 3584, 14_336, 16, 8, 8192, {}),
  "gemma3-1b": (
    *("gemma3_text", 262_144, 26, 1152, 6912, 4, 1, 32_768),
    {"window": 512},
  ),
  # The language model of a checkpoint that sees images too.
  "gemma3-4b": (
    *("gemma3_text", 262_208, 34, 2560, 10_240, 8, 4, 131_072),
    {"window": 1024, "rope_scaling": RopeScaling(8.0)},
  ),
  "phi3-mini": (
    *("phi3", 32_064, 32, 3072, 8192, 32, 32, 4096),
    {"window": 2047},
  ),
  "olmo2-1b": (
    *("olmo2", 100_352, 16, 2048, 8192, 16, 16, 4096),
    {"rope_theta": 500_000.0, "norm_eps": 1e-6},
  ),
  "olmo2-7b": (
    *("olmo2", 100_352, 32, 4096, 11_008, 32, 32, 4096),
    {"rope_theta": 500_000.0, "norm_eps": 1e-6},
  ),
}


PRESETS = {
  name: model_config.of_family(
    family, **dict(zip(_SIZE_FIELDS, shape)), **settings
  )
  for name, sizes in _SIZES.items()
  for family, *shape, settings in [sizes]
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

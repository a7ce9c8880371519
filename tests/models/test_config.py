"""Presets have their published sizes, and wrong settings say what is known."""

import dataclasses
import math

import jax
import pytest

from dpo_jax.models import config as model_config
from dpo_jax.models import presets, transformer

# Parameters of the published checkpoints.
PUBLISHED = {
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "gpt-j-6b": 6_050_882_784,
  "pythia-70m": 70_426_624,
  "pythia-160m": 162_322_944,
  "pythia-410m": 405_334_016,
  "pythia-1b": 1_011_781_632,
  "pythia-1.4b": 1_414_647_808,
  "pythia-2.8b": 2_775_208_960,
  "pythia-6.9b": 6_857_302_016,
  "pythia-12b": 11_846_072_320,
  "llama-7b": 6_738_415_616,
  "llama-13b": 13_015_864_320,
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama3-8b": 8_030_261_248,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "mistral-7b": 7_241_732_096,
  "mixtral-8x7b": 46_702_792_704,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-7b": 7_615_616_512,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "gemma-2b": 2_506_172_416,
  "gemma-7b": 8_537_680_896,
  "gemma2-2b": 2_614_341_888,
  "gemma2-9b": 9_241_705_984,
  "gemma3-1b": 999_885_952,
  "gemma3-4b": 3_880_263_168,
  "phi3-mini": 3_821_079_552,
  "olmo2-1b": 1_484_916_736,
  "olmo2-7b": 7_298_617_344,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(preset):
  shapes = transformer.param_shapes(presets.make_config(preset))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PUBLISHED[preset]


def test_config_is_hashable_and_takes_overrides():
  config = presets.make_config(
    "tiny", vocab_size=300, dtype="bfloat16", remat="full"
  )
  assert (config.vocab_size, config.dtype, config.remat) == (
    300,
    "bfloat16",
    "full",
  )
  assert hash(config) != hash(presets.make_config("tiny"))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"preset": "gpt3"}, "unknown model preset 'gpt3'; known: tiny"),
    ({"preset": "lama2-7b"}, "did you mean 'llama2-7b'"),
    ({"dtype": "float16"}, "dtype 'float16'; known: float32, bfloat16"),
    ({"param_dtype": "int8"}, "param_dtype 'int8'; known"),
    ({"remat": "some"}, "remat 'some'; known: none, full, dots"),
    ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
  ],
)
def test_wrong_setting_is_one_line_that_says_what_is_known(settings, message):
  with pytest.raises(ValueError, match=message) as error:
    presets.make_config(**{"preset": "tiny", **settings})
  assert "\n" not in str(error.value)


def test_heads_that_groups_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="num_kv_heads=3: must divide"):
    model_config.llama(
      vocab_size=8,
      num_layers=1,
      d_model=8,
      d_mlp=8,
      num_heads=4,
      num_kv_heads=3,
      max_positions=8,
    )


def test_every_preset_of_a_published_model_is_counted():
  ours = {"tiny", "nano", "mini", "small", "bench-58m"}
  assert set(presets.PRESETS) == set(PUBLISHED) | ours


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"window": 0}, "window=0: must be at least 1"),
    ({"window": 4, "sliding": (True,)}, "1 entries of sliding: there are 2"),
    ({"rotary_width": 3}, "head_width=16, of which 3 turn"),
    ({"experts_per_token": 1}, "experts_per_token=1: there are 0 experts"),
    ({"residual": "both"}, "residual 'both'; known: sequential, parallel"),
    ({"family": "gpt5"}, "family 'gpt5'; known: llama, gpt2, gptj"),
  ],
)
def test_what_no_decoder_has_is_refused(settings, message):
  config = presets.make_config("tiny")
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(config, **settings)

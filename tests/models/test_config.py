"""Presets have their published sizes, and wrong settings say what is known."""

import math

import jax
import pytest

from dpo_jax.models import config as model_config
from dpo_jax.models import transformer

# Parameters of the published checkpoints.
PUBLISHED = {
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "llama3.2-1b": 1_235_814_400,
  "llama2-7b": 6_738_415_616,
  "llama3-8b": 8_030_261_248,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(preset):
  shapes = transformer.param_shapes(model_config.make_config(preset))
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PUBLISHED[preset]


def test_config_is_hashable_and_takes_overrides():
  config = model_config.make_config(
    "tiny", vocab_size=300, dtype="bfloat16", remat="full"
  )
  assert (config.vocab_size, config.dtype, config.remat) == (
    300,
    "bfloat16",
    "full",
  )
  assert hash(config) != hash(model_config.make_config("tiny"))


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
    model_config.make_config(**{"preset": "tiny", **settings})
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

"""A vocabulary that is padded for a mesh gives the numbers of one that is not.

50,257 is odd: no mesh axis divides it, and 50,260 is the next multiple of 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.checkpoints import manager, source
from dpo_jax.losses import logprobs
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.types import Rows
from tests import drawn

SIZES = {
  "vocab_size": 50_257,
  "num_layers": 1,
  "d_model": 16,
  "num_heads": 4,
  "max_positions": 16,
}
MULTIPLE = 4
PADDED_ROWS = 50_260
by_family = pytest.mark.parametrize(
  "family",
  [
    "gpt2",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("gptj", "gemma2")),
  ],
)


def _config(family):
  extra = {"gptj": {"rotary_width": 4}, "gemma2": {"head_width": 4}}
  return model_config.of_family(family, **SIZES, **extra.get(family, {}))


def _padded(config):
  return dataclasses.replace(config, vocab_multiple=MULTIPLE)


def _rows():
  rng = np.random.default_rng(0)
  index = np.broadcast_to(np.arange(8)[None], (8, 8)).astype(np.int32)
  draw = lambda: rng.integers(0, 50_257, (8, 8)).astype(np.int32)
  return Rows(
    *(draw(), index, 0 * index, index + 1, index, draw(), 0 * index, index)
  )


@functools.partial(jax.jit, static_argnums=0)
def _logps_and_gradient(config, params, rows):
  """Returns what a step takes of a model: token values, and a gradient."""

  def loss(params):
    hidden = transformer.hidden_states(
      config, params, rows.tokens, rows.positions, rows.key_start, rows.key_end
    )
    tokens = logprobs.token_logps(
      hidden,
      transformer.unembedding(config, params),
      rows,
      chunk_length=4,
      with_entropy=True,
      with_log_sum_squares=True,
    )
    return tokens.logps.sum(), tokens

  gradient, tokens = jax.grad(loss, has_aux=True)(params)
  return tokens, gradient


@by_family
def test_padding_and_splitting_change_no_number(family):
  config = _config(family)
  params = drawn.weights(transformer.param_shapes(config), stddev=0.3)
  expected, gradient = _logps_and_gradient(config, params, _rows())
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  padded = _padded(config)
  layouts = transformer.layouts(mesh, padded)
  fit = functools.partial(transformer.fit_vocabulary, padded)
  placed = jax.jit(fit, out_shardings=layouts)(params)
  shards = placed["embedding"].addressable_shards
  assert {x.data.shape for x in shards} == {(PADDED_ROWS // 4, 8)}
  whole = transformer.layouts(mesh, config)["embedding"].spec
  assert whole[0] is None and layouts["embedding"].spec[0] is not None
  with jax.set_mesh(mesh):
    got, of_padded = _logps_and_gradient(padded, placed, _rows())
  for name in ("logps", "entropy", "log_sum_squares"):
    np.testing.assert_allclose(
      getattr(got, name), getattr(expected, name), rtol=1e-6, atol=2e-6
    )
  for name in transformer.VOCABULARY:
    if name in of_padded:
      assert not np.any(of_padded[name][50_257:]), name
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, rtol=1e-4, atol=1e-4
    ),
    transformer.fit_vocabulary(config, of_padded),
    gradient,
  )


def test_what_is_no_token_has_no_probability_and_no_embedding():
  config = _padded(model_config.gpt2(**SIZES | {"vocab_size": 50}))
  assert config.num_vocab_rows == 52
  params = drawn.weights(transformer.param_shapes(config), stddev=0.3)
  states = jnp.ones((1, 16))
  logits = transformer.unembedding(config, params).logits(states)
  probabilities = jax.nn.softmax(logits)
  assert not np.any(probabilities[:, 50:])
  assert np.sum(probabilities) == pytest.approx(1, abs=1e-6)
  index = jnp.arange(4)[None]
  hidden = jax.jit(functools.partial(transformer.hidden_states, config))
  last = lambda token: hidden(
    params, jnp.array([[0, 48, 3, token]]), index, 0 * index, index + 1
  )[0, 3]
  assert np.isnan(last(50)).all() and not np.isnan(last(49)).any()


def test_new_weights_are_those_without_padding():
  config = model_config.gpt2(**SIZES | {"vocab_size": 50})
  init = lambda config: transformer.init_params(config, jax.random.key(0))
  padded = init(_padded(config))
  assert padded["embedding"].shape == (52, 16)
  jax.tree.map(
    np.testing.assert_array_equal,
    transformer.fit_vocabulary(config, padded),
    init(config),
  )


@by_family
def test_folders_and_runs_hold_the_models_own_vocabulary(family, tmp_path):
  config = _config(family)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  params = drawn.weights(transformer.param_shapes(config))
  params = jax.device_put(params, transformer.layouts(mesh, config))
  padded = _padded(config)
  layouts = transformer.layouts(mesh, padded)
  huggingface.save_model(str(tmp_path / "plain"), config, params)
  opened = source.open_model(str(tmp_path / "plain"))
  read = opened.load(padded, layouts)
  assert read["embedding"].shape == (PADDED_ROWS, 16)
  assert not np.any(read["embedding"][50_257:])
  # A run saves what it trains, and says how many tokens there are.
  run = tmp_path / "run"
  (run / "model").mkdir(parents=True)
  huggingface.write_config(str(run / "model"), padded)
  with manager.Manager(run, every=1, keep=1) as checkpoints:
    checkpoints.save(1, {"params": read})
  of_run = source.open_model(str(run))
  assert of_run.config.vocab_size == 50_257
  assert of_run.config == opened.config
  plain = transformer.layouts(mesh, config)
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  same(of_run.load(config, plain), params)
  same(of_run.load(padded, layouts), read)
  # Files are the same, whatever is written.
  huggingface.save_model(str(tmp_path / "padded"), padded, read)
  one, other = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("plain", "padded")
  )
  assert one == other
  assert (tmp_path / "plain/config.json").read_bytes() == (
    tmp_path / "padded/config.json"
  ).read_bytes()


def test_a_multiple_below_one_is_refused():
  with pytest.raises(ValueError, match="vocab_multiple=0: must be at least 1"):
    model_config.gpt2(**SIZES, vocab_multiple=0)

"""Scores in the train step: no split, layout, mesh or neighbour matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.data import dataset, loader
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.models import heads, transformer
from dpo_jax.training import metrics, optimizers, scoring, state, steps
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.types import Rows
from tests import hlo

NUM_PAIRS = 24
CONFIG = model_config.llama(
  vocab_size=97,
  num_layers=2,
  d_model=32,
  d_mlp=48,
  num_heads=4,
  max_positions=128,
)
ONE_DEVICE = (1, 1, 1)  # data, fsdp, tensor
HYPERPARAMETERS = {
  "reward_model": {"label_smoothing": 0.1, "center_weight": 0.01},
  "classifier": {"label_smoothing": 0.1},
}
HEADS = {"reward_model": "reward", "classifier": "classifier"}


def _config(name):
  return dataclasses.replace(CONFIG, head=HEADS[name])


@functools.cache
def _params(name):
  init = jax.jit(transformer.init_params, static_argnums=0)
  return init(_config(name), jax.random.key(1))


def _lists():
  rng = np.random.default_rng(0)
  return [
    [
      rng.integers(1, CONFIG.vocab_size, size=n).tolist()
      for n in rng.integers(3, 40, size=NUM_PAIRS)
    ]
    for _ in range(3)
  ]


def _tokens(name):
  """Returns pairs; or lone responses, of label 1 and 0 in turns."""
  prompt, chosen, rejected = _lists()
  if name == "classifier":
    chosen = [x if i % 2 else [] for i, x in enumerate(chosen)]
    rejected = [[] if i % 2 else x for i, x in enumerate(rejected)]
  return dataset.TokenDataset.from_lists(prompt, chosen, rejected)


def _scorer(name):
  objective = objectives.make_objective(name, HYPERPARAMETERS[name])
  return scorer_lib.Scorer(_config(name), None, objective, chunk_length=16)


def _batches(name, **settings):
  settings = {"batch_size": 8, "microbatch_rows": 2} | settings
  return loader.Loader(_tokens(name), scored="ends", **settings)


def _mesh(shape):
  axes = dict(zip(sharding.MESH_AXES, shape))
  return sharding.make_mesh(
    **axes, devices=jax.devices()[: int(np.prod(shape))]
  )


def _layouts(name, mesh):
  config = _config(name)
  return sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )


@functools.cache
def _run(name, mesh=ONE_DEVICE, **settings):
  """Returns the metrics of two steps."""
  settings = {"microbatch_rows": 16} | settings
  mesh = _mesh(mesh)
  config, batches = _config(name), _batches(name, **settings)
  rate = optimizers.make_schedule(
    1e-2, schedule="constant", warmup_steps=0, total_steps=9
  )
  optimizer = optimizers.make_optimizer("adamw", rate, clip=0.0)
  layouts = _layouts(name, mesh)
  init = lambda: transformer.init_params(config, jax.random.key(0))
  with jax.set_mesh(mesh):
    now = state.init_state(init, optimizer, layouts, mesh)
    step = jax.jit(
      steps.make_train_step(_scorer(name), optimizer, rate), donate_argnums=0
    )
    history = []
    for k in range(2):
      placed = scoring.device_batch(batches.batch(k), batches, mesh)
      now, found = step(now, placed)
      history.append({key: float(value) for key, value in found.items()})
  return history


def _assert_same(got, expected, rtol=1e-4):
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(
        a[key], b[key], rtol=rtol, atol=1e-4, err_msg=key
      )


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_the_split_into_microbatches_changes_no_number(name):
  _assert_same(_run(name, microbatch_rows=2), _run(name))


@pytest.mark.parametrize(
  ("mesh", "layout"), [(ONE_DEVICE, "padded"), ((2, 2, 2), "mirrored")]
)
def test_scores_do_not_depend_on_layout_or_mesh(mesh, layout):
  name = "classifier"
  score = jax.jit(steps.make_score_step(_scorer(name)))
  batches = _batches(name, microbatch_rows=8)
  packed = score(_params(name), None, batches.batch(0)).policy
  assert np.sum(packed != 0) == 8  # one of the two columns
  mesh = _mesh(mesh)
  batches = _batches(name, microbatch_rows=8, layout=layout)
  params = jax.device_put(_params(name), _layouts(name, mesh))
  with jax.set_mesh(mesh):
    placed = scoring.device_batch(batches.batch(0), batches, mesh)
    found = score(params, None, placed).policy
  np.testing.assert_allclose(found, packed, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_training_packed_equals_training_padded(name):
  _assert_same(_run(name, layout="padded"), _run(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_training_on_one_device_equals_eight(name):
  many = _run(name, mesh=(2, 2, 2), microbatch_rows=4)
  _assert_same(many, _run(name), rtol=2e-3)


def test_a_score_is_that_of_the_sequence_alone():
  """The head's product with the last state of prompt and response."""
  name = "reward_model"
  config, params = _config(name), _params(name)
  batches = _batches(name, shuffle=False)
  score = jax.jit(steps.make_score_step(_scorer(name)))
  packed = np.asarray(score(params, None, batches.batch(0)).policy)

  @jax.jit
  def alone(tokens):
    index = jnp.arange(tokens.shape[1])[None]
    states = transformer.hidden_states(
      config, params, tokens, index, 0 * index, index + 1
    )
    return states[0] @ params["score"][0]

  for pair, (prompt, *responses) in enumerate(list(zip(*_lists()))[:8]):
    for column, response in enumerate(responses):
      sequence = prompt + response
      tokens = np.zeros((1, 80), np.int32)
      tokens[0, : len(sequence)] = sequence
      np.testing.assert_allclose(
        packed[pair, column], alone(tokens)[len(sequence) - 1], atol=2e-5
      )


@pytest.mark.slow
def test_gradient_is_that_of_the_definition():
  """-log sigmoid of the difference, by finite differences of the head."""
  name = "classifier"
  scorer, batches = _scorer(name), _batches(name, microbatch_rows=16)
  batch, params = batches.batch(0), _params(name)
  score_step = steps.make_score_step(scorer)

  @jax.jit
  def loss(params):
    return scorer.mean_loss(score_step(params, None, batch), batch, None)[0]

  grads = jax.grad(loss)(params)
  direction = jax.random.normal(jax.random.key(2), params["score"].shape)
  move = lambda size: loss(
    params | {"score": params["score"] + size * direction}
  )
  slope = (move(1e-2) - move(-1e-2)) / 2e-2
  np.testing.assert_allclose(
    jnp.sum(grads["score"] * direction), slope, rtol=1e-3
  )
  assert np.abs(grads["embedding"]).max() > 0


def test_no_program_multiplies_by_the_vocabulary():
  batch = _batches("reward_model").batch(0)
  step = jax.jit(steps.make_score_step(_scorer("reward_model")))
  lowered = step.lower(_params("reward_model"), None, batch)
  found = hlo.vocabulary_buffers(lowered.compile().as_text(), CONFIG.vocab_size)
  # The embedding, which is looked up.
  assert found == {(CONFIG.vocab_size, CONFIG.d_model)}


def test_padding_scores_nothing():
  rows = Rows(*[jnp.zeros((1, 3), jnp.int32)] * 8)
  rows = dataclasses.replace(
    rows,
    score_index=jnp.array([[2, 0, 0]]),
    response=jnp.array([[4, -1, -1]]),
  )
  hidden = jnp.arange(12, dtype=jnp.bfloat16).reshape(1, 3, 4)
  found = heads.scores({"score": jnp.ones((1, 4))}, hidden, rows)
  assert found.dtype == jnp.float32
  assert found.tolist() == [[8 + 9 + 10 + 11, 0, 0]]


def test_a_new_head_leaves_the_body_as_it_is():
  params = transformer.init_params(CONFIG, jax.random.key(0))
  config = _config("reward_model")
  new = heads.with_new_score(params, config, jax.random.key(1))
  shapes = transformer.param_shapes(config)
  jax.tree.map(
    lambda x, y: np.testing.assert_equal(x.shape, y.shape), new, shapes
  )
  assert new["embedding"] is params["embedding"]
  assert 0.01 < np.std(new["score"]) < 0.03


def test_a_scalar_head_has_no_logits():
  with pytest.raises(ValueError, match="it scores texts and has no distrib"):
    transformer.unembedding(_config("classifier"), _params("classifier"))


def test_metrics_by_hand():
  scores = np.array([[2.0, 1.0], [-1.0, 3.0], [0.0, 0.0]])
  lengths = np.array([[3, 4], [1, 1], [0, 0]])
  losses = np.array([1.0, 2.0, 9.0])
  found = metrics.score_metrics(losses, scores, lengths, is_labelled=False)
  expected = {
    "loss": 1.5,
    "rewards/chosen": 0.5,
    "rewards/rejected": 2.0,
    "rewards/mean": 1.25,
    "rewards/margins": -1.5,
    "rewards/accuracies": 0.5,
  }
  assert {k: float(v) for k, v in found.items()} == expected
  lengths = np.array([[3, 0], [1, 1], [0, 0]])
  found = metrics.score_metrics(losses, scores, lengths, is_labelled=True)
  assert float(found["rewards/accuracies"]) == pytest.approx(1 / 3)
  assert float(found["rewards/mean"]) == pytest.approx(4 / 3)

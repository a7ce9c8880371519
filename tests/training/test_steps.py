"""The train step: identities, and that no split changes a number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.data import dataset, loader
from dpo_jax.losses import objectives
from dpo_jax.models import presets, transformer
from dpo_jax.training import optimizers, scoring, state, steps
from dpo_jax.training import scorer as scorer_lib
from tests import hlo

NUM_PAIRS = 24
CONFIG = presets.make_config("tiny")
SMALL_MESH = (1, 1, 1)  # data, fsdp, tensor
_slow = lambda value: pytest.param(value, marks=pytest.mark.slow)
MESHES = [_slow((1, 8, 1)), (2, 2, 2), _slow((4, 1, 2))]


def _tokens(swap=False):
  rng = np.random.default_rng(0)
  lists = lambda: [
    rng.integers(1, CONFIG.vocab_size, size=n).tolist()
    for n in rng.integers(3, 40, size=NUM_PAIRS)
  ]
  prompt, chosen, rejected = lists(), lists(), lists()
  if swap:
    chosen, rejected = rejected, chosen
  return dataset.TokenDataset.from_lists(prompt, chosen, rejected)


def _labelled():
  """Returns lone responses, desirable and undesirable in turns of two."""
  lists = _tokens().take(np.arange(NUM_PAIRS))
  prompt, chosen, rejected = (
    np.split(column.values, column.offsets[1:-1])
    for column in (lists.prompt, *lists.responses)
  )
  kept = lambda column, wanted: [
    x if i // 2 % 2 == wanted else [] for i, x in enumerate(column)
  ]
  return dataset.TokenDataset.from_lists(
    prompt, kept(chosen, 0), kept(rejected, 1)
  )


def _objective(name, **modifiers):
  parameters = {
    "beta": 0.5,
    "label_smoothing": 0.1,
    "alpha": 0.3,
    "tau": 0.05,
    "lambda_": 0.5,
    "momentum": 0.9,
    "desirable_weight": 1.0,
    "undesirable_weight": 0.5,
  }
  needed = objectives.LOSSES[name].hyperparameters
  return objectives.make_objective(
    name, {key: parameters[key] for key in needed}, **modifiers
  )


@functools.cache
def _run(
  objective,
  *,
  mesh=SMALL_MESH,
  num_steps=2,
  data=None,
  config=CONFIG,
  learning_rate=1e-2,
  **settings,
):
  """Returns the metrics of each step, and the last state."""
  devices = jax.devices()[: int(np.prod(mesh))]
  mesh = sharding.make_mesh(
    **dict(zip(sharding.MESH_AXES, mesh)), devices=devices
  )
  rows = settings.pop("microbatch_rows", sharding.num_row_shards(mesh))
  batches = loader.Loader(
    data or _tokens(),
    batch_size=8,
    microbatch_rows=rows,
    extra_columns=objective.extra_columns,
    **settings,
  )
  rate = optimizers.make_schedule(
    learning_rate, schedule="constant", warmup_steps=0, total_steps=9
  )
  optimizer = optimizers.make_optimizer("adamw", rate, clip=0.0)
  reference = config if objective.needs_reference else None
  scorer = scorer_lib.Scorer(
    config,
    reference,
    objective,
    chunk_length=16,
    has_pairs=batches.has_pairs,
  )
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  init = lambda: transformer.init_params(config, jax.random.key(0))
  with jax.set_mesh(mesh):
    now = state.init_state(init, optimizer, layouts, mesh)
    if reference:
      copy = state.copy_params(now.params, like=now.params, shardings=layouts)
      now = dataclasses.replace(now, reference=copy)
    step = jax.jit(
      steps.make_train_step(scorer, optimizer, rate), donate_argnums=0
    )
    names = objective.state
    now = dataclasses.replace(
      now, loss_state=state.init_loss_state(names, mesh)
    )
    history = []
    for k in range(num_steps):
      placed = scoring.device_batch(batches.batch(k), batches, mesh)
      now, metrics = step(now, placed)
      history.append({k: float(v) for k, v in metrics.items()})
  return history, now


def _assert_same(got, expected, rtol=1e-4):
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(
        a[key], b[key], rtol=rtol, atol=1e-4, err_msg=key
      )


def test_loss_is_log2_when_policy_equals_reference():
  (first, second), _ = _run(_objective("dpo"))
  np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-6)
  assert first["rewards/accuracies"] == 0  # a margin of 0 is not right
  assert second["loss"] != first["loss"]


def test_swapping_chosen_and_rejected_negates_the_margin():
  scorer = scorer_lib.Scorer(CONFIG, CONFIG, _objective("dpo"), chunk_length=16)
  score = jax.jit(steps.make_score_step(scorer))
  policy, reference = (
    transformer.init_params(CONFIG, jax.random.key(seed)) for seed in (1, 2)
  )

  def margins(swap):
    batches = loader.Loader(_tokens(swap), batch_size=8, microbatch_rows=2)
    scores = score(policy, reference, batches.batch(0))
    ratio = scores.policy - scores.reference
    return ratio[:, 0] - ratio[:, 1]

  assert np.abs(margins(False)).min() > 1e-4
  np.testing.assert_allclose(margins(True), -margins(False), atol=2e-4)


@pytest.mark.parametrize(
  "name",
  [
    "dpo",
    *map(
      _slow, ("kto", "sft", "aot", "unlikelihood", "orpo", "beta_dpo", "bco")
    ),
  ],
)
def test_the_split_into_microbatches_changes_no_number(name):
  one, _ = _run(_objective(name), microbatch_rows=16)
  four, _ = _run(_objective(name), microbatch_rows=2)
  _assert_same(four, one)


@pytest.mark.parametrize("name", ["dpo", *map(_slow, ("apo_zero", "kto"))])
def test_packed_equals_padded(name):
  packed, _ = _run(_objective(name))
  padded, _ = _run(_objective(name), layout="padded", microbatch_rows=4)
  _assert_same(padded, packed)


@pytest.mark.slow
@pytest.mark.parametrize("modifiers", [{"ld_alpha": 0.5}, {"wpo": True}])
def test_modifiers_do_not_depend_on_the_layout(modifiers):
  objective = _objective("dpo", **modifiers)
  packed, _ = _run(objective, microbatch_rows=2)
  padded, _ = _run(objective, layout="padded", microbatch_rows=16)
  plain, _ = _run(_objective("dpo"))
  _assert_same(padded, packed)
  assert abs(plain[1]["loss"] - packed[1]["loss"]) > 1e-4


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["dpo", _slow("aot")])
def test_the_mesh_changes_no_number(name, mesh):
  one, _ = _run(_objective(name), microbatch_rows=8)
  many, last = _run(_objective(name), microbatch_rows=8, mesh=mesh)
  _assert_same(many, one, rtol=2e-3)
  kernel = last.params["blocks"]["mlp"]["up"]["kernel"]
  shard = kernel.addressable_shards[0].data
  assert shard.size * mesh[1] * mesh[2] == kernel.size


@pytest.mark.slow
def test_a_coupled_loss_has_the_gradient_of_its_definition():
  """Two passes give what one pass over all pairs gives by autodiff."""
  objective = _objective("aot")
  scorer = scorer_lib.Scorer(CONFIG, CONFIG, objective, chunk_length=16)
  batches = loader.Loader(_tokens(), batch_size=8, microbatch_rows=16)
  batch = batches.batch(0)
  rows = jax.tree.map(lambda x: x[0], batch.rows)
  keys = jax.random.split(jax.random.key(1))
  params = transformer.init_params(CONFIG, keys[0])
  reference = transformer.init_params(CONFIG, keys[1])

  def direct(params):
    scores = scorer.scores(params, reference, rows, batch.lengths)
    return jnp.mean(scorer.losses(scores, batch.lengths))

  expected = jax.grad(direct)(params)
  split = loader.Loader(_tokens(), batch_size=8, microbatch_rows=2).batch(0)
  _, _, got = steps._coupled_gradient(scorer, params, reference, split, None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    got,
    expected,
  )


@pytest.mark.parametrize("data", [_slow(_tokens), _labelled])
def test_kto_has_the_gradient_of_its_definition(data):
  """Scored beforehand, mismatched responses give what all at once give."""
  scorer = scorer_lib.Scorer(CONFIG, CONFIG, _objective("kto"), chunk_length=16)
  make_batch = lambda rows: loader.Loader(
    data(), batch_size=8, microbatch_rows=rows, extra_columns=("mismatched",)
  ).batch(0)
  keys = jax.random.split(jax.random.key(1))
  policy, reference = (transformer.init_params(CONFIG, key) for key in keys)
  # Log-probabilities of the reference, lower by 40: K is above 0.
  whole = make_batch(16)
  score = jax.jit(steps.make_score_step(scorer))
  shifted = score(policy, reference, whole).reference - 40 / 3

  def direct(params):
    ratio = score(params, reference, whole).policy - shifted
    kl = jax.lax.stop_gradient(ratio[:, 2].mean())
    desirable = jax.nn.sigmoid(0.5 * (kl - ratio[:, 0]))
    undesirable = 0.5 * jax.nn.sigmoid(0.5 * (ratio[:, 1] - kl))
    present = whole.lengths[:, :2] > 0
    losses = present * jnp.stack([desirable, undesirable], 1)
    return jnp.mean(losses.sum(1) / present.sum(1)), kl

  (loss, kl), expected = jax.value_and_grad(direct, has_aux=True)(policy)
  assert kl > 1
  cached = dataclasses.replace(make_batch(2), reference=shifted)
  scorer = dataclasses.replace(scorer, reference=None)
  scores, losses, got = jax.jit(
    functools.partial(steps._pairwise_gradient, scorer)
  )(policy, None, cached, None)
  assert float(losses.mean()) == pytest.approx(float(loss), rel=1e-5)
  metrics = scorer.metrics(scores, losses, cached.lengths)
  assert float(metrics["kl"]) == pytest.approx(float(kl), rel=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    got,
    expected,
  )


def test_kto_of_lone_responses_reports_no_pairs():
  (first, second), _ = _run(_objective("kto"), data=_labelled(), shuffle=False)
  # The policy is its reference: (1 + 0.5) / 2 of s(0), for half of each kind.
  assert first["loss"] == pytest.approx(0.375)
  assert first["kl"] == pytest.approx(0, abs=1e-4)
  assert second["loss"] != first["loss"]
  assert "rewards/accuracies" not in first


@pytest.mark.slow
def test_a_list_of_two_is_a_pair():
  ranked, _ = _run(_objective("plackett_luce"))
  pairs, _ = _run(_objective("dpo"))
  _assert_same(ranked, pairs)


def test_a_list_scores_each_response_as_if_it_stood_alone():
  rng = np.random.default_rng(0)
  lists = [
    [rng.integers(1, 512, size=n).tolist() for n in rng.integers(3, 9, size=6)]
    for _ in range(5)
  ]
  prompt, *responses = lists
  responses[3][2] = []  # a list of three
  data = dataset.TokenDataset.from_lists(prompt, *responses)
  objective = _objective("plackett_luce")
  scorer = scorer_lib.Scorer(CONFIG, CONFIG, objective, chunk_length=16)
  score = jax.jit(steps.make_score_step(scorer))
  policy, reference = (
    transformer.init_params(CONFIG, jax.random.key(seed)) for seed in (1, 2)
  )
  batch = loader.Loader(data, batch_size=6, shuffle=False).batch(0)
  scores = score(policy, reference, batch)
  for column, response in enumerate(responses):
    alone = dataset.TokenDataset.from_lists(
      prompt, response, [[1] for _ in prompt]
    )
    batch_alone = loader.Loader(alone, batch_size=6, shuffle=False).batch(0)
    expected = score(policy, reference, batch_alone).policy[:, 0]
    present = batch.lengths[:, column] > 0
    np.testing.assert_allclose(
      scores.policy[present, column], expected[present], rtol=1e-4
    )
  # Ranks by hand: the best of all, the best of the rest, ...
  z = np.array(0.5 * (scores.policy - scores.reference), np.float64)
  expected = [
    sum(np.log(np.exp(row[k:count]).sum()) - row[k] for k in range(count))
    for row, count in zip(z, (batch.lengths > 0).sum(1))
  ]
  losses = scorer.losses(scores, batch.lengths)
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  metrics = scorer.metrics(scores, losses, batch.lengths)
  ordered = [
    row[j] > row[k]
    for row, count in zip(z, (batch.lengths > 0).sum(1))
    for j in range(count)
    for k in range(j + 1, count)
  ]
  accuracy = float(metrics["rewards/accuracies"])
  assert accuracy == pytest.approx(np.mean(ordered))


@pytest.mark.slow
def test_a_likelihood_over_prompts_is_that_of_whole_sequences():
  data = _tokens()
  prompts = loader.epoch_order(0, 0, NUM_PAIRS)[:8]
  tokens = data.take(prompts)
  whole = [
    np.concatenate([x, y])
    for x, y in zip(
      np.split(tokens.prompt.values, tokens.prompt.offsets[1:-1]),
      np.split(tokens.responses[0].values, tokens.responses[0].offsets[1:-1]),
    )
  ]
  alone = dataset.TokenDataset.from_lists(
    [x[:1] for x in whole], [x[1:] for x in whole], [[] for _ in whole]
  )
  (first,), _ = _run(_objective("sft", prompt_nll=True), num_steps=1)
  (expected,), _ = _run(_objective("sft"), data=alone, num_steps=1)
  (plain,), _ = _run(_objective("sft"), num_steps=1)
  assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
  assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
  assert first["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=1e-5)
  assert abs(first["loss"] - plain["loss"]) > 1e-5


def test_no_array_of_a_step_is_larger_in_the_vocabulary_than_one_chunk():
  """Rows of 512 with 32,000 words: only tables and one chunk of logits."""
  vocab, chunk_length, num_rows = 32_000, 16, 2
  config = dataclasses.replace(CONFIG, vocab_size=vocab, d_model=48)
  objective = _objective("dpo")
  scorer = scorer_lib.Scorer(config, config, objective, chunk_length)
  rate = lambda step: jnp.float32(1e-3)
  optimizer = optimizers.make_optimizer("adamw", rate, clip=1.0)
  params = transformer.param_shapes(config)
  now = state.TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=jax.eval_shape(optimizer.init, params),
    reference=params,
  )
  batch = loader.Loader(
    _tokens(), batch_size=8, microbatch_rows=num_rows, row_length=512
  ).batch(0)
  step = steps.make_train_step(scorer, optimizer, rate)
  text = jax.jit(step).lower(now, batch).compile().as_text()
  buffers = hlo.vocabulary_buffers(text, vocab)
  assert (num_rows, chunk_length, vocab) in buffers
  largest = max(chunk_length * num_rows, config.d_model) * vocab
  assert all(np.prod(shape) <= largest for shape in buffers), buffers


def test_a_loss_without_a_reference_holds_and_traces_none():
  _, last = _run(_objective("unlikelihood"), num_steps=1)
  assert last.reference is None


@pytest.mark.slow
def test_score_gaps_go_with_their_pairs_into_every_microbatch():
  data = _tokens()
  data.score_gaps = np.linspace(0.2, 5.0, NUM_PAIRS, dtype=np.float32)
  one, _ = _run(_objective("odpo"), data=data, num_steps=1, microbatch_rows=16)
  four, _ = _run(_objective("odpo"), data=data, num_steps=1, microbatch_rows=2)
  _assert_same(four, one)
  gaps = data.score_gaps[loader.epoch_order(0, 0, NUM_PAIRS)[:8]]
  expected = np.log1p(np.exp(0.3 * np.log(gaps))).mean()
  assert one[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_running_means_go_from_step_to_step():
  history, after_two = _run(_objective("beta_dpo"))
  assert history[0]["rewards/margins"] == 0  # the policy is its reference
  assert float(after_two.loss_state["mean_margin"]) == pytest.approx(
    0.1 * history[1]["rewards/margins"], rel=1e-4
  )
  _, last = _run(_objective("bco"))
  assert float(last.loss_state["num_responses"]) == 32
  _, plain = _run(_objective("dpo"), num_steps=1)
  assert plain.loss_state is None


def test_the_reference_stays_and_the_policy_moves():
  _, last = _run(_objective("dpo"))
  start = transformer.init_params(CONFIG, jax.random.key(0))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, last.reference, start)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 1e-3, last.params, start
  )
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_remat_and_bfloat16_stay_close():
  plain, _ = _run(_objective("dpo"))
  remat, _ = _run(
    _objective("dpo"), config=dataclasses.replace(CONFIG, remat="full")
  )
  _assert_same(remat, plain)
  half, last = _run(
    _objective("dpo"), config=dataclasses.replace(CONFIG, dtype="bfloat16")
  )
  assert half[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
  assert half[0]["logps/chosen"] == pytest.approx(
    plain[0]["logps/chosen"], rel=1e-2
  )
  assert last.params["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.float32

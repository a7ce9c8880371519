"""PPO's steps on a tiny decoder: identities, splits, and a known optimum."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding
from dpo_jax.models import presets, transformer
from dpo_jax.sampling import decode
from dpo_jax.training import ppo, ppo_iteration, ppo_rows, state

CONFIG = presets.make_config("tiny")
NUM_RESPONSES, MAX_NEW_TOKENS, MAX_LENGTH = 8, 12, 24
SMALL_MESH = (1, 1, 1)  # data, fsdp, tensor
SETTINGS = ppo.Settings(epochs=1, minibatches=2, target_kl=1.0)


def _lists(longest, seed):
  rng = np.random.default_rng(seed)
  return [
    rng.integers(1, CONFIG.vocab_size, size=n).tolist()
    for n in rng.integers(1, longest + 1, size=NUM_RESPONSES)
  ]


def _make_mesh(shape):
  devices = jax.devices()[: int(np.prod(shape))]
  return sharding.make_mesh(
    **dict(zip(sharding.MESH_AXES, shape)), devices=devices
  )


def _init_state(config, optimizer, mesh, *, settings=SETTINGS, head_seed=None):
  """Returns a state with a reference; a head of random weights if seeded."""
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  init = lambda: transformer.init_params(config, jax.random.key(0))
  params = jax.jit(init, out_shardings=layouts)()
  reference = state.copy_params(params, like=params, shardings=layouts)
  head = ppo.init_value_head(config, mesh)
  if head_seed is not None:
    rng = np.random.default_rng(head_seed)
    draw = lambda x: np.asarray(rng.normal(size=x.shape), np.float32)
    head = jax.tree.map(lambda x: sharding.place_whole(draw(x), mesh), head)
  layouts = layouts | {ppo.VALUE_HEAD: jax.tree.map(lambda x: x.sharding, head)}
  first = state.init_state(
    params | {ppo.VALUE_HEAD: head}, optimizer, layouts, mesh
  )
  return dataclasses.replace(
    first,
    reference=reference,
    loss_state=ppo.init_loss_state(settings, mesh),
  )


def _generate(params, prompts, numbers):
  """Returns random responses, of which every other one ended."""
  responses = _lists(MAX_NEW_TOKENS, 100 + numbers[0])
  return responses, [row % 2 == 0 for row in range(len(responses))]


def _iteration(optimizer, mesh, microbatch_rows):
  """Returns an iteration of PPO on random tokens with random scores."""
  actor = ppo.Actor(CONFIG, chunk_length=16)
  return ppo_iteration.Iteration(
    SETTINGS,
    policy=actor,
    reference=actor,
    optimizer=optimizer,
    rows=ppo_rows.RowSettings(
      32, MAX_LENGTH, microbatch_rows, (0, microbatch_rows)
    ),
    max_new_tokens=MAX_NEW_TOKENS,
    generate_fn=_generate,
    score_fn=lambda prompts, responses, ended: np.array(
      [sum(response) % 7 - 3 for response in responses], np.float32
    ),
    mesh=mesh,
    seed=0,
  )


def _learning_rate(count):
  """Returns 0 in the first iteration, of two updates, and then more."""
  return jnp.where(count < 2, 0.0, 3e-3)


@functools.cache
def _run(*, mesh=SMALL_MESH, microbatch_rows=1):
  """Returns the metrics of each iteration, and the state before and after."""
  mesh = _make_mesh(mesh)
  optimizer = optax.sgd(_learning_rate)
  with jax.set_mesh(mesh):
    now = _init_state(CONFIG, optimizer, mesh, head_seed=1)
    iterate = _iteration(optimizer, mesh, microbatch_rows)
    history, states = [], [jax.device_get(now)]
    for k in range(3):
      now, metrics = iterate(now, k, _lists(12, k))
      history.append({key: float(x) for key, x in metrics.items()})
      states.append(jax.device_get(now))
  return history, states


def _assert_same(got, expected, rtol=1e-4):
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_allclose(
        a[key], b[key], rtol=rtol, atol=1e-4, err_msg=key
      )


def test_values_and_logps_are_those_of_each_sequence_by_itself():
  prompts, responses = _lists(12, 0), _lists(MAX_NEW_TOKENS, 1)
  mesh = _make_mesh(SMALL_MESH)
  params = _init_state(CONFIG, optax.sgd(0.0), mesh, head_seed=1).params
  actor = ppo.Actor(CONFIG, chunk_length=16, temperature=0.5)
  packed = ppo_rows.pack_responses(
    prompts, responses, ppo_rows.RowSettings(64, MAX_LENGTH, 2, (0, 2))
  )
  score = jax.jit(ppo.make_score_step(actor, actor, MAX_NEW_TOKENS))
  found = score(params, ppo.decoder_params(params), packed)
  np.testing.assert_array_equal(found.logps, found.reference_logps)
  hidden_states = jax.jit(functools.partial(transformer.hidden_states, CONFIG))
  for i, (prompt, response) in enumerate(zip(prompts, responses)):
    end = len(prompt) + len(response)
    tokens = np.zeros((1, MAX_LENGTH), np.int32)
    tokens[0, :end] = prompt + response
    index = np.arange(MAX_LENGTH)[None]
    states = hidden_states(
      ppo.decoder_params(params),
      *(tokens, index, np.zeros_like(index), index + 1),
    )
    hidden = states[0, len(prompt) - 1 : end - 1]
    head = params[ppo.VALUE_HEAD]
    values = np.asarray(hidden) @ np.asarray(head["kernel"]) + head["bias"]
    table = np.asarray(transformer.unembedding(CONFIG, params).table)
    logits = np.asarray(hidden) @ table.T / 0.5
    log_z = np.log(np.exp(logits).sum(axis=1))
    logps = logits[np.arange(len(response)), response] - log_z
    for got, wanted in ((found.values, values), (found.logps, logps)):
      np.testing.assert_allclose(
        got[i, : len(response)], wanted, rtol=1e-4, atol=1e-4
      )
      np.testing.assert_array_equal(got[i, len(response) :], 0)


def test_nothing_moves_at_learning_rate_0_and_the_ratio_is_exactly_1():
  (first, second, third), states = _run()
  equal = lambda a, b: all(
    jax.tree.leaves(jax.tree.map(np.array_equal, a.params, b.params))
  )
  assert equal(states[0], states[1]) and not equal(states[1], states[2])
  assert first["approx_kl"] == first["clip_fraction"] == 0
  assert first["ratio"] == pytest.approx(1, abs=1e-6)  # a mean in float32
  assert first["objective/kl"] == second["objective/kl"] == 0
  assert second["approx_kl"] > 1e-8 and third["objective/kl"] != 0
  assert first["ended"] == 0.5


def test_responses_that_did_not_end_lose_the_penalty():
  def rollout(penalty):
    iterate = ppo_iteration.Iteration(
      dataclasses.replace(SETTINGS, missing_eos_penalty=penalty),
      policy=ppo.Actor(CONFIG, chunk_length=16),
      reference=ppo.Actor(CONFIG, chunk_length=16),
      optimizer=optax.sgd(0.0),
      rows=ppo_rows.RowSettings(32, MAX_LENGTH, 1, (0, 1)),
      max_new_tokens=MAX_NEW_TOKENS,
      generate_fn=_generate,
      score_fn=lambda prompts, responses, ended: np.where(ended, 2.0, 0.5),
      mesh=_make_mesh(SMALL_MESH),
      seed=0,
    )
    state = types.SimpleNamespace(params={})
    return iterate._rollout(state, 0, _lists(12, 0))

  _, ended, scores = rollout(0.0)
  np.testing.assert_array_equal(ended, [True, False] * 4)
  np.testing.assert_array_equal(scores, [2.0, 0.5] * 4)
  np.testing.assert_array_equal(rollout(0.75)[2], [2.0, -0.25] * 4)
  assert scores.dtype == rollout(0.75)[2].dtype == np.float32


@pytest.mark.slow
def test_the_split_into_microbatches_changes_no_number():
  _assert_same(_run()[0], _run(microbatch_rows=8)[0])


def test_eight_devices_and_one_microbatch_equal_one_device_and_many():
  one, _ = _run()
  eight, states = _run(mesh=(2, 2, 2), microbatch_rows=8)
  _assert_same(eight, one, rtol=2e-3)
  assert states[-1].step == 3


def test_the_kl_coefficient_is_steered():
  history, states = _run()
  # The KL is far below its target of 1 nat: a fifth of 8 / 10,000 less.
  factor = 1 - 0.2 * NUM_RESPONSES / SETTINGS.horizon
  expected = SETTINGS.kl_coef * factor ** np.arange(3)
  found = [metrics["kl_coef"] for metrics in history]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  last = states[-1].loss_state[ppo.KL_COEF]
  assert last == pytest.approx(expected[-1] * factor, rel=1e-6)


def test_orders_are_functions_of_seed_iteration_and_epoch():
  order = ppo_rows.minibatch_order
  np.testing.assert_array_equal(order(1, 2, 3, 50), order(1, 2, 3, 50))
  np.testing.assert_array_equal(np.sort(order(1, 2, 3, 50)), np.arange(50))
  for other in ((0, 2, 3, 50), (1, 0, 3, 50), (1, 2, 0, 50)):
    assert (order(*other) != order(1, 2, 3, 50)).any()


def test_impossible_settings_are_refused():
  with pytest.raises(ValueError, match=r"ppo.clip=0: must be above 0"):
    ppo.Settings(clip=0)
  with pytest.raises(ValueError, match=r"ppo.lam=1.5: must be in \[0, 1\]"):
    ppo.Settings(lam=1.5)
  for penalty in (-1.0, float("inf"), float("nan")):
    with pytest.raises(ValueError, match="ppo.missing_eos_penalty=.*at least"):
      ppo.Settings(missing_eos_penalty=penalty)


@pytest.mark.slow
def test_a_bandit_comes_to_the_best_policy_at_its_beta():
  """The best policy is ref exp(r / beta) / Z (Rafailov et al. 2023, eq 4)."""
  beta, num_tokens, prompt = 0.5, 8, [5, 3]
  rewards = np.array([0, 1, 0.2, -1, 0.5, 0.9, -0.5, 0.1], np.float32)
  config = dataclasses.replace(CONFIG, vocab_size=num_tokens)
  settings = ppo.Settings(
    epochs=2, minibatches=2, kl_coef=beta, value_coef=0.5, value_clip=0.0
  )
  optimizer = optax.adam(optax.linear_schedule(3e-3, 0.0, 160))
  mesh = _make_mesh(SMALL_MESH)
  draws = decode.Settings(max_new_tokens=1)

  def generate(params, prompts, numbers):
    sampler = decode.Sampler(config, params)
    found = sampler.sample(
      prompts, draws, seed=0, stop_ids=(0,), indices=numbers
    )
    return [sample.tokens for (sample,) in found], [False] * len(found)

  def logps_of(params):
    tokens = np.array([prompt], np.int32)
    index = np.arange(2, dtype=np.int32)[None]
    hidden = transformer.hidden_states(
      config,
      ppo.decoder_params(params),
      *(tokens, index, np.zeros_like(index), index + 1),
    )
    logits = transformer.unembedding(config, params).logits(hidden)
    return np.asarray(jax.nn.log_softmax(logits[0, -1]), np.float64)

  actor = ppo.Actor(config, chunk_length=1)
  with jax.set_mesh(mesh):
    now = _init_state(config, optimizer, mesh, settings=settings)
    # A reference that prefers some tokens.
    tilt = jnp.linspace(0.5, 2.0, num_tokens)[:, None]
    sharpen = lambda params: (
      params | {"embedding": params["embedding"] * 15 * tilt}
    )
    now = dataclasses.replace(
      now, params=sharpen(now.params), reference=sharpen(now.reference)
    )
    reference = logps_of(now.reference)
    iterate = ppo_iteration.Iteration(
      settings,
      policy=actor,
      reference=actor,
      optimizer=optimizer,
      rows=ppo_rows.RowSettings(128, 3, 1, (0, 1)),
      max_new_tokens=1,
      generate_fn=generate,
      score_fn=lambda _, responses, ended: rewards[[x for (x,) in responses]],
      mesh=mesh,
      seed=0,
    )
    for k in range(40):
      now, _ = iterate(now, k, [prompt] * 256)
    policy = logps_of(now.params)

  def objective(logps):
    return np.sum(np.exp(logps) * (rewards - beta * (logps - reference)))

  tilted = reference + rewards / beta
  best = tilted - np.log(np.sum(np.exp(tilted)))
  gain = objective(policy) - objective(reference)
  possible = objective(best) - objective(reference)
  assert possible > 0.2
  assert gain > 0.97 * possible
  np.testing.assert_allclose(np.exp(policy), np.exp(best), atol=0.05)

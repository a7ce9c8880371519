import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax.losses import logprobs, modifiers, objectives, preference
from dpo_jax.types import Rows

# Two pairs: 1 chosen and 3 rejected tokens in the first row, 2 and 2 in the
# second, whose last entry is padding.
RESPONSE = np.array([[0, 1, 1, 1, -1], [2, 2, 3, 3, -1]], np.int32)
RANK = np.array([[0, 0, 1, 2, 0], [0, 1, 0, 1, 0]], np.int32)
LENGTHS = np.array([[1, 3], [2, 2]], np.int32)
EMPTY = np.zeros_like(RESPONSE)
ROWS = Rows(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, EMPTY, RESPONSE, RANK)


def make_pairs(u=(2.0,), v=(-1.0,), dtype="float32"):
  u, v = jnp.asarray(u, dtype), jnp.asarray(v, dtype)
  zeros = jnp.zeros_like(u)
  return preference.PairLogps(u, v, zeros, zeros, zeros + 2, zeros + 4)


@pytest.mark.parametrize(
  "f_divergence,f_alpha,expected",
  [
    ("reverse_kl", None, 0.5),
    ("forward_kl", None, 1 - math.exp(-0.5)),
    ("js", None, math.log(2) - math.log(1 + math.exp(-0.5))),
    ("alpha", 3.0, (math.exp(1) - 1) / 2),
    ("alpha", 0.5, (math.exp(-0.25) - 1) / -0.5),
  ],
)
def test_score_by_hand(f_divergence, f_alpha, expected):
  score = modifiers.f_score(jnp.array([0.5]), f_divergence, f_alpha)
  np.testing.assert_allclose(score, [expected], rtol=1e-6)
  at_reference = modifiers.f_score(jnp.zeros(1), f_divergence, f_alpha)
  np.testing.assert_allclose(at_reference, [0], atol=1e-7)


@hypothesis.given(st.floats(-5, 5))
def test_alpha_runs_from_forward_to_reverse_kl(logratio):
  u = jnp.array([logratio], jnp.float32)
  score = lambda *args: modifiers.f_score(u, *args)
  np.testing.assert_allclose(
    score("alpha", 0.0), score("forward_kl"), rtol=1e-5
  )
  np.testing.assert_allclose(score("alpha", 1.0001), u, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  "f_divergence,f_alpha",
  [("forward_kl", None), ("js", None), ("alpha", 0.5), ("alpha", 2.0)],
)
def test_scores_and_their_gradients_are_finite_and_rise(f_divergence, f_alpha):
  score = lambda u: modifiers.f_score(u, f_divergence, f_alpha)
  u = jnp.array([-1e4, -300.0, -1.0, 0.0, 1.0, 300.0, 1e4])
  slopes = jax.grad(lambda u: score(u).sum())(u)
  assert jnp.isfinite(score(u)).all() and jnp.isfinite(slopes).all()
  assert (jnp.diff(score(u)) >= 0).all() and (slopes >= 0).all()
  with jax.enable_x64(True):
    check_grads(score, (jnp.linspace(-3.0, 3.0, 5),), order=1)


def test_scores_enter_the_loss_and_not_the_rewards():
  pairs = make_pairs()
  objective = objectives.make_objective(
    "dpo", {"beta": 0.3}, f_divergence="forward_kl"
  )
  delta = -math.exp(-2) + math.exp(1)
  expected = math.log(1 + math.exp(-0.3 * delta))
  np.testing.assert_allclose(objective.per_pair(pairs), [expected], rtol=1e-5)
  rewards = preference.implicit_rewards(pairs, 0.3)
  np.testing.assert_allclose(rewards, [[0.6], [-0.3]], rtol=1e-6)


def test_tokens_past_the_shorter_response_weigh_ld_alpha():
  objective = objectives.make_objective("dpo", {"beta": 0.3}, ld_alpha=0.25)
  np.testing.assert_array_equal(
    objective.token_weights(ROWS, LENGTHS),
    [[1, 1, 0.25, 0.25, 0], [1, 1, 1, 1, 0]],
  )
  plain = objectives.make_objective("dpo", {"beta": 0.3})
  np.testing.assert_array_equal(
    plain.token_weights(ROWS, LENGTHS), RESPONSE >= 0
  )


def test_ld_alpha_of_zero_equals_cutting_at_the_shorter_response():
  objective = objectives.make_objective("dpo", {"beta": 0.3}, ld_alpha=0.0)
  values = jnp.asarray(np.random.default_rng(0).normal(size=RESPONSE.shape))
  weighted = values * objective.token_weights(ROWS, LENGTHS)
  cut = dataclasses.replace(
    ROWS, response=np.where((RESPONSE == 1) & (RANK > 0), -1, RESPONSE)
  )
  np.testing.assert_allclose(
    logprobs.response_sums(weighted, ROWS, (2, 2)),
    logprobs.response_sums(values, cut, (2, 2)),
    rtol=1e-6,
  )


def test_wpo_weight_by_hand_and_without_gradient():
  logps = jnp.log(jnp.where(RESPONSE >= 0, 0.5, 1.0))
  squares = jnp.log(jnp.where(RESPONSE >= 0, 0.75, 1.0)).at[0, 0].set(0)

  def log_weights(logps):
    tokens = logprobs.TokenLogps(logps, log_sum_squares=squares)
    return modifiers.wpo_log_weights(tokens, ROWS, LENGTHS)

  # Means over tokens: 1/2 for the first chosen response, 2/3 for all others.
  np.testing.assert_allclose(
    jnp.exp(log_weights(logps)), [1 / 3, 4 / 9], rtol=1e-6
  )
  grads = jax.grad(lambda x: log_weights(x).sum())(logps)
  np.testing.assert_array_equal(grads, jnp.zeros_like(logps))
  objective = objectives.make_objective("dpo", {"beta": 0.3}, wpo=True)
  pairs = make_pairs((2.0, 1.0), (-1.0, 0.5))
  np.testing.assert_allclose(
    objective.per_pair(pairs, log_weights(logps)),
    preference.dpo(pairs, beta=0.3) * jnp.array([1 / 3, 4 / 9]),
    rtol=1e-6,
  )


def test_wpo_weights_stop_at_their_bound():
  # Products of the weights of chosen and rejected: 1/2, 1 and 8.
  log_weights = jnp.log(jnp.array([0.5, 1.0, 8.0]))
  pairs = make_pairs((2.0, 1.0, 2.0), (-1.0, 0.5, -1.0))
  plain = preference.dpo(pairs, beta=0.3)
  for options, weights in (
    ({}, [0.5, 1, 1]),
    ({"wpo_max_weight": 2.0}, [0.5, 1, 2]),
    ({"wpo_max_weight": math.inf}, [0.5, 1, 8]),
  ):
    objective = objectives.make_objective(
      "dpo", {"beta": 0.3}, wpo=True, **options
    )
    np.testing.assert_allclose(
      objective.per_pair(pairs, log_weights),
      plain * jnp.array(weights),
      rtol=1e-6,
    )


def test_pairs_that_are_not_in_these_rows_have_wpo_weight_one():
  tokens = logprobs.TokenLogps(
    jnp.asarray(RESPONSE, jnp.float32), log_sum_squares=jnp.zeros((2, 5))
  )
  lengths = np.array([[1, 3], [2, 2], [5, 4], [0, 0]], np.int32)
  weights = modifiers.wpo_log_weights(tokens, ROWS, lengths)
  np.testing.assert_array_equal(weights[2:], [0, 0])


def test_sft_weight_adds_the_chosen_token_mean():
  pairs = dataclasses.replace(
    make_pairs((-2.0, -1.0), (-1.0, -3.0)), chosen_lengths=jnp.array([1.0, 4.0])
  )
  objective = objectives.make_objective("dpo", {"beta": 0.3}, sft_weight=0.5)
  added = objective.per_pair(pairs) - preference.dpo(pairs, beta=0.3)
  np.testing.assert_allclose(added.mean(), 0.5 * 3 / 5, rtol=1e-5)


def test_sft_weight_adds_likelihoods_and_not_scores():
  pairs = make_pairs()
  added = [
    objectives.make_objective(
      "dpo", {"beta": 0.3}, f_divergence="js", sft_weight=weight
    ).per_pair(pairs)
    for weight in (0.0, 1.0)
  ]
  np.testing.assert_allclose(added[1] - added[0], [-2 / 2], rtol=1e-6)

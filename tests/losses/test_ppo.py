"""PPO's numbers against arithmetic written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import ppo as rl

LENGTHS = np.array([3, 1], np.int32)
array = lambda *rows: np.array(rows, np.float32)


def test_the_score_stands_at_the_last_token_and_the_kl_at_every_one():
  rewards = rl.token_rewards(
    np.array([2.0, -1.0], np.float32),
    array([-1.0, -2.0, -3.0, 9.0], [-0.5, 9.0, 9.0, 9.0]),
    array([-1.5, -1.0, -3.0, 0.0], [-1.0, 0.0, 0.0, 0.0]),
    LENGTHS,
    0.1,
  )
  # -0.1 * 0.5, -0.1 * -1, 2 - 0; and -1 - 0.1 * 0.5.
  expected = array([-0.05, 0.1, 2.0, 0.0], [-1.05, 0.0, 0.0, 0.0])
  np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_advantages_are_those_computed_by_hand():
  rewards = array([0.0, 1.0, 2.0, 7.0], [3.0, 7.0, 7.0, 7.0])
  values = array([0.5, 1.0, 1.5, 7.0], [1.0, 7.0, 7.0, 7.0])
  found, returns = rl.advantages(rewards, values, LENGTHS, gamma=0.9, lam=0.5)
  # delta: 2 - 1.5, 1 + 0.9 * 1.5 - 1, 0 + 0.9 * 1 - 0.5.
  third = 0.5
  second = 1.35 + 0.45 * third
  first = 0.4 + 0.45 * second
  expected = array([first, second, third, 0], [2.0, 0, 0, 0])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  of_tokens = array([0.5, 1.0, 1.5, 0], [1.0, 0, 0, 0])
  np.testing.assert_allclose(returns, expected + of_tokens, rtol=1e-6)


def test_without_discount_the_return_is_the_sum_of_what_follows():
  rewards = array([1.0, 2.0, 4.0, 0.0], [8.0, 0.0, 0.0, 0.0])
  values = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
  _, returns = rl.advantages(rewards, values, LENGTHS, gamma=1.0, lam=1.0)
  expected = array([7.0, 6.0, 4.0, 0.0], [8.0, 0.0, 0.0, 0.0])
  np.testing.assert_allclose(returns, expected, rtol=1e-5)


def test_whitened_values_have_mean_0_and_variance_1():
  found = rl.whiten(array([1.0, 2.0, 3.0, 50.0], [6.0, 50.0, 50, 50]), LENGTHS)
  # Mean 3, variance (4 + 1 + 0 + 9) / 4.
  expected = array([-2.0, -1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]) / 3.5**0.5
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  equal = rl.whiten(array([2.0, 2.0, 2.0, 0.0], [2.0, 0, 0, 0]), LENGTHS)
  np.testing.assert_array_equal(equal, 0)


@pytest.mark.parametrize(
  ("ratio", "advantage", "loss", "slope"),
  [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # clipped to 1.2
    (0.5, 2.0, -1.0, -1.0),  # too low, and worth raising
    (1.5, -2.0, 3.0, 3.0),  # too high, and worth lowering
    (0.5, -2.0, 1.6, 0.0),  # clipped to 0.8
  ],
)
def test_clipping_by_hand_and_no_gradient_where_it_is_active(
  ratio, advantage, loss, slope
):
  logps, old = jnp.log(jnp.array([ratio])) - 3, jnp.array([-3.0])
  of = lambda fn: lambda logps: fn(logps, old, jnp.array([advantage]), clip=0.2)
  np.testing.assert_allclose(of(rl.policy_losses)(logps), [loss], rtol=1e-5)
  (gradient,) = jax.grad(lambda x: of(rl.policy_losses)(x).sum())(logps)
  if slope:
    assert gradient == pytest.approx(slope, rel=1e-5)
  else:
    assert gradient == 0
  assert bool(of(rl.is_clipped)(logps)[0]) == (slope == 0)


@pytest.mark.parametrize(
  ("value", "returns", "loss", "slope"),
  [
    (1.1, 2.0, 0.5 * 0.9**2, -0.9),
    (1.5, 2.0, 0.5 * 0.8**2, 0.0),  # clipped to 1.2, worse than 1.5
    (1.5, 1.0, 0.5 * 0.5**2, 0.5),  # away from the return: worse unclipped
  ],
)
def test_value_loss_by_hand(value, returns, loss, slope):
  fn = lambda x, clip=0.2: rl.value_losses(
    x, jnp.array([1.0]), jnp.array([returns]), clip=clip
  )
  found = fn(jnp.array([value]))
  np.testing.assert_allclose(found, [loss], rtol=1e-5)
  gradient = jax.grad(lambda x: fn(x).sum())(jnp.array([value]))
  np.testing.assert_allclose(gradient, [slope], rtol=1e-5)
  unclipped = 0.5 * (value - returns) ** 2
  np.testing.assert_allclose(
    fn(jnp.array([value]), clip=0.0), [unclipped], rtol=1e-5
  )


def test_padding_moves_no_number_even_where_it_is_nan():
  rng = np.random.default_rng(0)
  mask = np.arange(4)[None] < LENGTHS[:, None]
  arrays = [rng.normal(size=(2, 4)).astype(np.float32) for _ in range(3)]
  scores = rng.normal(size=2).astype(np.float32)

  @jax.jit
  def everything(arrays):
    logps, reference, values = arrays
    rewards = rl.token_rewards(scores, logps, reference, LENGTHS, 0.3)
    found = rl.advantages(rewards, values, LENGTHS, gamma=0.9, lam=0.8)
    explained = rl.explained_variance(values, found[1], LENGTHS)
    return rewards, *found, rl.whiten(values, LENGTHS), explained

  expected = everything([np.where(mask, x, 0) for x in arrays])
  for filler in (np.nan, 7.0):
    filled = everything([np.where(mask, x, filler) for x in arrays])
    for got, wanted in zip(filled, expected, strict=True):
      np.testing.assert_array_equal(got, wanted)


def test_explained_variance_is_1_for_right_values_and_0_for_equal_ones():
  returns = array([1.0, 2.0, 3.0, 0.0], [6.0, 0.0, 0.0, 0.0])
  assert rl.explained_variance(returns + 5, returns, LENGTHS) == 1
  zeros = np.zeros_like(returns)
  assert rl.explained_variance(zeros, returns, LENGTHS) == 0
  assert rl.explained_variance(returns, zeros, LENGTHS) == 0


@pytest.mark.parametrize(
  ("kl", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (0.0, 0.998)]
)
def test_the_kl_coefficient_moves_by_a_clipped_share_of_the_horizon(kl, factor):
  found = rl.next_kl_coef(
    *(jnp.float32(0.5), jnp.float32(kl)),
    target=6.0,
    horizon=10_000.0,
    num_responses=100,
  )
  assert found == pytest.approx(0.5 * factor, rel=1e-6)
  fixed = rl.next_kl_coef(
    *(jnp.float32(0.5), jnp.float32(kl)),
    target=None,
    horizon=10_000.0,
    num_responses=100,
  )
  assert fixed == jnp.float32(0.5)

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from dpo_jax.losses import objectives, preference, registry, running

BETA_DPO = objectives.make_objective(
  "beta_dpo", {"beta": 0.5, "alpha": 0.6, "momentum": 0.9}
)
BCO = objectives.make_objective(
  "bco", {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0}
)


def ls(x):
  return -math.log1p(math.exp(-x))


def pairs_of(u, v, dtype="float32"):
  """Returns pairs with these log-ratios; those of nan are slots without."""
  u, v = jnp.asarray(u, dtype), jnp.asarray(v, dtype)
  lengths = jnp.where(jnp.isnan(u), 0.0, 2.0).astype(dtype)
  zeros = jnp.zeros_like(u)
  return registry.PairLogps(
    jnp.nan_to_num(u), jnp.nan_to_num(v), zeros, zeros, lengths, lengths
  )


def zeros(objective):
  return {name: jnp.zeros(()) for name in objective.state}


def test_beta_follows_the_distance_to_the_running_margin():
  # Reward margins 1 and 2, M = 1.5; M0 = 0.5: beta is 0.5 (1 + 0.6).
  pairs = pairs_of([2.0, 3.0, math.nan], [0.0, -1.0, math.nan])
  state = {"mean_margin": jnp.array(0.5)}
  losses = BETA_DPO.per_pair(pairs, state=state)
  np.testing.assert_allclose(losses[:2], [-ls(1.6), -ls(3.2)], rtol=1e-6)
  after = BETA_DPO.next_state(pairs, state)
  np.testing.assert_allclose(after["mean_margin"], 0.9 * 0.5 + 0.1 * 1.5)


def test_beta_stays_above_a_hundredth():
  # M - M0 = -10: 1 - 6 would turn the loss around.
  pairs = pairs_of([2.0], [-2.0])
  losses = BETA_DPO.per_pair(pairs, state={"mean_margin": jnp.array(12.0)})
  np.testing.assert_allclose(losses, [-ls(0.01 * 2)], rtol=1e-6)


def test_beta_dpo_with_alpha_zero_is_dpo():
  plain = running.beta_dpo(
    pairs_of([2.0], [-2.0]),
    {"mean_margin": jnp.array(3.0)},
    beta=0.5,
    alpha=0.0,
    momentum=0.9,
  )
  expected = preference.dpo(pairs_of([2.0], [-2.0]), beta=0.5)
  np.testing.assert_allclose(plain, expected, rtol=1e-6)


def test_bco_shift_is_the_mean_reward_of_all_batches():
  # Rewards 1, -2 and 2, 0: their mean is 1/4. Then 0, 0: of all six 1/6.
  first = pairs_of([2.0, 4.0, math.nan], [-4.0, 0.0, math.nan])
  losses = BCO.per_pair(first, state=zeros(BCO))
  expected = [-(ls(0.75) + ls(2.25)) / 2, -(ls(1.75) + ls(0.25)) / 2]
  np.testing.assert_allclose(losses[:2], expected, rtol=1e-6)
  state = BCO.next_state(first, zeros(BCO))
  second = pairs_of([0.0], [0.0])
  losses = BCO.per_pair(second, state=state)
  np.testing.assert_allclose(losses, [-(ls(-1 / 6) + ls(1 / 6)) / 2], rtol=1e-6)
  state = BCO.next_state(second, state)
  np.testing.assert_allclose(state["mean_reward"], 1 / 6, rtol=1e-6)
  assert state["num_responses"] == 6


def test_bco_without_a_shift_is_half_of_bco_pair():
  pairs = pairs_of([2.0], [-2.0])
  np.testing.assert_allclose(
    BCO.per_pair(pairs, state=zeros(BCO)),
    preference.bco_pair(pairs, beta=0.5) / 2,
    rtol=1e-6,
  )


def test_no_gradient_passes_through_a_mean():
  pairs = pairs_of([2.0, 1.0], [0.0, -3.0])

  def gradient(objective, state):
    def fn(u):
      moved = dataclasses.replace(pairs, policy_chosen=u)
      return objective.per_pair(moved, state=state)[0]

    return jax.grad(fn)(pairs.policy_chosen)

  # M = 1.5: beta is 0.5 (1 + 0.6 * 1.5) = 0.95, times a margin of 2.
  slope = -0.95 / (1 + math.exp(1.9))
  np.testing.assert_allclose(
    gradient(BETA_DPO, zeros(BETA_DPO)), [slope, 0], rtol=1e-6
  )
  # Rewards 1, 0, 0.5, -1.5: delta is 0.
  slope = -0.25 / (1 + math.exp(1.0))
  np.testing.assert_allclose(gradient(BCO, zeros(BCO)), [slope, 0], rtol=1e-6)
  for objective in (BETA_DPO, BCO):
    after = jax.grad(
      lambda p, o=objective: sum(o.next_state(p, zeros(o)).values())
    )(pairs)
    np.testing.assert_array_equal(after.policy_chosen, [0, 0])


def test_gradients_are_those_at_the_batch_s_beta_and_shift():
  with jax.enable_x64(True):
    pairs = pairs_of([2.0, 1.0, -0.5], [0.0, -3.0, 1.0], "float64")
    policy = pairs.policy_chosen, pairs.policy_rejected

    def of_policy(per_pair):
      def fn(chosen, rejected):
        return per_pair(
          dataclasses.replace(
            pairs, policy_chosen=chosen, policy_rejected=rejected
          )
        ).sum()

      return fn

    def bco_at(pairs):
      delta = 0.25 / 6  # rewards of 1, 0.5, -0.25; 0, -1.5, 0.5
      desirable = jax.nn.log_sigmoid(0.5 * pairs.chosen_logratio - delta)
      undesirable = jax.nn.log_sigmoid(delta - 0.5 * pairs.rejected_logratio)
      return -(desirable + undesirable) / 2

    beta = 0.5 * (1 + 0.6 * (1 + 2 - 0.75) / 3)
    for objective, fixed in (
      (BETA_DPO, lambda pairs: preference.dpo(pairs, beta=beta)),
      (BCO, bco_at),
    ):
      fixed = of_policy(fixed)
      check_grads(fixed, policy, order=1)
      moving = of_policy(lambda p, o=objective: o.per_pair(p, state=zeros(o)))
      for ours, theirs in zip(
        jax.grad(moving, (0, 1))(*policy), jax.grad(fixed, (0, 1))(*policy)
      ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_sum_carries_the_state_of_each_of_its_losses():
  hyperparameters = dict(
    beta=0.5,
    alpha=0.6,
    momentum=0.9,
    desirable_weight=1.0,
    undesirable_weight=1.0,
  )
  both = objectives.make_objective("beta_dpo:1,bco:2,sft:1", hyperparameters)
  assert set(both.state) == {*BETA_DPO.state, *BCO.state}
  pairs = pairs_of([2.0, 1.0], [0.0, -3.0])
  sft = objectives.make_objective("sft", {})
  np.testing.assert_allclose(
    both.per_pair(pairs, state=zeros(both)),
    BETA_DPO.per_pair(pairs, state=zeros(BETA_DPO))
    + 2 * BCO.per_pair(pairs, state=zeros(BCO))
    + sft.per_pair(pairs),
    rtol=1e-6,
  )
  after = both.next_state(pairs, zeros(both))
  assert after == BETA_DPO.next_state(pairs, zeros(both)) | BCO.next_state(
    pairs, zeros(both)
  )

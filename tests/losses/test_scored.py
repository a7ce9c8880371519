"""Losses that read the data's scores."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import preference, scored
from tests.losses.test_preference import ls, make_pairs, pairs_of


def test_odpo_wants_a_margin_that_rises_with_the_score_difference():
  pairs = dataclasses.replace(
    pairs_of([2.0, 2.0, 2.0], [0.0, 0.0, 0.0]),
    score_gaps=jnp.array([1.0, math.e, math.exp(-1)]),
  )
  losses = scored.odpo(pairs, beta=0.3, alpha=0.5)
  np.testing.assert_allclose(losses, [-ls(0.6), -ls(0.1), -ls(1.1)], rtol=1e-5)
  np.testing.assert_allclose(
    scored.odpo(pairs, beta=0.3, alpha=0.0),
    preference.dpo(pairs, beta=0.3),
    rtol=1e-6,
  )


def test_rpo_is_least_where_the_margin_is_the_gap():
  # Gaps of 2 and eta of 0.2 want reward margins of 0.4.
  pairs = pairs_of([4.0, 2.0, 9.0], [2.0, 1.0, -9.0])
  for loss in (scored.rpo_sq, scored.rpo_bwd_kl):

    def total(pairs, loss=loss):
      losses = loss(pairs, beta=0.2, eta=0.2)
      return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(pairs)
    np.testing.assert_allclose(losses[0], 0, atol=1e-7)
    assert (losses[1:] > 0).all()
    # A margin above the gap is brought back, which `dpo` never does.
    slopes = grads.policy_chosen
    np.testing.assert_allclose(slopes[0], 0, atol=1e-7)
    assert slopes[1] < 0 < slopes[2]


def test_rpo_bwd_kl_is_cdpo_of_the_gap_without_the_label_s_entropy():
  pairs = dataclasses.replace(make_pairs(), score_gaps=jnp.full(5, 3.0))
  flips = 1 / (1 + math.exp(0.6))
  entropy = -flips * math.log(flips) - (1 - flips) * math.log1p(-flips)
  np.testing.assert_allclose(
    scored.rpo_bwd_kl(pairs, beta=0.3, eta=0.2),
    preference.cdpo(pairs, beta=0.3, label_smoothing=flips) - entropy,
    rtol=1e-4,
  )


def test_rebel_finds_the_policy_that_its_rewards_ask_for():
  # pi proportional to pi_0 exp(eta reward) has a loss of 0 for any pair.
  rewards = jnp.array([2.0, -1.0, 0.5])
  reference = jnp.log(jnp.array([0.2, 0.5, 0.3]))
  policy = jax.nn.log_softmax(reference + 0.7 * rewards)
  chosen, rejected = jnp.array([0, 2, 0]), jnp.array([1, 1, 2])
  pairs = preference.PairLogps(
    *(x[i] for x in (policy, reference) for i in (chosen, rejected)),
    chosen_lengths=jnp.ones(3),
    rejected_lengths=jnp.ones(3),
    score_gaps=rewards[chosen] - rewards[rejected],
  )
  np.testing.assert_allclose(scored.rebel(pairs, eta=0.7), 0, atol=1e-10)
  np.testing.assert_allclose(
    scored.rebel(pairs, eta=0.3), scored.rpo_sq(pairs, beta=1.0, eta=0.3)
  )

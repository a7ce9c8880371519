"""Losses of scores: by hand, what they do not depend on, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import objectives, registry, reward_model

PLAIN = {"label_smoothing": 0.0, "center_weight": 0.0}


def scored(chosen, rejected):
  """Returns pairs of these scores; None is an absent response."""
  to_array = lambda xs: jnp.array([0.0 if x is None else x for x in xs])
  lengths = lambda xs: jnp.array([0.0 if x is None else 3.0 for x in xs])
  return registry.PairLogps(
    to_array(chosen),
    to_array(rejected),
    None,
    None,
    lengths(chosen),
    lengths(rejected),
  )


def reward_loss(pairs, **options):
  return reward_model.reward_model(pairs, **PLAIN | options)


def test_reward_model_by_hand():
  pairs = scored([2.0, -1.0], [0.5, -1.0])
  expected = [np.log1p(np.exp(-1.5)), np.log(2)]
  np.testing.assert_allclose(reward_loss(pairs), expected, rtol=1e-6)
  # -ls(-x) = -ls(x) + x.
  smoothed = [expected[0] + 0.1 * 1.5, expected[1]]
  np.testing.assert_allclose(
    reward_loss(pairs, label_smoothing=0.1), smoothed, rtol=1e-6
  )
  centered = np.array(expected) + 0.01 * np.array([2.5**2, 4.0])
  np.testing.assert_allclose(
    reward_loss(pairs, center_weight=0.01), centered, rtol=1e-6
  )


def test_gradient_of_a_pair_is_the_probability_that_it_is_wrong():
  pairs = scored([2.0], [0.5])
  grads = jax.grad(lambda p: reward_loss(p).sum())(pairs)
  wrong = 1 / (1 + np.exp(1.5))
  np.testing.assert_allclose(grads.policy_chosen, [-wrong], rtol=1e-6)
  np.testing.assert_allclose(grads.policy_rejected, [wrong], rtol=1e-6)


def test_only_differences_of_rewards_count():
  one = reward_loss(scored([2.0, 0.0], [0.5, 1.0]))
  shifted = reward_loss(scored([9.0, 7.0], [7.5, 8.0]))
  np.testing.assert_allclose(shifted, one, rtol=1e-6)


def test_classifier_by_hand():
  pairs = scored([2.0, None, 1.0], [None, 0.5, -3.0])
  loss = reward_model.classifier(pairs, label_smoothing=0.0)
  softplus = lambda x: np.log1p(np.exp(x))
  lone = [softplus(-2.0), softplus(0.5)]
  both = (softplus(-1.0) + softplus(-3.0)) / 2
  np.testing.assert_allclose(loss, [*lone, both], rtol=1e-6)
  smoothed = reward_model.classifier(pairs, label_smoothing=0.2)
  expected = [lone[0] + 0.2 * 2.0, lone[1] - 0.2 * 0.5]
  np.testing.assert_allclose(smoothed[:2], expected, rtol=1e-6)


def test_gradient_of_a_classifier_is_probability_minus_label():
  pairs = scored([2.0, None], [None, 0.5])
  grads = jax.grad(
    lambda p: reward_model.classifier(p, label_smoothing=0.0).sum()
  )(pairs)
  probability = lambda x: 1 / (1 + np.exp(-x))
  expected = [probability(2.0) - 1, 0]
  np.testing.assert_allclose(grads.policy_chosen, expected, rtol=1e-6)
  expected = [0, probability(0.5)]
  np.testing.assert_allclose(grads.policy_rejected, expected, rtol=1e-6)


def test_scores_and_log_probabilities_do_not_mix():
  with pytest.raises(ValueError, match="a loss of scores cannot be summed"):
    objectives.make_objective("reward_model:1,sft:1", PLAIN)
  with pytest.raises(ValueError, match="'classifier' does not honour loss.wpo"):
    objectives.make_objective("classifier", {"label_smoothing": 0.0}, wpo=True)
  made = objectives.make_objective("classifier", {"label_smoothing": 0.0})
  assert made.head == "classifier" and not made.needs_reference

"""The metrics of a batch or of a whole evaluation, computed once."""

import jax.numpy as jnp

from dpo_jax.types import Array


def preference_metrics(
  losses: Array,
  policy: Array,
  reference: Array | None,
  lengths: Array,
  *,
  beta: float,
  has_rejected: bool,
) -> dict[str, Array]:
  """Returns means over pairs: loss, implicit rewards and log-probabilities.

  Args:
    losses: f[B], the loss of each pair.
    policy: f[B,2], summed log-probability of chosen and rejected, nats.
    reference: f[B,2], the same under the reference; None gives no rewards.
    lengths: i32[B,2], response tokens; a slot without a pair has none.
    beta: scales log-ratios to rewards.
    has_rejected: whether these are pairs, not demonstrations.

  Returns:
    Scalars. A reward is beta * (policy - reference), whatever the loss; an
    accuracy counts a pair as right when chosen is above rejected.
  """
  valid = lengths[:, 0] > 0
  mean = lambda x: jnp.sum(jnp.where(valid, x, 0)) / jnp.sum(valid)
  metrics = {"loss": mean(losses), "logps/chosen": mean(policy[:, 0])}
  if has_rejected:
    metrics["logps/rejected"] = mean(policy[:, 1])
  if reference is not None:
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics |= {
      "rewards/chosen": mean(rewards[:, 0]),
      "rewards/rejected": mean(rewards[:, 1]),
      "rewards/margins": mean(margins),
      "rewards/accuracies": mean((margins > 0).astype(policy.dtype)),
    }
  return metrics

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
  has_pairs: bool,
) -> dict[str, Array]:
  """Returns means over pairs: loss, implicit rewards and log-probabilities.

  Args:
    losses: f[B], the loss of each pair.
    policy: f[B,C], summed log-probability of each response, nats: of chosen
      and rejected, or of a ranked list, the best first.
    reference: f[B,C], the same under the reference; None gives no rewards.
    lengths: i32[B,C], response tokens; an absent response has none.
    beta: scales log-ratios to rewards.
    has_rejected: whether these are not demonstrations.
    has_pairs: whether any prompt has two responses.

  Returns:
    Scalars. A reward is beta * (policy - reference), whatever the loss; an
    accuracy counts a pair as right when chosen is above rejected. Of a list,
    `rejected` is the last response, and every two responses are a pair.
    Without pairs the margin is that of the two means, and there is no
    accuracy. A mean over nothing is 0.
  """
  present = lengths > 0
  last = jnp.maximum(jnp.sum(present[:, 1:], axis=1), 1)[:, None]
  worst = lambda x: jnp.take_along_axis(x, last, axis=1)[:, 0]
  means = lambda values, name: (
    {f"{name}/chosen": _mean(values[:, 0], present[:, 0])}
    | (
      {f"{name}/rejected": _mean(worst(values), worst(present))}
      if has_rejected
      else {}
    )
  )
  metrics = {"loss": _mean(losses, present.any(axis=1))}
  metrics |= means(policy, "logps")
  if reference is not None:
    rewards = beta * (policy - reference)
    metrics |= means(rewards, "rewards")
    if has_pairs:
      margins = rewards[:, :, None] - rewards[:, None, :]
      both = jnp.triu(present[:, :, None] & present[:, None, :], k=1)
      metrics["rewards/margins"] = _mean(margins, both)
      metrics["rewards/accuracies"] = _mean(margins > 0, both)
    elif has_rejected:
      margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
      metrics["rewards/margins"] = margin
  return metrics


def score_metrics(
  losses: Array, scores: Array, lengths: Array, *, is_labelled: bool
) -> dict[str, Array]:
  """Returns means over pairs, or over labelled responses: loss and scores.

  Args:
    losses: f[B], the loss of each pair.
    scores: f[B,2], of chosen and rejected, or of label 1 and label 0.
    lengths: i32[B,2], response tokens; an absent response has none.
    is_labelled: whether responses are labelled one by one.

  Returns:
    Scalars, named as in `preference_metrics`: a score is the reward. Right is
    a pair whose chosen scores higher, or a labelled response whose score has
    the sign of its label; there the margin is that of the two means.
  """
  present = lengths > 0
  metrics = {
    "loss": _mean(losses, present.any(axis=1)),
    "rewards/chosen": _mean(scores[:, 0], present[:, 0]),
    "rewards/rejected": _mean(scores[:, 1], present[:, 1]),
    "rewards/mean": _mean(scores, present),
  }
  if is_labelled:
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    is_right = jnp.stack([scores[:, 0] > 0, scores[:, 1] < 0], axis=1)
    where = present
  else:
    both = present.all(axis=1)
    margin = _mean(scores[:, 0] - scores[:, 1], both)
    is_right, where = scores[:, 0] > scores[:, 1], both
  metrics["rewards/margins"] = margin
  metrics["rewards/accuracies"] = _mean(is_right, where)
  return metrics


def _mean(values: Array, where: Array) -> Array:
  values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  total = jnp.sum(jnp.where(where, values, 0))
  return total / jnp.maximum(jnp.sum(where), 1)

"""Losses of a scalar score of each response: no log-probability is read.

Here `policy_chosen` and `policy_rejected` of `PairLogps` hold scores, r_w and
r_l: what a head makes of the hidden state at each response's last token. e is
label smoothing, ls(x) = log sigmoid(x).
"""

import jax.numpy as jnp

from dpo_jax.losses import labelled, registry
from dpo_jax.losses.registry import FlipRate, Logps, NotNegative, PairLogps
from dpo_jax.types import typed

_NONE = frozenset()


@registry.register(honours=_NONE, needs_reference=False, head="reward")
@typed
def reward_model(
  pairs: PairLogps, *, label_smoothing: FlipRate, center_weight: NotNegative
) -> Logps:
  """Returns -(1 - e) ls(r_w - r_l) - e ls(r_l - r_w) + a (r_w + r_l)^2.

  Rafailov et al. 2023 (Bradley-Terry, arXiv 2305.18290), eq 2, at e = a = 0:
  only differences of scores count. The last term draws their mean to 0
  (Eisenstein et al. 2023, arXiv 2312.09244, eq 2; TRL recommends a = 0.01).

  Args:
    pairs: scores.
    label_smoothing: e, the share of pairs that are labelled wrong.
    center_weight: a.
  """
  chosen, rejected = pairs.policy_chosen, pairs.policy_rejected
  centered = center_weight * jnp.square(chosen + rejected)
  return registry.smoothed(chosen - rejected, label_smoothing) + centered


@registry.register(
  honours=_NONE, needs_reference=False, inputs="labelled", head="classifier"
)
@typed
def classifier(pairs: PairLogps, *, label_smoothing: FlipRate) -> Logps:
  """Returns -(1 - e) ls(r_w) - e ls(-r_w), and -(1 - e) ls(-r_l) - e ls(r_l).

  Cox 1958 (logistic regression, https://www.jstor.org/stable/2983890): the
  cross-entropy of a response's label, whose log-odds of 1 are the score. In a
  pair chosen has label 1 and rejected 0, and its loss is the mean of both.

  Args:
    pairs: scores.
    label_smoothing: e, the share of labels that are wrong.
  """
  return labelled.mean_of_present(
    pairs,
    registry.smoothed(pairs.policy_chosen, label_smoothing),
    registry.smoothed(-pairs.policy_rejected, label_smoothing),
  )

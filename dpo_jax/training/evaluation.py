"""Held-out preference metrics over every pair, none dropped."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from dpo_jax.training import scorer as scorer_lib
from dpo_jax.training import state
from dpo_jax.types import Batch


def evaluate(
  scorer: scorer_lib.Scorer,
  score_step: Callable[..., scorer_lib.PairScores],
  batches: Iterable[Batch],
  train_state: state.TrainState,
) -> dict[str, float]:
  """Returns the metrics of all pairs, as if they were one batch.

  A loss that looks across the batch looks across all of them, and a token
  mean is taken over all their tokens. Running means stay as they are.

  Args:
    scorer: the loss.
    score_step: jitted `steps.make_score_step(scorer)`.
    batches: batches on the device; empty pair slots are left out.
    train_state: holds policy and reference.

  Returns:
    The keys of `preference_metrics`, `num_pairs`, and
    `rewards/accuracies_stderr`, the binomial standard error.
  """
  scores, lengths, score_gaps = [], [], []
  for batch in batches:
    result = score_step(
      train_state.params, train_state.reference, batch, train_state.base
    )
    scores.append(jax.device_get(result))
    lengths.append(jax.device_get(batch.lengths))
    score_gaps.append(jax.device_get(batch.score_gaps))
  lengths = np.concatenate(lengths)
  used = np.any(lengths > 0, axis=1)
  lengths = lengths[used]
  join = lambda *x: np.concatenate(x)[used]
  scores = jax.tree.map(join, *scores)
  score_gaps = jax.tree.map(join, *score_gaps)
  loss_state = jax.device_get(train_state.loss_state)
  losses = scorer.losses(scores, lengths, loss_state, score_gaps)
  result = jax.device_get(scorer.metrics(scores, losses, lengths))
  result = {name: float(value) for name, value in result.items()}
  result["num_pairs"] = len(lengths)
  if "rewards/accuracies" in result:
    accuracy = result["rewards/accuracies"]
    result["rewards/accuracies_stderr"] = float(
      np.sqrt(accuracy * (1 - accuracy) / len(lengths))
    )
  return result

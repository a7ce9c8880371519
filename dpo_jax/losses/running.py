"""Losses with running means, which the train state carries from step to step.

Symbols as in `preference`. Such a loss is given the means as they were before
its batch, all 0 before the first one; its `next_state` returns them after it.
No gradient passes through a mean.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import registry
from dpo_jax.losses.registry import (
  Fraction,
  Logps,
  NotNegative,
  PairLogps,
  Positive,
)
from dpo_jax.types import Array, typed

_PAIRWISE = frozenset({"ld_alpha", "wpo", "sft_weight"})

# A batch far below the running margin would else turn the loss around.
_MIN_BETA_SCALE = 0.01

State = Mapping[str, Any]  # f32[] by name


def _next_margin(pairs: PairLogps, state: State, *, beta, alpha, momentum):
  del alpha
  new = (1 - momentum) * _mean(pairs, beta * pairs.margin)
  return {"mean_margin": momentum * state["mean_margin"] + new}


@registry.register(
  honours=_PAIRWISE,
  looks_across_batch=True,
  state=("mean_margin",),
  next_state=_next_margin,
)
@typed
def beta_dpo(
  pairs: PairLogps,
  state: State,
  *,
  beta: Positive,
  alpha: NotNegative,
  momentum: Fraction,
) -> Logps:
  """Returns -ls(b d), b = beta (1 + alpha (mean(z) - M0)): one beta a batch.

  Wu et al. 2024 (beta-DPO, arXiv 2407.08639): M0 is the running mean of the
  batch means of the reward margin z; a batch whose pairs are told apart easily
  is tied more closely to the reference.

  Differs: b is at least a hundredth of beta; pairs are not filtered, and M0
  starts at 0, the margin of a policy that is its reference. Its authors' code
  takes means of d, not of z, and counts this batch in M0 as well: its alpha of
  0.6, with its momentum of 0.9, is 0.54 / beta here, 5.4 at its beta of 0.1. It
  also draws four fifths of a batch's pairs, those near the running mean
  likelier, and leaves out the others.

  Args:
    pairs: log-probabilities of the whole batch.
    state: `mean_margin`, M0 before this batch.
    beta: the beta of a batch at the running mean.
    alpha: how far a margin moves beta; 0 gives `dpo`.
    momentum: M0's part of the next M0; the rest is this batch's M.
  """
  distance = _mean(pairs, beta * pairs.margin) - state["mean_margin"]
  scale = jnp.maximum(1 + alpha * distance, _MIN_BETA_SCALE)
  return registry.smoothed(beta * scale * pairs.margin, 0.0)


def _mean(pairs: PairLogps, values: Array) -> Array:
  """Returns the mean over the slots that hold a pair, without gradient."""
  total = jnp.sum(jnp.where(pairs.present, values, 0))
  return jax.lax.stop_gradient(total / jnp.maximum(jnp.sum(pairs.present), 1))

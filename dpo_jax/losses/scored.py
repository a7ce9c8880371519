"""Losses of pairs whose responses the data scores, against a reference.

Symbols as in `preference`, and gap is the score of chosen minus that of
rejected, above 0.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import registry
from dpo_jax.losses.registry import Logps, NotNegative, PairLogps, Positive
from dpo_jax.types import Array, typed

_PAIRWISE = frozenset({"ld_alpha", "wpo", "sft_weight"})


@registry.register(honours=_PAIRWISE, inputs="scored_pairs")
@typed
def odpo(pairs: PairLogps, *, beta: Positive, alpha: NotNegative) -> Logps:
  """Returns -ls(z - alpha log(score of chosen - score of rejected)).

  Amini et al. 2024 (ODPO, arXiv 2402.10571): the reward margin must exceed an
  offset that rises with the difference of the data's scores, which is above
  0. A gap below 1 gives a negative offset. alpha of 0 gives `dpo`.
  """
  gaps = _gaps(pairs)
  offset = alpha * jnp.log(jnp.where(gaps > 0, gaps, 1.0))
  return registry.smoothed(beta * pairs.margin - offset, 0.0)


@registry.register(honours=_PAIRWISE, inputs="scored_pairs")
@typed
def rpo_sq(pairs: PairLogps, *, beta: Positive, eta: Positive) -> Logps:
  """Returns (z - eta gap)^2.

  Adler et al. 2024 (RPO of Nemotron-4, arXiv 2406.11704), with the squared
  distance of its code: the reward margin should be the gap, not above it. A
  pair that is nearly a tie then stays one, which `dpo` pulls apart.

  Args:
    pairs: log-probabilities and gaps.
    beta: as in `dpo`.
    eta: reward of a unit of the data's scores.
  """
  return jnp.square(beta * pairs.margin - eta * _gaps(pairs))


@registry.register(honours=_PAIRWISE, inputs="scored_pairs")
@typed
def rpo_bwd_kl(pairs: PairLogps, *, beta: Positive, eta: Positive) -> Logps:
  """Returns s(g) (ls(g) - ls(z)) + s(-g) (ls(-g) - ls(-z)), g = eta gap.

  Adler et al. 2024 (RPO of Nemotron-4, arXiv 2406.11704): the KL divergence
  from the preference that the gap implies to the policy's. As `cdpo`, with a
  flip rate of s(-g) for each pair and without the part that no policy changes.

  Args:
    pairs: log-probabilities and gaps.
    beta: as in `dpo`.
    eta: reward of a unit of the data's scores.
  """
  z, wanted = beta * pairs.margin, eta * _gaps(pairs)
  s, ls = jax.nn.sigmoid, jax.nn.log_sigmoid
  return s(wanted) * (ls(wanted) - ls(z)) + s(-wanted) * (ls(-wanted) - ls(-z))


@registry.register(honours=_PAIRWISE, inputs="scored_pairs")
@typed
def rebel(pairs: PairLogps, *, eta: Positive) -> Logps:
  """Returns (d - eta gap)^2.

  Gao et al. 2024 (REBEL, arXiv 2404.16767): a round of policy optimisation is
  the regression of log-ratios to differences of rewards. The reference is the
  policy that the round starts from, whose samples the pairs are, as
  `launch.iterate` has it; with a reference that stays it is `rpo_sq` of beta 1.

  Differs: the paper's loss is this one over eta^2.

  Args:
    pairs: log-probabilities and gaps.
    eta: nats of a round's step for a unit of the data's scores.
  """
  return jnp.square(pairs.margin - eta * _gaps(pairs))


def _gaps(pairs: PairLogps) -> Array:
  """Returns f[B], 0 in a slot without a pair."""
  assert pairs.score_gaps is not None, "the loss reads scored pairs"
  return pairs.score_gaps

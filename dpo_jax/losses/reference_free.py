"""Losses of the policy alone: no reference is read.

Symbols as in `preference`, and:

  aw = lw / nw,  al = ll / nl      mean log-probability of a response's token
  nll_w    mean negative log-likelihood of the batch's chosen tokens
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import modifiers, registry
from dpo_jax.losses.registry import (
  Finite,
  FlipRate,
  Logps,
  NotNegative,
  PairLogps,
  Positive,
  Scalar,
  UnitInterval,
)
from dpo_jax.types import Array, typed

_PAIRWISE = frozenset({"ld_alpha", "wpo", "sft_weight"})
# Losses with a likelihood of their own, which counts every token alike.
_NONE = frozenset()
_WITH_PROMPT = frozenset({"prompt_nll"})

# The mean log-probability of a token stays this far below 0: at 0 the odds
# are infinite, and a float32 tells no probability nearer to 1 from 1.
_MIN_NLL = 1e-7


@registry.register(
  honours=_WITH_PROMPT, needs_reference=False, inputs="demonstrations"
)
@typed
def sft(pairs: PairLogps) -> Logps:
  """Returns -lw (pairs of the batch) / (its chosen tokens).

  The mean over pairs is then the negative log-likelihood of a token.
  """
  return modifiers.chosen_nll(pairs)


@registry.register(
  honours=_NONE, needs_reference=False, inputs="demonstrations"
)
@typed
def sft_sum(pairs: PairLogps) -> Logps:
  """Returns -lw: `sft` with each response summed, as DPO's authors train."""
  return -pairs.policy_chosen


@registry.register(
  honours=_WITH_PROMPT, needs_reference=False, inputs="demonstrations"
)
@typed
def preferred_ft(pairs: PairLogps) -> Logps:
  """Returns -lw (pairs of the batch) / (its chosen tokens): `sft` of pairs.

  Rafailov et al. 2023 (Preferred-FT, arXiv 2305.18290), sec 6.
  """
  return modifiers.chosen_nll(pairs)


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def unlikelihood(pairs: PairLogps, *, alpha: UnitInterval) -> Logps:
  """Returns -lw + alpha ll.

  Rafailov et al. 2023 (unlikelihood, arXiv 2305.18290), app C.3, after Welleck
  et al. 2019: the rejected response is made less likely. Not bounded below.
  """
  return -pairs.policy_chosen + alpha * pairs.policy_rejected


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def simpo(
  pairs: PairLogps,
  *,
  beta: Positive,
  gamma: NotNegative,
  label_smoothing: FlipRate,
) -> Logps:
  """Returns -(1 - e) ls(m) - e ls(-m), m = beta (aw - al) - gamma.

  Meng et al. 2024 (SimPO, arXiv 2405.14734), eq 6, at e = 0.

  Differs: its authors' code takes gamma / beta instead of gamma.
  """
  chosen, rejected = _mean_token_logps(pairs)
  margin = beta * (chosen - rejected) - gamma
  return registry.smoothed(margin, label_smoothing)


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def alpha_po(
  pairs: PairLogps, *, beta: Positive, gamma: NotNegative, alpha: Finite
) -> Logps:
  """Returns -ls(beta (r(aw) - r(al)) - gamma), r(a) = (1 - p^-alpha) / alpha.

  Gupta et al. 2025 (AlphaPO, arXiv 2501.03884), with p = exp(a), the geometric
  mean of a response's token probabilities: `simpo` with a reward that bends. At
  alpha above 0 unlikely responses differ by more than likely ones of the same
  distance in nats, so that pairs of likely responses are pulled less; alpha of
  0, the limit, gives `simpo`.

  Differs: exponents stop at 80, so that no reward overflows; past it a reward
  is constant and has no gradient.

  Args:
    pairs: log-probabilities.
    beta: scales rewards.
    gamma: the margin that is wanted, as in `simpo`.
    alpha: of the reward's shape.
  """
  chosen, rejected = (
    _bent(mean_logps, alpha) for mean_logps in _mean_token_logps(pairs)
  )
  return registry.smoothed(beta * (chosen - rejected) - gamma, 0.0)


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def simper(pairs: PairLogps) -> Logps:
  """Returns exp(al) - exp(aw): nothing to tune but the learning rate.

  Xiao et al. 2025 (SimPER, arXiv 2502.00883): the inverse perplexity of the
  chosen response should rise and that of the rejected fall. Between -1 and 1,
  and flat for a response that is unlikely already.
  """
  chosen, rejected = _mean_token_logps(pairs)
  return jnp.exp(rejected) - jnp.exp(chosen)


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def repo(pairs: PairLogps, *, gamma: NotNegative) -> Logps:
  """Returns max(0, gamma - (aw - al)).

  Wu et al. 2025 (RePO, arXiv 2503.07426): `simpo` at a beta without bound. A
  pair whose margin is gamma, in nats of a mean token, no longer counts.
  """
  chosen, rejected = _mean_token_logps(pairs)
  return jax.nn.relu(gamma - (chosen - rejected))


@registry.register(honours=_WITH_PROMPT, needs_reference=False)
@typed
def orpo(pairs: PairLogps, *, lambda_: NotNegative) -> Logps:
  """Returns nll_w - lambda ls(o(aw) - o(al)), o(a) = a - log(1 - exp(a)).

  Hong et al. 2024 (ORPO, arXiv 2403.07691), eq 6 and 7: o is the log-odds.

  Differs: nll_w is the mean over the response tokens of the whole batch;
  there each response is averaged first. TRL's mean covers prompt tokens as
  well, as ours does under `prompt_nll`. Means above -1e-7 count as -1e-7,
  where odds are still finite.
  """
  chosen, rejected = (
    jnp.minimum(x, -_MIN_NLL) for x in _mean_token_logps(pairs)
  )
  log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
  odds_loss = registry.smoothed(log_odds, 0.0)
  return modifiers.chosen_nll(pairs) + lambda_ * odds_loss


@registry.register(honours=_NONE, needs_reference=False)
@typed
def cpo(pairs: PairLogps, *, beta: Positive, alpha: NotNegative) -> Logps:
  """Returns -ls(beta (lw - ll)) + alpha nll_w.

  Xu et al. 2024 (CPO, arXiv 2401.08417), there with alpha = 1.

  Differs: there the likelihood is a sum over a response's tokens; nll_w is
  their mean, as in TRL.
  """
  margin = pairs.policy_chosen - pairs.policy_rejected
  likelihood = alpha * modifiers.chosen_nll(pairs)
  return registry.smoothed(beta * margin, 0.0) + likelihood


@registry.register(honours=_NONE, needs_reference=False)
@typed
def slic(pairs: PairLogps, *, delta: Positive, lambda_: NotNegative) -> Logps:
  """Returns max(0, delta - (lw - ll)) + lambda nll_w.

  Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425).

  Differs: the second term there is the likelihood, summed over tokens, of the
  targets of supervised fine-tuning; here it is nll_w, of the chosen.

  Args:
    pairs: log-probabilities.
    delta: the margin, in nats, at which a pair no longer counts.
    lambda_: weight of the likelihood.
  """
  margin = pairs.policy_chosen - pairs.policy_rejected
  return jax.nn.relu(delta - margin) + lambda_ * modifiers.chosen_nll(pairs)


def _mean_token_logps(pairs: PairLogps) -> tuple[Array, Array]:
  """Returns aw and al; 0 for a slot without a pair."""
  return (
    pairs.policy_chosen / jnp.maximum(pairs.chosen_lengths, 1),
    pairs.policy_rejected / jnp.maximum(pairs.rejected_lengths, 1),
  )


def _bent(mean_logps: Array, alpha: Scalar) -> Array:
  """Returns (1 - exp(-alpha x)) / alpha of each x, and x where alpha is 0."""
  power = jnp.minimum(-alpha * mean_logps, modifiers.MAX_EXPONENT)
  divisor = jnp.where(alpha == 0, 1.0, -alpha).astype(mean_logps.dtype)
  return jnp.where(alpha == 0, mean_logps, jnp.expm1(power) / divisor)


def _log1mexp(x: Array) -> Array:
  """Returns log(1 - exp(x)) for x below 0, by the branch that is exact."""
  near_zero = x > -jnp.log(2.0)
  # The branch not taken gets a harmless argument: its gradient must be finite.
  return jnp.where(
    near_zero,
    jnp.log(-jnp.expm1(jnp.where(near_zero, x, -1.0))),
    jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, x))),
  )

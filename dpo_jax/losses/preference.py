"""Preference losses: log-probabilities of pairs to one number a pair.

Every loss is pure and unreduced: the training step takes the mean over the
pairs. Natural logs throughout. In the docstrings, per pair:

  lw, ll  policy log-probability of the chosen and rejected response, summed
          over its tokens; rw, rl under the reference; nw, nl their lengths
  u = lw - rw,  v = ll - rl      log-ratios
  d = u - v                      margin;  z = beta * d
  s = sigmoid,  ls = log sigmoid;  e = label_smoothing

beta above 0 is the strength of the tie to the reference.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dpo_jax.losses import modifiers, registry
from dpo_jax.losses.registry import (
  FlipRate,
  Logps,
  Loss,
  PairLogps,
  Positive,
  PositiveFlipRate,
  Range,
  Scalar,
  UnitInterval,
)
from dpo_jax.types import Array, Rows, typed

LOSSES: dict[str, Loss] = registry.LOSSES

# Modifiers that a loss may honour: of the log-ratios' difference alone, of
# both log-ratios, and of the batch's sorted log-ratios.
_OF_MARGIN = frozenset({"f_divergence", "ld_alpha", "wpo", "sft_weight"})
_PAIRWISE = _OF_MARGIN - {"f_divergence"}
_SORTED = _PAIRWISE - {"wpo"}
_NONE = frozenset()


@typed
def implicit_rewards(pairs: PairLogps, beta: Scalar) -> tuple[Logps, Logps]:
  """Returns beta * log-ratio of the chosen and of the rejected responses.

  Whatever the loss and its f-divergence (Rafailov et al. 2023, arXiv
  2305.18290, sec 4); under `ld_alpha` the log-ratios are weighted ones.
  """
  return beta * pairs.chosen_logratio, beta * pairs.rejected_logratio


@registry.register(honours=_OF_MARGIN)
@typed
def dpo(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -ls(z): Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq 7."""
  return _smoothed(beta * pairs.margin, 0.0)


@registry.register(honours=_OF_MARGIN)
@typed
def cdpo(
  pairs: PairLogps, *, beta: Positive, label_smoothing: FlipRate
) -> Logps:
  """Returns -(1 - e) ls(z) - e ls(-z), conservative DPO.

  Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO":
  labels are taken to be wrong with probability e.
  """
  return _smoothed(beta * pairs.margin, label_smoothing)


@registry.register(honours=_OF_MARGIN)
@typed
def robust(
  pairs: PairLogps, *, beta: Positive, label_smoothing: FlipRate
) -> Logps:
  """Returns (-(1 - e) ls(z) + e ls(-z)) / (1 - 2e).

  Chowdhury et al. 2024 (rDPO, arXiv 2403.00409): unbiased for `dpo`
  when labels are flipped with probability e.
  """
  z, e = beta * pairs.margin, label_smoothing
  clean, flipped = -jax.nn.log_sigmoid(z), -jax.nn.log_sigmoid(-z)
  return ((1 - e) * clean - e * flipped) / (1 - 2 * e)


@registry.register(honours=_OF_MARGIN)
@typed
def ipo(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns (u / nw - v / nl - 1 / (2 beta))^2.

  Azar et al. 2023 (IPO, arXiv 2310.12036), eq 17, with their tau our beta.
  Differs: log-ratios are averaged over a response's tokens, which its authors
  confirmed to TRL and HALOs is what they ran; `ipo_sum` is eq 17 as printed.
  """
  return jnp.square(_length_averaged_margin(pairs) - 1 / (2 * beta))


@registry.register(honours=_PAIRWISE)
@typed
def ipo_sum(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns (d - 1 / (2 beta))^2.

  Azar et al. 2023 (IPO, arXiv 2310.12036), eq 17 as printed, with their tau
  our beta.
  """
  return jnp.square(pairs.margin - 1 / (2 * beta))


@registry.register(honours=_OF_MARGIN)
@typed
def hinge(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns max(0, 1 - z): Liu et al. 2023 (RSO, arXiv 2309.06657).

  1 / beta is the margin at which a pair no longer counts.
  """
  return jax.nn.relu(1 - beta * pairs.margin)


@registry.register(honours=_OF_MARGIN)
@typed
def dpo_norm(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -ls(beta (u / nw - v / nl)), length-normalised DPO.

  Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), eq 6.
  """
  return _smoothed(beta * _length_averaged_margin(pairs), 0.0)


@registry.register(honours=_PAIRWISE)
@typed
def apo_zero(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns 1 - s(beta u) + s(beta v): for chosen better than the policy's.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq 7.
  """
  u, v = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
  return jax.nn.sigmoid(-u) + jax.nn.sigmoid(v)


@registry.register(honours=_PAIRWISE)
@typed
def apo_down(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns s(beta u) + 1 - s(z): for chosen worse than the policy's own.

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq 8.
  """
  u, z = beta * pairs.chosen_logratio, beta * pairs.margin
  return jax.nn.sigmoid(u) + jax.nn.sigmoid(-z)


@registry.register(honours=_PAIRWISE)
@typed
def nca(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -ls(beta u) - ls(-beta u) / 2 - ls(-beta v) / 2.

  Chen et al. 2024 (NCA, arXiv 2402.05369), with two responses, one of them
  preferred.
  """
  u, v = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
  ls = jax.nn.log_sigmoid
  return -ls(u) - (ls(-u) + ls(-v)) / 2


@registry.register(honours=_PAIRWISE)
@typed
def bco_pair(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -ls(beta u) - ls(-beta v).

  Jung et al. 2024 (BCO, arXiv 2404.04656), without the reward shift.
  """
  u, v = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
  return -jax.nn.log_sigmoid(u) - jax.nn.log_sigmoid(-v)


@registry.register(honours=_PAIRWISE)
@typed
def sppo_hard(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2.

  Wu et al. 2024 (SPPO, arXiv 2405.00675), eq 4.7 with win probabilities 1 and
  0; their eta is 1 / beta.
  """
  u, v = pairs.chosen_logratio, pairs.rejected_logratio
  return jnp.square(u - 1 / (2 * beta)) + jnp.square(v + 1 / (2 * beta))


@registry.register(honours=_OF_MARGIN)
@typed
def exo(
  pairs: PairLogps, *, beta: Positive, label_smoothing: PositiveFlipRate
) -> Logps:
  """Returns s(z) (ls(z) - log(1 - e)) + s(-z) (ls(-z) - log e).

  Ji et al. 2024 (EXO, arXiv 2402.00856), eq 16: the reverse KL divergence
  from the policy's preference to the smoothed label's, so e is above 0.
  """
  z = beta * pairs.margin
  chosen = jax.nn.log_sigmoid(z) - jnp.log1p(-label_smoothing)
  rejected = jax.nn.log_sigmoid(-z) - jnp.log(label_smoothing)
  return jax.nn.sigmoid(z) * chosen + jax.nn.sigmoid(-z) * rejected


@registry.register(honours=_OF_MARGIN)
@typed
def discopop(pairs: PairLogps, *, beta: Positive, tau: Positive) -> Logps:
  """Returns (1 - m) (-ls(z)) + m exp(-z), m = s(z / tau).

  Lu et al. 2024 (DiscoPOP, arXiv 2406.08414), eq 5 with tau = 0.05. At tau
  above 1 the loss of a negative margin grows exponentially.
  """
  z = beta * pairs.margin
  # m exp(-z) in one exponential: where exp(-z) overflows, m is 0.
  exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
  return jax.nn.sigmoid(-z / tau) * _smoothed(z, 0.0) + exponential


@registry.register(honours=_SORTED, looks_across_batch=True)
@typed
def aot(
  pairs: PairLogps, *, beta: Positive, label_smoothing: FlipRate
) -> Logps:
  """Returns -(1 - e) ls(beta x) - e ls(-beta x), x = sort(lw-ll) - sort(rw-rl).

  Melnyk et al. 2024 (AOT, arXiv 2406.05882), the paired form: the policy's
  margins should exceed the reference's in the order of their quantiles. Every
  pair of the batch must be present; a pair is given the loss at its own rank.
  """
  x = _quantile_difference(
    pairs.policy_chosen - pairs.policy_rejected,
    pairs.reference_chosen - pairs.reference_rejected,
    pairs.chosen_lengths > 0,
  )
  return _smoothed(beta * x, label_smoothing)


@registry.register(honours=_SORTED, looks_across_batch=True)
@typed
def aot_unpaired(
  pairs: PairLogps, *, beta: Positive, label_smoothing: FlipRate
) -> Logps:
  """Returns -(1 - e) ls(beta x) - e ls(-beta x), x = sort(u) - sort(v).

  Melnyk et al. 2024 (AOT, arXiv 2406.05882), the unpaired form. Every pair of
  the batch must be present; a pair is given the loss at its chosen's rank.
  """
  x = _quantile_difference(
    pairs.chosen_logratio, pairs.rejected_logratio, pairs.chosen_lengths > 0
  )
  return _smoothed(beta * x, label_smoothing)


@registry.register(
  honours=_NONE, needs_reference=False, inputs="demonstrations"
)
@typed
def sft(pairs: PairLogps) -> Logps:
  """Returns -lw times pairs over chosen tokens of the batch.

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
  honours=_NONE, needs_reference=False, inputs="demonstrations"
)
@typed
def preferred_ft(pairs: PairLogps) -> Logps:
  """Returns `sft`, whose demonstrations are the chosen responses of pairs.

  Rafailov et al. 2023 (arXiv 2305.18290), sec 6, Preferred-FT.
  """
  return modifiers.chosen_nll(pairs)


@registry.register(honours=_PAIRWISE, needs_reference=False)
@typed
def unlikelihood(pairs: PairLogps, *, alpha: UnitInterval) -> Logps:
  """Returns -lw + alpha ll.

  Welleck et al. 2019 as Rafailov et al. 2023 (arXiv 2305.18290, app C.3) use
  it: the rejected response is made less likely. Not bounded below.
  """
  return -pairs.policy_chosen + alpha * pairs.policy_rejected


def _smoothed(z: Array, label_smoothing: Scalar) -> Array:
  """Returns the cross-entropy of s(z) to a label wrong with probability e."""
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(
    z
  ) - label_smoothing * jax.nn.log_sigmoid(-z)


def _length_averaged_margin(pairs: PairLogps) -> Array:
  chosen = pairs.chosen_logratio / jnp.maximum(pairs.chosen_lengths, 1)
  rejected = pairs.rejected_logratio / jnp.maximum(pairs.rejected_lengths, 1)
  return chosen - rejected


def _quantile_difference(x: Array, y: Array, valid: Array) -> Array:
  """Returns x minus the y of the same rank among the valid; 0 if not valid."""
  largest = jnp.finfo(x.dtype).max  # slots without a pair sort last
  order = jnp.argsort(jnp.where(valid, x, largest))
  rank = jnp.argsort(order)
  matched = jnp.sort(jnp.where(valid, y, largest))[rank]
  return jnp.where(valid, x - matched, 0)


@dataclasses.dataclass(frozen=True)
class Objective:
  """A loss with its hyper-parameters and modifiers, checked."""

  loss: Loss
  hyperparameters: tuple[tuple[str, float], ...]
  f_divergence: str
  f_alpha: float | None
  ld_alpha: float
  wpo: bool
  sft_weight: float

  @property
  def needs_reference(self) -> bool:
    """Whether reference log-probabilities are read."""
    return self.loss.needs_reference

  @property
  def looks_across_batch(self) -> bool:
    """Whether all pairs of a batch must be present at once."""
    return self.loss.looks_across_batch

  @property
  def inputs(self) -> str:
    """`pairs` or `demonstrations`."""
    return self.loss.inputs

  @property
  def needs_log_sum_squares(self) -> bool:
    """Whether `per_pair` must be given `modifiers.wpo_log_weights`."""
    return self.wpo

  @property
  def beta(self) -> float:
    """What scales log-ratios to rewards; 1 for a loss without a beta."""
    return dict(self.hyperparameters).get("beta", 1.0)

  def token_weights(
    self, rows: Rows, lengths: Int[Array, "B 2"]
  ) -> Float[Array, "R S"]:
    """Returns each token's weight in its response's sum, 0 at padding."""
    return modifiers.length_desensitised_weights(rows, lengths, self.ld_alpha)

  def per_pair(
    self, pairs: PairLogps, log_weights: Logps | None = None
  ) -> Logps:
    """Returns each pair's loss; the step takes the mean over valid pairs.

    Args:
      pairs: from sums under `token_weights`.
      log_weights: `modifiers.wpo_log_weights`, where these are needed.
    """
    scored = pairs
    if self.f_divergence != "reverse_kl":
      scored = modifiers.with_scores(pairs, self.f_divergence, self.f_alpha)
    losses = self.loss.fn(scored, **dict(self.hyperparameters))
    if self.wpo:
      losses = modifiers.weighted(losses, log_weights)
    if self.sft_weight:
      losses += self.sft_weight * modifiers.chosen_nll(pairs)
    return losses


def make_objective(
  name: str,
  hyperparameters: Mapping[str, float],
  *,
  f_divergence: str = "reverse_kl",
  f_alpha: float | None = None,
  ld_alpha: float = 1.0,
  wpo: bool = False,
  sft_weight: float = 0.0,
) -> Objective:
  """Returns the loss `name` with its hyper-parameters and modifiers.

  Args:
    name: a key of `LOSSES`.
    hyperparameters: all of the loss's, and no others.
    f_divergence: one of `modifiers.F_DIVERGENCES`.
    f_alpha: the alpha of `f_divergence="alpha"`, not 1.
    ld_alpha: weight, in [0, 1], of tokens past the shorter response's length.
    wpo: weight pairs by their probability under the policy.
    sft_weight: weight, at least 0, of the chosen responses' token-mean NLL.

  Raises:
    ValueError: a value is not allowed, or the loss does not honour it.
  """
  loss = registry.find(name)
  registry.check_hyperparameters(loss, hyperparameters)
  modifiers.check_f_divergence(f_divergence, f_alpha)
  registry.check("ld_alpha", ld_alpha, Range(0, 1, "[]"))
  registry.check("sft_weight", sft_weight, Range(0, math.inf, "[)"))
  used = {
    "f_divergence": f_divergence != "reverse_kl",
    "ld_alpha": ld_alpha != 1,
    "wpo": wpo,
    "sft_weight": sft_weight != 0,
  }
  for modifier, is_used in used.items():
    if is_used and modifier not in loss.honours:
      honouring = [n for n, x in LOSSES.items() if modifier in x.honours]
      raise registry.does_not_honour(loss, modifier, honouring)
  if used["ld_alpha"] and used["sft_weight"]:
    raise ValueError(
      f"loss.sft_weight={sft_weight:g}: must be 0 where loss.ld_alpha is"
      " below 1; its likelihood counts every token alike"
    )
  return Objective(
    loss=loss,
    hyperparameters=tuple(
      (key, float(hyperparameters[key])) for key in loss.hyperparameters
    ),
    f_divergence=f_divergence,
    f_alpha=None if f_alpha is None else float(f_alpha),
    ld_alpha=float(ld_alpha),
    wpo=bool(wpo),
    sft_weight=float(sft_weight),
  )

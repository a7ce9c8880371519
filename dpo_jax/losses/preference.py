"""Losses of pairs against a reference: log-probabilities to one number a pair.

Every loss is pure and unreduced: the training step takes the mean over the
pairs. Natural logs throughout. In the docstrings, per pair:

  lw, ll  policy log-probability of the chosen and rejected response, summed
          over its tokens; rw, rl under the reference; nw, nl their lengths
  u = lw - rw,  v = ll - rl      log-ratios
  d = u - v                      margin;  z = beta * d
  s = sigmoid,  ls = log sigmoid;  e = label_smoothing

beta above 0 is the strength of the tie to the reference.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import modifiers, registry
from dpo_jax.losses.registry import (
  FlipRate,
  Logps,
  NotNegative,
  PairLogps,
  Positive,
  PositiveFlipRate,
  Scalar,
  Share,
)
from dpo_jax.types import Array, typed

# Modifiers that a loss may honour: of the log-ratios' difference alone, of
# both log-ratios, and of the batch's sorted log-ratios.
_OF_MARGIN = frozenset({"f_divergence", "ld_alpha", "wpo", "sft_weight"})
_PAIRWISE = _OF_MARGIN - {"f_divergence"}
_SORTED = _PAIRWISE - {"wpo"}


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
  return registry.smoothed(beta * pairs.margin, 0.0)


@registry.register(honours=frozenset({"sft_weight"}), inputs="ranked")
@typed
def plackett_luce(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -sum_k log(exp(z_k) / sum_(j >= k) exp(z_j)), z_k = beta u_k.

  Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq 20: `dpo` for a list of
  responses, the best first, under the Plackett-Luce model; two give `dpo`.
  """
  logratios, lengths = pairs.ranked_logratios, pairs.ranked_lengths
  if logratios is None:
    logratios = jnp.stack([pairs.chosen_logratio, pairs.rejected_logratio], 1)
    lengths = jnp.stack([pairs.chosen_lengths, pairs.rejected_lengths], 1)
  present = lengths > 0
  # Not -inf: the gradient of a slot without any response would be nan.
  z = jnp.where(present, beta * logratios, -1e30)
  rest = jax.lax.cumlogsumexp(z, axis=1, reverse=True)
  return jnp.sum(jnp.where(present, rest - z, 0), axis=1)


@registry.register(honours=_OF_MARGIN)
@typed
def cdpo(
  pairs: PairLogps, *, beta: Positive, label_smoothing: FlipRate
) -> Logps:
  """Returns -(1 - e) ls(z) - e ls(-z): conservative DPO.

  Mitchell 2023 (cDPO, https://ericmitchell.ai/cdpo.pdf), eq 3: labels are
  taken to be wrong with probability e.
  """
  return registry.smoothed(beta * pairs.margin, label_smoothing)


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
  """Returns -ls(beta (u / nw - v / nl)): length-normalised DPO.

  Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), eq 6.
  """
  return registry.smoothed(beta * _length_averaged_margin(pairs), 0.0)


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

  Beware: where tau is below (1 - log 2) / 3 = 0.102, the first steps lower the
  margins. At tau 0.05 the loss has a minimum at z = -0.119, rises through
  z = 0, where a policy that is its reference begins, to a maximum at z = 0.072
  and falls beyond it. Pairs get over it by what others teach, or stay behind.
  """
  z = beta * pairs.margin
  # m exp(-z) in one exponential: where exp(-z) overflows, m is 0.
  exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
  return jax.nn.sigmoid(-z / tau) * registry.smoothed(z, 0.0) + exponential


@registry.register(honours=_PAIRWISE)
@typed
def rdpo(pairs: PairLogps, *, beta: Positive, alpha: NotNegative) -> Logps:
  """Returns -ls(z + alpha (nw - nl)): length-regularised DPO.

  Park et al. 2024 (R-DPO, arXiv 2403.19159): with n the length, the policy
  with the largest mean of r - alpha n - beta log-ratio is the reference times
  exp((r - alpha n) / beta) over a constant. Solved for r, the rewards of a
  pair differ by z + alpha (nw - nl), in the likelihood that DPO maximises. The
  length difference explains its part of a preference: the longer chosen is
  beside rejected, the smaller the gradient. Some public code subtracts the
  term, which favours length.

  Args:
    pairs: log-probabilities and lengths.
    beta: as in `dpo`.
    alpha: reward a token, in units of beta * nats; 0 gives `dpo`.
  """
  lengths = pairs.chosen_lengths - pairs.rejected_lengths
  return registry.smoothed(beta * pairs.margin + alpha * lengths, 0.0)


@registry.register(honours=_PAIRWISE)
@typed
def dpop(pairs: PairLogps, *, beta: Positive, lambda_: NotNegative) -> Logps:
  """Returns -ls(beta (d - lambda max(0, rw - lw))): DPO-Positive.

  Pal et al. 2024 (Smaug, arXiv 2402.13228): a chosen response that
  becomes less likely than under the reference is penalised. lambda of 0 gives
  `dpo`.
  """
  fall = jax.nn.relu(-pairs.chosen_logratio)
  return registry.smoothed(beta * (pairs.margin - lambda_ * fall), 0.0)


@registry.register(honours=_PAIRWISE)
@typed
def dpo_shift(pairs: PairLogps, *, beta: Positive, shift: Share) -> Logps:
  """Returns -ls(beta (u - f v)), f = shift.

  Yang et al. 2025 (DPO-Shift, arXiv 2502.07599): the less the rejected counts,
  the more of the margin comes from a chosen that becomes likelier, and the
  smaller it grows. f of 1 gives `dpo`.

  Differs: f is fixed; the paper also lets it run linearly over training.
  """
  u, v = pairs.chosen_logratio, pairs.rejected_logratio
  return registry.smoothed(beta * (u - shift * v), 0.0)


@registry.register(honours=_PAIRWISE)
@typed
def cal_dpo(pairs: PairLogps, *, beta: Positive) -> Logps:
  """Returns -ls(d) + (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2.

  Xiao et al. 2024 (Cal-DPO, arXiv 2412.14516): log-ratios are tied to the
  scale of rewards of 1/2 and -1/2. beta stands in the targets alone.

  Differs: its authors' code halves the squares; its config has beta 0.002.
  """
  return registry.smoothed(pairs.margin, 0.0) + sppo_hard(pairs, beta=beta)


@registry.register(honours=_PAIRWISE)
@typed
def chi_po(pairs: PairLogps, *, beta: Positive, r_max: Positive) -> Logps:
  """Returns -ls(clip(beta (phi(u) - phi(v)), +-2 r_max)), phi(x) = exp(x) + x.

  Huang et al. 2024 (chi^2-PO, arXiv 2407.13399): phi(t) = t + log t of the
  probability ratio t ties the policy to the reference by the chi^2 and the KL
  divergence together. A pair past the clip has no gradient, on either side.

  Differs: exponents stop at 80, so that no score overflows; the paper's runs
  stop them at 20.

  Args:
    pairs: log-probabilities.
    beta: strength of the tie.
    r_max: bound of the rewards that the pairs were labelled by.
  """
  chosen, rejected = (
    jnp.exp(jnp.minimum(x, modifiers.MAX_EXPONENT)) + x
    for x in (pairs.chosen_logratio, pairs.rejected_logratio)
  )
  margin = beta * (chosen - rejected)
  return registry.smoothed(jnp.clip(margin, -2 * r_max, 2 * r_max), 0.0)


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
  return registry.smoothed(beta * x, label_smoothing)


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
  return registry.smoothed(beta * x, label_smoothing)


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

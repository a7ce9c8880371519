"""Changes to a preference loss that do not depend on which loss it is.

Each is usable with the losses whose `honours` names it; `objectives.
make_objective` refuses the others.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dpo_jax.losses import logprobs, registry
from dpo_jax.losses.registry import Logps, PairLogps
from dpo_jax.types import Array, Rows, typed

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")

# exp(80) = 5.5e34 is a float32 and leaves room to multiply by beta and add.
MAX_EXPONENT = 80.0


@typed
def f_score(
  logratio: Logps, f_divergence: str, f_alpha: float | None = None
) -> Logps:
  """Returns f'(t) at t = exp(logratio), up to a constant.

  Wang et al. 2023 (arXiv 2309.16240): a policy held to its reference
  by an f-divergence has implicit reward beta f'(policy / reference):

    reverse_kl  u            forward_kl  1 - exp(-u)
    js          log 2 + log sigmoid(u)
    alpha       (exp((a - 1) u) - 1) / (a - 1)

  Differs: exponents stop at 80, so that no score overflows; past it a score
  is constant and has no gradient. Our `a` is 1 minus the paper's alpha, so
  that reverse_kl is the limit a = 1 and forward_kl is a = 0.

  Args:
    logratio: u, policy minus reference log-probability of a response.
    f_divergence: one of `F_DIVERGENCES`.
    f_alpha: a, not 1; for `alpha` only.
  """
  match f_divergence:
    case "reverse_kl":
      return logratio
    case "forward_kl":
      return -jnp.expm1(jnp.minimum(-logratio, MAX_EXPONENT))
    case "js":
      return jnp.log(2.0).astype(logratio.dtype) + jax.nn.log_sigmoid(logratio)
    case "alpha":
      power = f_alpha - 1
      return jnp.expm1(jnp.minimum(power * logratio, MAX_EXPONENT)) / power
  raise AssertionError(f_divergence)


def check_f_divergence(f_divergence: str, f_alpha: float | None) -> None:
  """Raises ValueError unless `f_score` can be called with these."""
  if f_divergence not in F_DIVERGENCES:
    raise ValueError(
      f"loss.f_divergence={f_divergence!r}: must be one of"
      f" {', '.join(F_DIVERGENCES)}"
    )
  if f_divergence != "alpha":
    if f_alpha is not None:
      raise ValueError(
        f"loss.f_alpha={f_alpha}: loss.f_divergence={f_divergence!r} does"
        " not honour it; 'alpha' does"
      )
    return
  if f_alpha is None:
    raise ValueError("loss.f_divergence='alpha' needs loss.f_alpha")
  registry.check("f_alpha", f_alpha, registry.Range(-math.inf, math.inf, "()"))
  if f_alpha == 1:
    raise ValueError(
      f"loss.f_alpha={f_alpha}: must not be 1; that limit is"
      " loss.f_divergence='reverse_kl'"
    )


def with_scores(
  pairs: PairLogps, f_divergence: str, f_alpha: float | None
) -> PairLogps:
  """Returns pairs whose log-ratios are the f-divergence's scores.

  Scores stand where the policy's log-probabilities were and zeros where the
  reference's were: a loss of the log-ratios sees the scores as such.
  """
  zeros = jnp.zeros_like(pairs.chosen_logratio)
  return dataclasses.replace(
    pairs,
    policy_chosen=f_score(pairs.chosen_logratio, f_divergence, f_alpha),
    policy_rejected=f_score(pairs.rejected_logratio, f_divergence, f_alpha),
    reference_chosen=zeros,
    reference_rejected=zeros,
  )


@typed
def length_desensitised_weights(
  rows: Rows, lengths: Int[Array, "B C"], ld_alpha: float
) -> Float[Array, "R S"]:
  """Returns each scored token's weight, 0 at padding.

  Liu et al. 2024 (LD-DPO, arXiv 2409.06411): with n the shorter of a
  pair's two response lengths, token k of either response (k = 1, 2, ...) has
  weight 1 for k <= n and `ld_alpha` after it.

  Args:
    rows: the rows that hold the pairs.
    lengths: response tokens; of chosen and rejected, if ld_alpha is not 1.
    ld_alpha: in [0, 1]; 1 changes nothing.
  """
  pair = jnp.maximum(rows.response, 0) // lengths.shape[1]
  shared = jnp.min(lengths, axis=1)[pair]
  weights = jnp.where(rows.rank < shared, 1.0, ld_alpha)
  return jnp.where(rows.response >= 0, weights, 0.0)


@typed
def wpo_log_weights(
  policy: logprobs.TokenLogps, rows: Rows, lengths: Int[Array, "B 2"]
) -> Logps:
  """Returns log(w_w w_l), without gradient; 0 for pairs not in these rows.

  Zhou et al. 2024 (WPO, arXiv 2406.11827), eq 2, sampled alignment:
  w = exp(mean over response tokens of log p(token) - log sum_v p_v^2).

  Args:
    policy: with `log_sum_squares`.
    rows: the rows that hold the pairs.
    lengths: response tokens of chosen and rejected.
  """
  aligned = jax.lax.stop_gradient(policy.logps - policy.log_sum_squares)
  sums = logprobs.response_sums(aligned, rows, lengths.shape)
  return (sums / jnp.maximum(lengths, 1)).sum(axis=1)


@typed
def weighted(losses: Logps, log_weights: Logps, max_weight: float) -> Logps:
  """Returns pair losses times min(w_w w_l, max_weight), WPO's weights.

  Its authors' code stops the product at 1. Unbounded, as in TRL 1.16, it is
  often far above: text that was sampled below temperature 1 consists of tokens
  that are likelier than those the policy would draw.

  Args:
    losses: of pairs.
    log_weights: of `wpo_log_weights`.
    max_weight: above 0; inf leaves the product as it is.
  """
  bounded = jnp.minimum(log_weights, math.log(max_weight))
  return losses * jnp.exp(jax.lax.stop_gradient(bounded))


@typed
def chosen_nll(pairs: PairLogps) -> Logps:
  """Returns shares of the chosen responses' negative log-likelihood.

  Their mean over the batch's pairs is the mean over all its chosen tokens:
  -lw * (pairs in the batch) / (chosen tokens in the batch). Added with a
  weight to a preference loss it is RPO's (Pang et al. 2024, arXiv 2404.19733).
  Differs: there each response is averaged over its own tokens first.

  Where the pairs hold their prompts' log-probabilities, tokens of prompts
  count as well (`prompt_nll`).
  """
  logps, lengths = pairs.policy_chosen, pairs.chosen_lengths
  if pairs.policy_prompt is not None:
    logps, lengths = logps + pairs.policy_prompt, lengths + pairs.prompt_lengths
  num_tokens = jnp.maximum(jnp.sum(lengths), 1)
  return -logps * (jnp.sum(pairs.present) / num_tokens)

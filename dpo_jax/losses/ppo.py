"""PPO on responses: rewards of tokens, advantages and clipped losses.

Arrays are [B,U]: B responses of at most U tokens, the first token first. A
token at or past `lengths` is padding: whatever stands there, NaN included,
moves no number, and what is returned there is 0. Natural logs, float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dpo_jax.types import Array, typed

# Added to a variance before its root: advantages that are all equal are
# whitened to 0 (Ziegler et al.'s code has the same).
VARIANCE_EPSILON = 1e-8
# The largest relative error that the KL controller acts upon (Ziegler et al.).
MAX_KL_ERROR = 0.2


@typed
def is_token(lengths: Int[Array, "B"], length: int) -> Bool[Array, "B U"]:
  """Returns which of `length` places hold a token of the response."""
  return jnp.arange(length)[None] < lengths[:, None]


@typed
def token_rewards(
  scores: Float[Array, "B"],
  logps: Float[Array, "B U"],
  reference_logps: Float[Array, "B U"],
  lengths: Int[Array, "B"],
  kl_coef: Float[Array, ""] | float,
) -> Float[Array, "B U"]:
  """Returns the reward of each token: the score at the last, less the KL.

      r_t = [t = last] score - kl_coef (logp_t - reference_logp_t)

  Ziegler et al. 2019 (arXiv 1909.08593), eq 2, token by token as in Stiennon
  et al. 2020 (arXiv 2009.01325). A response without tokens has no reward.

  Args:
    scores: what the reward function says of each whole response.
    logps: under the policy that sampled, nats.
    reference_logps: under the reference, nats.
    lengths: tokens of each response.
    kl_coef: beta of the objective, score units per nat, at least 0.
  """
  mask = is_token(lengths, logps.shape[1])
  is_last = jnp.arange(logps.shape[1])[None] == lengths[:, None] - 1
  rewards = -kl_coef * (logps - reference_logps)
  rewards += jnp.where(is_last, scores[:, None], 0)
  return jnp.where(mask, rewards, 0)


@typed
def advantages(
  rewards: Float[Array, "B U"],
  values: Float[Array, "B U"],
  lengths: Int[Array, "B"],
  *,
  gamma: float,
  lam: float,
) -> tuple[Float[Array, "B U"], Float[Array, "B U"]]:
  """Returns generalised advantages and the returns that values are fitted to.

      delta_t = r_t + gamma V_(t+1) - V_t
      A_t = delta_t + gamma lam A_(t+1),   return_t = A_t + V_t

  Schulman et al. 2016 (arXiv 1506.02438), eq 16. After the last token there
  is nothing: V and A are 0, also where a response was cut.

  Args:
    rewards: of each token.
    values: expected sum of the rewards from this token on.
    lengths: tokens of each response.
    gamma: discount, in [0, 1].
    lam: weight of longer estimates, in [0, 1]: 0 is delta, 1 Monte Carlo.
  """
  mask = is_token(lengths, rewards.shape[1])
  rewards, values = (jnp.where(mask, x, 0) for x in (rewards, values))
  following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + gamma * following - values

  def backwards(after, delta):
    here = delta + gamma * lam * after
    return here, here

  _, found = jax.lax.scan(
    backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True
  )
  found = jnp.where(mask, found.T, 0)
  return found, found + values


@typed
def masked_mean(
  values: Float[Array, "B U"], lengths: Int[Array, "B"]
) -> Float[Array, ""]:
  """Returns the mean over all tokens; 0 where there are none."""
  mask = is_token(lengths, values.shape[1])
  total = jnp.sum(jnp.where(mask, values, 0))
  return total / jnp.maximum(jnp.sum(mask), 1)


@typed
def masked_variance(
  values: Float[Array, "B U"], lengths: Int[Array, "B"]
) -> Float[Array, ""]:
  """Returns the variance over all tokens, divided by their number."""
  centred = values - masked_mean(values, lengths)
  return masked_mean(centred**2, lengths)


@typed
def whiten(
  values: Float[Array, "B U"], lengths: Int[Array, "B"]
) -> Float[Array, "B U"]:
  """Returns values with mean 0 and variance 1 over all tokens of the batch."""
  mean = masked_mean(values, lengths)
  scale = jax.lax.rsqrt(masked_variance(values, lengths) + VARIANCE_EPSILON)
  return jnp.where(
    is_token(lengths, values.shape[1]), (values - mean) * scale, 0
  )


@typed
def policy_losses(
  logps: Float[Array, "*shape"],
  old_logps: Float[Array, "*shape"],
  advantages: Float[Array, "*shape"],
  *,
  clip: float,
) -> Float[Array, "*shape"]:
  """Returns max(-ratio A, -clipped ratio A) of each token.

      ratio = exp(logp - old_logp), clipped to [1 - clip, 1 + clip]

  Schulman et al. 2017 (arXiv 1707.06347), eq 7, negated. The gradient is
  exactly 0 where the clipped term is the larger. Tokens only, of any shape.

  Args:
    logps: under the policy, nats.
    old_logps: under the policy that sampled, nats.
    advantages: without gradient.
    clip: epsilon, above 0.
  """
  ratio = jnp.exp(logps - old_logps)
  clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
  return jnp.maximum(-advantages * ratio, -advantages * clipped)


@typed
def is_clipped(
  logps: Float[Array, "*shape"],
  old_logps: Float[Array, "*shape"],
  advantages: Float[Array, "*shape"],
  *,
  clip: float,
) -> Bool[Array, "*shape"]:
  """Returns for which tokens `policy_losses` has no gradient."""
  ratio = jnp.exp(logps - old_logps)
  above = (ratio > 1 + clip) & (advantages > 0)
  return above | ((ratio < 1 - clip) & (advantages < 0))


@typed
def value_losses(
  values: Float[Array, "*shape"],
  old_values: Float[Array, "*shape"],
  returns: Float[Array, "*shape"],
  *,
  clip: float,
) -> Float[Array, "*shape"]:
  """Returns half the squared error of each value, or of its clipped one.

      max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2

  The larger of both, as in the code of Ziegler et al. 2019 (arXiv 1909.08593)
  and of PPO before it; the papers do not have it. No gradient where V has left
  the interval towards R. Tokens only, of any shape.

  Args:
    values: of the policy's head.
    old_values: when the response was sampled.
    returns: what the values should be.
    clip: how far a value may move, in score units; 0 clips nothing.
  """
  errors = (values - returns) ** 2
  if clip:
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    errors = jnp.maximum(errors, (clipped - returns) ** 2)
  return 0.5 * errors


@typed
def explained_variance(
  values: Float[Array, "B U"],
  returns: Float[Array, "B U"],
  lengths: Int[Array, "B"],
) -> Float[Array, ""]:
  """Returns 1 - Var(return - value) / Var(return); 0 for equal returns."""
  total = masked_variance(returns, lengths)
  left = masked_variance(returns - values, lengths)
  return jnp.where(total > 0, 1 - left / jnp.where(total > 0, total, 1), 0)


@typed
def next_kl_coef(
  kl_coef: Float[Array, ""],
  kl: Float[Array, ""],
  *,
  target: float | None,
  horizon: float,
  num_responses: int,
) -> Float[Array, ""]:
  """Returns the coefficient of the next batch, moved towards the target KL.

      kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon)

  Ziegler et al. 2019 (arXiv 1909.08593), section 2.2; K_beta, 0.1 there, is
  num_responses / horizon, as in their code.

  Args:
    kl_coef: of this batch.
    kl: the batch's mean of the summed logp - reference_logp, nats.
    target: nats of a sequence, above 0; None leaves the coefficient alone.
    horizon: responses over which it may change by a fifth, above 0.
    num_responses: B.
  """
  if target is None:
    return kl_coef
  error = jnp.clip(kl / target - 1, -MAX_KL_ERROR, MAX_KL_ERROR)
  return kl_coef * (1 + error * num_responses / horizon)

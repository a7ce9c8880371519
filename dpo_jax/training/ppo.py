"""PPO: log-probabilities, values, advantages and the clipped update.

The baseline of Rafailov et al. 2023 (arXiv 2305.18290), after Ziegler et al.
2019 (arXiv 1909.08593). A value head on the policy's own trunk reads the state
that predicts a token, so one pass over packed rows gives log-probabilities and
values. `iteration` puts the steps together.

Differs: experts get no load-balancing loss.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.losses import logprobs
from dpo_jax.losses import ppo as rl
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.training import ppo_rows, steps
from dpo_jax.training import state as state_lib
from dpo_jax.training.ppo_rows import Responses
from dpo_jax.types import Array, Params, Rows

VALUE_HEAD = "value_head"
KL_COEF = "kl_coef"  # in the state, beside the running means of losses


@dataclasses.dataclass(frozen=True)
class Settings:
  """What PPO does with a batch of responses.

  Attributes:
    epochs: passes over the responses of an iteration.
    minibatches: updates in an epoch.
    clip: how far the ratio of probabilities may leave 1.
    value_coef: weight of the value loss.
    value_clip: how far a value may move, in score units; 0 clips nothing.
    gamma: discount.
    lam: weight of longer estimates of the advantage.
    kl_coef: score units that a nat of KL costs, at first.
    target_kl: nats of a sequence to which kl_coef is steered; None fixes it.
    horizon: responses over which kl_coef may change by a fifth.
    whiten: whether advantages have mean 0 and variance 1 in an iteration.
    missing_eos_penalty: score units that a response loses which did not end.
  """

  epochs: int = 4
  minibatches: int = 1
  clip: float = 0.2
  value_coef: float = 0.1
  value_clip: float = 0.2
  gamma: float = 1.0
  lam: float = 0.95
  kl_coef: float = 0.05
  target_kl: float | None = None
  horizon: float = 10_000.0
  whiten: bool = True
  missing_eos_penalty: float = 0.0

  def __post_init__(self):
    is_allowed = {
      "epochs": (self.epochs >= 1, "at least 1"),
      "minibatches": (self.minibatches >= 1, "at least 1"),
      "clip": (self.clip > 0, "above 0"),
      "value_coef": (self.value_coef >= 0, "at least 0"),
      "value_clip": (self.value_clip >= 0, "at least 0"),
      "gamma": (0 <= self.gamma <= 1, "in [0, 1]"),
      "lam": (0 <= self.lam <= 1, "in [0, 1]"),
      "kl_coef": (0 <= self.kl_coef < math.inf, "at least 0"),
      "target_kl": (
        self.target_kl is None or self.target_kl > 0,
        "above 0, or None",
      ),
      "horizon": (self.horizon > 0, "above 0"),
      "missing_eos_penalty": (
        0 <= self.missing_eos_penalty < math.inf,
        "at least 0",
      ),
    }
    for name, (allowed, what) in is_allowed.items():
      if not allowed:
        raise ValueError(f"ppo.{name}={getattr(self, name)}: must be {what}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
  """What policy and reference said of each token when it was sampled."""

  logps: Array  # f32[B,U]  nats
  reference_logps: Array  # f32[B,U]  nats
  values: Array  # f32[B,U]  score units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Minibatch:
  """The responses of one update, and what they are compared to."""

  responses: Responses
  old_logps: Array  # f32[B,U]
  old_values: Array  # f32[B,U]
  advantages: Array  # f32[B,U]
  returns: Array  # f32[B,U]


@dataclasses.dataclass(frozen=True)
class Actor:
  """Reads log-probabilities and values off packed rows.

  Attributes:
    model: the decoder.
    chunk_length: scored positions of a row that meet the vocabulary at once.
    temperature: of the policy that samples, above 0; logits are divided by it.
  """

  model: model_config.ModelConfig
  chunk_length: int
  temperature: float = 1.0

  def read(
    self, params: Params, rows: Rows, *, with_entropy: bool = False
  ) -> tuple[logprobs.TokenLogps, Array]:
    """Returns the log-probability and the value f32[R,S] of each token.

    The value of a token is that of the state which predicts it: what is to be
    had before it is drawn. Without a value head all values are 0.
    """
    hidden = transformer.hidden_states(
      self.model,
      decoder_params(params),
      *(rows.tokens, rows.positions, rows.key_start, rows.key_end),
    )
    tokens = logprobs.token_logps(
      hidden,
      self._unembedding(params),
      rows,
      chunk_length=self.chunk_length,
      with_entropy=with_entropy,
    )
    if VALUE_HEAD not in params:
      return tokens, jnp.zeros_like(tokens.logps)
    head = jax.tree.map(lambda x: x.astype(jnp.float32), params[VALUE_HEAD])
    at_tokens = jnp.einsum(
      "rtd,d->rt", hidden.astype(jnp.float32), head["kernel"]
    )
    values = jnp.take_along_axis(at_tokens, rows.score_index, axis=1)
    return tokens, jnp.where(rows.response >= 0, values + head["bias"], 0)

  def _unembedding(self, params):
    """Returns what makes logits over the temperature of states."""
    plain = transformer.unembedding(self.model, params)
    if self.temperature == 1:
      return plain
    # c tanh(x / c) / T has the cap c / T of x / T.
    scaled = jax.tree.map(lambda x: x / self.temperature, plain)
    cap = plain.soft_cap and plain.soft_cap / self.temperature
    return dataclasses.replace(scaled, soft_cap=cap)


def init_value_head(config: model_config.ModelConfig, mesh: Mesh) -> Params:
  """Returns a head that says 0 of every state, whole on every device."""
  kernel = np.zeros(config.d_model, np.float32)
  head = {"kernel": kernel, "bias": np.zeros((), np.float32)}
  return jax.tree.map(lambda x: sharding.place_whole(x, mesh), head)


def decoder_params(params: Params) -> Params:
  """Returns the parameters without the value head."""
  return {key: value for key, value in params.items() if key != VALUE_HEAD}


def with_value_head(
  load_policy: Callable[[], Params],
  shardings: Params,
  config: model_config.ModelConfig,
  mesh: Mesh,
) -> tuple[Callable[[], Params], Params]:
  """Returns how to load a decoder with a new head, and the layout of both."""
  whole = sharding.replicated(mesh)
  head = {"kernel": whole, "bias": whole}
  load = lambda: load_policy() | {VALUE_HEAD: init_value_head(config, mesh)}
  return load, shardings | {VALUE_HEAD: head}


def init_loss_state(settings: Settings, mesh: Mesh) -> dict[str, Array]:
  """Returns what the state carries from one iteration to the next."""
  return {KL_COEF: sharding.place_whole(np.float32(settings.kl_coef), mesh)}


def make_score_step(
  policy: Actor, reference: Actor, max_length: int
) -> Callable[[Params, Params, Responses], TokenScores]:
  """Returns `score(params, reference_params, responses) -> TokenScores`.

  Args:
    policy: with a value head.
    reference: of the same temperature.
    max_length: U, tokens of the longest response.
  """

  def score(params, reference_params, responses):
    shape = (len(responses.lengths), max_length)

    def body(rows):
      tokens, values = policy.read(params, rows)
      others, _ = reference.read(reference_params, rows)
      found = TokenScores(tokens.logps, others.logps, values)
      return jax.tree.map(lambda x: ppo_rows.by_response(x, rows, shape), found)

    return steps.sum_microbatches(
      responses.rows, responses.num_microbatches, body
    )

  return score


def make_advantage_step(
  settings: Settings,
) -> Callable[..., tuple[Array, Array, Array, dict[str, Array]]]:
  """Returns `(scores f[B], TokenScores, lengths i[B], kl_coef f[]) -> ...`.

  These are the advantages and the returns, f32[B,U], the next kl_coef, and
  metrics: `objective/kl` is the mean over responses of the summed logp -
  reference_logp, nats; `objective/reward` the mean score less kl_coef times
  that.
  """

  def advantage(scores, tokens, lengths, kl_coef):
    rewards = rl.token_rewards(
      scores, tokens.logps, tokens.reference_logps, lengths, kl_coef
    )
    advantages, returns = rl.advantages(
      rewards, tokens.values, lengths, gamma=settings.gamma, lam=settings.lam
    )
    explained = rl.explained_variance(tokens.values, returns, lengths)
    if settings.whiten:
      advantages = rl.whiten(advantages, lengths)
    kl = jnp.mean(jnp.sum(tokens.logps - tokens.reference_logps, axis=1))
    next_kl_coef = rl.next_kl_coef(
      kl_coef,
      kl,
      target=settings.target_kl,
      horizon=settings.horizon,
      num_responses=len(scores),
    )
    metrics = {
      "objective/kl": kl,
      "objective/reward": jnp.mean(scores) - kl_coef * kl,
      "score/mean": jnp.mean(scores),
      "score/std": jnp.std(scores),
      "kl_coef": kl_coef,
      "explained_variance": explained,
      "response_length": jnp.mean(lengths.astype(jnp.float32)),
    }
    return advantages, returns, next_kl_coef, metrics

  return advantage


def make_update_step(
  actor: Actor, optimizer: optax.GradientTransformation, settings: Settings
) -> Callable[
  [state_lib.TrainState, Minibatch],
  tuple[state_lib.TrainState, dict[str, Array]],
]:
  """Returns `step(state, minibatch) -> (state, metrics)`, to be jitted.

  The loss is the mean over the minibatch's tokens of the clipped surrogate
  and value_coef times the value loss. `state.step` counts iterations and
  stays. Metrics are means over tokens; `approx_kl` is half the mean of
  (logp - old_logp)^2, nats.
  """

  def step(state, batch):
    num_tokens = jnp.sum(batch.responses.lengths)

    def loss_fn(params, rows):
      tokens, values = actor.read(params, rows, with_entropy=True)
      of_tokens = functools.partial(ppo_rows.of_tokens, rows=rows)
      mean = lambda x: jnp.sum(jnp.where(rows.response >= 0, x, 0)) / num_tokens
      old_logps = of_tokens(batch.old_logps)
      ratio = (tokens.logps, old_logps, of_tokens(batch.advantages))
      policy_loss = mean(rl.policy_losses(*ratio, clip=settings.clip))
      value_loss = mean(
        rl.value_losses(
          values,
          of_tokens(batch.old_values),
          of_tokens(batch.returns),
          clip=settings.value_clip,
        )
      )
      loss = policy_loss + settings.value_coef * value_loss
      return loss, {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_fraction": mean(rl.is_clipped(*ratio, clip=settings.clip)),
        "approx_kl": mean(0.5 * (tokens.logps - old_logps) ** 2),
        "ratio": mean(jnp.exp(tokens.logps - old_logps)),
        "entropy": mean(tokens.entropy),
      }

    def body(rows):
      gradient = jax.value_and_grad(loss_fn, has_aux=True)
      (_, metrics), grads = gradient(state.params, rows)
      return metrics, grads

    metrics, grads = steps.sum_microbatches(
      batch.responses.rows, batch.responses.num_microbatches, body
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    params = optax.apply_updates(state.params, updates)
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    return state, metrics

  return step

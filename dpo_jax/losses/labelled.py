"""Losses of responses that are labelled one by one, desirable or undesirable.

Symbols as in `preference`: u and v are the log-ratios of a desirable and an
undesirable response. A slot of the batch holds one response, or a pair, which
is one of each kind; its loss is the mean over the responses that it holds, and
the batch's the mean over slots.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.losses import registry
from dpo_jax.losses.registry import Logps, PairLogps, Positive
from dpo_jax.types import Array, typed

_HONOURS = frozenset({"sft_weight"})

State = Mapping[str, Any]  # f32[] by name


@registry.register(honours=_HONOURS, inputs="labelled", reads_mismatched=True)
@typed
def kto(
  pairs: PairLogps,
  *,
  beta: Positive,
  desirable_weight: Positive,
  undesirable_weight: Positive,
) -> Logps:
  """Returns a (1 - s(beta (u - K))), and b (1 - s(beta (K - v))).

  Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), eq 8: K estimates the KL
  divergence to the reference as the batch's mean log-ratio of responses that
  stand behind prompts of others, at least 0. No gradient passes through it.

  Args:
    pairs: log-probabilities, mismatched ones of the whole batch among them.
    beta: scales log-ratios to rewards.
    desirable_weight: a, of desirable responses.
    undesirable_weight: b, of undesirable ones.
  """
  assert pairs.mismatched_logratio is not None, "no mismatched responses"
  count = jnp.maximum(jnp.sum(pairs.present), 1)
  kl = jnp.maximum(jnp.sum(pairs.mismatched_logratio) / count, 0)
  kl = jax.lax.stop_gradient(kl)
  return mean_of_present(
    pairs,
    desirable_weight * jax.nn.sigmoid(beta * (kl - pairs.chosen_logratio)),
    undesirable_weight * jax.nn.sigmoid(beta * (pairs.rejected_logratio - kl)),
  )


@registry.register(honours=_HONOURS, inputs="labelled")
@typed
def apo_zero_unpaired(
  pairs: PairLogps,
  *,
  beta: Positive,
  desirable_weight: Positive,
  undesirable_weight: Positive,
) -> Logps:
  """Returns a (1 - s(beta u)), and b s(beta v).

  D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266): `apo_zero` of responses one
  by one, as TRL has it. As `kto` with K = 0, so that no mismatched responses
  are scored.

  Args:
    pairs: log-probabilities.
    beta: scales log-ratios to rewards.
    desirable_weight: a, of desirable responses.
    undesirable_weight: b, of undesirable ones.
  """
  return mean_of_present(
    pairs,
    desirable_weight * jax.nn.sigmoid(-beta * pairs.chosen_logratio),
    undesirable_weight * jax.nn.sigmoid(beta * pairs.rejected_logratio),
  )


def _next_reward(pairs: PairLogps, state: State, *, beta, **weights):
  del weights
  rewards = beta * jnp.concatenate(
    [pairs.chosen_logratio, pairs.rejected_logratio]
  )
  present = jnp.concatenate([pairs.chosen_lengths, pairs.rejected_lengths]) > 0
  rewards = jax.lax.stop_gradient(rewards)
  mean, count = state["mean_reward"], state["num_responses"] + present.sum()
  mean += jnp.sum(jnp.where(present, rewards - mean, 0)) / count
  return {"mean_reward": mean, "num_responses": count}


@registry.register(
  honours=_HONOURS,
  inputs="labelled",
  looks_across_batch=True,
  state=("mean_reward", "num_responses"),
  next_state=_next_reward,
)
@typed
def bco(
  pairs: PairLogps,
  state: State,
  *,
  beta: Positive,
  desirable_weight: Positive,
  undesirable_weight: Positive,
) -> Logps:
  """Returns -a ls(beta u - delta), and -b ls(-(beta v - delta)).

  Jung et al. 2024 (BCO, arXiv 2404.04656), with the reward shift delta: the
  mean reward of all responses of this batch and of those before it, each
  weighing the same, as in TRL's trainer.

  Differs: there are no density ratios, by which its authors weigh undesirable
  responses whose prompts are of another distribution than those of desirable
  ones. It is theirs where both kinds have the same prompts.

  Args:
    pairs: log-probabilities of the whole batch.
    state: `mean_reward` and `num_responses` before this batch.
    beta: scales log-ratios to rewards.
    desirable_weight: a, of desirable responses.
    undesirable_weight: b, of undesirable ones.
  """
  delta = _next_reward(pairs, state, beta=beta)["mean_reward"]
  desirable = jax.nn.log_sigmoid(beta * pairs.chosen_logratio - delta)
  undesirable = jax.nn.log_sigmoid(delta - beta * pairs.rejected_logratio)
  return mean_of_present(
    pairs, -desirable_weight * desirable, -undesirable_weight * undesirable
  )


def mean_of_present(
  pairs: PairLogps, desirable: Array, undesirable: Array
) -> Array:
  """Returns the mean over the responses that each slot holds, f[B]."""
  has_desirable = pairs.chosen_lengths > 0
  has_undesirable = pairs.rejected_lengths > 0
  total = jnp.where(has_desirable, desirable, 0) + jnp.where(
    has_undesirable, undesirable, 0
  )
  count = has_desirable.astype(total.dtype) + has_undesirable
  return total / jnp.maximum(count, 1)

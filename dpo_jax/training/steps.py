"""The training step: policy and reference log-ratios, gradient and update.

A batch is a stack of microbatches of which some are filled. One compiled
program loops over as many as there are (`num_microbatches` is an array), and
the body takes value and gradient, so the trip count may be dynamic. Every sum
runs over the whole batch: its pair and token counts are known beforehand, so
the split into microbatches changes no number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpo_jax.losses import logprobs
from dpo_jax.training import reference as reference_lib
from dpo_jax.training import state as state_lib
from dpo_jax.training.scorer import PairScores, Scorer
from dpo_jax.types import Array, Batch, Rows


def make_train_step(
  scorer: Scorer,
  optimizer: optax.GradientTransformation,
  schedule: Callable[[Array], Array],
  reference: reference_lib.Reference | None = None,
) -> Callable[
  [state_lib.TrainState, Batch], tuple[state_lib.TrainState, dict[str, Array]]
]:
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted.

  Args:
    scorer: the log-probabilities and the loss.
    optimizer: clips and updates.
    schedule: the learning rate, reported only.
    reference: how the reference's parameters move; None leaves them.
  """
  gradient = (
    _coupled_gradient
    if scorer.objective.looks_across_batch
    else _pairwise_gradient
  )

  def step(state, batch):
    scores, losses, grads = gradient(
      scorer,
      state.params,
      state.reference,
      batch,
      state.loss_state,
      state.base,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = scorer.metrics(scores, losses, batch.lengths)
    if scores.routing is not None:
      balance = scores.routing.load_balancing_loss()
      metrics["router/load_balancing_loss"] = balance
      metrics["router/largest_share"] = scores.routing.largest_share()
    metrics["grad_norm"] = optax.global_norm(grads)
    metrics["learning_rate"] = schedule(state.step)
    params = optax.apply_updates(state.params, updates)
    held = state.reference
    if reference is not None:
      held = reference.updated(state.step + 1, held, params)
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      reference=held,
      loss_state=scorer.next_loss_state(
        scores, batch.lengths, state.loss_state
      ),
    )
    return state, metrics

  return step


def make_score_step(
  scorer: Scorer, *, with_routing: bool = False
) -> Callable[..., PairScores]:
  """Returns `score(params, reference, batch, base=None) -> PairScores`.

  Without gradient; the arguments are those of `Scorer.scores`.
  """

  def score(params, reference, batch, base=None):
    def body(rows, with_routing=with_routing):
      return scorer.scores(
        params, reference, rows, batch.lengths, base, with_routing=with_routing
      )

    scores = sum_microbatches(batch.rows, batch.num_microbatches, body)
    if batch.mismatched is not None:
      plain = functools.partial(body, with_routing=False)
      others = sum_microbatches(batch.mismatched, batch.num_mismatched, plain)
      scores = _with_others(scores, others)
    return _with_cached(scores, batch.reference)

  return score


def _with_others(scores: PairScores, others: PairScores) -> PairScores:
  """Returns the scores with those of mismatched responses beside them."""
  own = dataclasses.replace(scores, routing=None)
  total = jax.tree.map(jnp.add, own, others)
  return dataclasses.replace(total, routing=scores.routing)


def _with_cached(scores: PairScores, reference: Array | None) -> PairScores:
  """Returns the scores with the reference that came with the batch, if any."""
  if reference is None:
    return scores
  return dataclasses.replace(scores, reference=reference)


def sum_microbatches(
  rows: Rows, count: Array, body: Callable[[Rows], Any]
) -> Any:
  """Returns the sum of `body` over the first `count` microbatches."""
  take = lambda i: jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), rows
  )
  if len(rows.tokens) == 1:
    return body(take(0))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(body, take(0))
  )
  return jax.lax.fori_loop(
    0,
    count,
    lambda i, total: jax.tree.map(jnp.add, total, body(take(i))),
    zeros,
  )


def _pairwise_gradient(scorer, params, reference, batch, loss_state, base=None):
  """Returns scores, losses f[B] and gradients in one pass over the rows.

  Mismatched responses are scored before it; what they say is the same for
  every microbatch.
  """
  shape = batch.lengths.shape
  others = None
  if batch.mismatched is not None:
    others = sum_microbatches(
      batch.mismatched,
      batch.num_mismatched,
      lambda rows: scorer.scores(params, reference, rows, batch.lengths, base),
    )

  def loss_fn(params, rows):
    own = scorer.scores(
      params, reference, rows, batch.lengths, base, with_routing=True
    )
    here = _present(rows, shape)
    seen = own
    if others is not None:
      seen = _with_others(own, jax.lax.stop_gradient(others))
    if batch.reference is not None:
      # As a traced reference has it: 0 for the pairs of other rows.
      is_seen = here[:, None]
      if others is not None:
        is_seen |= (jnp.arange(shape[1]) == shape[1] - 1)[None]
      cached = jnp.where(is_seen, batch.reference, 0)
      seen = _with_cached(seen, cached)
    loss, losses = scorer.mean_loss(seen, batch, loss_state, here)
    return loss, (own, losses)

  def body(rows):
    (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
    return *aux, grads

  scores, losses, grads = sum_microbatches(
    batch.rows, batch.num_microbatches, body
  )
  if others is not None:
    scores = _with_others(scores, others)
  return _with_cached(scores, batch.reference), losses, grads


def _coupled_gradient(scorer, params, reference, batch, loss_state, base=None):
  """Returns the same for a loss that looks across the batch.

  The first pass scores every pair; the loss of all of them then says what
  each log-probability weighs; the second pass applies those weights.
  """
  score = make_score_step(scorer, with_routing=True)
  scores = score(params, reference, batch, base)

  policy_only = dataclasses.replace(scorer, reference=None)
  batch_loss = lambda scores: scorer.mean_loss(scores, batch, loss_state)
  weights, losses = jax.grad(batch_loss, has_aux=True)(scores)
  weights = dataclasses.replace(weights, reference=None)

  def body(rows):
    def weighted(params):
      terms = jax.tree.map(
        lambda weight, score: jnp.sum(weight * score),
        weights,
        policy_only.scores(
          params, None, rows, batch.lengths, base, with_routing=True
        ),
      )
      return sum(jax.tree.leaves(terms))

    return jax.grad(weighted)(params)

  return (
    scores,
    losses,
    sum_microbatches(batch.rows, batch.num_microbatches, body),
  )


def _present(rows: Rows, shape: tuple[int, int]) -> Array:
  """Returns bool[B]: the pairs that have a scored token in `rows`."""
  scored = (rows.response >= 0).astype(jnp.float32)
  return jnp.any(logprobs.response_sums(scored, rows, shape) > 0, axis=-1)

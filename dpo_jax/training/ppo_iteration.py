"""An iteration of PPO: sample responses, score them, update on them.

Everything but the parameters, the moments and the KL coefficient is a function
of (seed, iteration), so that a run goes on bit for bit from these.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.training import ppo, ppo_rows
from dpo_jax.training import state as state_lib
from dpo_jax.training.ppo_rows import Responses, RowSettings, Tokens
from dpo_jax.types import Array, Params

# (the decoder's parameters, prompts, number of each) -> responses, and whether
# each ended with a stop token
GenerateFn = Callable[
  [Params, Tokens, Sequence[int]], tuple[list[list[int]], list[bool]]
]
# (prompts, responses, whether each ended) -> f32[n]
ScoreFn = Callable[[Tokens, Tokens, Sequence[bool]], np.ndarray]


class Iteration:
  """One iteration: `iterate(state, k, prompts) -> (state, metrics)`.

  Prompts, responses, scores and the order of minibatches are functions of
  (seed, k) and of the state. Every process calls it with all prompts; each
  calls `score_fn` on all responses and must get the same scores.
  """

  def __init__(
    self,
    settings: ppo.Settings,
    *,
    policy: ppo.Actor,
    reference: ppo.Actor,
    optimizer: optax.GradientTransformation,
    rows: RowSettings,
    max_new_tokens: int,
    generate_fn: GenerateFn,
    score_fn: ScoreFn,
    mesh: Mesh,
    seed: int,
  ):
    """Compiles nothing yet.

    Args:
      settings: of PPO.
      policy: reads the policy.
      reference: reads the reference.
      optimizer: clips and updates.
      rows: what responses are packed into.
      max_new_tokens: U, tokens of the longest response.
      generate_fn: samples the policy, the same responses for one number.
      score_fn: says how good whole responses are.
      mesh: all devices; to be called under `jax.set_mesh`.
      seed: of the order of minibatches.
    """
    self._settings = settings
    self._rows = rows
    self._max_new_tokens = max_new_tokens
    self._generate_fn = generate_fn
    self._score_fn = score_fn
    self._mesh = mesh
    self._seed = seed
    whole = sharding.replicated(mesh)
    self._score = jax.jit(
      ppo.make_score_step(policy, reference, max_new_tokens),
      out_shardings=whole,
    )
    self._advantage = jax.jit(
      ppo.make_advantage_step(settings), out_shardings=whole
    )
    self._step = ppo.make_update_step(policy, optimizer, settings)
    self._update: Callable[..., Any] | None = None
    self._mean = jax.jit(
      lambda found: jax.tree.map(lambda *x: sum(x) / len(x), *found),
      out_shardings=whole,
    )

  def __call__(
    self, state: state_lib.TrainState, k: int, prompts: Tokens
  ) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Returns the state after iteration k, counted from 0; donates `state`."""
    responses, ended, scores = self._rollout(state, k, prompts)
    parts = self._parts(k, 0, len(prompts))
    batches = [self._pack(prompts, responses, part) for part in parts]
    tokens = self._token_scores(state, batches, parts)
    advantages, returns, kl_coef, metrics = self._advantage(
      *self._place((scores, tokens, _lengths(responses))),
      state.loss_state[ppo.KL_COEF],
    )
    compared = jax.device_get(
      (tokens.logps, tokens.values, advantages, returns)
    )
    found = []
    for epoch in range(self._settings.epochs):
      if epoch:
        parts = self._parts(k, epoch, len(prompts))
        batches = [self._pack(prompts, responses, part) for part in parts]
      for part, batch in zip(parts, batches, strict=True):
        own = self._place(tuple(x[part] for x in compared))
        state, update_metrics = self._updated(state, ppo.Minibatch(batch, *own))
        found.append(update_metrics)
    state = dataclasses.replace(
      state, step=state.step + 1, loss_state={ppo.KL_COEF: kl_coef}
    )
    metrics["ended"] = np.float32(np.mean(ended))
    return state, self._mean(found) | metrics

  def evaluate(
    self, state: state_lib.TrainState, prompts: Tokens
  ) -> dict[str, float]:
    """Returns mean score and KL over new responses to these prompts.

    Scores are less the penalty of what did not end; `ended` is the share that
    did. `loss` is the mean score's negative.
    """
    responses, ended, scores = self._rollout(state, 0, prompts)
    size = len(prompts) // self._settings.minibatches or 1
    parts = np.split(np.arange(len(prompts)), range(size, len(prompts), size))
    batches = [self._pack(prompts, responses, part) for part in parts]
    tokens = self._token_scores(state, batches, parts)
    kl = (tokens.logps - tokens.reference_logps).sum(axis=1)
    return {
      "loss": -float(scores.mean()),
      "score/mean": float(scores.mean()),
      "objective/kl": float(kl.mean()),
      "response_length": float(_lengths(responses).mean()),
      "ended": float(np.mean(ended)),
      "num_prompts": len(prompts),
    }

  def _rollout(self, state, k, prompts):
    """Returns iteration k's responses, whether each ended, and its score."""
    numbers = range(k * len(prompts), (k + 1) * len(prompts))
    responses, ended = self._generate_fn(
      ppo.decoder_params(state.params), prompts, numbers
    )
    scores = self._score_fn(prompts, responses, ended)
    scores = np.asarray(scores, np.float32)
    if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
      raise ValueError(
        f"the reward gave {scores.shape} scores for {len(prompts)} responses,"
        f" {int((~np.isfinite(scores)).sum())} of them not finite"
      )
    penalty = np.float32(self._settings.missing_eos_penalty)
    return responses, ended, np.where(ended, scores, scores - penalty)

  def _parts(self, k, epoch, num_responses):
    order = ppo_rows.minibatch_order(self._seed, k, epoch, num_responses)
    return np.split(order, self._settings.minibatches)

  def _pack(self, prompts, responses, part):
    """Returns the responses of a minibatch on the device."""
    packed = ppo_rows.pack_responses(
      [prompts[i] for i in part], [responses[i] for i in part], self._rows
    )
    place_rows = functools.partial(
      sharding.place_rows,
      mesh=self._mesh,
      num_rows=self._rows.microbatch_rows,
      first_row=self._rows.row_range[0],
    )
    return Responses(
      jax.tree.map(place_rows, packed.rows),
      *self._place((packed.num_microbatches, packed.lengths)),
    )

  def _token_scores(self, state, batches, parts) -> ppo.TokenScores:
    """Returns what is said of all responses, on the host, in their order.

    In the rows of the first epoch, so that at its first update the ratio is 1.
    """
    found = jax.device_get(
      [self._score(state.params, state.reference, batch) for batch in batches]
    )
    order = np.argsort(np.concatenate(parts))
    return jax.tree.map(lambda *x: np.concatenate(x)[order], *found)

  def _updated(self, state, batch):
    if self._update is None:
      layouts = jax.tree.map(lambda x: x.sharding, state)
      out = (layouts, sharding.replicated(self._mesh))
      self._update = jax.jit(self._step, donate_argnums=0, out_shardings=out)
    return self._update(state, batch)

  def _place(self, tree):
    return jax.tree.map(lambda x: sharding.place_whole(x, self._mesh), tree)


def _lengths(responses: Tokens) -> np.ndarray:
  return np.array([len(response) for response in responses], np.int32)

"""Log-probabilities of every pair of a dataset under one model."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.data import loader
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.training import steps
from dpo_jax.types import Batch, Params


def device_batch(batch: Batch, batches: loader.Loader, mesh: Mesh) -> Batch:
  """Returns a host batch as global arrays, rows split over the mesh."""
  place = functools.partial(
    sharding.place_rows,
    mesh=mesh,
    num_rows=batches.microbatch_rows,
    first_row=batches.row_range[0],
  )
  whole = functools.partial(sharding.place_whole, mesh=mesh)
  return Batch(
    rows=jax.tree.map(place, batch.rows),
    num_microbatches=whole(batch.num_microbatches),
    lengths=whole(batch.lengths),
    reference=jax.tree.map(whole, batch.reference),
    score_gaps=jax.tree.map(whole, batch.score_gaps),
    mismatched=jax.tree.map(place, batch.mismatched),
    num_mismatched=jax.tree.map(whole, batch.num_mismatched),
  )


def response_logps(
  model: model_config.ModelConfig,
  params: Params,
  objective: objectives.Objective,
  batches: loader.Loader,
  mesh: Mesh,
  *,
  chunk_length: int,
  as_trained: bool = False,
) -> np.ndarray:
  """Returns f32[n,C], summed log-probabilities of each response, nats.

  Every pair once; an absent response has 0. The program is that of an
  evaluation, so layouts and chunks are those of the step.

  Args:
    model: the decoder.
    params: its parameters, on the mesh.
    objective: its token weights enter the sums, nothing else of it.
    batches: the pairs.
    mesh: all devices; to be called under `jax.set_mesh`.
    chunk_length: scored positions of a row that meet the vocabulary at once.
    as_trained: whether rows are those of the first epoch, not of evaluations.
  """
  scorer = scorer_lib.Scorer(
    policy=model,
    reference=None,
    objective=dataclasses.replace(objective, wpo=False),
    chunk_length=chunk_length,
  )
  score = make_score_fn(scorer, mesh)
  return collect(score, params, batches, mesh, as_trained=as_trained)


def make_score_fn(
  scorer: scorer_lib.Scorer, mesh: Mesh
) -> Callable[[Params, Params | None, Batch], scorer_lib.PairScores]:
  """Returns the jitted `steps.make_score_step(scorer)`."""
  return jax.jit(
    steps.make_score_step(scorer), out_shardings=sharding.replicated(mesh)
  )


def collect(
  score: Callable[[Params, Params | None, Batch], scorer_lib.PairScores],
  params: Params,
  batches: loader.Loader,
  mesh: Mesh,
  *,
  as_trained: bool = False,
) -> np.ndarray:
  """Returns f32[n,C], what the policy scores each response, in file order.

  Args:
    score: of `make_score_fn`, its reference not traced.
    params: the policy's, on the mesh.
    batches: the pairs.
    mesh: all devices; to be called under `jax.set_mesh`.
    as_trained: as of `response_logps`.
  """
  order, packed = np.arange(batches.num_pairs), batches.eval_batches()
  if as_trained:
    # The last batch may begin the next epoch.
    numbers = range(math.ceil(batches.num_pairs / batches.batch_size))
    order = np.concatenate([batches.indices(k) for k in numbers])[: len(order)]
    packed = map(batches.batch, numbers)
  found = []
  for batch in packed:
    batch = dataclasses.replace(batch, reference=None)
    placed = device_batch(batch, batches, mesh)
    found.append(score(params, None, placed).policy)
    # One batch late: the next is packed while the device computes, and no
    # more than two are in its memory.
    found[-2:-1] = jax.device_get(found[-2:-1])
  scores = np.concatenate(jax.device_get(found))[: batches.num_pairs]
  in_file_order = np.empty_like(scores)
  in_file_order[order] = scores
  return in_file_order

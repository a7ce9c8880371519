"""Sampled responses as packed rows, and scores of rows by response."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import packing, placement
from dpo_jax.types import Array, Rows

Tokens = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class RowSettings:
  """The rows that responses are packed into.

  Attributes:
    row_length: tokens.
    max_length: tokens of the longest prompt and response together.
    microbatch_rows: rows in memory at once, over all processes.
    row_range: those of each microbatch that this process builds.
  """

  row_length: int
  max_length: int
  microbatch_rows: int
  row_range: tuple[int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
  """B packed responses, each behind its prompt."""

  rows: Rows  # each leaf [M,R,...]; `response` counts the B
  num_microbatches: Array  # i32[]
  lengths: Array  # i32[B]


def minibatch_order(
  seed: int, iteration: int, epoch: int, num_responses: int
) -> np.ndarray:
  """Returns i64[num_responses], in which order an epoch takes responses."""
  rng = np.random.default_rng([seed, iteration, epoch])
  return rng.permutation(num_responses)


def pack_responses(
  prompts: Tokens, responses: Tokens, rows: RowSettings
) -> Responses:
  """Returns packed responses, this process's rows of them.

  How many microbatches there are at most depends on the number of responses
  alone, so that one compiled program serves all.
  """
  columns = [_ragged(prompts), _ragged(responses)]
  lengths = np.stack([np.diff(x.offsets) for x in columns], axis=1)
  assert lengths.sum(axis=1).max() <= rows.max_length <= rows.row_length
  plan = placement.make_plan(lengths, rows.row_length, "mirrored")
  longest = np.full(len(prompts), rows.max_length)
  most = placement.max_rows(longest, len(prompts), rows.row_length)
  low, high = rows.row_range
  row = plan.row % rows.microbatch_rows
  own = plan.select((low <= row) & (row < high))
  filled = math.ceil(plan.num_rows / rows.microbatch_rows)
  packed = packing.pack(
    own,
    packing.PairTokens(
      _ragged([prompts[i] for i in own.pair]),
      (_ragged([responses[i] for i in own.pair]),),
    ),
    row_length=rows.row_length,
    microbatch_rows=rows.microbatch_rows,
    num_microbatches=math.ceil(most / rows.microbatch_rows),
    row_range=rows.row_range,
    num_columns=1,
  )
  return Responses(packed, np.int32(filled), lengths[:, 1].astype(np.int32))


def _ragged(lists: Tokens) -> packing.Ragged:
  values = np.fromiter(itertools.chain(*lists), np.int32)
  offsets = np.cumsum([0, *map(len, lists)])
  return packing.Ragged(values, offsets)


def by_response(values: Array, rows: Rows, shape: tuple[int, int]) -> jax.Array:
  """Returns [B,U] of [R,S], 0 where these rows hold no token."""
  # Past the last response: dropped.
  response = jnp.where(rows.response >= 0, rows.response, shape[0])
  zeros = jnp.zeros(shape, values.dtype)
  return zeros.at[response, rows.rank].set(values, mode="drop")


def of_tokens(values: Array, rows: Rows) -> jax.Array:
  """Returns [R,S] of [B,U], 0 at padding."""
  return jnp.where(rows.response >= 0, values[rows.response, rows.rank], 0)

"""Token rows that hold several pairs, each with its prompt standing once.

A pair is one span of a row, its chosen response laid out backwards:

  memory order:  c_n ... c_2 c_1 | x_1 x_2 ... x_m | r_1 r_2 ... r_k
  position ids:  m+n-1 ... m+1 m | 0   1   ... m-1 | m   m+1 ... m+k-1

so that the keys of any query are one contiguous interval:

  c_t: [index(c_t), index(x_m)]   x_s: [index(x_1), index(x_s)]
  r_t: [index(x_1), index(r_t)]

c_1 and r_1 are predicted from x_m, c_t from c_(t-1), r_t from r_(t-1). A lone
response (of a demonstration, or of an example that is labelled by itself) has
no left part: the prompt, then the response. A ranked list has one span for
every two of its responses, the best two first, side by side in one row. The
layout `padded` has every response in a row of its own behind a copy of its
prompt; it is the oracle that `mirrored` is tested against.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo_jax.data import placement
from dpo_jax.types import Rows

# Which positions are scored: those that predict a response's tokens, or the
# last token of each response alone (what a reward model reads).
SCORED = ("tokens", "ends")


class Ragged(NamedTuple):
  """Token lists end to end; list i is `values[offsets[i]:offsets[i+1]]`."""

  values: np.ndarray  # i32[total]
  offsets: np.ndarray  # i64[n+1]


class PairTokens(NamedTuple):
  """The tokens of n pairs, or of n ranked lists; absent responses are empty."""

  prompt: Ragged
  responses: tuple[Ragged, ...]  # chosen, rejected; or the best first
  score_gaps: np.ndarray | None = None  # f32[n]  of scored pairs


def pack(
  plan: placement.Plan,
  tokens: PairTokens,
  *,
  row_length: int,
  microbatch_rows: int,
  num_microbatches: int,
  row_range: tuple[int, int],
  num_columns: int,
  prompt_column: int | None = None,
  scored: str = "tokens",
) -> Rows:
  """Returns the rows [M, hi-lo, row_length] that hold the spans of a plan.

  Row i of the batch is row i % microbatch_rows of microbatch
  i // microbatch_rows.

  Args:
    plan: of spans that stand in the rows `row_range` of a microbatch.
    tokens: of the pair of each span, in the plan's order.
    row_length: tokens in a row, and scored entries in a row.
    microbatch_rows: rows in a microbatch, over all processes.
    num_microbatches: M, filled or not.
    row_range: the rows of each microbatch that are built, `hi` exclusive.
    num_columns: C, how many sums of a pair `Rows.response` tells apart.
    prompt_column: the one that scores the prompt's tokens from the second on,
      once a pair, beside its first response; None scores no prompt.
    scored: one of `SCORED`. Of an end, `score_index` is where the token itself
      stands and `targets` holds it.
  """
  lo, hi = row_range
  microbatch, row = np.divmod(plan.row, microbatch_rows)
  assert ((lo <= row) & (row < hi)).all(), "a span outside row_range"
  row_start = (microbatch * (hi - lo) + row - lo) * row_length
  shape = (num_microbatches, hi - lo, row_length)
  leaves = {
    field.name: np.zeros(shape, np.int32) for field in dataclasses.fields(Rows)
  }
  leaves["response"].fill(-1)
  flat = {name: leaf.reshape(-1) for name, leaf in leaves.items()}
  left = select(tokens.responses, plan.left_column, plan.left)
  right = select(tokens.responses, plan.right_column, plan.right)
  _place_left(flat, plan, left, row_start)
  _place_right(flat, plan, tokens.prompt.values, right, row_start)
  make_run = {"tokens": _token_run, "ends": _end_run}[scored]
  prompt_start = plan.offset + plan.left
  prompt_last = prompt_start + plan.prompt - 1
  runs = [
    make_run(left, plan.left, plan.left_column, prompt_start, prompt_last, -1),
    make_run(right, plan.right, plan.right_column, prompt_last, prompt_last, 1),
  ]
  if prompt_column is not None:
    runs.append(_prompt_run(plan, tokens.prompt, prompt_column))
  _score(flat, plan, runs, row_start, num_columns)
  return Rows(**leaves)


class _Run(NamedTuple):
  """Tokens of each span that follow each other and are scored."""

  lengths: np.ndarray  # i64[P]
  column: np.ndarray  # i64[P]  the sum that they belong to
  targets: np.ndarray  # i32[sum of lengths]
  index: np.ndarray  # i64[sum of lengths]  where in its row the state stands
  rank: np.ndarray  # i64[sum of lengths]


def _token_run(
  tokens: np.ndarray,
  lengths: np.ndarray,
  column: np.ndarray,
  before: np.ndarray,
  prompt_last: np.ndarray,
  step: int,
) -> _Run:
  """Returns all tokens of one response of each span as a run.

  Args:
    tokens: i32[sum of lengths], the responses end to end.
    lengths: i64[P], their tokens.
    column: i64[P], whose these are.
    before: i64[P], the index that the first token stands next to.
    prompt_last: i64[P], the index of the prompt's last token.
    step: the way from a token to the next, 1 or -1.
  """
  owner, rank = _expand(lengths)
  index = np.where(rank == 0, prompt_last[owner], before[owner] + step * rank)
  return _Run(lengths, column, tokens, index, rank)


def _end_run(
  tokens: np.ndarray,
  lengths: np.ndarray,
  column: np.ndarray,
  before: np.ndarray,
  prompt_last: np.ndarray,
  step: int,
) -> _Run:
  """Returns the last token of each of those responses as a run."""
  del prompt_last
  is_there = lengths > 0
  last = np.cumsum(lengths)[is_there] - 1
  return _Run(
    lengths=is_there.astype(np.int64),
    column=column,
    targets=tokens[last],
    index=(before + step * lengths)[is_there],
    rank=lengths[is_there] - 1,
  )


def _prompt_run(plan: placement.Plan, prompt: Ragged, column: int) -> _Run:
  """Returns the prompts' tokens, but for their first, as a run."""
  nearest = np.where(plan.left > 0, plan.left_column, plan.right_column)
  lengths = np.where(nearest == 0, plan.prompt - 1, 0)
  owner, rank = _expand(lengths)
  return _Run(
    lengths=lengths,
    column=np.full_like(lengths, column),
    targets=prompt.values[prompt.offsets[owner] + rank + 1],
    index=(plan.offset + plan.left)[owner] + rank,
    rank=rank,
  )


def _expand(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for every token of lists laid end to end, its list and rank."""
  owner = np.repeat(np.arange(len(lengths)), lengths)
  rank = np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]
  return owner, rank


def select(
  responses: Sequence[Ragged], column: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
  """Returns the first tokens of one response of each pair, end to end.

  Args:
    responses: of n pairs.
    column: i64[n], which response of each.
    lengths: i64[n], how many of its tokens.
  """
  sizes = [len(response.values) for response in responses]
  base = np.cumsum([0, *sizes])
  starts = np.stack(
    [x.offsets[:-1] + b for x, b in zip(responses, base, strict=False)], 1
  )
  owner, rank = _expand(lengths)
  start = starts[np.arange(len(column)), column]
  values = np.concatenate([response.values for response in responses])
  return values[start[owner] + rank]


def _place_left(
  flat: dict[str, np.ndarray],
  plan: placement.Plan,
  chosen: np.ndarray,
  row_start: np.ndarray,
) -> None:
  """Writes the mirrored chosen responses."""
  owner, rank = _expand(plan.left)
  prompt_end = plan.offset + plan.left + plan.prompt
  index = (plan.offset + plan.left - 1)[owner] - rank
  at = row_start[owner] + index
  flat["tokens"][at] = chosen
  flat["positions"][at] = plan.prompt[owner] + rank
  flat["key_start"][at] = index
  flat["key_end"][at] = prompt_end[owner]


def _place_right(
  flat: dict[str, np.ndarray],
  plan: placement.Plan,
  prompt: np.ndarray,
  response: np.ndarray,
  row_start: np.ndarray,
) -> None:
  """Writes the prompts and the responses to the right of them."""
  owner, position = _expand(plan.prompt + plan.right)
  prompt_start = (plan.offset + plan.left)[owner]
  index = prompt_start + position
  at = row_start[owner] + index
  is_prompt = position < plan.prompt[owner]
  flat["tokens"][at[is_prompt]] = prompt
  flat["tokens"][at[~is_prompt]] = response
  flat["positions"][at] = position
  flat["key_start"][at] = prompt_start
  flat["key_end"][at] = index + 1


def _score(
  flat: dict[str, np.ndarray],
  plan: placement.Plan,
  runs: list[_Run],
  row_start: np.ndarray,
  num_columns: int,
) -> None:
  """Writes the runs: left, right and prompt of a span side by side."""
  num_scored = sum(run.lengths for run in runs)
  order = np.lexsort((plan.offset, row_start))
  before = np.cumsum(num_scored[order]) - num_scored[order]
  first = np.searchsorted(row_start[order], row_start[order])
  entry = np.empty_like(row_start)
  entry[order] = row_start[order] + before - before[first]
  for run in runs:
    owner, place = _expand(run.lengths)
    at = entry[owner] + place
    flat["score_index"][at] = run.index
    flat["targets"][at] = run.targets
    flat["response"][at] = (num_columns * plan.pair + run.column)[owner]
    flat["rank"][at] = run.rank
    entry = entry + run.lengths

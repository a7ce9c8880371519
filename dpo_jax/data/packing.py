"""Token rows that hold several pairs, each with its prompt standing once.

A pair is one span of a row, its chosen response laid out backwards:

  memory order:  c_n ... c_2 c_1 | x_1 x_2 ... x_m | r_1 r_2 ... r_k
  position ids:  m+n-1 ... m+1 m | 0   1   ... m-1 | m   m+1 ... m+k-1

so that the keys of any query are one contiguous interval:

  c_t: [index(c_t), index(x_m)]   x_s: [index(x_1), index(x_s)]
  r_t: [index(x_1), index(r_t)]

c_1 and r_1 are predicted from x_m, c_t from c_(t-1), r_t from r_(t-1). A
demonstration has no left part: the prompt, then its response. The layout
`padded` has every response in a row of its own behind a copy of its prompt;
it is the oracle that `mirrored` is tested against.
"""

import bisect
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from dpo_jax.types import Rows

LAYOUTS = ("mirrored", "padded")
CHOSEN, REJECTED = 0, 1


class Ragged(NamedTuple):
  """Token lists end to end; list i is `values[offsets[i]:offsets[i+1]]`."""

  values: np.ndarray  # i32[total]
  offsets: np.ndarray  # i64[n+1]


class PairTokens(NamedTuple):
  """The tokens of n pairs; a demonstration has an empty `rejected`."""

  prompt: Ragged
  chosen: Ragged
  rejected: Ragged
  score_gaps: np.ndarray | None = None  # f32[n]  of scored pairs


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each of P spans stands, known from lengths alone."""

  pair: np.ndarray  # i64[P]  the span's pair, counted within the batch
  left: np.ndarray  # i64[P]  mirrored tokens left of the prompt, all chosen
  prompt: np.ndarray  # i64[P]
  right: np.ndarray  # i64[P]  tokens right of the prompt
  right_side: np.ndarray  # i64[P]  whose these are: 0 chosen, 1 rejected
  row: np.ndarray  # i64[P]  counted over the whole batch
  offset: np.ndarray  # i64[P]  index of the span's first token in its row
  num_rows: int

  def select(self, spans: np.ndarray) -> "Plan":
    """Returns the plan of some spans only; `num_rows` stays the batch's."""
    columns = dataclasses.asdict(self)
    num_rows = columns.pop("num_rows")
    return Plan(
      **{name: column[spans] for name, column in columns.items()},
      num_rows=num_rows,
    )


def span_lengths(lengths: np.ndarray, layout: str) -> np.ndarray:
  """Returns i64[n], the row length that each pair needs to be placed at all.

  Args:
    lengths: [n,3], tokens of prompt, chosen and rejected.
    layout: one of `LAYOUTS`.
  """
  prompt, chosen, rejected = np.asarray(lengths, np.int64).T
  if layout == "padded":
    return prompt + np.maximum(chosen, rejected)
  return prompt + chosen + rejected


def make_plan(lengths: np.ndarray, row_length: int, layout: str) -> Plan:
  """Returns where the spans of a batch stand.

  Args:
    lengths: [B,3], tokens of prompt, chosen and rejected; a demonstration has
      no rejected tokens, an unused pair slot has none at all.
    row_length: tokens in a row; no span may be longer.
    layout: one of `LAYOUTS`.
  """
  prompt, chosen, rejected = np.asarray(lengths, np.int64).T
  pair = np.arange(len(prompt))
  if layout == "padded":
    pair, prompt = np.repeat(pair, 2), np.repeat(prompt, 2)
    right = np.stack([chosen, rejected], 1).reshape(-1)
    right_side = np.tile([CHOSEN, REJECTED], len(chosen))
    left = np.zeros_like(right)
    used = right > 0
  else:
    is_pair = rejected > 0
    left = np.where(is_pair, chosen, 0)
    right = np.where(is_pair, rejected, chosen)
    right_side = np.where(is_pair, REJECTED, CHOSEN)
    used = prompt + right > 0
  columns = [pair, left, prompt, right, right_side]
  pair, left, prompt, right, right_side = (x[used] for x in columns)
  if layout == "padded":
    row, offset = np.arange(len(pair)), np.zeros(len(pair), np.int64)
  else:
    row, offset = assign_rows(left + prompt + right, row_length)
  num_rows = int(row.max(initial=-1)) + 1
  return Plan(pair, left, prompt, right, right_side, row, offset, num_rows)


def assign_rows(
  lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the row and the offset in it of each span, best fit decreasing.

  The longest span goes first, each into the row with the least space that
  still holds it; spans of one length keep their order.

  Args:
    lengths: [P], tokens of each span, at most `row_length`.
    row_length: tokens in a row.
  """
  row = np.zeros(len(lengths), np.int64)
  offset = np.zeros(len(lengths), np.int64)
  spaces: list[tuple[int, int]] = []  # (space, row), tightest first
  num_rows = 0
  for span in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[span])
    tightest = bisect.bisect_left(spaces, (length, -1))
    if tightest < len(spaces):
      space, row[span] = spaces.pop(tightest)
    else:
      space, row[span] = row_length, num_rows
      num_rows += 1
    offset[span] = row_length - space
    bisect.insort(spaces, (space - length, int(row[span])))
  return row, offset


def max_rows(lengths: np.ndarray, batch_size: int, row_length: int) -> int:
  """Returns a bound on the rows that a batch of these spans can fill.

  Best fit opens a row only for a span that no open row holds. So (1) no two
  rows fit into one, and N > 1 rows hold more than N * row_length / 2 tokens;
  (2) a row is left behind with at least row_length // longest spans in it.
  A batch that spans two epochs may hold a pair twice, hence twice the longest
  half of a batch.

  Args:
    lengths: [n], the length of every span of the dataset.
    batch_size: spans in a batch.
    row_length: tokens in a row, at least the longest span.
  """
  longest = np.sort(lengths)[::-1]
  total = 2 * int(longest[: math.ceil(batch_size / 2)].sum())
  by_tokens = max(1, math.ceil(2 * total / row_length) - 1)
  by_spans = math.ceil(batch_size / (row_length // int(longest[0])))
  return min(by_tokens, by_spans)


def pack(
  plan: Plan,
  tokens: PairTokens,
  *,
  row_length: int,
  microbatch_rows: int,
  num_microbatches: int,
  row_range: tuple[int, int],
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
  left, right = _left_tokens(plan, tokens), _right_tokens(plan, tokens)
  _place_left(flat, plan, left, row_start)
  _place_right(flat, plan, tokens.prompt.values, right, row_start)
  _score(flat, plan, left, right, row_start)
  return Rows(**leaves)


def _expand(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for every token of lists laid end to end, its list and rank."""
  owner = np.repeat(np.arange(len(lengths)), lengths)
  rank = np.arange(len(owner)) - (np.cumsum(lengths) - lengths)[owner]
  return owner, rank


def _left_tokens(plan: Plan, tokens: PairTokens) -> np.ndarray:
  """Returns the tokens left of each prompt, end to end, in reading order."""
  owner, rank = _expand(plan.left)
  return tokens.chosen.values[tokens.chosen.offsets[owner] + rank]


def _right_tokens(plan: Plan, tokens: PairTokens) -> np.ndarray:
  """Returns the tokens right of each prompt, end to end."""
  owner, rank = _expand(plan.right)
  start = np.where(
    plan.right_side == CHOSEN,
    tokens.chosen.offsets[:-1],
    tokens.rejected.offsets[:-1] + len(tokens.chosen.values),
  )
  values = np.concatenate([tokens.chosen.values, tokens.rejected.values])
  return values[start[owner] + rank]


def _place_left(
  flat: dict[str, np.ndarray],
  plan: Plan,
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
  plan: Plan,
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
  plan: Plan,
  left: np.ndarray,
  right: np.ndarray,
  row_start: np.ndarray,
) -> None:
  """Writes which state predicts which response token, row by row."""
  num_scored = plan.left + plan.right
  order = np.lexsort((plan.offset, row_start))
  before = np.cumsum(num_scored[order]) - num_scored[order]
  first = np.searchsorted(row_start[order], row_start[order])
  entry = np.empty_like(row_start)
  entry[order] = row_start[order] + before - before[first]
  prompt_last = plan.offset + plan.left + plan.prompt - 1

  owner, rank = _expand(plan.left)
  at = entry[owner] + rank
  previous = (plan.offset + plan.left)[owner] - rank  # index of c_(t-1)
  flat["score_index"][at] = np.where(rank == 0, prompt_last[owner], previous)
  flat["targets"][at] = left
  flat["response"][at] = 2 * plan.pair[owner] + CHOSEN
  flat["rank"][at] = rank

  owner, rank = _expand(plan.right)
  at = (entry + plan.left)[owner] + rank
  flat["score_index"][at] = prompt_last[owner] + rank
  flat["targets"][at] = right
  flat["response"][at] = (2 * plan.pair + plan.right_side)[owner]
  flat["rank"][at] = rank

"""Where the spans of pairs stand in rows: which row, at which offset."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LAYOUTS = ("mirrored", "padded")


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each of P spans stands, known from lengths alone."""

  pair: np.ndarray  # i64[P]  the span's pair, counted within the batch
  left: np.ndarray  # i64[P]  mirrored tokens left of the prompt
  left_column: np.ndarray  # i64[P]  whose these are: 0 chosen, 1 rejected, ...
  prompt: np.ndarray  # i64[P]
  right: np.ndarray  # i64[P]  tokens right of the prompt
  right_column: np.ndarray  # i64[P]
  row: np.ndarray  # i64[P]  counted over the whole batch
  offset: np.ndarray  # i64[P]  index of the span's first token in its row
  num_rows: int

  @property
  def lengths(self) -> np.ndarray:
    """The tokens of each span, i64[P]."""
    return self.left + self.prompt + self.right

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
    lengths: [n,1+C], tokens of the prompt and of C responses.
    layout: one of `LAYOUTS`.
  """
  prompt, responses = np.split(np.asarray(lengths, np.int64), [1], axis=1)
  if layout == "padded":
    return prompt[:, 0] + responses.max(axis=1)
  num_spans = (_two_by_two(responses).max(axis=2) > 0).sum(axis=1)
  return prompt[:, 0] * num_spans + responses.sum(axis=1)


def layout_for_window(
  lengths: np.ndarray, layout: str, window: int | None
) -> str:
  """Returns `padded` where a window would cut a mirrored response's keys.

  The last `window` positions before a mirrored token are an interval of its
  row only as long as they reach back to the prompt's first.

  Args:
    lengths: [n,1+C], tokens of the prompt and of C responses.
    layout: the one asked for.
    window: keys that a query of a sliding layer sees; None: there is none.
  """
  if window is None or layout != "mirrored":
    return layout
  prompt, responses = np.split(np.asarray(lengths, np.int64), [1], axis=1)
  left, right = np.moveaxis(_two_by_two(responses), 2, 0)
  is_cut = (left > 0) & (right > 0) & (prompt + left > window)
  return "padded" if is_cut.any() else layout


def make_plan(
  lengths: np.ndarray,
  row_length: int,
  layout: str,
  columns: Sequence[int] | None = None,
) -> Plan:
  """Returns where the spans of a batch stand.

  Args:
    lengths: [B,1+C], tokens of the prompt and of C responses; an absent
      response has none, an unused pair slot has none at all.
    row_length: tokens in a row; no pair may need more.
    layout: one of `LAYOUTS`.
    columns: the responses that are placed, all of them by default.
  """
  prompt, responses = np.split(np.asarray(lengths, np.int64), [1], axis=1)
  columns = np.arange(responses.shape[1]) if columns is None else columns
  responses = responses[:, columns]
  columns = np.broadcast_to(columns, responses.shape)
  if layout == "padded":
    first = np.zeros_like(responses)
    second, second_column, first_column = responses, columns, columns
  else:
    first, second = np.moveaxis(_two_by_two(responses), 2, 0)
    first_column, second_column = np.moveaxis(_two_by_two(columns), 2, 0)
  both = (first > 0) & (second > 0)
  pair, group = np.nonzero(first + second)
  take = lambda x: x[pair, group]
  left = take(np.where(both, first, 0))
  right = take(np.where(both, second, first + second))
  right_column = take(np.where(second > 0, second_column, first_column))
  prompt = prompt[pair, 0]
  if layout == "padded":
    row, offset = np.arange(len(pair)), np.zeros(len(pair), np.int64)
  else:
    row, offset = _assign_pairs(pair, left + prompt + right, row_length)
  num_rows = int(row.max(initial=-1)) + 1
  return Plan(
    pair=pair,
    left=left,
    left_column=take(first_column),
    prompt=prompt,
    right=right,
    right_column=right_column,
    row=row,
    offset=offset,
    num_rows=num_rows,
  )


def _two_by_two(columns: np.ndarray) -> np.ndarray:
  """Returns [n,C] as [n,ceil(C/2),2], a last odd one beside a zero."""
  padded = np.pad(columns, ((0, 0), (0, columns.shape[1] % 2)))
  return padded.reshape(len(columns), -1, 2)


def _assign_pairs(
  pair: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns row and offset of each span; those of one pair stand together."""
  _, first, count = np.unique(pair, return_index=True, return_counts=True)
  before = np.cumsum(lengths) - lengths
  total = np.add.reduceat(lengths, first) if len(first) else lengths
  row, offset = assign_rows(total, row_length)
  within = before - np.repeat(before[first], count)
  return np.repeat(row, count), np.repeat(offset, count) + within


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

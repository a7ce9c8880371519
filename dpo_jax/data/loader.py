"""Batches of packed rows: batch k is a pure function of (seed, k)."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from dpo_jax.data import mismatch, packing, placement
from dpo_jax.types import Batch, Rows


class Dataset(Protocol):
  """What a loader reads: token counts of all pairs, tokens of some."""

  lengths: np.ndarray  # i32[n,1+C]  tokens of the prompt and C responses
  score_gaps: np.ndarray | None  # f32[n]  of scored pairs

  def take(self, indices: np.ndarray) -> packing.PairTokens:
    """Returns the tokens of some pairs, in the order asked for."""


def choose_row_length(
  lengths: np.ndarray, batch_size: int, microbatch_rows: int, layout: str
) -> int:
  """Returns the row length that leaves little padding.

  The smallest multiple of 128 that holds the longest span, or up to twice as
  long where 16 random batches then compute fewer positions, by more than 1%:
  a batch fills whole microbatches, so at 8 rows a microbatch and 64 pairs of
  HH rows of 1,024 are 20% padding and rows of 1,408 13%.

  Args:
    lengths: [n,3], tokens of prompt, chosen and rejected.
    batch_size: pairs in a batch.
    microbatch_rows: rows in a microbatch, over all processes.
    layout: one of `placement.LAYOUTS`.
  """
  longest = int(placement.span_lengths(lengths, layout).max())
  shortest = math.ceil(longest / 128) * 128
  if layout == "padded":
    return shortest
  order = epoch_order(0, 0, len(lengths))
  batches = [
    lengths[order[first : first + batch_size]]
    for first in range(0, len(order), batch_size)
  ]
  computed = {}
  for row_length in range(shortest, 2 * shortest + 1, 128):
    plans = (placement.make_plan(x, row_length, layout) for x in batches[:16])
    rows = [_round_up(plan.num_rows, microbatch_rows) for plan in plans]
    computed[row_length] = sum(rows) * row_length
  least = min(computed.values())
  return next(x for x in computed if computed[x] <= 1.01 * least)


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
  """Returns i64[num_pairs], the pairs of an epoch in shuffled order."""
  order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
  order.flags.writeable = False  # shared by all callers
  return order


MISMATCHED, PROMPT = "mismatched", "prompt"
PROMPT_CHUNK = 4096  # prompts that are read at once to find equal ones


class Loader:
  """Packs the pairs of a dataset into batches.

  Every process plans every batch from lengths alone, and reads and builds
  only its own rows, so that any number of processes sees one global batch.

  Beside the responses a pair can have columns of its own for
    mismatched  a response to another prompt (see `mismatch`), behind this
                prompt, in rows of its own. Cut so that no sequence is longer
                than the dataset's longest
    prompt      the prompt's tokens from the second on, where they stand
  """

  def __init__(
    self,
    dataset: Dataset,
    *,
    batch_size: int,
    row_length: int = 0,
    microbatch_rows: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    layout: str = "mirrored",
    row_range: tuple[int, int] | None = None,
    extra_columns: tuple[str, ...] = (),
    scored: str = "tokens",
    max_prompt_length: int = 0,
  ):
    """Checks that every pair of the dataset can be placed.

    Args:
      dataset: what holds the tokens.
      batch_size: pairs in a batch.
      row_length: tokens in a row; 0 is what `choose_row_length` says.
      microbatch_rows: rows in a microbatch, over all processes.
      seed: of the order of pairs, at least 0.
      shuffle: whether each epoch is shuffled anew; file order otherwise.
      layout: `mirrored`, or `padded` with two sequences a pair.
      row_range: the rows of each microbatch that this process builds, the
        second number exclusive; all of them by default.
      extra_columns: what is scored beside the responses, in this order; no
        column comes after `prompt`.
      scored: one of `packing.SCORED`.
      max_prompt_length: tokens to which some prompts may have been cut, of
        which a mismatched response looks at no others; 0: none were.

    Raises:
      ValueError: a number out of range, an unknown layout, a row length that
        does not hold the longest span, or data that the layout or a column
        cannot have, such as mismatched responses of one prompt alone.
    """
    self.dataset = dataset
    self.reference_logps: np.ndarray | None = None  # f32[n,C]
    self.mismatched: tuple[np.ndarray, ...] = ()  # of `mismatch.find`
    self.num_pairs = len(dataset.lengths)
    self.batch_size = batch_size
    self.microbatch_rows = microbatch_rows
    self.seed = seed
    self.shuffle = shuffle
    self.layout = layout
    self.row_range = row_range or (0, microbatch_rows)
    self.extra_columns = extra_columns
    self._scored = scored
    self._check()
    self._num_responses = dataset.lengths.shape[1] - 1
    self._lengths = dataset.lengths
    if MISMATCHED in extra_columns:
      self.mismatched = mismatch.find(dataset, max_prompt_length)
      self._partner, self._partner_column, lengths = self.mismatched
      self._lengths = np.column_stack([dataset.lengths, lengths])
    spans = placement.span_lengths(dataset.lengths, layout)
    self.row_length = row_length or choose_row_length(
      dataset.lengths, batch_size, microbatch_rows, layout
    )
    if self.row_length < spans.max():
      raise ValueError(
        f"row_length={row_length}: pair {int(spans.argmax())} needs a row of"
        f" {int(spans.max())} tokens, and {int((spans > row_length).sum())}"
        f" of {self.num_pairs} pairs do not fit; allowed: 0 (automatic) or at"
        f" least {int(spans.max())}"
      )
    self._num_microbatches = self._max_microbatches(spans)
    if MISMATCHED in extra_columns:
      spans = placement.span_lengths(self._lengths[:, [0, -1]], layout)
      self._num_mismatched = self._max_microbatches(spans)

  @property
  def num_columns(self) -> int:
    """C, the sums of log-probabilities that are kept of each pair."""
    return self._num_responses + len(self.extra_columns)

  @property
  def arrangement(self) -> tuple[int | str | None, ...]:
    """What decides which rows a pair first stands in, and where."""
    seed = self.seed if self.shuffle else None
    rows = (self.row_length, self.microbatch_rows, self.layout)
    return (seed, self.batch_size, *rows)

  @property
  def has_pairs(self) -> bool:
    """Whether any prompt has two responses, one better than the other."""
    present = self.dataset.lengths[:, 1:] > 0
    return bool((present.sum(axis=1) > 1).any())

  def _check(self) -> None:
    """Raises ValueError for a setting that cannot be."""
    if self.layout not in placement.LAYOUTS:
      known = ", ".join(placement.LAYOUTS)
      raise ValueError(f"unknown layout {self.layout!r}; known: {known}")
    for name in ("batch_size", "microbatch_rows"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed}: must be at least 0")
    if self.num_pairs == 0:
      raise ValueError("the dataset holds no pairs")
    num_responses = self.dataset.lengths.shape[1] - 1
    if self.layout == "padded" and num_responses > 2:
      raise ValueError(
        f"layout 'padded': the data has lists of {num_responses} responses, it"
        " holds pairs; allowed: 'mirrored'"
      )
    if self.layout == "padded" and self.microbatch_rows % 2:
      raise ValueError(
        f"microbatch_rows={self.microbatch_rows}: layout 'padded' keeps the"
        " two rows of a pair in one microbatch; allowed: even numbers"
      )
    lo, hi = self.row_range
    if not 0 <= lo < hi <= self.microbatch_rows:
      raise ValueError(
        f"row_range={self.row_range}: must lie in 0..{self.microbatch_rows}"
      )

  def _max_microbatches(self, spans: np.ndarray) -> int:
    """Returns how many microbatches hold any batch of such spans."""
    rows = placement.max_rows(spans, self.batch_size, self.row_length)
    if self.layout == "padded":
      rows = 2 * self.batch_size
    return math.ceil(rows / self.microbatch_rows)

  def with_reference(self, logps: np.ndarray) -> "Loader":
    """Returns a loader whose batches hold the reference's log-probabilities.

    Args:
      logps: f32[n,C], pairs in file order.
    """
    wanted = (self.num_pairs, self.num_columns)
    assert logps.shape == wanted, "of another dataset"
    twin = copy.copy(self)
    twin.reference_logps = logps
    return twin

  def indices(self, k: int) -> np.ndarray:
    """Returns i64[B], the pairs of batch k, counted from 0.

    These are entries k*B to (k+1)*B of the epochs laid end to end, so a batch
    may span two epochs, and every epoch holds every pair once.

    Raises:
      ValueError: a batch is larger than the dataset.
    """
    if self.batch_size > self.num_pairs:
      raise ValueError(
        f"batch_size={self.batch_size}: must be at most the number of pairs,"
        f" {self.num_pairs}"
      )
    epoch, rank = np.divmod(
      np.arange(k * self.batch_size, (k + 1) * self.batch_size),
      self.num_pairs,
    )
    if not self.shuffle:
      return rank
    return np.concatenate(
      [
        epoch_order(self.seed, int(e), self.num_pairs)[rank[epoch == e]]
        for e in np.unique(epoch)
      ]
    )

  def batch(self, k: int) -> Batch:
    """Returns batch k, counted from 0; this process's rows of it.

    Raises:
      ValueError: a batch is larger than the dataset.
    """
    return self._pack(self.indices(k))

  def eval_batches(self) -> Iterator[Batch]:
    """Yields every pair once, in file order.

    The last batch is filled up with empty pair slots; a batch may be larger
    than the dataset.
    """
    for first in range(0, self.num_pairs, self.batch_size):
      last = min(first + self.batch_size, self.num_pairs)
      yield self._pack(np.arange(first, last))

  def num_tokens(self, k: int) -> int:
    """Returns the positions of batch k that hold a token, in all processes."""
    plans = self._plans(self.indices(k))
    return int(sum(plan.lengths.sum() for plan in plans))

  def num_positions(self, batch: Batch) -> int:
    """Returns the positions that a batch computes, in all processes.

    These are the positions of the microbatches that it fills.
    """
    filled = int(batch.num_microbatches) + int(batch.num_mismatched or 0)
    return filled * self.microbatch_rows * self.row_length

  def padding_fraction(self, k: int) -> float:
    """Returns the share of batch k's computed positions that is padding."""
    return 1 - self.num_tokens(k) / self.num_positions(self.batch(k))

  def _plans(self, indices: np.ndarray) -> list[placement.Plan]:
    """Returns the plan of the responses, and that of mismatched ones if any."""
    columns = [range(self._num_responses)]
    if MISMATCHED in self.extra_columns:
      columns.append([self._num_responses])
    return [
      placement.make_plan(
        self._lengths[indices], self.row_length, self.layout, places
      )
      for places in columns
    ]

  def _take(self, indices: np.ndarray) -> packing.PairTokens:
    """Returns the tokens of some pairs, mismatched responses among them."""
    tokens = self.dataset.take(indices)
    if MISMATCHED not in self.extra_columns:
      return tokens
    lengths = self._lengths[indices, -1].astype(np.int64)
    values = packing.select(
      self.dataset.take(self._partner[indices]).responses,
      self._partner_column[indices],
      lengths,
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mismatched = packing.Ragged(values, offsets)
    return tokens._replace(responses=(*tokens.responses, mismatched))

  def _pack(self, indices: np.ndarray) -> Batch:
    """Returns the batch of these pairs, at most `batch_size` of them."""
    plan, *mismatched = self._plans(indices)
    lengths = self._lengths[indices, 1:]
    prompt_column = None
    if PROMPT in self.extra_columns:
      prompt_column = self.num_columns - 1
      lengths = np.column_stack([lengths, self._lengths[indices, 0] - 1])
    batch = Batch(
      rows=self._rows(plan, indices, self._num_microbatches, prompt_column),
      num_microbatches=self._num_filled(plan),
      lengths=self._by_slot(lengths.astype(np.int32)),
    )
    changes: dict[str, Any] = {}
    if self.reference_logps is not None:
      changes["reference"] = self._by_slot(self.reference_logps[indices])
    if self.dataset.score_gaps is not None:
      changes["score_gaps"] = self._by_slot(self.dataset.score_gaps[indices])
    for plan in mismatched:
      changes["mismatched"] = self._rows(plan, indices, self._num_mismatched)
      changes["num_mismatched"] = self._num_filled(plan)
    return dataclasses.replace(batch, **changes)

  def _rows(
    self,
    plan: placement.Plan,
    indices: np.ndarray,
    num_microbatches: int,
    prompt_column: int | None = None,
  ) -> Rows:
    """Returns this process's rows of a plan of these pairs."""
    lo, hi = self.row_range
    row = plan.row % self.microbatch_rows
    own = plan.select((lo <= row) & (row < hi))
    return packing.pack(
      own,
      self._take(indices[own.pair]),
      row_length=self.row_length,
      microbatch_rows=self.microbatch_rows,
      num_microbatches=num_microbatches,
      row_range=self.row_range,
      num_columns=self.num_columns,
      prompt_column=prompt_column,
      scored=self._scored,
    )

  def _num_filled(self, plan: placement.Plan) -> np.int32:
    return np.int32(math.ceil(plan.num_rows / self.microbatch_rows))

  def _by_slot(self, values: np.ndarray) -> np.ndarray:
    """Returns values of the batch's pairs, 0 for the slots without one."""
    slots = np.zeros((self.batch_size, *values.shape[1:]), values.dtype)
    slots[: len(values)] = values
    return slots


def _round_up(number: int, multiple: int) -> int:
  return math.ceil(number / multiple) * multiple

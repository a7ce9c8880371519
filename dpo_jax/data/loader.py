"""Batches of packed rows: batch k is a pure function of (seed, k)."""

import copy
import dataclasses
import functools
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from dpo_jax.data import packing
from dpo_jax.types import Batch, Rows

T = TypeVar("T")


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
    layout: one of `packing.LAYOUTS`.
  """
  longest = int(packing.span_lengths(lengths, layout).max())
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
    plans = (packing.make_plan(x, row_length, layout) for x in batches[:16])
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
    mismatched  the response to another prompt, of the first pair that has one
                from half the dataset away on, behind this prompt, in rows of
                its own; of pairs, the chosen and the rejected in turns. Cut so
                that no sequence is longer than the dataset's longest
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

    Raises:
      ValueError: a number out of range, an unknown layout, a row length that
        does not hold the longest span, or data that the layout or a column
        cannot have, such as mismatched responses of one prompt alone.
    """
    self.dataset = dataset
    self.reference_logps: np.ndarray | None = None  # f32[n,C]
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
      self._partner, self._partner_column, lengths = _mismatch(dataset)
      self._lengths = np.column_stack([dataset.lengths, lengths])
    spans = packing.span_lengths(dataset.lengths, layout)
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
      spans = packing.span_lengths(self._lengths[:, [0, -1]], layout)
      self._num_mismatched = self._max_microbatches(spans)

  @property
  def num_columns(self) -> int:
    """C, the sums of log-probabilities that are kept of each pair."""
    return self._num_responses + len(self.extra_columns)

  @property
  def placement(self) -> tuple[int | str | None, ...]:
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
    if self.layout not in packing.LAYOUTS:
      known = ", ".join(packing.LAYOUTS)
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
    rows = packing.max_rows(spans, self.batch_size, self.row_length)
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

  def _plans(self, indices: np.ndarray) -> list[packing.Plan]:
    """Returns the plan of the responses, and that of mismatched ones if any."""
    columns = [range(self._num_responses)]
    if MISMATCHED in self.extra_columns:
      columns.append([self._num_responses])
    return [
      packing.make_plan(
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
    plan: packing.Plan,
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

  def _num_filled(self, plan: packing.Plan) -> np.int32:
    return np.int32(math.ceil(plan.num_rows / self.microbatch_rows))

  def _by_slot(self, values: np.ndarray) -> np.ndarray:
    """Returns values of the batch's pairs, 0 for the slots without one."""
    slots = np.zeros((self.batch_size, *values.shape[1:]), values.dtype)
    slots[: len(values)] = values
    return slots


def _mismatch(
  dataset: Dataset,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each pair's partner, which response of it, and how much of that.

  The partner is the first pair with another prompt from half the dataset away
  on, as pairs of one prompt often stand side by side.

  Raises:
    ValueError: all pairs have the same prompt.
  """
  prompt, chosen, rejected = dataset.lengths.T
  names = _prompt_names(dataset)
  # From each pair, cyclically, the first one whose prompt is not its own.
  twice = np.concatenate([names, names])
  changes = np.flatnonzero(twice[1:] != twice[:-1]) + 1
  if not len(changes):
    raise ValueError(
      f"all {len(names)} pairs have one prompt: a mismatched response needs"
      " the response to another"
    )
  index = np.arange(len(names))
  partner = np.roll(index, -(len(names) // 2))
  other = changes[np.searchsorted(changes, partner, side="right")] % len(names)
  partner = np.where(names[partner] == names, other, partner)
  is_rejected = np.where((chosen > 0) & (rejected > 0), index % 2, rejected > 0)
  longest = (prompt + np.maximum(chosen, rejected)).max()
  theirs = np.where(is_rejected, rejected, chosen)[partner]
  column = is_rejected[partner].astype(np.int64)
  return partner, column, np.minimum(theirs, longest - prompt)


def _prompt_names(dataset: Dataset) -> np.ndarray:
  """Returns i64[n], equal for the pairs whose prompts are equal."""
  names: dict[bytes, int] = {}
  found = []
  for first in range(0, len(dataset.lengths), PROMPT_CHUNK):
    last = min(first + PROMPT_CHUNK, len(dataset.lengths))
    prompts = dataset.take(np.arange(first, last)).prompt
    for tokens in np.split(prompts.values, prompts.offsets[1:-1]):
      found.append(names.setdefault(tokens.tobytes(), len(names)))
  return np.array(found)


class Prefetch(Generic[T]):
  """An iterator over fn(first), ..., fn(last - 1), computed ahead in a thread.

  `wait_seconds` is the time the consumer has waited so far. The thread ends
  when the range does, with `close`, or when the iterator is let go.
  """

  def __init__(self, fn: Callable[[int], T], first: int, last: int, depth: int):
    self.wait_seconds = 0.0
    self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._slots = threading.Semaphore(depth)
    stop = threading.Event()
    # The thread holds no reference to self, so that letting go ends it.
    self.close = weakref.finalize(self, _stop, stop, self._slots)
    threading.Thread(
      target=_produce,
      args=(fn, range(first, last), self._ready, self._slots, stop),
      daemon=True,
    ).start()

  def __iter__(self) -> "Prefetch[T]":
    return self

  def __next__(self) -> T:
    if not self.close.alive:
      raise StopIteration
    start = time.perf_counter()
    value, error = self._ready.get()
    self.wait_seconds += time.perf_counter() - start
    self._slots.release()
    if error is not None:
      self.close()
      raise error
    return value


def prefetch(
  fn: Callable[[int], T], first: int, last: int, depth: int = 2
) -> Prefetch[T]:
  """Returns an iterator over fn(first), ..., fn(last - 1), computed ahead.

  Args:
    fn: called in a thread, in order; what it raises, the consumer gets.
    first: the first argument.
    last: one past the last argument.
    depth: results that wait for the consumer at most, at least 1.
  """
  return Prefetch(fn, first, last, depth)


def _round_up(number: int, multiple: int) -> int:
  return math.ceil(number / multiple) * multiple


def _stop(stop: threading.Event, slots: threading.Semaphore) -> None:
  stop.set()
  slots.release()


def _produce(
  fn: Callable[[int], T],
  arguments: range,
  ready: queue.SimpleQueue,
  slots: threading.Semaphore,
  stop: threading.Event,
) -> None:
  """Puts (value, None) for each argument, then (None, what ended it)."""
  try:
    for argument in arguments:
      slots.acquire()
      if stop.is_set():
        return
      ready.put((fn(argument), None))
    ready.put((None, StopIteration()))
  except BaseException as error:  # the consumer would wait for ever
    ready.put((None, error))

"""Batches of packed rows: batch k is a pure function of (seed, k)."""

import copy
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
from dpo_jax.types import Batch

T = TypeVar("T")


class Dataset(Protocol):
  """What a loader reads: token counts of all pairs, tokens of some."""

  lengths: np.ndarray  # i32[n,3]  tokens of prompt, chosen, rejected
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


class Loader:
  """Packs the pairs of a dataset into batches.

  Every process plans every batch from lengths alone, and reads and builds
  only its own rows, so that any number of processes sees one global batch.
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

    Raises:
      ValueError: a number out of range, an unknown layout, or a row length
        that does not hold the longest span.
    """
    self.dataset = dataset
    self.reference_logps: np.ndarray | None = None  # f32[n,2]
    self.num_pairs = len(dataset.lengths)
    self.batch_size = batch_size
    self.microbatch_rows = microbatch_rows
    self.seed = seed
    self.shuffle = shuffle
    self.layout = layout
    self.row_range = row_range or (0, microbatch_rows)
    self._check()
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
    self.num_microbatches = self._num_microbatches(spans)

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

  def _num_microbatches(self, spans: np.ndarray) -> int:
    """Returns M, the microbatches that hold any batch of this dataset."""
    rows = packing.max_rows(spans, self.batch_size, self.row_length)
    if self.layout == "padded":
      rows = 2 * self.batch_size
    return math.ceil(rows / self.microbatch_rows)

  def with_reference(self, logps: np.ndarray) -> "Loader":
    """Returns a loader whose batches hold the reference's log-probabilities.

    Args:
      logps: f32[n,2], of chosen and rejected, pairs in file order.
    """
    assert logps.shape == (self.num_pairs, 2), "of another dataset"
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
    plan = self._plan(self.indices(k))
    return int((plan.left + plan.prompt + plan.right).sum())

  def padding_fraction(self, k: int) -> float:
    """Returns the share of batch k's computed positions that is padding.

    Computed are the positions of the microbatches that the batch fills, in
    all processes.
    """
    plan = self._plan(self.indices(k))
    used = int((plan.left + plan.prompt + plan.right).sum())
    rows = _round_up(plan.num_rows, self.microbatch_rows)
    return 1 - used / (rows * self.row_length)

  def _plan(self, indices: np.ndarray) -> packing.Plan:
    return packing.make_plan(
      self.dataset.lengths[indices], self.row_length, self.layout
    )

  def _pack(self, indices: np.ndarray) -> Batch:
    """Returns the batch of these pairs, at most `batch_size` of them."""
    plan = self._plan(indices)
    lo, hi = self.row_range
    row = plan.row % self.microbatch_rows
    own = plan.select((lo <= row) & (row < hi))
    rows = packing.pack(
      own,
      self.dataset.take(indices[own.pair]),
      row_length=self.row_length,
      microbatch_rows=self.microbatch_rows,
      num_microbatches=self.num_microbatches,
      row_range=self.row_range,
    )
    lengths = np.zeros((self.batch_size, 2), np.int32)
    lengths[: len(indices)] = self.dataset.lengths[indices, 1:]
    reference = None
    if self.reference_logps is not None:
      reference = np.zeros((self.batch_size, 2), np.float32)
      reference[: len(indices)] = self.reference_logps[indices]
    num_filled = math.ceil(plan.num_rows / self.microbatch_rows)
    score_gaps = None
    if self.dataset.score_gaps is not None:
      score_gaps = np.zeros(self.batch_size, np.float32)
      score_gaps[: len(indices)] = self.dataset.score_gaps[indices]
    return Batch(rows, np.int32(num_filled), lengths, reference, score_gaps)


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

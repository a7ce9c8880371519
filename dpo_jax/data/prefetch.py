"""Values that a thread computes ahead of whoever consumes them."""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


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

"""The loop over steps: batches in, metrics and checkpoints out.

The host never waits for the device but to read metrics one step late, and the
device never waits for the host but where the loader is too slow, which is
measured and reported.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from dpo_jax.training import state as state_lib

EvalFn = Callable[[state_lib.TrainState], dict[str, float]]
SaveFn = Callable[[int, state_lib.TrainState, dict[str, float] | None], None]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen; steps count from 1, and 0 means never on the way.

  The last step is always logged, evaluated (if there is anything to evaluate
  on) and saved.
  """

  last_step: int
  log_every: int = 1
  eval_every: int = 0
  save_every: int = 0

  def is_due(self, step: int, every: int) -> bool:
    """Returns whether something done every so often is due after `step`."""
    return step == self.last_step or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class HostBatch:
  """A batch on the device, with what the host knows of it."""

  batch: Any  # what the step takes: a `Batch`, or the prompts of PPO
  num_pairs: int
  # 0, and no rates of them, where they are known in the step only.
  num_tokens: int = 0  # tokens that stand in the rows
  num_positions: int = 0  # tokens and padding that the step computes


def run(
  state: state_lib.TrainState,
  *,
  train_step: Callable[..., Any],
  batches: Iterator[HostBatch],
  waited: Callable[[], float],
  schedule: Schedule,
  eval_fn: EvalFn | None,
  save_fn: SaveFn,
  record_fn: Callable[[int, str, dict[str, float]], None],
) -> tuple[state_lib.TrainState, bool]:
  """Returns the last state, and whether the run came to its end.

  A run that is told to stop (SIGTERM) saves and returns False.

  Args:
    state: holds the number of updates done already; donated.
    train_step: compiled `step(state, batch) -> (state, metrics)`.
    batches: the batches from the next step on.
    waited: seconds that the loop has waited for batches so far.
    schedule: when to log, evaluate, save and end.
    eval_fn: returns the metrics of an evaluation.
    save_fn: keeps (step, state, eval metrics or None).
    record_fn: keeps (step, split, metrics).
  """
  step = int(jax.device_get(state.step))
  pending = None
  clock = _Clock(waited)
  with _stop_signal() as must_stop:
    for host_batch in batches:
      step += 1
      with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, host_batch.batch)
      clock.add(host_batch)
      if pending is not None:
        record_fn(*_fetch(pending, clock))
        pending = None
      if schedule.is_due(step, schedule.log_every):
        pending = (step, metrics, clock.take())
      evaluates = eval_fn and schedule.is_due(step, schedule.eval_every)
      stopping = must_stop(step)
      saves = stopping or schedule.is_due(step, schedule.save_every)
      if evaluates or saves:
        if pending is not None:
          record_fn(*_fetch(pending, clock))
          pending = None
        jax.block_until_ready(state.step)
        with clock.paused():
          eval_metrics = eval_fn(state) if evaluates else None
          if eval_metrics is not None:
            record_fn(step, "eval", eval_metrics)
          if saves:
            save_fn(step, state, eval_metrics)
      if stopping or step >= schedule.last_step:
        break
  return state, step >= schedule.last_step


class _Clock:
  """Counts what the steps since the last report did, and how long it took."""

  def __init__(self, waited: Callable[[], float]):
    self._waited = waited
    self._total_waited = waited()
    self._pairs = self._tokens = self._positions = 0
    self._start = time.perf_counter()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves what is done inside (an evaluation, a save) out of the rates."""
    begin = time.perf_counter()
    yield
    self._start += time.perf_counter() - begin

  def add(self, batch: HostBatch) -> None:
    self._pairs += batch.num_pairs
    self._tokens += batch.num_tokens
    self._positions += batch.num_positions

  def take(self) -> tuple[int, int, int]:
    counts = self._pairs, self._tokens, self._positions
    self._pairs = self._tokens = self._positions = 0
    return counts

  def rates(self, counts: tuple[int, int, int]) -> dict[str, float]:
    """Returns rates from the last report to now, when its step is done."""
    pairs, tokens, positions = counts
    now, waited = time.perf_counter(), self._waited()
    seconds, self._start = now - self._start, now
    wait, self._total_waited = waited - self._total_waited, waited
    rates = {"pairs_per_second": pairs / seconds, "data_wait_seconds": wait}
    if positions:
      rates["tokens_per_second"] = tokens / seconds
      rates["padding_fraction"] = 1 - tokens / positions
    return rates


def _fetch(pending, clock):
  step, metrics, counts = pending
  metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
  return step, "train", metrics | clock.rates(counts)


@contextlib.contextmanager
def _stop_signal():
  """Yields `must_stop(step)`: true once this run was told to end.

  Several processes agree on the step through JAX's own preemption service;
  one process listens to SIGTERM itself.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []
  previous = signal.signal(
    signal.SIGTERM, lambda number, frame: received.append(number)
  )
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, previous)

"""The loop over steps: batches in, metrics and checkpoints out.

The host never waits for the device but to read metrics one step late, and the
device never waits for the host but where the loader is too slow, which is
measured and reported.
"""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dpo_jax.host import endings
from dpo_jax.training import state as state_lib

# Metrics of every step that must be finite, or the run ends.
FINITE_METRICS = ("loss", "grad_norm")

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
  save_minutes: float = 0.0  # a save at the latest so long after another

  def __post_init__(self):
    if not 0 <= self.save_minutes < math.inf:
      raise ValueError(
        f"checkpoint.minutes={self.save_minutes}: 0 (never) or above"
      )

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
  wait_fn: Callable[[], None],
  record_fn: Callable[[int, str, dict[str, float]], None],
) -> tuple[state_lib.TrainState, bool]:
  """Returns the last state, and whether the run came to its end.

  A run that is told to stop (see `endings`) saves and returns False. No state
  is saved, nor evaluated, before every step that led to it is known to have
  been finite.

  Args:
    state: holds the number of updates done already; donated.
    train_step: compiled `step(state, batch) -> (state, metrics)`.
    batches: the batches from the next step on.
    waited: seconds that the loop has waited for batches so far.
    schedule: when to log, evaluate, save and end.
    eval_fn: returns the metrics of an evaluation.
    save_fn: keeps (step, state, eval metrics or None).
    wait_fn: returns when what was saved is on disk.
    record_fn: keeps (step, split, metrics).

  Raises:
    endings.NotFiniteError: one of `FINITE_METRICS` of a step is not finite.
  """
  step = int(jax.device_get(state.step))
  pending = None
  clock = _Clock(waited)
  timer = _SaveTimer(60 * schedule.save_minutes, step)
  with _stop_signal() as must_stop:
    for host_batch in batches:
      step += 1
      with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, host_batch.batch)
      clock.add(host_batch)
      if pending is not None:
        _read(*pending, clock, record_fn)
      is_logged = schedule.is_due(step, schedule.log_every)
      pending = (step, metrics, clock.take() if is_logged else None)
      evaluates = eval_fn and schedule.is_due(step, schedule.eval_every)
      stopping = must_stop(step)
      saves = (
        stopping
        or schedule.is_due(step, schedule.save_every)
        or timer.is_due(step)
      )
      if evaluates or saves:
        _read(*pending, clock, record_fn)
        pending = None
        jax.block_until_ready(state.step)
        with clock.paused():
          eval_metrics = eval_fn(state) if evaluates else None
          if eval_metrics is not None:
            record_fn(step, "eval", eval_metrics)
            _warn_of_eval(step, eval_metrics)
          if saves:
            save_fn(step, state, eval_metrics)
            timer.restart(step)
      if stopping or step >= schedule.last_step:
        break
    wait_fn()
  return state, step >= schedule.last_step


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Raises endings.NotFiniteError where a step's metrics are not finite."""
  wrong = [
    f"{name} is {float(metrics[name])}"
    for name in FINITE_METRICS
    if not math.isfinite(metrics[name])
  ]
  if wrong:
    raise endings.NotFiniteError(f"step {step}: {' and '.join(wrong)}")


def _warn_of_eval(step, metrics):
  # The weights may be fine: one held-out row is enough. It is never the best.
  if not math.isfinite(metrics.get("loss", 0.0)):
    logging.warning(
      "step %d: the evaluation's loss is %s", step, metrics["loss"]
    )


class _SaveTimer:
  """Says when a save is due by time, in all processes after the same step.

  Process 0 measures how long a step takes and says at which step to look
  again: after at most as many steps as it has seen, and half of the time that
  is left, since later steps may take longer. So processes talk a few times
  between two saves, and no step waits for that.
  """

  def __init__(self, seconds: float, step: int):
    self._seconds = seconds
    self.restart(step)

  def restart(self, step: int) -> None:
    """Begins to count after a save."""
    self._start, self._start_step = time.monotonic(), step
    self._look_at = step + 1

  def is_due(self, step: int) -> bool:
    if not self._seconds or step < self._look_at:
      return False
    passed, steps = time.monotonic() - self._start, step - self._start_step
    left = self._seconds - passed
    half = left / 2 * steps / max(passed, 1e-9)
    wait = 0 if left <= 0 else max(1, int(min(steps, half)))
    wait = int(multihost_utils.broadcast_one_to_all(np.int32(wait)))
    self._look_at = step + wait
    return wait == 0


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


def _read(step, metrics, counts, clock, record_fn):
  """Records a step's metrics if there are counts; all must be finite."""
  if counts is None:
    metrics = {name: metrics[name] for name in FINITE_METRICS}
  metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
  if counts is not None:
    record_fn(step, "train", metrics | clock.rates(counts))
  check_finite(step, metrics)


@contextlib.contextmanager
def _stop_signal():
  """Yields `must_stop(step)`: true once this run was told to end.

  Several processes agree on the step through JAX's own preemption service,
  to which SIGTERM belongs: other signals are passed on to it.
  """
  if jax.process_count() == 1:
    with endings.deferred() as received:
      yield lambda step: bool(received)
    return
  others = tuple(n for n in endings.SIGNALS if n != signal.SIGTERM)
  passed_on = []

  def must_stop(step):
    if received and not passed_on:
      passed_on.append(received[0])
      os.kill(os.getpid(), signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(step)

  with endings.deferred(others) as received:
    yield must_stop

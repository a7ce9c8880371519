"""When the loop saves, when it ends, and that nothing bad is kept."""

import os
import signal
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from dpo_jax.host import endings
from dpo_jax.run import ppo as ppo_run
from dpo_jax.training import loop, state

NAN = float("nan")


class Run:
  """A loop over steps that only say how they went."""

  def __init__(self, last_step, *, bad=None, during=lambda step: None, **when):
    self.saved, self.recorded, self.waits = [], [], 0
    good = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
    steps = {k: good for k in range(1, last_step + 1)} | (bad or {})
    state_of = {k: self._state(k) for k in range(last_step + 1)}
    done = iter(range(1, last_step + 1))

    def train_step(train_state, batch):
      step = next(done)
      during(step)
      return state_of[step], steps[step]

    self._arguments = dict(
      train_step=train_step,
      batches=iter([loop.HostBatch(None, 1)] * last_step),
      waited=lambda: 0.0,
      schedule=loop.Schedule(last_step, **when),
      eval_fn=None,
      save_fn=lambda step, *_: self.saved.append(step),
      wait_fn=lambda: self.saved.append("waited"),
      record_fn=lambda step, *_: self.recorded.append(step),
    )
    self._first = state_of[0]

  def _state(self, step):
    return state.TrainState(jnp.int32(step), {}, None)

  def __call__(self, **changes):
    return loop.run(self._first, **self._arguments | changes)


def _metrics(**changes):
  good = {"loss": 1.0, "grad_norm": 1.0}
  return {k: jnp.float32(x) for k, x in (good | changes).items()}


@pytest.mark.parametrize("log_every", [1, 3, 100, 0])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("bad_step", [3, 4])
def test_no_state_behind_a_step_that_was_not_finite_is_saved(
  log_every, name, value, bad_step
):
  bad = {bad_step: _metrics(**{name: value})}
  run = Run(9, bad=bad, log_every=log_every, save_every=2)
  with pytest.raises(
    endings.NotFiniteError, match=f"^step {bad_step}: {name} is {value}$"
  ):
    run()
  assert run.saved == [2]
  if log_every == 1:
    assert run.recorded == list(range(1, bad_step + 1))


def test_the_last_step_is_checked_too():
  run = Run(3, bad={3: _metrics(loss=NAN)}, log_every=0)
  with pytest.raises(endings.NotFiniteError, match="step 3: loss is nan"):
    run()
  assert not run.saved


def test_an_iteration_of_ppo_ends_before_the_next_one_samples():
  iterate = lambda train_state, k, prompts: (train_state, _metrics(loss=NAN))
  options = types.SimpleNamespace(updates_per_step=4)
  step = ppo_run.make_step(options, iterate, lambda k: jnp.float32(0))
  with pytest.raises(endings.NotFiniteError, match="step 5: loss is nan"):
    step(None, (4, []))


def test_an_evaluation_that_is_not_finite_is_said_and_the_run_goes_on(
  monkeypatch,
):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *x: said.append(x[0] % x[1:]))
  run = Run(2)
  _, finished = run(eval_fn=lambda _: {"loss": NAN})
  assert finished and run.saved == [2, "waited"]
  assert said == ["step 2: the evaluation's loss is nan"]


@pytest.mark.parametrize(
  "number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM]
)
def test_a_signal_saves_waits_for_the_disk_and_ends(number):
  before = signal.getsignal(number)

  def during(step):
    if step == 3:
      os.kill(os.getpid(), number)

  run = Run(9, during=during)
  last, finished = run()
  assert not finished and int(last.step) == 3
  assert run.saved == [3, "waited"]
  assert endings.status() == 128 + number
  assert signal.getsignal(number) is before


def _seconds(monkeypatch, of_step):
  """Lets each step take as long as `of_step` says; returns a `during`."""
  now = [0.0]
  clock = types.SimpleNamespace(
    monotonic=lambda: now[0], perf_counter=time.perf_counter
  )
  monkeypatch.setattr(loop, "time", clock)

  def during(step):
    now[0] += of_step(step)

  return during


def test_a_save_is_due_after_so_many_minutes(monkeypatch):
  during = _seconds(monkeypatch, lambda step: 60.0)
  run = Run(40, during=during, save_minutes=15.0)
  run()
  assert run.saved == [15, 30, 40, "waited"]


def test_saves_by_steps_and_by_time_count_as_one(monkeypatch):
  during = _seconds(monkeypatch, lambda step: 60.0)
  run = Run(30, during=during, save_minutes=15.0, save_every=10)
  run()
  assert run.saved == [10, 20, 30, "waited"]


def test_no_more_than_the_end_is_saved_without_minutes(monkeypatch):
  during = _seconds(monkeypatch, lambda step: 1e4)
  run = Run(5, during=during)
  run()
  assert run.saved == [5, "waited"]


def test_processes_talk_seldom_and_follow_steps_that_become_slower(
  monkeypatch,
):
  talks = []
  monkeypatch.setattr(
    loop.multihost_utils,
    "broadcast_one_to_all",
    lambda x: talks.append(x) or np.asarray(x),
  )
  # The first seem to take nothing: the device still works on them.
  slow = lambda step: 0.0 if step < 4 else 0.5 if step < 1000 else 2.0
  during = _seconds(monkeypatch, slow)
  run = Run(1500, during=during, save_minutes=15.0)
  run()
  first, *_ = run.saved
  # 15 minutes are over at step 1200; half of what is left at step 1000, by the
  # pace until then, is 400 steps.
  assert 1200 <= first <= 1400
  assert len(talks) < 60


@pytest.mark.parametrize("minutes", [-1.0, float("inf"), NAN])
def test_minutes_out_of_range_are_refused(minutes):
  with pytest.raises(ValueError, match="^checkpoint.minutes="):
    loop.Schedule(1, save_minutes=minutes)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_one_bad_weight_is_found(value):
  tree = {"a": jnp.ones((2, 3)), "b": {"c": jnp.zeros(4)}}
  assert state.is_finite(tree)
  tree["b"]["c"] = tree["b"]["c"].at[2].set(value)
  assert not state.is_finite(tree)

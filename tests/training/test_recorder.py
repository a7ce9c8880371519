"""What a run measured survives kills and resumptions, each step once."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from dpo_jax.training import recorder


def _lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def _train(workdir, first, last, start_step=0):
  """Records steps as a run would: an evaluation every other step."""
  with recorder.Recorder(
    workdir, total_steps=10, start_step=start_step
  ) as metrics:
    for step in range(first, last + 1):
      metrics.write(step, "train", {"loss": 1 / step, "grad_norm": step / 3})
      if step % 2 == 0:
        metrics.write(step, "eval", {"loss": 2 / step})


def test_a_line_is_one_object_of_plain_numbers(tmp_path):
  with recorder.Recorder(tmp_path, total_steps=2) as metrics:
    metrics.write(
      np.int64(1), "train", {"loss": np.float32(0.5), "rewards/margins": 2}
    )
    flushed = (tmp_path / "metrics.jsonl").read_text()
  assert flushed == (
    '{"step": 1, "split": "train", "loss": 0.5, "rewards/margins": 2.0}\n'
  )


def test_a_resumed_run_leaves_the_same_file_as_an_uninterrupted_one(tmp_path):
  _train(tmp_path / "whole", 1, 8)
  _train(tmp_path / "resumed", 1, 7)
  _train(tmp_path / "resumed", 5, 8, start_step=4)
  whole, resumed = (
    (tmp_path / name / "metrics.jsonl").read_bytes()
    for name in ("whole", "resumed")
  )
  assert whole == resumed


def test_a_new_run_starts_without_old_lines(tmp_path):
  with recorder.Recorder(tmp_path, total_steps=3) as metrics:
    metrics.write(0, "eval", {"loss": 1.0})
    metrics.write(1, "train", {"loss": 1.0})
  _train(tmp_path, 1, 1)
  assert [line["step"] for line in _lines(tmp_path)] == [1]


@pytest.mark.parametrize(
  "rest", [b'{"step": 3, "spl', b'{"step": 3}', b"\0\0\0\n", b"7\n"]
)
def test_a_half_written_last_line_is_removed(tmp_path, rest):
  _train(tmp_path, 1, 3)
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  (tmp_path / "metrics.jsonl").write_bytes(whole + rest)
  _train(tmp_path, 4, 3, start_step=3)
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_damaged_line_elsewhere_is_an_error(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  with pytest.raises(ValueError, match="metrics.jsonl line 2 is not") as error:
    recorder.Recorder(tmp_path, total_steps=3, start_step=2)
  assert "\n" not in str(error.value)


def test_a_killed_run_keeps_every_line_it_wrote(tmp_path):
  code = (
    "import os, signal, sys\n"
    "from dpo_jax.training import recorder\n"
    "metrics = recorder.Recorder(sys.argv[1], total_steps=9)\n"
    "for step in (1, 2, 3):\n"
    "  metrics.write(step, 'train', {'loss': step})\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  killed = subprocess.run([sys.executable, "-c", code, tmp_path])
  assert killed.returncode == -signal.SIGKILL
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_lines_are_replaced_by_renaming(tmp_path, monkeypatch):
  _train(tmp_path, 1, 3)
  whole = (tmp_path / "metrics.jsonl").read_bytes()

  def kill(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "fsync", kill)
  with pytest.raises(KeyboardInterrupt):
    recorder.Recorder(tmp_path, total_steps=3, start_step=1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_tensorboard_events_are_named_by_split(tmp_path):
  _train(tmp_path, 1, 2)
  (events,) = tmp_path.glob("events.out.tfevents.*")
  data = events.read_bytes()
  assert all(tag in data for tag in (b"train/loss", b"train/grad_norm"))
  assert b"eval/loss" in data


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  _train(tmp_path, 1, 3)
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_a_line_with_rate_and_time_left(
  tmp_path, monkeypatch, capsys
):
  seconds = iter([0.0, 4.0, 5.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(seconds), time=time.time)
  monkeypatch.setattr(recorder, "time", clock)
  with recorder.Recorder(tmp_path, total_steps=10, start_step=2) as metrics:
    metrics.write(4, "train", {"loss": 0.5})
    metrics.write(4, "eval", {"loss": 0.25, "rewards/accuracies": 1.0})
    metrics.write(6, "train", {"loss": 0.5})
  output = capsys.readouterr()
  assert output.out.splitlines() == [
    "step 4/10 loss 0.5000 0.50 steps/s, 00:12 left",
    "step 4 eval: loss 0.25, rewards/accuracies 1",
    "step 6/10 loss 0.5000 2.00 steps/s, 00:02 left",
  ]
  assert not output.err


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  _train(tmp_path, 1, 10)
  output = capsys.readouterr()
  assert "10/10" in output.err and "loss 0.1000" in output.err
  assert "step 4 eval: loss 0.5" in output.out + output.err


def test_wandb_gets_every_metric_when_asked_for(tmp_path, monkeypatch):
  calls = []
  run = types.SimpleNamespace(
    log=lambda metrics, step: calls.append((step, metrics)),
    finish=lambda: calls.append("finished"),
  )
  wandb = types.ModuleType("wandb")
  wandb.init = lambda **settings: calls.append(settings) or run
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  with recorder.Recorder(
    tmp_path, total_steps=1, wandb_project="dpo", config={"seed": 0}
  ) as metrics:
    metrics.write(1, "train", {"loss": 1.0})
  settings, logged, end = calls
  assert (settings["project"], settings["config"]) == ("dpo", {"seed": 0})
  assert logged == (1, {"train/loss": 1.0})
  assert end == "finished"


def test_a_missing_wandb_is_an_error_of_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="wandb project 'dpo'") as error:
    recorder.Recorder(tmp_path, total_steps=1, wandb_project="dpo")
  assert "\n" not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_a_write_that_the_system_refuses_names_the_file(tmp_path, capsys):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(OSError, match="File too large") as caught:
    with recorder.Recorder(tmp_path, total_steps=99) as metrics:
      resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
      try:
        for step in range(1, 99):
          metrics.write(step, "train", {"loss": 1.0})
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.filename == str(tmp_path / "metrics.jsonl")

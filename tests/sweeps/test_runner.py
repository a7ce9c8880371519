"""Which runs start, when, and what is left when they or the sweep are killed.

A script that writes what a run leaves stands in for the trainer.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.sweeps import launchers, runner
from dpo_jax.sweeps.points import Point

PATIENCE = 300  # seconds, on a machine that others use
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TRAINER = """
import json, pathlib, signal, sys, time

given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
folder = pathlib.Path(given["workdir"])

def tell(what):
  with (folder.parent / "events").open("a") as file:
    file.write(f"{what} {folder.name}\\n")

def stop(number, frame):
  # As in the trainer, whose last save goes on when its handler is gone.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  time.sleep(0.5)
  tell("save")
  sys.exit(143)

signal.signal(signal.SIGTERM, stop)
tell("begin")
settings = json.loads(given["settings"])
(folder / "config.json").write_text(json.dumps(settings))
time.sleep(float(given["seconds"]))
if given["fails"] == "True":
  print("the data cannot be read")
  sys.exit(2)
beta = settings["loss"]["beta"]
metrics = {"step": 1, "split": "eval", "rewards/accuracies": beta / 10}
(folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\\n")
(folder / "finished").touch()
tell("end")
"""
# Runs a sweep in a process that can be killed.
DRIVER = """
import pathlib, sys
from tests.sweeps import test_runner

folder, *all_seconds = sys.argv[1:]
all_seconds = [float(seconds) for seconds in all_seconds]
sys.exit(test_runner.sweep(pathlib.Path(folder), all_seconds, parallel=2))
"""


def make_point(beta, seconds=0.0, fails=False):
  settings = {
    "steps": 1,
    "epochs": 1,
    "loss": {"name": "dpo", "beta": beta},
  }
  flags = {"settings": json.dumps(settings), "seconds": seconds, "fails": fails}
  return Point(
    name=f"loss.beta={beta}",
    values={"loss.beta": beta},
    arguments=tuple(f"--{key}={value}" for key, value in flags.items()),
    settings=settings,
  )


def make_sweep(folder, all_seconds, parallel=1, fails=()):
  folder.mkdir(exist_ok=True)
  (folder / "trainer.py").write_text(TRAINER)
  return runner.Sweep(
    points=[
      make_point(beta, seconds, beta in fails)
      for beta, seconds in enumerate(all_seconds, 1)
    ],
    folder=folder,
    command=(sys.executable, str(folder / "trainer.py")),
    launcher=launchers.make_launcher("local"),
    parallel=parallel,
    metric="eval/rewards/accuracies",
    x="loss.beta",
  )


def sweep(folder, all_seconds, **options):
  return runner.run(make_sweep(folder, all_seconds, **options))


def events(folder):
  path = folder / "events"
  lines = path.read_text().splitlines() if path.exists() else []
  return [tuple(line.split()) for line in lines]


def count(folder, what):
  return sum(event == what for event, _ in events(folder))


def most_at_once(folder):
  running = most = 0
  for event, _ in events(folder):
    running += 1 if event == "begin" else -1
    most = max(most, running)
  return most


def tables(folder):
  return [(folder / name).read_text() for name in ("sweep.csv", "sweep.md")]


def wait_for(condition):
  deadline = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Returns the tables of a sweep that nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  assert sweep(folder, [0.0] * 4) == 0
  return tables(folder)


@pytest.fixture
def drive(tmp_path):
  """Returns a function that starts a sweep as a process, two runs at once."""
  processes = []

  def start(*all_seconds):
    process = subprocess.Popen(
      [sys.executable, "-c", DRIVER, str(tmp_path), *map(str, all_seconds)],
      cwd=REPOSITORY,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def test_the_table_does_not_depend_on_which_run_ended_first(tmp_path, whole):
  assert sweep(tmp_path, [2.4, 1.6, 0.8, 0.0], parallel=4) == 0
  ended = [name for event, name in events(tmp_path) if event == "end"]
  assert ended == [f"loss.beta={beta}" for beta in (4, 3, 2, 1)]
  assert tables(tmp_path) == whole


@pytest.mark.parametrize(("parallel", "seconds"), [(1, 0.1), (2, 1.0)])
def test_as_many_run_at_once_as_may(parallel, seconds, tmp_path):
  assert sweep(tmp_path, [seconds] * 4, parallel=parallel) == 0
  assert most_at_once(tmp_path) == parallel


def test_what_is_finished_is_not_started_again(tmp_path, whole, capsys):
  for _ in range(2):
    assert sweep(tmp_path, [0.0] * 4) == 0
  assert count(tmp_path, "begin") == 4
  assert "[4/4] loss.beta=4 finished before" in capsys.readouterr().out
  assert tables(tmp_path) == whole
  assert runner.plan(make_sweep(tmp_path, [0.0] * 5)).count("finished") == 4


def test_a_longer_run_of_a_finished_folder_is_started(tmp_path):
  short = make_sweep(tmp_path, [0.0])
  assert runner.run(short) == 0
  (point,) = short.points
  assert short.is_finished(point)
  point.settings["steps"] = 2
  assert not short.is_finished(point)


def test_a_failure_is_told_and_the_others_go_on(tmp_path, whole, capsys):
  assert sweep(tmp_path, [0.0] * 4, fails=(2,)) == 1
  out = capsys.readouterr().out
  assert "loss.beta=2 failed with status 2; the end of" in out
  assert "  the data cannot be read\n" in out
  assert count(tmp_path, "end") == 3
  assert "failed" in tables(tmp_path)[0].splitlines()[2]
  # Put right, it alone runs again.
  assert sweep(tmp_path, [0.0] * 4) == 0
  assert count(tmp_path, "begin") == 5
  assert tables(tmp_path) == whole


def test_a_killed_sweep_started_again_ends_with_the_same_table(
  tmp_path, whole, drive
):
  process = drive(0.0, 2.0, 2.0, 0.0)
  wait_for(lambda: count(tmp_path, "begin") >= 3)
  process.kill()
  process.wait()
  assert count(tmp_path, "end") < 4
  assert sweep(tmp_path, [0.0] * 4) == 0
  # Each ran once: those alive at the kill were waited for.
  assert count(tmp_path, "begin") == 4 and most_at_once(tmp_path) <= 2
  assert tables(tmp_path) == whole


def test_a_run_still_alive_is_waited_for_and_counts(tmp_path, capsys):
  orphan = make_sweep(tmp_path, [0.0, 0.0, 1.0])
  point = orphan.points[2]
  command, log = orphan.command_of(point), orphan.log(point)
  job = orphan.launcher.start(command, log)
  wait_for(lambda: count(tmp_path, "begin") == 1)
  assert orphan.launcher.is_busy(log)
  assert orphan.launcher.start(command, log) is None
  assert "running" in runner.plan(orphan)
  assert runner.run(orphan) == 0
  assert job.poll() == 0
  assert count(tmp_path, "begin") == 3 and most_at_once(tmp_path) == 1
  assert "loss.beta=3 runs on from an earlier" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_runs_save_and_the_sweep_go_on(
  number, tmp_path, drive, whole
):
  process = drive(100, 100, 100, 100)
  wait_for(lambda: count(tmp_path, "begin") == 2)
  os.killpg(process.pid, number)  # as Ctrl-C does
  out, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 128 + number, out
  assert f"stopped by {number.name}" in out
  assert count(tmp_path, "save") == 2 and not count(tmp_path, "end")
  assert not (tmp_path / "sweep.csv").exists()
  assert sweep(tmp_path, [0.0] * 4) == 0
  assert tables(tmp_path) == whole


def test_an_unknown_launcher_is_refused():
  with pytest.raises(
    ValueError, match="unknown launcher 'slurm'; known: local"
  ):
    launchers.make_launcher("slurm")

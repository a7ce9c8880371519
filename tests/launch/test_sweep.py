"""The sweep as it is typed, with the trainer itself."""

import csv
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
  "--config=configs/quickstart.py",
  "--config.steps=3",
  "--config.data.path=pairs:100",
  "--config.data.eval_path=pairs:20",
  "--config.microbatch_rows=0",
  "--config.data.row_length=128",
)


def start(workdir, *arguments):
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "launch.sweep",
      *SMALL,
      f"--workdir={workdir}",
      f"--config.data.cache_dir={workdir.parent / 'cache'}",
      *arguments,
    ],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def sweep(workdir, *arguments):
  """Returns status, stdout and stderr of a sweep."""
  process = start(workdir, *arguments)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def starts(workdir, name):
  """Returns how often the run was started."""
  return (workdir / name / "log.txt").read_text().count("$ ")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_beside_a_point_that_fails(tmp_path):
  """Killed when a run has finished; three points, the last of them fails."""
  workdir, points = tmp_path / "sweep", tmp_path / "points.jsonl"
  values = [
    {"loss": "dpo", "loss.beta": 0.1, "batch_size": 8},
    {"loss": "ipo", "loss.beta": 1, "batch_size": 8},
    {"loss": "dpo", "loss.beta": 0.1, "batch_size": 1000},
  ]
  points.write_text("\n".join(map(json.dumps, values)))
  names = [
    "batch_size=8,loss=dpo,loss.beta=0.1",
    "batch_size=8,loss=ipo,loss.beta=1",
    "batch_size=1000,loss=dpo,loss.beta=0.1",
  ]
  command = workdir, f"--points={points}", "--parallel=2"
  process = start(*command)
  while not list(workdir.glob("*/finished")):
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  process.kill()
  process.communicate()
  status, out, err = sweep(*command)
  assert status == 1, out + err
  assert f"{names[2]} failed with status 2; the end of" in out
  assert "batch_size=1000: larger than the data" in out
  assert [starts(workdir, name) for name in names[:2]] == [1, 1]
  with (workdir / "sweep.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["run"] for row in rows] == names
  assert [row["status"] for row in rows] == ["finished"] * 2 + ["failed"]
  for name, row in zip(names[:2], rows):
    last = (workdir / name / "metrics.jsonl").read_text().splitlines()[-1]
    accuracy = json.loads(last)["rewards/accuracies"]
    assert float(row["eval/rewards/accuracies"]) == accuracy
  assert (workdir / "sweep.png").exists()
  # The pairs were tokenised once for all: a cache each for train and eval.
  assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 2


def test_a_dry_run_prints_the_points_and_starts_nothing(tmp_path):
  workdir = tmp_path / "sweep"
  grid = "--grid=loss=dpo,ipo", "--grid=seed=0,1", "--grid=loss.beta=0.10"
  status, out, err = sweep(workdir, *grid, "--dry_run")
  assert status == 0, err
  rows = [line.split(" | ") for line in out.splitlines()[2:]]
  assert [row[0].strip("| ") for row in rows] == [
    f"loss={loss},loss.beta=0.1,seed={seed}"
    for loss in ("dpo", "ipo")
    for seed in (0, 1)
  ]
  assert all(row[1].strip(" |") == "new" for row in rows)
  assert not workdir.exists()


MISTAKES = {
  "--grid=loss.beta=0.1,high": "point loss.beta=high: flag --config.loss.beta",
  "--grid=seed=1 --x=loss.gamma": "--x=loss.gamma: no number at any point",
  "": "a sweep needs --grid=KEY=V1,V2,... or --points=FILE",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_before_anything_starts(mistake, tmp_path):
  status, out, err = sweep(tmp_path / "sweep", *mistake.split())
  assert status == 2
  assert err.startswith(f"error: {MISTAKES[mistake]}") and err.count("\n") == 1
  assert not out and not (tmp_path / "sweep").exists()

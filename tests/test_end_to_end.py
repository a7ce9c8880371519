"""The commands a user types: what a run leaves, survives and refuses."""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax.checkpoints import manager, source
from dpo_jax.data.sources import synthetic
from dpo_jax.models import transformer

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TIMINGS = {"pairs_per_second", "tokens_per_second", "data_wait_seconds"}
SMALL = (
  "--config=configs/quickstart.py:dpo",
  "--config.data.path=pairs:200",
  "--config.data.eval_path=",
  "--config.batch_size=8",
  "--config.microbatch_rows=0",
  "--config.data.row_length=128",
  "--config.log.every=1",
  "--config.steps=6",
  # Or a run could not be taken up with more steps.
  "--config.optimizer.schedule=constant",
)


def start(*arguments, devices=1, module="launch.train", **environment):
  """Returns the running command."""
  flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": flags} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def train(workdir, *arguments, status=0, **options):
  """Runs a small training to its end and returns its metrics lines."""
  cache = f"--config.data.cache_dir={workdir.parent / 'cache'}"
  process = start(*SMALL, cache, f"--workdir={workdir}", *arguments, **options)
  out, err = process.communicate(timeout=300)
  assert process.returncode == status, out + err
  return metrics(workdir)


def metrics(workdir):
  path = workdir / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def without_timings(lines):
  return [
    {key: value for key, value in line.items() if key not in TIMINGS}
    for line in lines
  ]


def params(workdir):
  opened = source.open_model(str(workdir))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    ),
    transformer.param_shapes(opened.config),
  )
  return manager.restore_params(workdir, abstract)


def wait_for_step(process, workdir, step):
  """Returns when the run has written the metrics of a step."""
  deadline = time.monotonic() + 200
  path = workdir / "metrics.jsonl"
  while time.monotonic() < deadline and process.poll() is None:
    if path.exists() and len(path.read_text().splitlines()) >= step:
      return
    time.sleep(0.02)
  raise AssertionError(process.communicate())


def check_explained(lines):
  """Checks that docs/metrics.md has every key of these metrics."""
  page = (REPOSITORY / "docs" / "metrics.md").read_text()
  keys = {key for line in lines for key in line}
  assert not [key for key in sorted(keys) if f"`{key}`" not in page]


def test_a_run_leaves_what_the_contract_says(tmp_path):
  workdir = tmp_path / "run"
  lines = train(workdir, "--config.data.eval_path=pairs:30")
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
  assert [line["split"] for line in lines] == ["train"] * 6 + ["eval"]
  wanted = (
    "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies"
    " logps/chosen logps/rejected"
  ).split()
  rates = (
    "grad_norm learning_rate pairs_per_second tokens_per_second"
    " padding_fraction"
  ).split()
  for line in lines:
    assert set(wanted) <= line.keys()
    assert np.isfinite([v for k, v in line.items() if k != "split"]).all()
  assert all(set(rates) <= line.keys() for line in lines[:-1])
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[-1]["num_pairs"] == 30
  check_explained(lines)
  config = json.loads((workdir / "config.json").read_text())
  assert config["loss"]["beta"] == 0.1 and config["steps"] == 6
  assert list(workdir.glob("events.out.tfevents*"))
  assert manager.saved_steps(workdir) == [6]
  # Again: nothing to do, nothing changed.
  assert train(workdir, "--config.data.eval_path=pairs:30") == lines


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  every = ("--config.steps=30", "--config.checkpoint.every=5")
  whole = train(tmp_path / "whole", *every)
  killed = tmp_path / "killed"
  process = start(
    *SMALL,
    *every,
    f"--workdir={killed}",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
  )
  wait_for_step(process, killed, 12)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert max(line["step"] for line in metrics(killed)) < 30
  resumed = train(killed, *every)
  assert without_timings(resumed) == without_timings(whole)
  jax.tree.map(
    np.testing.assert_array_equal, params(killed), params(tmp_path / "whole")
  )


@pytest.mark.slow
def test_running_means_of_a_loss_go_on_bit_for_bit(tmp_path):
  loss = (
    "--config.loss.name=beta_dpo",
    "--config.loss.alpha=0.6",
    "--config.loss.momentum=0.9",
  )
  whole = train(tmp_path / "whole", *loss, "--config.steps=4")
  train(tmp_path / "parted", *loss, "--config.steps=2")
  parted = train(tmp_path / "parted", *loss, "--config.steps=4")
  assert without_timings(parted) == without_timings(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, number):
  workdir = tmp_path / "run"
  process = start(
    *SMALL,
    "--config.steps=400",
    f"--workdir={workdir}",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
  )
  wait_for_step(process, workdir, 3)
  process.send_signal(number)
  out, err = process.communicate(timeout=100)
  assert process.returncode == 128 + number, out + err
  (saved,) = manager.saved_steps(workdir)
  assert f"saved at step {saved}; the same command goes on" in out
  assert "Traceback" not in err
  assert 3 <= saved < 400
  lines = train(workdir, f"--config.steps={saved + 2}")
  assert [line["step"] for line in lines] == list(range(1, saved + 3))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["live", "cached"])
def test_two_processes_equal_one_and_restore_each_other(tmp_path, mode):
  reference = f"--config.reference.mode={mode}"
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4", reference)
  one = train(tmp_path / "one", *mesh, devices=8)
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  two = tmp_path / "two"
  processes = [
    start(
      *SMALL,
      *mesh,
      "--multihost",
      f"--workdir={two}",
      f"--config.data.cache_dir={tmp_path / 'cache_two'}",
      devices=4,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=300) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert "step 6/6" in outputs[0][0]
  assert "step" not in outputs[1][0]  # the first process alone reports
  # A margin of about 0 is above it or not by rounding.
  left_out = TIMINGS | {"split", "rewards/accuracies"}
  for ours, theirs in zip(metrics(two), one, strict=True):
    for key in ours.keys() - left_out:
      assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
  # One process on one device takes up the run of the two.
  more = ("--config.steps=8", "--config.mesh.data=1", "--config.mesh.fsdp=1")
  more += (reference,)
  assert [line["step"] for line in train(two, *more)][-2:] == [7, 8]


@pytest.mark.slow
def test_an_exported_run_is_a_model_again(tmp_path):
  run, exported = tmp_path / "run", tmp_path / "exported"
  train(run)
  process = start(
    f"--source={run}", f"--target={exported}", module="launch.convert"
  )
  out, err = process.communicate(timeout=200)
  assert process.returncode == 0, out + err
  config = json.loads((exported / "config.json").read_text())
  assert config["model_type"] == "llama" and config["eos_token_id"] == 1
  held_out = tmp_path / "pairs.jsonl"
  rows = itertools.islice(synthetic.read("pairs:20", "test"), 20)
  held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
  process = start(
    "preferences",
    f"--source={run}",
    f"--reference={exported}",
    f"--data={held_out}",
    f"--output={tmp_path / 'held_out'}",
    module="launch.evaluate",
  )
  out, err = process.communicate(timeout=200)
  assert process.returncode == 0, out + err
  summary = json.loads((tmp_path / "held_out/summary.jsonl").read_text())
  assert summary["num_pairs"] == 20
  lines = train(
    tmp_path / "again",
    "--config.model.preset=",
    f"--config.model.path={exported}",
    f"--config.reference.path={run}",
    "--config.steps=1",
  )
  assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)

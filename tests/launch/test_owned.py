"""Commands that write where another process writes end in one line."""

import pathlib
import subprocess
import sys

import pytest

from dpo_jax.host import files

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# What is typed, {} for the folder, and what another process does in that.
COMMANDS = {
  "launch.tokenizer --data=absent.jsonl --output={}": "writes",
  "launch.evaluate judge --judge=length --data=absent --output={}": "writes",
  "launch.reproduce quickstart --workdir={}": "works in",
}
SWEEP = "launch.sweep --config=configs/quickstart.py --grid=seed=0 --workdir={}"


@pytest.mark.parametrize(
  ("command", "doing"),
  [
    *COMMANDS.items(),
    pytest.param(SWEEP, "sweeps in", marks=pytest.mark.slow),  # imports JAX
  ],
)
def test_a_second_process_is_refused(tmp_path, command, doing):
  with files.owned_folder(tmp_path, "tests"):
    done = subprocess.run(
      [sys.executable, "-m", *command.format(tmp_path).split()],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
      timeout=100,
    )
  assert done.returncode == 2, done.stderr
  assert done.stderr == f"error: another process {doing} {tmp_path}\n"
  assert not list(tmp_path.iterdir())

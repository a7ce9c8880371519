"""Which tests there are depends on nothing but the source."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# Another time, and folders that list their files the other way round.
ELSEWHERE = """
import os, time

now, now_ns, listdir, scandir = time.time, time.time_ns, os.listdir, os.scandir
time.time = lambda: now() + 1e7
time.time_ns = lambda: now_ns() + 10**16
os.listdir = lambda *args: sorted(listdir(*args))[::-1]


class Reversed:

  def __init__(self, *args):
    self._scan = scandir(*args)
    self._found = iter(sorted(self._scan, key=lambda x: x.name)[::-1])

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._found)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    self._scan.close()


os.scandir = Reversed
"""


def _start(folder, cwd, plugin, **environment):
  """Returns a process that prints the ids of all tests in a folder."""
  command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", ""]
  command += ["-p", plugin, "-p", "no:cacheprovider", "--rootdir", folder]
  return subprocess.Popen(
    [*map(str, command), "-c", folder / "pyproject.toml", folder / "tests"],
    cwd=cwd,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_ids_depend_on_no_clock_hash_seed_path_or_order(tmp_path):
  (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
  copy = tmp_path / "copy"  # has no shared data beside it
  for name in ("configs", "docs", "dpo_jax", "launch", "tests"):
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / name, copy / name, ignore=leave)
  for path in REPOSITORY.iterdir():
    if path.is_file():
      shutil.copy(path, copy)
  both = [
    _start(REPOSITORY, REPOSITORY, "no:elsewhere", PYTHONHASHSEED="1"),
    _start(
      *(copy, tmp_path, "elsewhere"),
      PYTHONHASHSEED="2",
      PYTHONPATH=str(tmp_path),
      DPO_JAX_SHARED=str(tmp_path / "shared"),
    ),
  ]
  here, there = (x.communicate(timeout=300)[0].splitlines() for x in both)
  assert [x.returncode for x in both] == [0, 0], here[-20:] + there[-20:]
  # The last line says how long it took.
  ids, others = ([x for x in y[:-1] if "::" in x] for y in (here, there))
  assert len(ids) > 1000
  assert set(ids) ^ set(others) == set()
  assert ids == others  # workers that share the tests compare their order too

"""Several processes: they agree, and end together."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from dpo_jax.data.sources import synthetic
from dpo_jax.host import processes, supervisor
from tests import test_end_to_end

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAIR = {"prompt": "the plot", "chosen": " was good .", "rejected": " was bad ."}


class Store:
  """What a client of the coordination service keeps, for threads."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self._changed:
      assert self._changed.wait_for(lambda: key in self._values, 20), key
      return self._values[key]

  def key_value_dir_get(self, prefix):
    return [x for x in self._values.items() if x[0].startswith(prefix)]


@pytest.fixture
def store(monkeypatch):
  """A store that every process, a thread by the name of its index, sees."""
  made = Store()
  index = lambda: int(threading.current_thread().name)
  monkeypatch.setattr(processes.distributed.global_state, "client", made)
  monkeypatch.setattr(jax, "process_index", index)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(processes, "_rounds", iter([0] * 3 + [1] * 3))
  return made


def agree_all(*all_values):
  """Returns what each process of three got: None, or its error."""
  found = [None] * 3

  def run(index):
    try:
      processes.agree(all_values[index])
    except ValueError as error:
      found[index] = str(error)

  threads = [
    threading.Thread(target=run, args=[i], name=str(i)) for i in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return found


def test_processes_with_the_same_values_agree(store):
  assert agree_all({"a": 1}, {"a": 1}, {"a": 1}) == [None] * 3


def test_all_say_the_same_of_what_differs(store):
  found = agree_all({"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3})
  assert len(set(found)) == 1
  assert found[0] == (
    "the processes of this run differ: b is 2 in process 0 and 3 in process"
    " 2; give all of them the same command and files"
  )
  found = agree_all({"a": 1}, {}, {"a": 1})
  assert found[0].startswith(
    "the processes of this run differ: a is 1 in process 0 and None in"
    " process 1;"
  )


def test_one_process_agrees_with_itself():
  processes.agree({"a": 1})


def test_a_failure_elsewhere_ends_this_process(store, monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(processes, "LOOK_SECONDS", 0.01)
  monkeypatch.setattr(processes, "GRACE_SECONDS", 0.01)
  monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
  statuses = []

  def leave(status):
    statuses.append(status)
    ended.set()

  monkeypatch.setattr(processes.os, "_exit", leave)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  processes._Watch().stop()  # this one ends by itself
  watch = processes._Watch()
  watch.tell(ValueError("no such\n file"))
  assert ended.wait(20)
  time.sleep(0.05)
  assert statuses == [2]
  assert capsys.readouterr().err == "error: process 1: no such file\n"


@pytest.mark.parametrize(
  ("text", "is_loss"),
  [
    ("UNKNOWN: Gloo AllGather failed: Connection closed by peer", True),
    ("INTERNAL: NCCL operation failed: remote process exited", True),
    ("RESOURCE_EXHAUSTED: Out of memory", False),
    ("gloo.jsonl, line 3: not JSON", False),
  ],
)
def test_a_lost_process_is_told_from_other_errors(text, is_loss):
  error = RuntimeError("a save failed")
  error.__cause__ = ValueError(text)
  assert processes._is_loss(error) == is_loss


def start_two(folder, *arguments):
  """Returns two processes of a run, each in a working folder of its own."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
  environment = {
    "XLA_FLAGS": flags,
    "PYTHONPATH": str(REPOSITORY),
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_NUM_PROCESSES": "2",
  }
  found = []
  for index in range(2):
    own = folder / str(index)
    own.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "launch.train", "--multihost"]
    small = [
      x.replace("configs/", f"{REPOSITORY}/configs/")
      for x in test_end_to_end.SMALL
    ]
    common = (f"--workdir={folder}/run", f"--config.data.cache_dir={folder}/c")
    process = subprocess.Popen(
      [*command, *small, *common, "--config.mesh.data=4", *arguments],
      cwd=own,
      env=os.environ | environment | {"JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    found.append(process)
  return found


def write_pairs(path, count):
  """Returns the arguments of a run on pairs that each process has its own."""
  path.parent.mkdir(exist_ok=True)
  path.write_text((json.dumps(PAIR) + "\n") * count)
  tokenizer = path.parents[1] / "tokenizer"
  synthetic.make_tokenizer().save_pretrained(tokenizer)
  data = {"source": "jsonl", "path": "pairs.jsonl"}
  flags = [f"--config.data.{key}={value}" for key, value in data.items()]
  return [*flags, f"--config.model.tokenizer={tokenizer}"]


@pytest.mark.slow
def test_other_data_in_a_process_ends_both_with_the_file(tmp_path):
  write_pairs(tmp_path / "0/pairs.jsonl", 8)
  data = write_pairs(tmp_path / "1/pairs.jsonl", 9)
  for process in start_two(tmp_path, *data):
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    (line,) = err.splitlines()
    assert line.startswith(
      "error: the processes of this run differ: content of pairs.jsonl is"
    )
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_file_missing_in_one_process_ends_both(tmp_path):
  data = write_pairs(tmp_path / "0/pairs.jsonl", 8)
  first, second = start_two(tmp_path, *data)
  _, err = first.communicate(timeout=100)
  assert first.returncode == 2, err
  message = "no such file: 'pairs.jsonl'"
  assert err.splitlines() == [f"error: process 1: {message}"]
  _, err = second.communicate(timeout=20)
  assert second.returncode == 2, err
  assert err.splitlines() == [f"error: {message}"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_in_a_minute(tmp_path, killed):
  both = start_two(tmp_path, "--config.steps=100000")
  test_end_to_end.wait_for_step(both[0], tmp_path / "run", 2)
  both[killed].kill()
  begin = time.monotonic()
  other = both[1 - killed]
  out, err = other.communicate(timeout=100)
  assert time.monotonic() - begin < 60
  assert other.returncode == 1, out + err
  assert err.splitlines() == [f"error: {supervisor.LOST}"]

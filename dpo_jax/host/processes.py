"""The processes of one run: they join, agree, speak once and end together.

What goes wrong in one process ends all of them, each with one line: a process
that fails says so in the coordination service of JAX, where a thread of each
other one looks every second, and waits there until all have seen it. Of a
process that is killed the coordination service learns from its heartbeats, and
then aborts the others, which `supervisor` turns into a line.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # jax.distributed does not give the client

from dpo_jax.host import supervisor

# After so long without a sign of life a process counts as dead.
HEARTBEAT_SECONDS = 30
LOOK_SECONDS = 1
# What fails everywhere fails at about the same time, and each says it itself.
GRACE_SECONDS = 2
PATIENCE_SECONDS = 24 * 3600  # the first process may have much to tokenise
# What XLA says when a process is gone: a status, then who noticed.
_LOSS = re.compile(
  r"[A-Z_]+: .*(gloo|nccl|socket closed|connection (closed|reset|refused)"
  r"|heartbeat|coordination ?service)",
  re.IGNORECASE | re.DOTALL,
)
_ENDS = "dpo_jax/ended/"
_rounds = itertools.count()


def is_first() -> bool:
  """Returns whether this is the process that writes and speaks for all."""
  return jax.process_index() == 0


def say(*lines: str) -> None:
  """Prints lines, in the first process alone."""
  if is_first():
    print(*lines, sep="\n", flush=True)


def agree(values: Mapping[str, Any]) -> None:
  """Returns when all processes have called this with the same values.

  Every process must call it alike. One process agrees with itself.

  Args:
    values: as JSON has them, by names that an error may show.

  Raises:
    ValueError: they differ; in every process, with the same message.
  """
  client = distributed.global_state.client
  if client is None:
    return
  name = f"dpo_jax/agree/{next(_rounds)}"
  index, count = jax.process_index(), jax.process_count()
  client.key_value_set(f"{name}/{index}", json.dumps(dict(values)))
  found = [
    json.loads(
      client.blocking_key_value_get(f"{name}/{i}", PATIENCE_SECONDS * 1000)
    )
    for i in range(count)
  ]
  for number, other in enumerate(found):
    differ = [
      f"{key} is {found[0].get(key)!r} in process 0 and {other.get(key)!r} in"
      f" process {number}"
      for key in sorted(found[0].keys() | other.keys())
      if found[0].get(key) != other.get(key)
    ]
    if differ:
      raise ValueError(
        f"the processes of this run differ: {'; '.join(differ)}; give all of"
        " them the same command and files"
      )


@contextlib.contextmanager
def joined(is_one_of_several: bool) -> Iterator[None]:
  """Joins the other processes; all end where the block raises in one.

  Raises:
    ValueError: neither the cluster nor the environment says who they are.
  """
  if not is_one_of_several:
    yield
    return
  _join()
  watch = _Watch()
  try:
    yield
  except BaseException as error:
    watch.stop()
    if _is_loss(error):
      sys.stdout.flush()
      os._exit(supervisor.LOST_STATUS)  # at exit JAX would wait for the lost
    watch.tell(error)
    raise  # at exit JAX waits until all others have looked
  watch.stop()


def _join() -> None:
  number = os.environ.get("JAX_NUM_PROCESSES")
  index = os.environ.get("JAX_PROCESS_ID")
  try:
    jax.distributed.initialize(
      num_processes=int(number) if number else None,
      process_id=int(index) if index else None,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except ValueError as error:
    raise ValueError(f"--multihost: {error}") from error


def _is_loss(error: BaseException | None) -> bool:
  """Returns whether an error, or what it is from, is a lost process."""
  while error is not None:
    if _LOSS.match(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


class _Watch:
  """Looks in a thread whether another process failed, and then ends this."""

  def __init__(self):
    self._client = distributed.global_state.client
    self._stopped = threading.Event()
    self._ending = threading.Lock()  # whoever has it says why this one ends
    threading.Thread(target=self._look, daemon=True).start()

  def stop(self) -> None:
    """Returns when this process may end by itself; else never."""
    self._stopped.set()
    self._ending.acquire()

  def tell(self, error: BaseException) -> None:
    """Says to the others why this process ends."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError):
      text = f"{type(error).__name__}: {text}"
    status = 2 if isinstance(error, ValueError) else 1
    self._client.key_value_set(
      f"{_ENDS}{jax.process_index()}", json.dumps([text, status])
    )

  def _look(self) -> None:
    while not self._stopped.wait(LOOK_SECONDS):
      # The coordination service itself ends a process that cannot reach it.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        if ends := self._client.key_value_dir_get(_ENDS):
          break
    else:
      return
    time.sleep(GRACE_SECONDS)
    if not self._ending.acquire(blocking=False):
      return
    name, value = min(ends)
    text, status = json.loads(value)
    line = f"error: process {name.removeprefix(_ENDS)}: {text}"
    print(line, file=sys.stderr, flush=True)
    jax.distributed.shutdown()
    os._exit(status)

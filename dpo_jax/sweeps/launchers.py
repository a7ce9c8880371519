"""How a run of a sweep is started: here, as a process of this machine.

A launcher for a cluster is a class with the three methods of `Launcher`, and a
line in `LAUNCHERS`.
"""

import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
from collections.abc import Sequence
from typing import IO, Protocol


class Job(Protocol):
  """A run that was started."""

  def poll(self) -> int | None:
    """Returns the exit status, or None while it runs; does not wait."""

  def stop(self) -> None:
    """Asks it to save and end; does not wait."""


class Launcher(Protocol):
  """Starts runs. A run has a log, and no two jobs of one log run at once."""

  def is_busy(self, log: pathlib.Path) -> bool:
    """Returns whether a job of this log runs, also from an earlier sweep."""

  def start(self, command: Sequence[str], log: pathlib.Path) -> Job | None:
    """Returns the started job; None where one of this log runs already."""


class LocalJob:
  """A process, in a session of its own so that Ctrl-C does not reach it."""

  def __init__(self, process: subprocess.Popen):
    self._process = process

  def poll(self) -> int | None:
    return self._process.poll()

  def stop(self) -> None:
    if self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)


class LocalLauncher:
  """Starts processes whose output goes to their log, which they lock.

  The lock belongs to the open file, and the process inherits that as its
  output: however the sweep ends, the lock is held until the process ends.
  """

  def is_busy(self, log: pathlib.Path) -> bool:
    if not log.exists():
      return False
    file = _open_locked(log)
    if file is None:
      return True
    file.close()
    return False

  def start(self, command: Sequence[str], log: pathlib.Path) -> LocalJob | None:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = _open_locked(log)
    if file is None:
      return None
    with file:
      file.write(f"$ {shlex.join(command)}\n".encode())
      file.flush()
      process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    return LocalJob(process)


LAUNCHERS = {"local": LocalLauncher}


def make_launcher(name: str) -> Launcher:
  """Returns the launcher of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in LAUNCHERS:
    raise ValueError(
      f"unknown launcher {name!r}; known: {', '.join(sorted(LAUNCHERS))}"
    )
  return LAUNCHERS[name]()


def _open_locked(log: str | os.PathLike[str]) -> IO[bytes] | None:
  """Returns the log, to be added to, or None where a process has it locked."""
  file = open(log, "ab")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    return None
  return file

"""Keeps what JAX does to a process whose peers are gone from the user.

When a process of a run dies, JAX's coordination service aborts the others from
a thread in C++, with dozens of lines. Nothing in such a process can catch that;
the process that started it can. So the work is done in a child, whose stderr
passes through here.
"""

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time

from dpo_jax.host import endings

# Lines of the coordination service begin so; those after them may be more.
NOISE = re.compile(
  rb"^[IWEF]\d{4} \S+ +\d+ (coordination_service|preemption_sync|client\.h)",
  re.MULTILINE,
)
LOST = (
  "a process of this run ended or cannot be reached; start all of them again"
  " with the same command: the run goes on from its last checkpoint"
)
LOST_STATUS = 86  # by which the child asks for that line
FATAL = b"JAX distributed service detected fatal errors"
HOLD_SECONDS = 20  # then noise is shown: the process did not end of it


def start() -> None:
  """Returns in a child; this process passes signals on, and ends as it does.

  To be called before JAX is imported, as a process with threads cannot fork.

  Raises:
    SystemExit: in the parent, with the child's status; 1 where JAX ended it.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  errors, child_errors = os.pipe()
  alive, parent_alive = os.pipe()
  if child := os.fork():
    os.close(child_errors)
    os.close(alive)
    sys.exit(_watch(child, errors))
  os.close(errors)
  os.close(parent_alive)
  # A Ctrl-C comes to the parent alone, and once from there.
  os.setpgid(0, 0)
  os.dup2(child_errors, sys.stderr.fileno())
  os.close(child_errors)
  threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
  endings.listen()


def _end_with_parent(alive: int) -> None:
  os.read(alive, 1)  # returns when the parent has ended
  os.kill(os.getpid(), signal.SIGKILL)


def _watch(child: int, errors: int) -> int:
  """Returns the exit status of the child, whose stderr is passed on."""
  signal.set_wakeup_fd(-1)  # the child alone hears of signals
  for number in endings.SIGNALS:
    signal.signal(number, lambda n, frame: os.kill(child, n))
  held = _Held()
  while True:
    if select.select([errors], [], [], 1.0)[0]:
      text = os.read(errors, 1 << 16)
      if not text:  # the child has ended
        break
      held.add(text)
    held.release_if_old()
  _, status = os.waitpid(child, 0)
  code = os.waitstatus_to_exitcode(status)
  if code == LOST_STATUS or (code == -signal.SIGABRT and held.is_fatal):
    _write(f"error: {LOST}\n".encode())
    return 1
  held.release()
  if code >= 0:
    return code
  name = signal.Signals(-code).name
  _write(f"error: the process was ended by {name}\n".encode())
  return 128 - code


class _Held:
  """Stderr of the child; what begins with noise is kept until we know why."""

  def __init__(self):
    self._text, self._since = b"", 0.0

  @property
  def is_fatal(self) -> bool:
    return FATAL in self._text

  def add(self, text: bytes) -> None:
    if not self._text:
      noise = NOISE.search(text)
      start = noise.start() if noise else len(text)
      _write(text[:start])
      text, self._since = text[start:], time.monotonic()
    self._text += text

  def release_if_old(self) -> None:
    if self._text and time.monotonic() > self._since + HOLD_SECONDS:
      self.release()

  def release(self) -> None:
    _write(self._text)
    self._text = b""


def _write(text: bytes) -> None:
  with contextlib.suppress(OSError):  # nobody reads it
    while text:
      text = text[os.write(2, text) :]

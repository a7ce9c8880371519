"""How a command ends before its end: a signal, the system, numbers that burst.

A signal to end raises `Stopped` in the main thread, which unwinds what is under
way. What saves first, as the loop over steps does, defers it.
"""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
# How long unwinding may take: a compilation, or threads that wait for a
# server, would else go on for minutes.
GRACE_SECONDS = 5.0
# As the Rust of `tokenizers` and the C++ of TensorStore write it.
_OS_ERROR = re.compile(r"\(os error (\d+)\)|os_error_code=\W*(\d+)")

_received: list[int] = []  # in the order in which they came
_is_deferred = False
_terminals: list[int] = []  # the outputs that end when the terminal closes


class Stopped(KeyboardInterrupt):
  """A signal said that the process shall end."""

  def __init__(self, number: int):
    self.number = number
    super().__init__(_stopped_by(number))


class NotFiniteError(ArithmeticError):
  """The numbers of a run are no longer finite: it cannot go on."""


def listen() -> None:
  """Lets signals to end raise `Stopped`; the main thread of a command calls it.

  The process ends within `GRACE_SECONDS` however long unwinding takes; a second
  Ctrl-C ends it at once, also where the first was deferred. What was ignored
  (`nohup`) stays ignored.
  """
  _terminals.extend(fd for fd in (1, 2) if os.isatty(fd))
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer)
  _install(SIGNALS)
  os.register_at_fork(after_in_child=_forget)
  threading.Thread(target=_watch, args=(reader,), daemon=True).start()


@contextlib.contextmanager
def deferred(numbers: tuple[int, ...] = SIGNALS) -> Iterator[list[int]]:
  """Yields the list of signals to end as they come; the first raises nothing.

  Args:
    numbers: the signals that are deferred.
  """
  global _is_deferred
  _received.clear()
  _is_deferred, previous = True, _install(numbers)
  try:
    yield _received
  finally:
    _is_deferred = False
    for number, handler in previous.items():
      signal.signal(number, handler)


def status() -> int:
  """Returns the exit status of a process that a signal ended: 128 + number.

  A process whose neighbour in a run was told to end says SIGTERM.
  """
  return 128 + (_received[0] if _received else signal.SIGTERM)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Raises what the system refused inside as an OSError that names a path.

  A full disk names none, and what libraries of Rust and C++ raise is of other
  types; their texts have the error's number.
  """
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
    raise
  except Exception as error:
    found = _OS_ERROR.search(str(error))
    if not found:
      raise
    number = int(found[1] or found[2])
    raise OSError(number, os.strerror(number), os.fspath(path)) from error


def _stopped_by(number: int) -> str:
  name = signal.Signals(number).name
  return f"stopped by {name}; the same command does what is left"


def _install(numbers):
  """Returns the handlers that were there, by number."""
  kept = {n: signal.getsignal(n) for n in numbers}
  kept = {n: old for n, old in kept.items() if old != signal.SIG_IGN}
  for number in kept:
    signal.signal(number, _handle)
  return kept


def _handle(number, frame):
  """Runs in the main thread, once that is back from what it computes."""
  _received.append(number)
  is_first = len(_received) == 1
  if number == signal.SIGHUP:
    _leave_terminal()
  if not _is_deferred if is_first else number == signal.SIGINT:
    raise Stopped(number)


def _watch(reader):
  """Hears of signals at once, whatever the main thread computes."""
  seen = 0
  while True:
    (number,) = os.read(reader, 1)
    if number not in SIGNALS:
      continue
    if number == signal.SIGHUP:
      _leave_terminal()
    if seen and number == signal.SIGINT:
      _leave(number)
    if not (seen or _is_deferred):
      timer = threading.Timer(GRACE_SECONDS, _leave_unless_deferred, [number])
      timer.daemon = True
      timer.start()
    seen += 1


def _leave_unless_deferred(number):
  if not _is_deferred:
    _leave(number)


def _leave(number) -> NoReturn:
  os.write(2, f"{_stopped_by(number)}\n".encode())
  os._exit(128 + number)


def _leave_terminal():
  """Lets outputs go nowhere that went to a terminal, which is closed now."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  for fd in _terminals:
    os.dup2(nowhere, fd)
  os.close(nowhere)


def _forget():
  """In a forked child: signals do there what they do anywhere."""
  signal.set_wakeup_fd(-1)
  for number in SIGNALS:
    if signal.getsignal(number) is _handle:
      signal.signal(number, signal.SIG_DFL)

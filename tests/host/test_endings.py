"""A command that a signal or the system ends says so in one line."""

import errno
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.host import endings

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SIGNALS = {signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGTERM: 143}
PATIENCE = 30

# Stands for any command: argument 1 is what it does when it has said `ready`.
SCRIPT = """
import os, resource, sys, time
from absl import flags
from dpo_jax.host import endings
from launch import cli

flags.DEFINE_string("workdir", "runs/x", "Where it writes.")

def wait():
  print("ready", flush=True)
  time.sleep(60)

def defer():
  with endings.deferred() as received:
    print("ready", flush=True)
    while not received:
      time.sleep(0.01)
    print("saved", flush=True)
  return endings.status()

def hang():
  with endings.deferred():
    wait()

def unwind_for_long():
  endings.GRACE_SECONDS = 0.3
  try:
    wait()
  finally:
    time.sleep(60)

def fork():
  if not os.fork():
    print("ready", flush=True)
    time.sleep(60)
  os.wait()

def full():
  with open("/dev/full", "w") as file:
    file.write("x")

def limited():
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))
  with endings.writing("cache/tokens"), open("limited", "w") as file:
    file.write("x" * 100)

def file_as_folder():
  open("file", "w").close()
  os.makedirs("file/folder")

def reader_is_gone():
  for _ in range(10_000):
    print("x" * 100)

def burst():
  raise endings.NotFiniteError("step 3: loss is nan")

if __name__ == "__main__":
  cli.run(lambda argv: globals()[argv[1]](), num_arguments=1)
"""


@pytest.fixture
def start(tmp_path):
  (tmp_path / "script.py").write_text(SCRIPT)

  def run(what, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(
      [sys.executable, "script.py", what],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
      text=True,
      **{"stdout": pipe, "stderr": pipe} | options,
    )

  return run


def _end(process, *numbers):
  """Returns status, lines of stderr and seconds after a signal or more."""
  assert process.stdout.readline() == "ready\n"
  begin = time.monotonic()
  for number in numbers:
    process.send_signal(number)
    time.sleep(0.2)
  _, errors = process.communicate(timeout=PATIENCE)
  return process.returncode, errors.splitlines(), time.monotonic() - begin


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_in_one_line(number, start):
  status, lines, _ = _end(start("wait"), number)
  assert status == SIGNALS[number]
  assert lines == [
    f"stopped by {number.name}; the same command does what is left"
  ]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_deferred_signal_only_chooses_the_status(number, start):
  status, lines, _ = _end(start("defer"), number)
  assert (status, lines) == (SIGNALS[number], [])


@pytest.mark.parametrize("what", ["hang", "unwind_for_long"])
def test_a_second_ctrl_c_ends_at_once_whatever_goes_on(what, start):
  status, lines, seconds = _end(start(what), signal.SIGINT, signal.SIGINT)
  assert status == 130 and len(lines) == 1 and seconds < 10


def test_unwinding_is_given_a_while_only(start):
  status, lines, seconds = _end(start("unwind_for_long"), signal.SIGINT)
  assert status == 130 and len(lines) == 1 and seconds < 10


def test_what_nohup_ignores_stays_ignored(start):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child's as well
  process = start("wait")
  signal.signal(signal.SIGHUP, before)
  status, _, _ = _end(process, signal.SIGHUP, signal.SIGTERM)
  assert status == 143


def test_a_fork_does_not_press_ctrl_c_again(start):
  """The parent of a child that gets the terminal's signal too unwinds."""
  process = start("fork", start_new_session=True)
  assert process.stdout.readline() == "ready\n"
  os.killpg(process.pid, signal.SIGINT)
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 130 and errors.count("\n") == 1


def test_a_closed_terminal_lets_the_last_lines_go_nowhere(start):
  master, terminal = pty.openpty()
  process = start("defer", stdout=terminal, stderr=terminal)
  os.close(terminal)
  assert os.read(master, 100).startswith(b"ready")
  process.send_signal(signal.SIGHUP)
  os.close(master)
  assert process.wait(timeout=PATIENCE) == 129


@pytest.mark.parametrize(
  "what, line",
  [
    ("full", f"--workdir=runs/x: {os.strerror(errno.ENOSPC)}: free some space"),
    ("limited", f"cache/tokens: {os.strerror(errno.EFBIG)}: raise the limit"),
    ("file_as_folder", "file/folder: Not a directory: a file is where a"),
  ],
)
def test_what_the_system_refuses_ends_in_one_line_and_status_1(
  what, line, start
):
  process = start(what)
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 1
  assert errors.startswith(f"error: {line}") and errors.count("\n") == 1


def test_a_reader_that_is_gone_ends_in_one_line(start):
  process = start("reader_is_gone")
  process.stdout.close()
  errors = process.stderr.read()
  assert process.wait(PATIENCE) == 1 and errors.count("\n") == 1
  assert "Broken pipe" in errors


def test_numbers_that_are_not_finite_have_status_3(start):
  process = start("burst")
  _, errors = process.communicate(timeout=PATIENCE)
  assert process.returncode == 3 and errors == "error: step 3: loss is nan\n"


@pytest.mark.parametrize(
  "text", ["File too large (os error 27)", "Failed [os_error_code='27']"]
)
def test_what_libraries_make_of_a_refused_write_is_an_os_error(text):
  with pytest.raises(OSError) as caught, endings.writing("a/b"):
    raise Exception(text)
  assert caught.value.errno == errno.EFBIG and caught.value.filename == "a/b"


def test_another_exception_stays_what_it_is():
  with pytest.raises(ValueError, match="os error"), endings.writing("a/b"):
    raise ValueError("os error in a user's text")

"""What a process of several leaves on stderr, and how it ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.host import supervisor

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NOISE = """\
E1126 21:02:14.150007    2314 coordination_service.cc:1520] The barrier failed:
INTERNAL: a task is set to ERROR
F1126 21:02:14.150463    2325 client.h:80] Terminating process because the \
JAX distributed service detected fatal errors. This most likely indicates
*** Check failure stack trace: ***
    @     0x7f7a45a40634  absl::log_internal::LogMessage::SendToLog()
"""


def start(code, **more):
  """Returns a process that runs the code supervised."""
  begin = "import os, signal, sys, time\nfrom dpo_jax.host import supervisor\n"
  return subprocess.Popen(
    [sys.executable, "-c", begin + "supervisor.start()\n" + code],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **more,
  )


def end(code):
  """Returns status, stdout and stderr."""
  process = start(code)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def test_status_and_output_pass_through():
  code = "print('out'); print('err', file=sys.stderr); sys.exit(3)"
  assert end(code) == (3, "out\n", "err\n")


@pytest.mark.parametrize(
  "ending",
  [
    f"os.write(2, {NOISE.encode()!r}); os.abort()",
    f"os.write(2, {NOISE[:80].encode()!r}); os._exit(supervisor.LOST_STATUS)",
  ],
  ids=["aborted", "noticed"],
)
def test_a_lost_process_is_one_line_and_status_1(ending):
  code = "print('step 3', file=sys.stderr, flush=True)\n" + ending
  status, _, err = end(code)
  assert status == 1
  assert err.splitlines() == ["step 3", f"error: {supervisor.LOST}"]


def test_what_is_no_lost_process_is_shown():
  noise = NOISE.replace("JAX distributed service", "another")
  status, _, err = end(f"os.write(2, {noise.encode()!r}); os.abort()")
  assert status == 128 + signal.SIGABRT
  assert err == noise + "error: the process was ended by SIGABRT\n"


def test_noise_that_ends_nothing_is_shown_in_time(monkeypatch):
  shown = []
  monkeypatch.setattr(supervisor, "_write", shown.append)
  held = supervisor._Held()
  held.add(b"before\n" + NOISE.encode())
  held.release_if_old()
  assert b"".join(shown) == b"before\n"
  monkeypatch.setattr(supervisor, "HOLD_SECONDS", 0)
  time.sleep(0.001)
  held.release_if_old()
  assert b"".join(shown) == b"before\n" + NOISE.encode()


def test_signals_are_passed_on_once():
  process = start(
    "got = []\n"
    "signal.signal(signal.SIGTERM, lambda n, _: got.append(n))\n"
    "print('ready', flush=True)\n"
    "while not got: time.sleep(0.01)\n"
    "time.sleep(0.2); print(len(got)); sys.exit(143)\n"
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60) == ("1\n", "")
  assert process.returncode == 143


def test_a_kill_ends_the_work_too():
  process = start("print(os.getpid(), flush=True); time.sleep(600)")
  worker = int(process.stdout.readline())
  process.kill()
  # The worker holds the other end until it ends.
  assert process.stdout.read() == ""
  with pytest.raises(ProcessLookupError):
    for _ in range(100):
      os.kill(worker, 0)
      time.sleep(0.05)

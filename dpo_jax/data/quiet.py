"""What libraries write to stderr before they fail, kept from the user."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def held_back_stderr() -> Iterator[None]:
  """Passes on what was written to stderr, unless an error ends the block.

  Of code in Rust too, whose panics print a backtrace that no handler of ours
  sees.
  """
  sys.stderr.flush()
  with tempfile.TemporaryFile() as file, os.fdopen(os.dup(2), "wb") as stderr:
    os.dup2(file.fileno(), 2)
    try:
      yield
      sys.stderr.flush()
      file.seek(0)
      stderr.write(file.read())
    finally:
      sys.stderr.flush()
      stderr.flush()
      os.dup2(stderr.fileno(), 2)

"""Stderr is passed on in order, or dropped with what failed."""

import os
import sys

import pytest

from dpo_jax.data import quiet


def test_what_was_written_comes_after_success_and_not_after_an_error(
  capfd, monkeypatch
):
  # Pytest's own does not write to the descriptor 2, as that of a command does.
  monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))
  with quiet.held_back_stderr():
    print("one", file=sys.stderr, flush=True)
    os.write(2, b"two\n")
  with pytest.raises(KeyError), quiet.held_back_stderr():
    print("three", file=sys.stderr)
    os.write(2, b"four\n")
    raise KeyError
  print("five", file=sys.stderr, flush=True)
  assert capfd.readouterr().err.splitlines() == ["one", "two", "five"]

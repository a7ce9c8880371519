"""Answers of a chat endpoint on disk, so that none is paid for twice.

One SQLite file, which threads and processes may share. Each answer is a
transaction of its own: a process that is killed loses none but those under
way.
"""

import dataclasses
import errno
import hashlib
import json
import pathlib
import sqlite3
import threading
from typing import Any

_TABLE = """
create table if not exists answers (
  key text primary key, request text not null, text text not null,
  prompt_tokens integer, completion_tokens integer
)
"""
WAIT_SECONDS = 60  # for another process that is writing


@dataclasses.dataclass(frozen=True)
class Answer:
  """A message, and what it took; None where the endpoint did not say."""

  text: str
  prompt_tokens: int | None
  completion_tokens: int | None


def make_key(request: dict[str, Any]) -> str:
  """Returns a hash of a request: of model, messages and sampling settings."""
  text = json.dumps(request, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
  """Request -> answer."""

  def __init__(self, path: str | pathlib.Path):
    """Opens a file; it is made if it is not there.

    Raises:
      ValueError: the file cannot be opened, or is not such a cache.
      OSError: its folder cannot be made.
    """
    self._path = path = pathlib.Path(path).expanduser()
    self._lock = threading.Lock()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      self._connection = sqlite3.connect(
        path,
        timeout=WAIT_SECONDS,
        isolation_level=None,  # each statement is a transaction
        check_same_thread=False,
      )
      self._connection.execute(_TABLE)
      self._connection.execute("select * from answers limit 1").fetchone()
    except sqlite3.Error as error:
      raise ValueError(
        f"judge cache {str(path)!r} cannot be used: {error}; allowed: a new"
        " file, or one that a judge wrote"
      ) from error

  def get(self, request: dict[str, Any]) -> Answer | None:
    """Returns the answer to a request, if there was one."""
    with self._lock:
      row = self._connection.execute(
        "select text, prompt_tokens, completion_tokens from answers"
        " where key = ?",
        [make_key(request)],
      ).fetchone()
    return row and Answer(*row)

  def put(self, request: dict[str, Any], answer: Answer) -> None:
    """Keeps an answer; it is on disk when this returns.

    Raises:
      OSError: it cannot be written.
    """
    row = [make_key(request), json.dumps(request)]
    try:
      with self._lock:
        self._connection.execute(
          "insert or replace into answers values (?, ?, ?, ?, ?)",
          row + list(dataclasses.astuple(answer)),
        )
    except sqlite3.OperationalError as error:  # has no number of the system's
      raise OSError(errno.EIO, str(error), str(self._path)) from error

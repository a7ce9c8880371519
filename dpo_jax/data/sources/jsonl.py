"""Rows of a local file: JSON lines, plain or compressed, or parquet."""

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dpo_jax.data import xz
from dpo_jax.host import schema

OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": xz.open_text}
EXTENSIONS = (*OPENERS, ".parquet")
MAX_DEPTH = 100  # lists and objects in each other, few for a call stack

_TOO_DEEP = f"more than {MAX_DEPTH} lists or objects in each other"


def read(path: str, split: str) -> Iterator[dict]:
  """Yields the rows of a file in order; row k of JSON lines is line k.

  Args:
    path: a file, named by one of `EXTENSIONS`.
    split: not looked at, a file is one split.

  Raises:
    ValueError: no such file, an unknown extension, a damaged file, or a row
      that is not a JSON object of text.
  """
  del split
  extension = find_extension(path)
  if extension == ".parquet":
    yield from _read_parquet(path)
  else:
    yield from _read_lines(path, extension)


def find_extension(path: str) -> str:
  """Returns which of `EXTENSIONS` a file has.

  Raises:
    ValueError: no such file, or none of them.
  """
  check_file(path)
  for extension in EXTENSIONS:
    if path.endswith(extension):
      return extension
  allowed = ", ".join(EXTENSIONS)
  raise ValueError(f"{path!r} cannot be read; allowed: a file *{allowed}")


def check_file(path: str) -> None:
  """Raises ValueError where there is no regular file: a pipe has no end."""
  if not os.path.exists(path):
    raise ValueError(f"no such file: {path!r}")
  if os.path.isdir(path):
    raise ValueError(f"{path!r} cannot be read: it is a folder")
  schema.check_file(path)


def _read_lines(path: str, extension: str) -> Iterator[dict]:
  """Yields the object on each line; empty lines may stand at the end only."""
  empty = None
  for number, line in enumerate(lines(path, OPENERS[extension]), 1):
    if not line.strip():
      empty = empty or number
      continue
    if empty:
      raise ValueError(f"{path}, line {empty}: empty; allowed: a JSON object")
    row = parse(line.strip(), f"{path}, line {number}")
    if not isinstance(row, dict):
      raise ValueError(
        f"{path}, line {number}: {line.strip()[:40]!r}; allowed: a JSON object"
      )
    yield row


def parse(text: str, where: str) -> Any:
  """Returns the value of a JSON text, which is all text and not too deep.

  Args:
    text: the JSON.
    where: begins what is said of a mistake.

  Raises:
    ValueError: no JSON, an integer of thousands of digits, more than
      `MAX_DEPTH` lists and objects within each other, or a string that is no
      text: JSON can name half of a character ("\\ud83d").
  """
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{where}: not JSON ({error.msg} at character {error.pos + 1}); allowed:"
      " a JSON object"
    ) from error
  except RecursionError as error:
    raise ValueError(f"{where}: {_TOO_DEEP}") from error
  except ValueError as error:
    reason = str(error).split(";")[0]
    raise ValueError(f"{where}: cannot be read: {reason}") from error
  # Only what can be wrong is looked through.
  if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
    _check_value(value, where, MAX_DEPTH)
  return value


def _check_value(value: Any, where: str, depth: int) -> None:
  """Raises ValueError for a value that is too deep, or holds no text."""
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{where}: character {error.start + 1} of {value[:40]!r} is"
        f" {value[error.start]!r}, half of a surrogate pair; allowed: Unicode"
        " text"
      ) from error
  elif isinstance(value, dict | list):
    if not depth:
      raise ValueError(f"{where}: {_TOO_DEEP}")
    parts = value if isinstance(value, list) else [*value, *value.values()]
    for part in parts:
      _check_value(part, where, depth - 1)


def lines(path: str, opener: Callable, **options: Any) -> Iterator[str]:
  """Yields the lines of a text file, which may be compressed.

  Args:
    path: the file.
    opener: one of `OPENERS`.
    **options: of it.

  Raises:
    ValueError: it cannot be read, or a line is not UTF-8.
  """
  schema.check_regular(path)
  options |= {"encoding": "utf-8", "errors": "surrogateescape"}
  number = 0
  try:
    with opener(path, "rt", **options) as file:
      for number, line in enumerate(file, 1):
        if not line.isascii():
          _check_utf8(line, f"{path}, line {number}")
        yield line
  except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
    raise ValueError(_unreadable(path, "line", number, error)) from error


def _check_utf8(line: str, where: str) -> None:
  """Raises ValueError where a byte was no part of a character."""
  try:
    line.encode()
  except UnicodeEncodeError as error:
    byte = ord(line[error.start]) & 0xFF
    raise ValueError(
      f"{where}: cannot be read: byte 0x{byte:02x} behind character"
      f" {error.start} is not UTF-8"
    ) from error


def _unreadable(path: str, kind: str, number: int, error: Exception) -> str:
  """Returns what to say where reading ends behind row or line `number`."""
  since = f" from {kind} {number + 1} on" if number else ""
  reason = (str(error) or type(error).__name__).splitlines()[0]
  return f"{path!r} cannot be read{since}: {reason}"


def _read_parquet(path: str) -> Iterator[dict]:
  number = 0
  try:
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    for batch in file.iter_batches(batch_size=1024):
      for row in _rows(batch):
        number += 1
        yield row
  except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
    raise ValueError(_unreadable(path, "row", number, error)) from error


def _rows(batch: pa.RecordBatch) -> Iterator[dict]:
  """Yields the rows up to the first that has a value which cannot be."""
  try:
    yield from batch.to_pylist()
  except (ValueError, OverflowError):  # bytes that are no text, say
    for place in range(len(batch)):
      yield from batch.slice(place, 1).to_pylist()

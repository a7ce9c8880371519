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

from dpo_jax import schema

OPENERS = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
EXTENSIONS = (*OPENERS, ".parquet")


def read(path: str, split: str) -> Iterator[dict]:
  """Yields the rows of a file in order; row k of JSON lines is line k.

  Args:
    path: a file, named by one of `EXTENSIONS`.
    split: not looked at, a file is one split.

  Raises:
    ValueError: no such file, an unknown extension, or a line that is not a
      JSON object.
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
  if not os.path.exists(path):
    raise ValueError(f"no such file: {path!r}")
  schema.check_regular(path)
  for extension in EXTENSIONS:
    if path.endswith(extension):
      return extension
  allowed = ", ".join(EXTENSIONS)
  raise ValueError(f"{path!r} cannot be read; allowed: a file *{allowed}")


def _read_lines(path: str, extension: str) -> Iterator[dict]:
  """Yields the object on each line; empty lines may stand at the end only."""
  empty = None
  for number, line in enumerate(lines(path, OPENERS[extension]), 1):
    if not line.strip():
      empty = empty or number
      continue
    if empty:
      raise ValueError(f"{path}, line {empty}: empty; allowed: a JSON object")
    try:
      row = json.loads(line.strip())
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path}, line {number}: not JSON ({error.msg} at character"
        f" {error.pos + 1}); allowed: a JSON object"
      ) from error
    if not isinstance(row, dict):
      raise ValueError(
        f"{path}, line {number}: {line.strip()[:40]!r}; allowed: a JSON object"
      )
    yield row


def lines(path: str, opener: Callable, **options: Any) -> Iterator[str]:
  """Yields the lines of a text file, which may be compressed.

  Args:
    path: the file.
    opener: one of `OPENERS`.
    **options: of it.

  Raises:
    ValueError: it cannot be read.
  """
  schema.check_regular(path)
  damaged = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error)
  try:
    with opener(path, "rt", encoding="utf-8", **options) as file:
      yield from file
  except damaged as error:
    raise ValueError(f"{path!r} cannot be read: {error}") from error


def _read_parquet(path: str) -> Iterator[dict]:
  try:
    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
      yield from batch.to_pylist()
  except (OSError, pa.ArrowException) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"{path!r} cannot be read: {reason}") from error

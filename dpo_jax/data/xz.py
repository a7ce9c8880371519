"""Text files compressed by xz, of which every byte counts.

Python's `lzma.open` takes what follows a stream and is none for padding, so
that garbage, or a second stream whose first bytes are damaged, goes unseen.
"""

import io
import lzma
from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK = 1 << 14  # compressed bytes that are read at once


def open_text(path: str, mode: str, **options: Any) -> io.TextIOWrapper:
  """Returns the text of a file, as `lzma.open` does.

  Args:
    path: the file.
    mode: `rt`.
    **options: of `io.TextIOWrapper`.

  Raises:
    OSError: it cannot be read.
    lzma.LZMAError, EOFError: when read, where it is damaged or ends early.
  """
  assert mode == "rt", mode
  raw = io.BufferedReader(_Reader(open(path, "rb")))
  return io.TextIOWrapper(raw, **options)


class _Reader(io.RawIOBase):
  """The content of a compressed file."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self._parts = _decompress(file)
    self._rest = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._rest:
      part = next(self._parts, None)
      if part is None:
        return 0
      self._rest = part
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    return size

  def close(self) -> None:
    self._file.close()
    super().close()


def _decompress(file: BinaryIO) -> Iterator[bytes]:
  """Yields what the streams of a file hold; zeros may stand behind each."""
  data = file.read(BLOCK)
  while True:
    stream = lzma.LZMADecompressor()
    while not stream.eof:
      if not data and stream.needs_input:
        raise EOFError("the file ends within a compressed stream")
      yield stream.decompress(data, BLOCK)
      data = file.read(BLOCK) if stream.needs_input else b""
    data = stream.unused_data
    while not (data := data.lstrip(b"\0")):
      if not (data := file.read(BLOCK)):
        return

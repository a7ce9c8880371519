"""Files in safetensors format: read tensor by tensor, written in a stream."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dpo_jax.host import schema

# dtypes by their name in a safetensors header.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_ENTRY = {
  "dtype": schema.choice(*DTYPES),
  "shape": schema.list_of(schema.COUNT),
  "data_offsets": schema.list_of(schema.COUNT, 2),
}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file.

  Attributes:
    path: of the file.
    begin: where the data begins there, in bytes.
  """

  path: str
  begin: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def view(self) -> np.ndarray:
    """Returns a memory map, whose pages are let go of with the last view."""
    size = math.prod(self.shape) * self.dtype.itemsize
    if not size:
      return np.zeros(self.shape, self.dtype)
    data = np.memmap(self.path, mode="r", offset=self.begin, shape=(size,))
    return data.view(self.dtype).reshape(self.shape)


def open_file(path: str) -> dict[str, Stored]:
  """Returns the tensors of a file by name; reads its header alone.

  Raises:
    ValueError: no such file, or one whose header says what cannot be.
  """
  schema.check_file(path)
  # The file: the header's length in 8 bytes, the header, then the data.
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 + length or length > MAX_HEADER_BYTES:
      raise ValueError(
        f"{path} is not a whole safetensors file: it has {size} bytes, and its"
        f" header would have {length}"
      )
    text = file.read(length)
  try:
    header = schema.parse(text)
    schema.check(header, {"__metadata__": schema.object_of(schema.STRING)})
    header.pop("__metadata__", None)
    return _stored(path, header, 8 + length, size)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _stored(
  path: str, header: dict[str, Any], start: int, size: int
) -> dict[str, Stored]:
  """Returns the tensors of a header, which leave no byte out and share none.

  Args:
    path: of the file.
    header: without the metadata.
    start: where the data begins, in bytes.
    size: of the file, in bytes.

  Raises:
    ValueError: the first tensor that is not as it must be, and its key.
  """
  offsets = {}
  for name, entry in header.items():
    if not isinstance(entry, dict):
      raise ValueError(f"{name}={entry!r}: must be an object")
    schema.check(entry, _ENTRY, required=_ENTRY, prefix=f"{name}.")
    offsets[name] = entry["data_offsets"]
  stored, end = {}, 0
  for name in sorted(offsets, key=offsets.__getitem__):
    begin = end
    if offsets[name][0] != begin:
      raise ValueError(
        f"{name}.data_offsets={offsets[name]}: must begin at {begin}, where"
        " the tensor before it ends"
      )
    shape, dtype = tuple(header[name]["shape"]), DTYPES[header[name]["dtype"]]
    end = begin + math.prod(shape) * dtype.itemsize
    if offsets[name][1] != end:
      raise ValueError(
        f"{name}.data_offsets={offsets[name]}: must end at {end}, as it is"
        f" {dtype.name}{list(shape)}"
      )
    stored[name] = Stored(path, start + begin, shape, dtype)
  if start + end != size:
    raise ValueError(
      "this is not a whole safetensors file: its tensors end at byte"
      f" {start + end}, the file at {size}"
    )
  return stored


@dataclasses.dataclass(frozen=True)
class Output:
  """A tensor to be written; `fetch` brings it to the host."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: str | None, outputs: list[Output]) -> None:
  """Writes a file, one tensor in memory at a time; only fetches without path.

  Fetching is collective: a process that writes nothing takes part in it.
  """
  names = {dtype: name for name, dtype in DTYPES.items()}
  # transformers refuses a file that does not say what wrote its layout.
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for output in outputs:
    begin, end = end, end + output.num_bytes
    header[output.name] = {
      "dtype": names[output.dtype],
      "shape": output.shape,
      "data_offsets": (begin, end),
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # The format aligns the data to 8 bytes.
  with open(path, "wb") if path else contextlib.nullcontext() as file:
    if file:
      file.write(len(text).to_bytes(8, "little") + text)
    for output in outputs:
      array = output.fetch()
      if file:
        file.write(np.ascontiguousarray(array).view(np.uint8).data)

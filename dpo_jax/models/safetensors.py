"""Files in safetensors format: read tensor by tensor, written in a stream."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np

# dtypes by their name in a safetensors header.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
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
  """Returns the tensors of a file by name; reads its header alone."""
  if not os.path.isfile(path):
    raise ValueError(f"no such file {path}")
  stored = {}
  try:
    # The file: the header's length in 8 bytes, the header, then the data.
    size = os.path.getsize(path)
    with open(path, "rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(min(start, size) - 8))
    header.pop("__metadata__", None)
    for name, entry in header.items():
      begin, end = (start + offset for offset in entry["data_offsets"])
      shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
      if end > size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has not as many bytes as it should")
      stored[name] = Stored(path, begin, shape, dtype)
  except KeyError as error:
    raise ValueError(
      f"{path}: {error} is not a dtype that can be read; known:"
      f" {', '.join(DTYPES)}"
    ) from error
  except (ValueError, IndexError) as error:
    raise ValueError(f"{path} is not a whole safetensors file") from error
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

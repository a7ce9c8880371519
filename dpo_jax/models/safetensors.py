"""Files in safetensors format: read as memory maps, written in a stream."""

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


def open_file(path: str) -> dict[str, np.ndarray]:
  """Returns the tensors of a file by name, as views of its memory map."""
  if not os.path.isfile(path):
    raise ValueError(f"no such file {path}")
  data = np.memmap(path, mode="r")
  tensors = {}
  try:
    # The file: the header's length in 8 bytes, the header, then the data.
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
      begin, end = (start + offset for offset in entry["data_offsets"])
      flat = data[begin:end].view(DTYPES[entry["dtype"]])
      tensors[name] = flat.reshape(entry["shape"])
  except KeyError as error:
    raise ValueError(
      f"{path}: {error} is not a dtype that can be read; known:"
      f" {', '.join(DTYPES)}"
    ) from error
  except (ValueError, IndexError) as error:
    raise ValueError(f"{path} is not a whole safetensors file") from error
  return tensors


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

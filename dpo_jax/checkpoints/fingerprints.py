"""What two processes compare to know that they read the same model."""

import hashlib
import os
import pathlib

import numpy as np

from dpo_jax.checkpoints import manager, run_folder, source
from dpo_jax.models.huggingface import folder as huggingface

BLOCK_BYTES = 2**16
MAX_BLOCKS = 64  # of a file, evenly spaced, its first and its last among them


def of_model(path: str) -> dict[str, str]:
  """Returns a hash of each file that a model is read from, by its name.

  A large file is read in part: its size and 64 blocks of 64 KiB. Where an
  adapter names a base, that model's files follow.

  Args:
    path: a run folder, one of its checkpoints, a Hugging Face or PEFT folder,
      or a hub name.

  Raises:
    ValueError: there is no such model.
  """
  run, step = source.split_step(path)
  if source.is_run(run):
    steps = manager.saved_steps(run)
    step = step if step is not None else max(steps, default=None)
    folders = [pathlib.Path(run) / run_folder.MODEL_FOLDER]
    folders.append(pathlib.Path(run) / "checkpoints" / str(step))
  else:
    folders = [pathlib.Path(huggingface.resolve(path))]
  found = {
    f"{path}: {file.relative_to(folder)}": _hash(file)
    for folder in folders
    for file in sorted(folder.rglob("*"))
    if file.is_file() and not file.name.startswith(".")
  }
  adapter = source.open_adapter(path)
  base = adapter.base if adapter else ""
  if base and not source.is_same(base, path):
    found |= of_model(base)
  return found


def _hash(path: pathlib.Path) -> str:
  size = os.path.getsize(path)
  digest = hashlib.sha256(str(size).encode())
  last = max(size - BLOCK_BYTES, 0)
  count = min(MAX_BLOCKS, -(-size // BLOCK_BYTES))
  with path.open("rb") as file:
    for begin in np.linspace(0, last, count, dtype=np.int64):
      file.seek(int(begin))
      digest.update(file.read(BLOCK_BYTES))
  return digest.hexdigest()

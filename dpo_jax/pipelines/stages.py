"""Stages in turn, what each took, and the files that they read and write.

A file or folder that is there is whole: a stage can be skipped by it.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dpo_jax.data import bpe

SECONDS = "seconds.json"
ENDINGS = (".jsonl", ".jsonl.xz", ".jsonl.gz")


def run_all(
  folder: pathlib.Path, stages: Sequence[tuple[str, Callable[[], bool]]]
) -> bool:
  """Returns whether every stage came to its end; stops at one that did not.

  A stage that was done before does nothing, and its time is kept: `SECONDS`
  has what each took, over all calls.

  Args:
    folder: where the times stand.
    stages: a name and what runs it, in order.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / SECONDS
  seconds = json.loads(path.read_text()) if path.exists() else {}
  for name, stage in stages:
    print(f"== {name}", flush=True)
    begun = time.monotonic()
    try:
      if not stage():
        return False
    finally:
      seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begun
      path.write_text(json.dumps(seconds, indent=2) + "\n")
  return True


def read_seconds(folder: pathlib.Path) -> str:
  """Returns a line for each stage that is done, and their sum."""
  seconds = json.loads((folder / SECONDS).read_text())
  seconds["sum"] = sum(seconds.values())
  width = max(map(len, seconds))
  return "\n".join(f"{name:<{width}}  {x:>7.0f}" for name, x in seconds.items())


def find_file(folder: str, name: str) -> str:
  """Returns the path of a file of JSON lines, packed or not.

  Raises:
    ValueError: the folder has none of this name.
  """
  paths = [pathlib.Path(folder) / f"{name}{end}" for end in ENDINGS]
  found = [path for path in paths if path.exists()]
  if not found:
    raise ValueError(
      f"--data={folder}: has no {name}.jsonl, nor one that is packed (.xz, .gz)"
    )
  return str(found[0])


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file, whole or not at all."""
  part = path.with_name(path.name + ".part")
  part.write_text(text)
  os.replace(part, path)


def write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes JSON lines, all or none; makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(
  path: pathlib.Path, source: str, data: str, vocab_size: int
) -> None:
  """Trains a tokenizer on demonstrations; see `bpe.texts` and `bpe.train`."""
  part = path.with_name(path.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  bpe.train(bpe.texts(source, [data], ""), vocab_size).save_pretrained(part)
  part.rename(path)

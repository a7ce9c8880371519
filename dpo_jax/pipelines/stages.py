"""Stages in turn, what each took, and the files that they read and write.

A file or folder that is there is whole: a stage can be skipped by it.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from dpo_jax.checkpoints import run_folder
from dpo_jax.data import bpe
from dpo_jax.host import files
from dpo_jax.run import experiment, trainer

SECONDS = "seconds.json"
ENDINGS = (".jsonl", ".jsonl.xz", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of an experiment.

  Attributes:
    name: what is shown of it, and the key of its time.
    run: does it; returns whether it came to its end.
    is_done: returns whether there is nothing to do; by default there always is.
  """

  name: str
  run: Callable[[], bool]
  is_done: Callable[[], bool] = lambda: False


def writing(
  name: str, path: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> Stage:
  """Returns a stage that writes a file or folder, its last output, whole."""

  def run():
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return True

  return Stage(name, run, path.exists)


def training(name: str, config: ConfigDict, path: pathlib.Path) -> Stage:
  """Returns a stage that is a run in the folder `path`."""

  def is_done():
    settings = experiment.to_plain(config)
    run_folder.check_config(path, settings)
    return run_folder.is_finished(path, settings)

  return Stage(name, lambda: trainer.train(config, str(path)), is_done)


def run_all(folder: pathlib.Path, stages: Sequence[Stage]) -> bool:
  """Returns whether every stage came to its end; stops at one that did not.

  One that is done is passed over. `SECONDS` has what each took, over all calls.

  Args:
    folder: where the times stand.
    stages: in order; each is asked whether it is done when its turn comes.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / SECONDS
  seconds = json.loads(path.read_text()) if path.exists() else {}
  for stage in stages:
    is_done = stage.is_done()
    print(f"== {stage.name}{', done' if is_done else ''}", flush=True)
    if is_done:
      continue
    begun = time.monotonic()
    try:
      if not stage.run():
        return False
    finally:
      took = time.monotonic() - begun
      seconds[stage.name] = seconds.get(stage.name, 0.0) + took
      files.write_json(path, seconds)
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


def write_tokenizer(
  path: pathlib.Path, source: str, data: str, vocab_size: int
) -> None:
  """Trains a tokenizer on demonstrations; see `bpe.texts` and `bpe.train`."""
  bpe.write(bpe.train(bpe.texts(source, [data], ""), vocab_size), path)

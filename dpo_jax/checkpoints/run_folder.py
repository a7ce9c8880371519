"""What a run folder says of itself: its config, and the model it trains.

config.json    every key of the config
model/         the decoder's config.json in Hugging Face format, tokenizer
checkpoints/   see `manager`
finished       empty; there when the run of config.json came to its end
.lock          held by the process that trains; see `files.owned`
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dpo_jax import files, processes

FINISHED = "finished"
LENGTH_KEYS = ("steps", "epochs")
MODEL_FOLDER = "model"
# What may differ when a run is taken up again.
MUTABLE_KEYS = (
  "steps",
  "epochs",
  "microbatch_rows",
  "data.cache_dir",
  "mesh",
  "checkpoint",
  "eval",
  "log",
)


def owned(
  workdir: str | os.PathLike[str], doing: str
) -> contextlib.AbstractContextManager[None]:
  """Returns what keeps the folder for one run, whose first process holds it.

  Args:
    workdir: the folder, made where it is not there.
    doing: what the error says that another process does in it.

  Raises:
    ValueError: on entry, another run holds it.
  """
  if processes.is_first():
    return files.owned_folder(workdir, doing)
  return contextlib.nullcontext()


def check_config(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
  """Checks that a run of this config may start or go on in the folder.

  Raises:
    ValueError: it holds a run of another config; the message says what
      differs.
  """
  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return
  try:
    before = _fixed(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error
  now = _fixed(config)
  changed = [
    f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run of another config: {'; '.join(changed)}; give"
      " another --workdir"
    )


def write_config(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
  """Writes config.json, whole or not at all; the run is not finished."""
  path = pathlib.Path(workdir) / "config.json"
  # First, or a longer run of this folder would look finished.
  (path.parent / FINISHED).unlink(missing_ok=True)
  files.write_json(path, config)


def mark_finished(workdir: str | os.PathLike[str]) -> None:
  """Says that the run of config.json came to its end."""
  (pathlib.Path(workdir) / FINISHED).touch()


def is_finished(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> bool:
  """Returns whether a run as long as this config's came to its end here.

  Args:
    workdir: the run folder, which need not exist.
    config: one that `check_config` lets go on in the folder.
  """
  folder = pathlib.Path(workdir)
  if not (folder / FINISHED).exists():
    return False
  before = json.loads((folder / "config.json").read_text())
  return all(before[key] == config[key] for key in LENGTH_KEYS)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns the values of nested mappings by their dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def _fixed(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns dotted keys and values, without those that may differ."""
  is_mutable = lambda key: any(
    (key + ".").startswith(mutable + ".") for mutable in MUTABLE_KEYS
  )
  return {k: v for k, v in flatten(tree).items() if not is_mutable(k)}

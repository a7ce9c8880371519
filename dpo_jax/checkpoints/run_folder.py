"""What a run folder says of itself: its config, and the model it trains.

config.json    every key of the config
model/         the decoder's config.json in Hugging Face format, tokenizer
checkpoints/   see `manager`
finished       empty; there when the run of config.json came to its end
.lock          held by the process that trains; see `files.owned`
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from dpo_jax.host import files, processes, schema

FINISHED = "finished"
LENGTH_KEYS = ("steps", "epochs")
MODEL_FOLDER = "model"
# What may differ when a run is taken up again: no update changes by it but in
# rounding. So may `LENGTH_KEYS`, where the learning rate does not depend on
# them.
MUTABLE_KEYS = (
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


# What is read of a config, by dotted key.
KINDS = {
  "steps": schema.integer(0, schema.MAX_INDEX),
  "epochs": schema.number("a number, at least 0", 0, schema.HUGE),
  **{
    f"data.max{part}_length": schema.integer(0, schema.MAX_INDEX)
    for part in ("", "_prompt")
  },
  "data.truncate_prompts": schema.STRING,
  "loss.beta": schema.NUMBER,
  "checkpoint.metric": schema.STRING,
  "reference.mode": schema.STRING,
  **dict.fromkeys(("model.path", "reference.path", "lora.path"), schema.STRING),
}


def read_config(
  workdir: str | os.PathLike[str], required: Collection[str] = ()
) -> dict[str, Any]:
  """Returns the values of a run's config.json by their dotted keys.

  Args:
    workdir: the run folder.
    required: keys that it must have.

  Raises:
    ValueError: no such file, one that is not JSON, a key that is missing or a
      value of a wrong kind.
  """
  path = pathlib.Path(workdir) / "config.json"
  values = flatten(schema.read(path, {}))
  try:
    schema.check(values, KINDS, required)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return values


def check_config(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
  """Checks that a run of this config may start or go on in the folder.

  Raises:
    ValueError: it holds a run of another config; the message says what
      differs.
    NotADirectoryError: it cannot be a folder.
  """
  path = pathlib.Path(workdir) / "config.json"
  for folder in path.parents:
    if folder.exists() and not folder.is_dir():
      reason = os.strerror(errno.ENOTDIR)
      raise NotADirectoryError(errno.ENOTDIR, reason, str(folder))
  if not path.exists():
    return
  before, now = read_config(workdir), flatten(config)
  schedule = now.get("optimizer.schedule", "constant")
  free = set() if schedule != "constant" else set(LENGTH_KEYS)
  if before.get("steps") and now.get("steps"):
    free.add("epochs")  # steps win
  changed = [
    key
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key) and not (key in free or _is_mutable(key))
  ]
  if not changed:
    return
  allowed = "give another --workdir"
  if set(changed) <= set(LENGTH_KEYS):
    allowed = (
      f"the rate of the steps already done depends on it under"
      f" optimizer.schedule={schedule!r}; allowed: the old value, or another"
      " --workdir"
    )
  differ = (
    f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed
  )
  raise ValueError(
    f"{workdir} holds a run of another config: {'; '.join(differ)}; {allowed}"
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
  before = read_config(folder, LENGTH_KEYS)
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


def _is_mutable(key: str) -> bool:
  return any((key + ".").startswith(group + ".") for group in MUTABLE_KEYS)

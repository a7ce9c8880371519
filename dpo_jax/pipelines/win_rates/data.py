"""Which rows the experiments of `preferences` train and test on."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from dpo_jax.data import examples
from dpo_jax.host import files
from dpo_jax.pipelines.win_rates.tasks import Scale, Task

HELD_OUT_SHARE = 16  # one pair of so many chooses the reward model


def write(
  path: pathlib.Path, data: pathlib.Path, task: Task, scale: Scale
) -> None:
  """Writes what is trained on, held out and tested on, and its counts.

  Args:
    path: gets the counts; beside it stands a folder `data`, with `train.jsonl`,
      `held_out.jsonl` and `test.jsonl`.
    data: folder of the task's files.
    task: whose rows.
    scale: how many, and how long.

  Raises:
    ValueError: a file that cannot be read, or of which too few rows are kept.
  """
  folder = path.parent / "data"
  kept, counts = _read(data, task, scale, "train", lambda _: True)
  files.write_lines(
    folder / "train.jsonl",
    (x for n, x in enumerate(kept) if n % HELD_OUT_SHARE),
  )
  held_out = kept[::HELD_OUT_SHARE]
  files.write_lines(folder / "held_out.jsonl", held_out)
  trained_on = {x["prompt"] for x in kept}
  is_new = lambda x: task.is_test(x) and x["prompt"] not in trained_on
  test, test_counts = _read(data, task, scale, "test", is_new)
  files.write_lines(folder / "test.jsonl", test)
  record = {"train": counts, "held_out": len(held_out), "test": test_counts}
  print(f"data: {json.dumps(record)}", flush=True)
  files.write_json(path, record)


def response(row: Mapping[str, Any]) -> str:
  """Returns the data's own response, of pairs the chosen one."""
  return row["response"] if "response" in row else row["chosen"]


def _read(
  data: pathlib.Path,
  task: Task,
  scale: Scale,
  split: str,
  is_wanted: Callable[[dict], bool],
) -> tuple[list[dict], dict[str, int]]:
  """Returns rows of distinct prompts that fit, and what became of all."""
  is_train = split == "train"
  limit = scale.train_rows if is_train else scale.test_prompts
  path = str(data / (task.train if is_train else task.test))
  inputs = "pairs" if task.has_pairs else "demonstrations"
  found, counts = {}, {"read": 0}
  for row in examples.read(task.source, path, split=split, inputs=inputs):
    counts["read"] += 1
    reason = row.get("dropped") or _reason(row, scale, is_wanted, found)
    if reason is None and limit is not None and len(found) == limit:
      reason = "more than this scale takes"
    if reason:
      counts[reason] = counts.get(reason, 0) + 1
    else:
      found[row["prompt"]] = row
  if len(found) < 2:
    raise ValueError(f"{path!r}: too few rows are kept: {counts}")
  return list(found.values()), counts | {"kept": len(found)}


def _reason(row, scale, is_wanted, found) -> str | None:
  """Returns why a row is left out; None where it is not."""
  texts = [row[x] for x in ("chosen", "rejected", "response") if x in row]
  if not (row["prompt"].strip() and all(x.strip() for x in texts)):
    return "empty prompt or response"
  if row["prompt"] in found:
    return "prompt seen before"
  if len(row["prompt"]) > scale.prompt_characters:
    return "long prompt"
  if max(map(len, texts)) > scale.response_characters:
    return "long response"
  return None if is_wanted(row) else "not a prompt of the test"

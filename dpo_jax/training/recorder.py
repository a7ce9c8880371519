"""Writes what a run measures: metrics.jsonl, TensorBoard, wandb, a line."""

import importlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from dpo_jax.host import endings, files


class Recorder:
  """Records metrics in a run folder, from process 0; elsewhere does nothing.

  `metrics.jsonl` has one JSON object a line, e.g.
  `{"step": 10, "split": "train", "loss": 0.6931471824645996}`; a value that is
  not finite is written as Python writes it (NaN, Infinity).
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    start_step: int = 0,
    wandb_project: str = "",
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the files, without what an earlier run wrote past `start_step`.

    Args:
      workdir: the run folder; made when absent.
      total_steps: the step that the run ends at.
      start_step: the step of the checkpoint that the run resumes from; 0 for a
        new run, which starts with no metrics.
      wandb_project: where to send metrics besides; "" sends none.
      config: what wandb shows as the run's configuration.

    Raises:
      ValueError: wandb is asked for and not installed.
    """
    self._total_steps = total_steps
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    wandb = _import_wandb(wandb_project) if wandb_project else None
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "metrics.jsonl"
    _drop_after(path, start_step)
    self._file = path.open("a")
    # Not a SummaryWriter, whose thread dies of a full disk: the run would then
    # wait for it for ever.
    self._events = event_file_writer.EventsWriter(str(workdir / "events"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add_event(start_step + 1 if start_step else 0, session_log=start)
    self._wandb = wandb and wandb.init(
      project=wandb_project,
      name=workdir.absolute().name,
      dir=str(workdir),
      config=dict(config or {}),
      resume="auto",
    )
    # tqdm shows nothing where stderr is no terminal (disable=None).
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start_step,
      unit="step",
      dynamic_ncols=True,
      disable=None,
    )
    self._last = start_step, time.monotonic()

  def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
    """Records the metrics of one step; those of `train` move the progress.

    Args:
      step: steps count from 1; step k describes update k.
      split: "train" or "eval".
      metrics: numbers on the host.
    """
    if not self._is_writer:
      return
    values = {name: float(value) for name, value in metrics.items()}
    line = json.dumps({"step": int(step), "split": split, **values})
    with endings.writing(self._file.name):
      self._file.write(line + "\n")
      self._file.flush()
      for name, value in values.items():
        if math.isfinite(value):  # TensorBoard has no others
          scalar = summary.scalar(f"{split}/{name}", value)
          self._add_event(step, summary=scalar)
    if self._wandb:
      named = {f"{split}/{name}": value for name, value in values.items()}
      self._wandb.log(named, step=step)
    self._show(step, split, values)

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._is_writer:
      self._bar.close()
      with endings.writing(self._file.name):
        self._file.close()
        self._events.close()
      if self._wandb:
        self._wandb.finish()

  def __enter__(self) -> "Recorder":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _add_event(self, step: int, **content: Any) -> None:
    event = event_pb2.Event(step=step, wall_time=time.time(), **content)
    self._events.write_event(event)

  def _show(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Moves the bar of a terminal; elsewhere prints a line."""
    summary = f"loss {values['loss']:.4f}" if "loss" in values else ""
    if split != "train":
      numbers = ", ".join(f"{name} {x:.4g}" for name, x in values.items())
      line = f"step {step} {split}: {numbers}"
      self._bar.write(line) if not self._bar.disable else _print(line)
      return
    if not self._bar.disable:
      self._bar.set_postfix_str(summary, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    last_step, last_time = self._last
    self._last = step, now = step, time.monotonic()
    rate = (step - last_step) / max(now - last_time, 1e-9)  # Clocks may stall.
    left = (self._total_steps - step) / rate if rate > 0 else 0.0
    _print(
      f"step {step}/{self._total_steps} {summary} {rate:.2f} steps/s,"
      f" {tqdm.tqdm.format_interval(left)} left"
    )


def _print(line: str) -> None:
  print(line, file=sys.stdout, flush=True)


def _import_wandb(project: str) -> ModuleType:
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError(
      f"metrics are to go to the wandb project {project!r}, but wandb cannot be"
      f" imported ({error}): install it, or name no project"
    ) from error


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Removes the lines past `step`, and a last line that a kill cut short.

  With `step` 0 nothing stays: an evaluation before the first update is made
  anew. The file is replaced by renaming, so a kill here loses nothing.

  Raises:
    ValueError: a line that is not the last is no record of metrics.
  """
  if not path.exists():
    return
  kept = []
  lines = path.read_bytes().splitlines(keepends=True) if step else []
  for number, line in enumerate(lines, 1):
    try:
      line_step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise ValueError(
        f"{path} line {number} is not a JSON object with a step: {line!r}"
      ) from error
    if line_step <= step and line.endswith(b"\n"):
      kept.append(line)
  files.write_bytes(path, b"".join(kept))

"""Saves a run's state while it trains, and brings it back on any mesh.

A run folder holds `checkpoints/<step>/`, each with three items:
  `state`         the arrays, one tree, written by Orbax from every process
  `fingerprints`  a 32-bit sum of the bits of every array, taken on the device
  `metrics`       what the evaluation at this step said, if there was one

Orbax writes to a temporary folder and renames it, so what a killed process
leaves is never taken for a checkpoint.
"""

import contextlib
import functools
import logging as stdlib_logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from dpo_jax.checkpoints import reader
from dpo_jax.host import caches, endings, schema
from dpo_jax.models import finite
from dpo_jax.types import Params

# Metrics that may choose the best checkpoint: whether the lowest is the best.
LOWER_IS_BETTER = {
  "loss": True,
  "rewards/accuracies": False,
  "rewards/margins": False,
}

_METRICS = schema.object_of(schema.NUMBER)

# Each chunk of an array is read whole and beside it. Smaller ones than this
# come from malloc's arenas, which keep the memory.
_CHUNK_BYTES = 2**26


class Manager:
  """The checkpoints of one run; every process makes one and calls it alike."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    every: int,
    keep: int,
    metric: str = "loss",
    lower_is_better: bool = True,
  ):
    """Opens `workdir/checkpoints`, and clears what a killed write left there.

    Args:
      workdir: the run folder; made when absent.
      every: `save` writes at multiples of this many steps; 0 is never, unless
        forced.
      keep: how many of the latest checkpoints stay, at least 1. With 1 there
        is nothing to fall back to when that one is damaged.
      metric: the key of `save`'s metrics by which the best one stays as well.
      lower_is_better: whether the best is the lowest.

    Raises:
      ValueError: `every` or `keep` is out of range.
    """
    if every < 0:
      raise ValueError(f"checkpoint.every={every}: must be 0 (never) or above")
    if keep < 1:
      raise ValueError(f"checkpoint.keep={keep}: must be at least 1")
    self._every = every
    self._metric = metric
    self._folder = _checkpoints_folder(workdir)
    _drop_unreadable_metrics(workdir)
    sign = 1.0 if lower_is_better else -1.0

    def badness(metrics: Mapping[str, float] | None) -> float:
      value = sign * (metrics or {}).get(metric, math.inf)
      return value if math.isfinite(value) else math.inf

    best = checkpoint_managers.BestN(
      get_metric_fn=badness,
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    latest = checkpoint_managers.LatestN(keep)
    options = ocp.CheckpointManagerOptions(
      best_fn=badness,  # Orbax writes metrics only where this is set.
      best_mode="min",
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(
        [latest, best]
      ),
      cleanup_tmp_directories=True,
    )
    _hush_failed_writes()
    self._folder.mkdir(parents=True, exist_ok=True)  # Orbax only logs if not
    with self._writing():
      self._orbax = ocp.CheckpointManager(self._folder, options=options)

  def save(
    self,
    step: int,
    state: Any,
    metrics: Mapping[str, float] | None = None,
    *,
    force: bool = False,
  ) -> bool:
    """Returns whether a save of `state` began; the rest happens in a thread.

    The arrays are copied to the host before this returns, so `state` may be
    donated at once. A save waits for the one before it.

    Args:
      step: the number of updates that made `state`.
      state: a tree of jax arrays with elements of 8, 16 or 32 bits (no typed
        random keys), the subtree `params` among them.
      metrics: what an evaluation of `state` said; None where there was none.
      force: saves though `every` does not divide the step.

    Raises:
      ValueError: `metrics` lacks the key by which the best one is chosen.
      OSError: this save, or the one before it, could not be written.
    """
    if metrics is not None and self._metric not in metrics:
      raise ValueError(
        f"the best checkpoint is chosen by {self._metric!r}, which is not"
        f" among the metrics: {', '.join(sorted(metrics))}"
      )
    due = self._every > 0 and step % self._every == 0
    if not (due or force) or step in self._orbax.all_steps():
      return False
    prints = jax.device_get(reader.fingerprints(state))
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(
        state,
        save_args=jax.tree.map(
          lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state
        ),
      ),
      fingerprints=ocp.args.JsonSave(
        {name: int(value) for name, value in prints.items()}
      ),
    )
    metrics = {name: float(x) for name, x in (metrics or {}).items()}
    with self._writing():
      return self._orbax.save(step, args=args, metrics=metrics, force=True)

  def wait(self) -> None:
    """Returns when no save is under way; OSError where one was not written."""
    with self._writing():
      self._orbax.wait_until_finished()

  def close(self) -> None:
    """Waits as `wait` does, then ends the threads."""
    with self._writing():
      self._orbax.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises no ValueError, which would read as the user's mistake."""
    try:
      with endings.writing(self._folder):
        yield
    except ValueError as error:
      raise RuntimeError(f"{self._folder}: a save failed: {error}") from error

  def __enter__(self) -> "Manager":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """Returns the newest step that was saved; None where there is none."""
    return self._orbax.latest_step()

  def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
    """Returns the newest undamaged step and its state; None if none was saved.

    A damaged checkpoint is renamed to `damaged_<step>` and one line says why,
    once an older one was read whole: a step can then be saved again.

    Args:
      abstract_state: ShapeDtypeStructs with shardings, in the tree to return.
        The mesh need not be the one that saved.

    Raises:
      ValueError: the checkpoint holds other arrays than `abstract_state`, or
        all are damaged (then nothing is renamed).
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._orbax.all_steps(), reverse=True):
      try:
        state = reader.read(self._folder / str(step), abstract_state)
      except reader.DamagedError as error:
        damaged[step] = str(error)
        continue
      if damaged:
        self._set_aside(damaged, read=step)
      return step, state
    if damaged:
      raise ValueError(
        f"no checkpoint in {self._folder} can be read:"
        f" {'; '.join(f'{s}: {why}' for s, why in damaged.items())}"
      )
    return None

  def _set_aside(self, damaged: Mapping[int, str], *, read: int) -> None:
    """Renames the damaged steps, so that they are out of the way."""
    for step, reason in damaged.items():
      path, aside = self._folder / str(step), self._folder / f"damaged_{step}"
      if jax.process_index() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
      logging.warning(
        "checkpoint %s is damaged (%s): renamed it %s and went back to step %d",
        *(path, reason, aside.name, read),
      )
    multihost_utils.sync_global_devices("damaged checkpoints renamed")
    self._orbax.reload()


@functools.cache
def _hush_failed_writes() -> None:
  """Keeps stderr free of the tracebacks of a save that failed.

  Orbax's threads log each and then raise it; the writes beside the one that
  failed find their event loop closed, and Python prints that nothing else can.
  """
  closed, show = "Event loop is closed", sys.unraisablehook
  is_shown = lambda record: (
    record.levelno < stdlib_logging.ERROR
    or f"{os.sep}orbax{os.sep}" not in record.pathname
  )
  logging.get_absl_logger().addFilter(is_shown)
  stdlib_logging.getLogger("asyncio").addFilter(
    lambda record: closed not in f"{record.msg} {record.exc_info}"
  )
  sys.unraisablehook = lambda x: closed in str(x.exc_value) or show(x)


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
  """Returns the steps that a run folder holds checkpoints of, ascending."""
  names = ocp.path.step.standard_name_format()
  found = names.find_all(_checkpoints_folder(workdir))
  return sorted(entry.step for entry in found)


def best_step(workdir: str | os.PathLike[str], metric: str) -> int | None:
  """Returns the saved step with the best evaluation, of equal ones the last.

  Args:
    workdir: the run folder.
    metric: a key of `LOWER_IS_BETTER`.

  Returns:
    None where no saved step was evaluated.

  Raises:
    ValueError: an unknown metric, or a step's metrics cannot be read.
  """
  if metric not in LOWER_IS_BETTER:
    raise ValueError(
      f"{workdir}: checkpoint.metric={metric!r}: must be one of"
      f" {', '.join(LOWER_IS_BETTER)}"
    )
  sign = -1.0 if LOWER_IS_BETTER[metric] else 1.0
  found = []
  for step in saved_steps(workdir):
    path = _metrics_path(workdir, step)
    value = math.nan
    if path.exists():
      value = sign * _read_metrics(path).get(metric, math.nan)
    if math.isfinite(value):
      found.append((value, step))
  return max(found)[1] if found else None


def saved_shape(
  workdir: str | os.PathLike[str], name: str, step: int | None = None
) -> tuple[int, ...]:
  """Returns the shape of an array of a checkpoint, the newest by default.

  Raises:
    ValueError: there is no such checkpoint, or no such array in it.
  """
  return reader.saved_shape(_checkpoint(workdir, step), name)


def restore_params(
  workdir: str | os.PathLike[str],
  abstract_params: Params,
  step: int | None = None,
) -> Params:
  """Returns the policy's parameters of a run, without reading anything else.

  Nothing in the folder is changed, so the run may still be going on.

  Args:
    workdir: the run folder.
    abstract_params: ShapeDtypeStructs with shardings. Parameters saved in
      another dtype are cast.
    step: which checkpoint; the newest by default.

  Raises:
    ValueError: there is no such checkpoint, it holds other parameters, NaN or
      infinity among them, or it is damaged (a model other than the one asked
      for would be worse).
  """
  path = _checkpoint(workdir, step)
  wanted = {"params": abstract_params}
  try:
    params = reader.read(path, wanted, partial=True)["params"]
  except reader.DamagedError as error:
    steps = ", ".join(map(str, saved_steps(workdir)))
    raise ValueError(
      f"checkpoint {path} is damaged: {error}; there are {steps}"
    ) from error
  params = jax.tree.map(
    lambda x, like: x.astype(like.dtype), params, abstract_params
  )
  finite.check(params, f"checkpoint {path}")
  return params


def _checkpoint(
  workdir: str | os.PathLike[str], step: int | None
) -> pathlib.Path:
  """Returns the folder of a step, the newest by default."""
  folder, steps = _checkpoints_folder(workdir), saved_steps(workdir)
  if not steps:
    raise ValueError(f"no checkpoint in {folder}")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise ValueError(
      f"no checkpoint of step {step} in {folder}; there are"
      f" {', '.join(map(str, steps))}"
    )
  return folder / str(step)


def _checkpoints_folder(workdir: str | os.PathLike[str]) -> pathlib.Path:
  # Orbax takes absolute paths only.
  return pathlib.Path(workdir).absolute() / "checkpoints"


def _metrics_path(workdir: str | os.PathLike[str], step: int) -> pathlib.Path:
  return _checkpoints_folder(workdir) / str(step) / "metrics" / "metrics"


def _read_metrics(path: pathlib.Path) -> dict[str, float]:
  """Returns what an evaluation said; ValueError where the file is damaged."""
  metrics = schema.read(path, {})
  if not _METRICS.allows(metrics):
    raise ValueError(f"{path}: must be {_METRICS.name}")
  return metrics


def _drop_unreadable_metrics(workdir: str | os.PathLike[str]) -> None:
  """Deletes damaged metrics files, which would keep Orbax from opening."""
  if jax.process_index() == 0:
    for step in saved_steps(workdir):
      path = _metrics_path(workdir, step)
      try:
        if os.path.lexists(path):
          _read_metrics(path)
      except ValueError:
        logging.warning("%s cannot be read: step %d has no metrics", path, step)
        caches.remove(path)
  multihost_utils.sync_global_devices("checkpoint metrics read")

"""Where reference log-probabilities come from, one mode each.

live    a frozen copy that the step runs without gradient
cached  a file, written once and read by every run that needs the same ones:
        the step holds no reference and computes none. It is computed in the
        rows of the first epoch, where a policy that equals the reference has
        margins of 0; in other rows (later epochs; in float32 also those of
        another seed or batch size, which share the file) sums are rounded in
        another order: by 1e-5 nats, and in bfloat16 by the hundredth of one
adapter_off
        the policy's base with the adapters left out: no second copy of it
ema     as live, and every few updates it moves part of the way to the policy
sync    as live, and every few updates it becomes the policy
none    nowhere: the loss has no reference

`ema` and `sync` are the soft and the hard update of TR-DPO (Gorbatovski et
al. 2024, arXiv 2404.09656).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.data import loader
from dpo_jax.host import caches, files, schema
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.types import Array, Params

MODES = ("live", "cached", "adapter_off", "ema", "sync", "none")
MOVING_MODES = ("ema", "sync")
ALPHA, EVERY = 0.6, 512  # TR-DPO's soft weight and its hard interval
# To be raised with any change of what is in a cache of log-probabilities.
CACHE_VERSION = 2
_HASHED_PAIRS = 4096  # whose tokens are in memory at once


@dataclasses.dataclass(frozen=True)
class Reference:
  """How a run comes by reference log-probabilities.

  Attributes:
    mode: one of `MODES`.
    model: the reference's decoder; None where the loss has no reference.
    alpha: the policy's share in an update of a reference that moves.
    every: training steps between updates of the reference.
  """

  mode: str
  model: model_config.ModelConfig | None = None
  alpha: float | None = None
  every: int | None = None

  def __str__(self) -> str:
    """Returns what a run says of itself at its start."""
    if self.model is None:
      return "none"
    text = f"{self.mode}, {self.model.param_dtype}"
    if self.moves:
      text += f", alpha {self.alpha:g} every {self.every} steps"
    return text

  @property
  def traced(self) -> model_config.ModelConfig | None:
    """The decoder that the step runs beside the policy's, if any."""
    return None if self.mode == "cached" else self.model

  @property
  def is_cached(self) -> bool:
    """Whether log-probabilities come with the batch."""
    return self.mode == "cached" and self.model is not None

  @property
  def moves(self) -> bool:
    """Whether training changes the reference."""
    return self.mode in MOVING_MODES and self.model is not None

  def updated(self, step: Array, params: Params, policy: Params) -> Params:
    """Returns the reference's parameters after training step `step`.

    Gorbatovski et al. 2024 (arXiv 2404.09656), soft and hard update:
    reference <- alpha policy + (1 - alpha) reference at every multiple of
    `every`, else unchanged. In float32, rounded to the reference's dtype:
    with bfloat16 a change below 1 part in 256 is lost.

    Args:
      step: i32[], updates of the policy done, counted from 1.
      params: the reference's before.
      policy: the policy's after its update.
    """
    if not self.moves:
      return params

    def mix(old, new):
      old32, new32 = old.astype(jnp.float32), new.astype(jnp.float32)
      mixed = self.alpha * new32 + (1 - self.alpha) * old32
      return mixed.astype(old.dtype)

    return jax.lax.cond(
      step % self.every == 0,
      lambda: jax.tree.map(mix, params, policy),
      lambda: params,
    )


def make_reference(
  mode: str,
  model: model_config.ModelConfig | None,
  *,
  alpha: float | None = None,
  every: int | None = None,
) -> Reference:
  """Returns a reference with its settings checked and filled in.

  Args:
    mode: one of `MODES`.
    model: the reference's decoder; None where the loss has no reference.
    alpha: for `ema` only, in (0, 1]; `sync` has 1. None is TR-DPO's 0.6.
    every: for `ema` and `sync`, at least 1. None is TR-DPO's 512.

  Raises:
    ValueError: a number out of range or that the mode does not honour.
  """
  if alpha is not None and mode != "ema":
    raise ValueError(
      f"reference.alpha={alpha:g}: reference.mode={mode!r} does not honour it;"
      " 'ema' does"
    )
  if mode not in MOVING_MODES:
    if every is not None:
      raise ValueError(
        f"reference.every={every}: reference.mode={mode!r} does not honour it;"
        f" {' and '.join(MOVING_MODES)} do"
      )
    return Reference(mode, model)
  if alpha is None:
    alpha = ALPHA if mode == "ema" else 1.0
  every = EVERY if every is None else every
  if not 0 < alpha <= 1:
    raise ValueError(f"reference.alpha={alpha:g}: must be in (0, 1]")
  if every < 1:
    raise ValueError(f"reference.every={every}: must be at least 1")
  return Reference(mode, model, alpha, every)


def check_mode(
  mode: str,
  path: str,
  name: str,
  *,
  has_reference: bool,
  has_adapters: bool,
) -> None:
  """Raises ValueError unless a run can have this mode and this path.

  Args:
    mode: `reference.mode`.
    path: `reference.path`.
    name: of the loss.
    has_reference: whether the loss reads one.
    has_adapters: whether adapters are trained.
  """
  if mode not in MODES:
    raise ValueError(
      f"unknown reference.mode {mode!r}; known: {', '.join(MODES)}"
    )
  problems = {
    f"reference.mode={mode!r}: loss {name!r} needs a reference": (
      mode == "none" and has_reference
    ),
    f"reference.mode={mode!r}: loss {name!r} has no reference": (
      mode in MOVING_MODES and not has_reference
    ),
    f"reference.path={path!r}: loss {name!r} has no reference": (
      path and not has_reference
    ),
    f"reference.mode={mode!r}: there are no adapters to leave out; give"
    " lora.rank above 0": mode == "adapter_off" and not has_adapters,
    f"reference.path={path!r}: reference.mode={mode!r} is the base alone": (
      path and mode == "adapter_off"
    ),
    f"reference.mode={mode!r} with lora.rank above 0: a reference of adapters"
    " does not move; known: live, cached, adapter_off, none": (
      mode in MOVING_MODES and has_adapters
    ),
  }
  for message, is_so in problems.items():
    if is_so:
      raise ValueError(message)


def cache_key(
  batches: loader.Loader,
  model: model_config.ModelConfig,
  fingerprints: Mapping[str, int],
  objective: objectives.Objective,
) -> str:
  """Returns a hash of all that log-probabilities depend on.

  These are the token ids, cut to length as they are; the decoder, its dtypes
  and weights; and the loss's weights of tokens. Rows change the order of sums
  only and are not among them in float32; in bfloat16, where that counts, they
  are. Mesh and device are not.

  Args:
    batches: the pairs, and what is scored beside their responses.
    model: the reference's decoder.
    fingerprints: of each array of its parameters.
    objective: of the loss, `ld_alpha` alone enters.
  """
  shape = dataclasses.asdict(model)
  # Neither changes a log-probability.
  del shape["remat"], shape["vocab_multiple"]
  settings = [
    CACHE_VERSION,
    shape,
    dict(fingerprints),
    objective.ld_alpha,
    batches.extra_columns,
  ]
  if model.dtype != "float32":
    settings += batches.arrangement
  dataset = batches.dataset
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  for values in (dataset.lengths, *batches.mismatched):
    digest.update(np.ascontiguousarray(values))
  for first in range(0, len(dataset.lengths), _HASHED_PAIRS):
    last = min(first + _HASHED_PAIRS, len(dataset.lengths))
    tokens = dataset.take(np.arange(first, last))
    for column in (tokens.prompt, *tokens.responses):
      digest.update(np.ascontiguousarray(column.values))
  return digest.hexdigest()[:32]


def cached_logps(
  cache_dir: str | os.PathLike,
  key: str,
  shape: tuple[int, int],
  compute: Callable[[], np.ndarray],
  say: Callable[[str], None],
) -> np.ndarray:
  """Returns f32[n,C] from the cache, computed and kept where it has none.

  Every process must call this alike. The first one reads and writes, under a
  lock: of two runs on one machine or file system that need the same values
  one computes them. The others get what it has.

  Args:
    cache_dir: folder of all caches.
    key: of `cache_key`.
    shape: (n, C).
    compute: returns the values; called by all processes or by none.
    say: told in one line what was done.
  """
  path = pathlib.Path(cache_dir) / f"reference_{key}.npz"
  is_writer = jax.process_index() == 0
  with _locked(path, say) if is_writer else contextlib.nullcontext():
    found, problem = None, ""
    if is_writer and os.path.lexists(path):
      found, problem = _read(path, key, shape)
    has_found = multihost_utils.broadcast_one_to_all(
      np.array(found is not None)
    )
    if has_found:
      say(f"reference: log-probabilities of {shape[0]} pairs read from {path}")
      if found is None:
        found = np.zeros(shape, np.float32)
      return np.asarray(multihost_utils.broadcast_one_to_all(found))
    why = f" ({path.name} was damaged: {problem})" if problem else ""
    say(f"reference: computes log-probabilities of {shape[0]} pairs{why}")
    logps = np.asarray(compute(), np.float32)
    if is_writer:
      _write(path, key, logps)
    return logps


@contextlib.contextmanager
def _locked(path: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
  path.parent.mkdir(parents=True, exist_ok=True)
  caches.sweep(path.parent)
  lock = caches.lock(path)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    say(f"reference: waits for another run that writes {path}")
    lock.acquire()
  try:
    yield
  finally:
    lock.release()


def _read(
  path: pathlib.Path, key: str, shape: tuple[int, int]
) -> tuple[np.ndarray | None, str]:
  """Returns the values of a cache, or None and why they are not to be used."""
  try:
    schema.check_file(path)
    with np.load(path) as file:
      logps, written = file["logps"], str(file["sha256"])
  except Exception as error:  # Whatever numpy makes of other files.
    return None, " ".join(str(error).split()) or type(error).__name__
  if logps.dtype != np.float32 or logps.shape != shape:
    return None, f"it holds {logps.dtype}{list(logps.shape)}"
  if written != _checksum(key, logps):
    return None, "its checksum differs"
  return logps, ""


def _write(path: pathlib.Path, key: str, logps: np.ndarray) -> None:
  """Writes a cache, whole or not at all."""
  if not path.is_file() or path.is_symlink():
    caches.remove(path)
  with files.replacing(path) as part, part.open("wb") as file:
    np.savez(file, logps=logps, sha256=np.array(_checksum(key, logps)))


def _checksum(key: str, logps: np.ndarray) -> str:
  digest = hashlib.sha256(key.encode())
  digest.update(np.ascontiguousarray(logps))
  return digest.hexdigest()

"""Reads the arrays of one checkpoint, and knows when they are not as written.

Damage to Orbax's indices and to the frames of compressed data raises when read;
a changed byte in the data of an array does not, as neither zarr nor zstd keeps
a checksum of it. So a fingerprint of every array is saved beside them.
"""

import contextlib
import gc
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

# After a failed read, for the reads beside it to end while stderr is hushed.
_ABANDONED_READS_SECONDS = 0.1
# Arrays together no larger than this are read at once.
_SMALL_READ_BYTES = 2**24


class DamagedError(Exception):
  """A committed checkpoint cannot be read, or reads otherwise than written."""


def fingerprints(tree: Any) -> dict[str, jax.Array]:
  """Returns the fingerprint of every array, u32[], by the path in the tree."""
  leaves = _named_leaves(tree)
  # One program for all: many small ones with collectives, in flight at once,
  # can wait for each other for ever where devices share few cores.
  return dict(zip(leaves, _fingerprints(list(leaves.values())), strict=True))


def saved_shape(path: pathlib.Path, name: str) -> tuple[int, ...]:
  """Returns the shape of one array of a checkpoint; name: "params/head".

  Raises:
    ValueError: the checkpoint's index has no such array, or cannot be read.
  """
  try:
    index = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
    return tuple(_named_leaves(index)[name].shape)
  except KeyError as error:
    raise ValueError(f"checkpoint {path} holds no array {name!r}") from error
  except Exception as error:  # Whatever Orbax makes of bad data.
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(f"checkpoint {path} is damaged: {reason}") from error


def read(path: pathlib.Path, abstract: Any, *, partial: bool = False) -> Any:
  """Returns the arrays of one checkpoint, in the dtype that they were saved in.

  Each process reads for itself and all then agree on whether it went well:
  Orbax's own barriers would leave the others waiting for the process that met
  a damaged file.

  Args:
    path: the folder of the step.
    abstract: what to read.
    partial: whether the checkpoint may hold more, and in another dtype.

  Raises:
    ValueError: the checkpoint holds other arrays than `abstract`.
    DamagedError: on every process, with the reason.
  """
  state, written, reason = _try_read(path, abstract, partial)
  if not np.all(multihost_utils.process_allgather(np.array(not reason))):
    raise DamagedError(reason or "another process could not read it")
  read = jax.device_get(fingerprints(state))
  wrong = [name for name, value in read.items() if written.get(name) != value]
  if wrong:
    raise DamagedError(
      f"{len(wrong)} of {len(read)} arrays differ from what was saved, the"
      f" first {wrong[0]!r}"
    )
  return state


def _try_read(
  path: pathlib.Path, abstract: Any, partial: bool
) -> tuple[Any, dict[str, int], str]:
  """Returns arrays, the fingerprints saved with them, and what went wrong."""
  with _abandoned_reads_hushed():
    try:
      text = (path / "fingerprints" / "metadata").read_text()
      written = {str(name): int(x) for name, x in json.loads(text).items()}
      index = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
      saved = _named_leaves(index)
      if saved.keys() != written.keys():
        raise ValueError("its index and its fingerprints name other arrays")
      _check_same_arrays(path, saved, _named_leaves(abstract), partial)
      abstract = jax.tree_util.tree_map_with_path(
        lambda keys, like: jax.ShapeDtypeStruct(
          like.shape, saved[_name(keys)].dtype, sharding=like.sharding
        ),
        abstract,
      )
      state = _read_in_turns(path / "state", abstract, partial)
      return state, written, ""
    except (_OtherArraysError, jax.errors.JaxRuntimeError, MemoryError):
      raise
    except Exception as error:  # Orbax raises a bare Exception on bad data.
      cause = error.__cause__ or error
      text = (str(cause) or type(cause).__name__).splitlines()[0]
      time.sleep(_ABANDONED_READS_SECONDS)
      reason = text[:200]
      del cause
    gc.collect()  # lets go of the other reads while nothing of them is heard
    return None, {}, reason


def _read_in_turns(path: pathlib.Path, abstract: Any, partial: bool) -> Any:
  """Returns the arrays, read one large one at a time, or several small ones.

  A read holds its bytes on the host twice: as stored and as they go to the
  devices. Orbax has a bound on what is read at once, but counts an array as
  done before its host copy is gone.
  """
  wanted, structure = jax.tree.flatten(abstract)
  state = list(wanted)
  handler = ocp.PyTreeCheckpointHandler()
  for turn in _turns([math.prod(x.shape) * x.dtype.itemsize for x in wanted]):
    item = structure.unflatten(
      x if i in turn else ocp.PLACEHOLDER for i, x in enumerate(wanted)
    )
    found = handler.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=partial,
      ),
    )
    found = jax.block_until_ready(jax.tree.leaves(found))
    for i in turn:
      state[i] = found[i]
  return structure.unflatten(state)


def _turns(sizes: Sequence[int]) -> list[set[int]]:
  """Returns indices, together no larger than the largest or a small read."""
  bound = max(_SMALL_READ_BYTES, *sizes, 0)
  turns, total = [set()], 0
  for i, size in enumerate(sizes):
    total += size
    if total > bound:
      turns, total = [*turns, set()], size
    turns[-1].add(i)
  return turns


class _OtherArraysError(ValueError):
  """The checkpoint is sound, but of another model or optimizer."""


def _check_same_arrays(
  path: pathlib.Path,
  saved: Mapping[str, Any],
  wanted: Mapping[str, Any],
  partial: bool,
) -> None:
  """Raises _OtherArraysError that names the first array that does not fit."""

  def describe(leaf: Any) -> str:
    if leaf is None:
      return "absent"
    dtype = "" if partial else f"{np.dtype(leaf.dtype).name}"
    return f"{dtype}{list(leaf.shape)}"

  # A head is never left out: that would be another model, with tied weights.
  others = saved.keys() & {"params/head"} if partial else saved.keys()
  for name in sorted(wanted.keys() | others):
    there, here = describe(saved.get(name)), describe(wanted.get(name))
    if there != here:
      raise _OtherArraysError(
        f"checkpoint {path} does not fit: {name} is {there} there and {here}"
        " here; use the model and optimizer that wrote it, or another workdir"
      )


@contextlib.contextmanager
def _abandoned_reads_hushed() -> Iterator[None]:
  """Keeps stderr free of what the reads beside a failed one have to say.

  Orbax reads all arrays at once and closes its event loop at the first
  failure; each of the others then prints a traceback, thousands of lines that
  would bury the reason.
  """
  asyncio_logger = logging.getLogger("asyncio")
  hook, disabled = sys.unraisablehook, asyncio_logger.disabled
  sys.unraisablehook, asyncio_logger.disabled = lambda _: None, True
  try:
    yield
  finally:
    sys.unraisablehook, asyncio_logger.disabled = hook, disabled


@jax.jit
def _fingerprints(arrays: list[jax.Array]) -> list[jax.Array]:
  return [_fingerprint(x) for x in arrays]


def _fingerprint(x: jax.Array) -> jax.Array:
  """Returns the sum over elements of bits * (2 * index + 1), modulo 2**32.

  Weights are odd, so a change of one element always shows; they differ by
  place, so exchanged parts show. Integer sums do not depend on their order,
  so neither does the value on how `x` is laid out over devices.
  """
  if x.ndim < 3:
    return _weighted_sum(x, jnp.uint32(0))
  # Layer by layer: XLA on CPUs makes an array of what is summed.
  layer_size = np.uint32(math.prod(x.shape[1:]) % 2**32)

  def add(i, total):
    layer = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return total + _weighted_sum(layer, i.astype(jnp.uint32) * layer_size)

  return jax.lax.fori_loop(0, x.shape[0], add, jnp.uint32(0))


def _weighted_sum(x: jax.Array, first: jax.Array) -> jax.Array:
  """Returns the fingerprint's terms of elements that begin at an index."""
  size = x.dtype.itemsize
  bits = jax.lax.bitcast_convert_type(
    x.astype(jnp.uint8) if x.dtype == bool else x,
    {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size],
  ).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, length in enumerate(x.shape):
    index = index * np.uint32(length % 2**32) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  return jnp.sum(bits * (2 * (first + index) + 1), dtype=jnp.uint32)


def _named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path: "params/layers/mlp"."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(keys): leaf for keys, leaf in leaves}


def _name(keys: jax.tree_util.KeyPath) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")

"""The mesh, and what each logical axis of an array is laid over.

This is the only module that names a mesh axis. Models name logical axes
(`embed`, `heads`, ...); `LOGICAL_AXES` says where those go.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Rows are split over every axis that does not split a matrix product.
LOGICAL_AXES = {
  "rows": ("data", "fsdp"),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "experts": (),
}


def make_mesh(
  *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None
) -> Mesh:
  """Returns a mesh over all devices; an axis of -1 takes what is left.

  Args:
    data: devices that hold a full copy of the sharded state.
    fsdp: devices that rows, parameters and moments are split over.
    tensor: devices that heads, mlp and vocabulary are split over.
    devices: a list of devices; all of them by default.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [data, fsdp, tensor]
  wanted = ", ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape))
  if any(s < 1 and s != -1 for s in shape) or shape.count(-1) > 1:
    raise ValueError(
      f"mesh {wanted}: each axis is at least 1, and one may be -1 (the rest)"
    )
  known = math.prod(s for s in shape if s != -1)
  if -1 in shape and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if -1 in shape or math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh {wanted} does not fit {len(devices)} devices: the product must"
      " equal their number"
    )
  return jax.make_mesh(
    tuple(shape), MESH_AXES, (AxisType.Auto,) * 3, devices=devices
  )


def num_row_shards(mesh: Mesh) -> int:
  """Returns how many ways the rows of a microbatch are split."""
  return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["rows"])


def partition_spec(
  mesh: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
  """Returns the layout of an array whose dimensions have these logical axes.

  A dimension that its mesh axes do not divide is kept whole (a vocabulary of
  50,257, or two key heads over `tensor=4`).
  """
  entries: list[Any] = []
  for axis, size in zip(axes, shape, strict=True):
    names = LOGICAL_AXES.get(axis, ()) if axis else ()
    split = math.prod(mesh.shape[name] for name in names)
    entries.append(names if split > 1 and size % split == 0 else None)
  return PartitionSpec(*entries)


def array_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """Returns a tree of NamedSharding from trees of logical axes and shapes."""
  return jax.tree.map(
    lambda shape, names: NamedSharding(
      mesh, partition_spec(mesh, names, shape.shape)
    ),
    shapes,
    axes,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the layout of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
  """Returns the layout of arrays whose axis number `leading` is rows."""
  return NamedSharding(
    mesh, PartitionSpec(*[None] * leading, LOGICAL_AXES["rows"])
  )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns `x`, laid out as named under `jax.set_mesh`; else unchanged."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(
    x, partition_spec(mesh, axes, x.shape)
  )


def local_rows(mesh: Mesh, num_rows: int) -> tuple[int, int]:
  """Returns the range [first, end) of rows that this process must hold."""
  devices = rows(mesh).addressable_devices_indices_map((num_rows,))
  ranges = [index[0].indices(num_rows) for index in devices.values()]
  return min(r[0] for r in ranges), max(r[1] for r in ranges)


def place_rows(
  x: np.ndarray, mesh: Mesh, *, num_rows: int, first_row: int
) -> jax.Array:
  """Returns a global array [M,R,...] split by rows, from this process's part.

  Args:
    x: [M,r,...], the rows of `local_rows`.
    mesh: all devices.
    num_rows: R, the rows of all processes.
    first_row: where `x` begins.
  """
  layout = rows(mesh, leading=1)
  shape = (x.shape[0], num_rows, *x.shape[2:])

  def own(index):
    start, end, _ = index[1].indices(num_rows)
    return x[:, start - first_row : end - first_row]

  return jax.make_array_from_callback(shape, layout, own)


def place_whole(x: np.ndarray | np.generic, mesh: Mesh) -> jax.Array:
  """Returns an array that every device holds whole; all processes have it."""
  x = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, replicated(mesh), lambda index: x[index]
  )

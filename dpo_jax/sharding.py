"""The mesh, and what each logical axis of an array is laid over.

This is the only module that names a mesh axis. Models name logical axes
(`embed`, `heads`, ...); `LOGICAL_AXES` says where those go.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert")

# Rows are split over every axis that does not split a matrix product.
LOGICAL_AXES = {
  "rows": ("data", "fsdp", "expert"),
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "experts": ("expert",),
}


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  expert: int = 1,
  devices: Any = None,
) -> Mesh:
  """Returns a mesh over all devices; an axis of -1 takes what is left.

  Args:
    data: devices that hold a full copy of the sharded state.
    fsdp: devices that rows, parameters and moments are split over.
    tensor: devices that heads, mlp and vocabulary are split over.
    expert: devices that experts, and beside them rows, are split over.
    devices: a list of devices; all of them by default.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [data, fsdp, tensor, expert]
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
    tuple(shape),
    MESH_AXES,
    (AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def matmul_dtype(dtype: str) -> str:
  """Returns what `auto` stands for: bfloat16, float32 on CPU."""
  if dtype != "auto":
    return dtype
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def num_row_shards(mesh: Mesh) -> int:
  """Returns how many ways the rows of a microbatch are split."""
  return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["rows"])


def num_row_shards_here() -> int:
  """Returns the same of the mesh that is set; 1 where none is."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else num_row_shards(mesh)


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


def over_experts(
  fn: Callable[..., jax.Array],
  arrays: tuple[jax.Array, jax.Array, jax.Array],
  kernels: tuple[jax.Array, jax.Array, jax.Array],
) -> jax.Array:
  """Returns [R,T,D], the sum of `fn` over the shards of experts and mlp.

  Under `jax.set_mesh` every device calls it with the experts that it holds
  and with the rows of all devices that share its other coordinates: those are
  gathered over the experts' axis before, and the sums split over it after.

  Args:
    fn: (x, weights, picked, is_here, kernels) -> f32[R,T,D], where `picked`
      counts the kernels given, and `is_here` says whether it is one of them.
    arrays: x [R,T,D], weights f32[R,T,k] and picked i32[R,T,k].
    kernels: two [E,D,F], one [E,F,D].
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    x, weights, picked = arrays
    return fn(x, weights, picked, picked >= 0, kernels)
  rows_spec = partition_spec(mesh, ("rows", None, None), arrays[0].shape)
  into = partition_spec(mesh, ("experts", None, "mlp"), kernels[0].shape)
  back = partition_spec(mesh, ("experts", "mlp", None), kernels[2].shape)
  (axis,) = LOGICAL_AXES["experts"]
  is_split = into[0] is not None
  gathers = is_split and rows_spec[0] is not None
  sums = LOGICAL_AXES["mlp"] if into[2] is not None else ()
  if is_split and not gathers:
    sums += (axis,)

  def local(arrays, kernels):
    if gathers:
      gather = functools.partial(
        jax.lax.all_gather, axis_name=axis, axis=0, tiled=True
      )
      arrays = jax.tree.map(gather, arrays)
    x, weights, picked = arrays
    num_here = len(kernels[0])
    if is_split:
      picked = picked - num_here * jax.lax.axis_index(axis)
    is_here = (0 <= picked) & (picked < num_here)
    out = fn(x, weights, picked, is_here, kernels)
    if sums:
      out = jax.lax.psum(out, sums)
    if gathers:
      out = jax.lax.psum_scatter(out, axis, scatter_dimension=0, tiled=True)
    return out

  return jax.shard_map(
    local,
    in_specs=((rows_spec,) * 3, (into, into, back)),
    out_specs=rows_spec,
  )(arrays, kernels)


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

"""What a training step carries from one update to the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.types import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The policy, its optimizer and loss state, and a reference that is run.

  With LoRA `params` are the policy's adapters and `base` is what they are
  added to; a reference is then adapters too, or None for the base alone.
  """

  step: Array  # i32[]  updates done
  params: Params
  opt_state: Any
  reference: Params | None = None
  loss_state: dict[str, Array] | None = None  # f32[]  of running means
  base: Params | None = None  # frozen

  def without_frozen(self, *, reference: bool) -> "TrainState":
    """Returns what a checkpoint holds: not the base, which is read again.

    Args:
      reference: whether the reference stays too.
    """
    kept = None if reference else self.reference
    return dataclasses.replace(self, reference=kept, base=None)


def opt_state_shardings(
  optimizer: optax.GradientTransformation,
  params: Params,
  shardings: Params,
  mesh: Mesh,
) -> Any:
  """Returns a layout for `optimizer.init(params)`: moments like parameters.

  Args:
    optimizer: an optax transformation.
    params: a tree of arrays or ShapeDtypeStructs.
    shardings: the layout of each parameter.
    mesh: where scalars and factored moments (Adafactor) are replicated.
  """
  like_params = optax.tree_utils.tree_map_params(
    optimizer,
    lambda moment, param, layout: (
      layout if moment.shape == param.shape else sharding.replicated(mesh)
    ),
    jax.eval_shape(optimizer.init, params),
    params,
    shardings,
    transform_non_params=lambda _: sharding.replicated(mesh),
  )
  return like_params


def init_state(
  make_params: Callable[[], Params] | Params,
  optimizer: optax.GradientTransformation,
  shardings: Params,
  mesh: Mesh,
) -> TrainState:
  """Returns a state at step 0, built on the mesh, without a reference.

  Args:
    make_params: a function that returns fresh parameters (traced under jit),
      or parameters that are on the mesh already.
    optimizer: initialises the moments.
    shardings: the layout of each parameter.
    mesh: all devices of the run.
  """
  if callable(make_params):
    params = jax.jit(make_params, out_shardings=shardings)()
  else:
    params = make_params
  layouts = opt_state_shardings(optimizer, params, shardings, mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=layouts)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
  return TrainState(step=step, params=params, opt_state=opt_state)


def init_loss_state(
  names: tuple[str, ...], mesh: Mesh
) -> dict[str, Array] | None:
  """Returns a zero for each of `names`; None where there are none."""
  zero = lambda: jax.device_put(
    jnp.zeros((), jnp.float32), sharding.replicated(mesh)
  )
  return {name: zero() for name in names} or None


@jax.jit
def is_finite(tree: Any) -> Array:
  """Returns whether no array of the tree holds a NaN or an infinity."""
  leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.stack(leaves).all()


def abstract_state(state: TrainState) -> TrainState:
  """Returns shapes, dtypes and layouts of `state`, for restoring into."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )


def copy_params(params: Params, *, like: Params, shardings: Params) -> Params:
  """Returns a second copy of `params`: a frozen reference.

  Args:
    params: to be copied.
    like: a tree of arrays or ShapeDtypeStructs, in whose dtypes it will be.
    shardings: the layout of each parameter.
  """
  # jnp.copy: jit would else pass the policy's own buffers through, and a
  # donated state may not hold a buffer twice.
  copy = lambda x, other: jnp.copy(x.astype(other.dtype))
  return jax.jit(
    lambda tree: jax.tree.map(copy, tree, like), out_shardings=shardings
  )(params)

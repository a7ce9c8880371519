"""The decoder: parameters as plain dicts, token rows to hidden states.

The blocks are one `nn.scan` over parameters stacked on a leading layer axis,
so compile time does not grow with depth.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from dpo_jax import sharding
from dpo_jax.models import layers
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Array, Params, typed

# What each dimension of a parameter is laid over, by the last two names of its
# path; the leading layer axis of a block's parameters is not listed. A norm
# is whole on every device.
AXES = {
  ("embedding",): ("vocab", "embed"),
  ("position_embedding",): (None, "embed"),
  ("head",): ("vocab", "embed"),
  ("query", "kernel"): ("embed", "heads", None),
  ("query", "bias"): ("heads", None),
  ("key", "kernel"): ("embed", "heads", None),
  ("key", "bias"): ("heads", None),
  ("value", "kernel"): ("embed", "heads", None),
  ("value", "bias"): ("heads", None),
  ("out", "kernel"): ("heads", None, "embed"),
  ("out", "bias"): (None,),
  ("up", "kernel"): ("embed", "mlp"),
  ("up", "bias"): ("mlp",),
  ("gate", "kernel"): ("embed", "mlp"),
  ("gate", "bias"): ("mlp",),
  ("down", "kernel"): ("mlp", "embed"),
  ("down", "bias"): (None,),
  ("attention_norm", "scale"): (None,),
  ("attention_norm", "bias"): (None,),
  ("mlp_norm", "scale"): (None,),
  ("mlp_norm", "bias"): (None,),
  ("final_norm", "scale"): (None,),
  ("final_norm", "bias"): (None,),
}

# Which outputs of a block are kept for its backward pass.
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
  """Embeddings, blocks and the final norm; declares the head, if untied."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    key_start: jax.Array,
    key_end: jax.Array,
  ) -> jax.Array:
    """Returns [R,T,D] in `config.dtype`."""
    config = self.config
    table_shape = (config.vocab_size, config.d_model)
    x = _look_up(self._table("embedding", table_shape), tokens)
    angles = None
    if config.positions == "learned":
      table = self._table(
        "position_embedding", (config.max_positions, config.d_model)
      )
      x = x + _look_up(table, positions)
    else:
      angles = layers.rotary_angles(config, positions)
    if not config.tied:
      self._table("head", table_shape)
    x = x.astype(config.dtype)
    x = sharding.constrain(x, "rows", None, None)
    block = layers.Block
    if config.remat != "none":
      # Inside a scan nothing can be merged with the forward pass.
      block = nn.remat(
        block, policy=REMAT_POLICIES[config.remat], prevent_cse=False
      )
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_layers,
    )
    x, _ = blocks(config, name="blocks")(x, angles, key_start, key_end)
    return layers.make_norm(config, "final_norm")(x)

  def _table(self, name: str, shape: tuple[int, int]) -> jax.Array:
    """Returns the parameter `name`, a table of vectors."""
    init = nn.initializers.normal(layers.INIT_STDDEV)
    return self.param(name, init, shape, jnp.dtype(self.config.param_dtype))


def _look_up(table: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns rows of a table; an index outside it gives NaN, not a neighbour.

  The table is gathered over its width first, as every matrix is. Left alone,
  the partitioner copies the states of all rows to every device instead.
  """
  table = sharding.constrain(table, "vocab", None)
  return jnp.take(table, indices, axis=0)


@typed
def init_params(config: ModelConfig, rng: PRNGKeyArray) -> Params:
  """Returns new parameters in `config.param_dtype`, blocks stacked [L,...].

  Weights are normal with deviation 0.02 (those that add to the residual
  stream divided by sqrt(2 L)), norms one, biases zero.
  """
  nothing = jnp.zeros((1, 1), jnp.int32)
  return Decoder(config).init(rng, nothing, nothing, nothing, nothing)["params"]


def param_shapes(config: ModelConfig) -> Params:
  """Returns the tree of parameters as shapes and dtypes, without values."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
  """Returns, for each parameter, its logical axis (or None) per dimension.

  The tree has the structure of the parameters, with a tuple for each; it is
  what `sharding.array_shardings(mesh, axes, shapes)` takes.
  """

  def axes_of(path, leaf):
    names = tuple(entry.key for entry in path)
    axes = AXES[names[-2:]]
    return (None,) * (len(leaf.shape) - len(axes)) + axes

  return jax.tree_util.tree_map_with_path(axes_of, param_shapes(config))


@typed
def hidden_states(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "R T"],
  positions: Int[Array, "R T"],
  key_start: Int[Array, "R T"],
  key_end: Int[Array, "R T"],
) -> Float[Array, "R T D"]:
  """Returns the state at each token, after the final norm.

  Args:
    config: the model.
    params: its parameters.
    tokens: token ids below `config.vocab_size`; others give NaN.
    positions: position ids; with learned positions, those from
      `config.max_positions` on give NaN.
    key_start: the first key of the row that each token sees.
    key_end: the key after the last; no more than `key_start` for padding,
      whose state is finite and means nothing.

  Returns:
    States in `config.dtype`; times `unembedding`, they are logits.
  """
  return Decoder(config).apply(
    {"params": params}, tokens, positions, key_start, key_end
  )


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
  """Returns the table whose product with a state is its logits, as stored."""
  return params["embedding"] if config.tied else params["head"]

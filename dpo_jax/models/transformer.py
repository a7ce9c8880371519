"""The decoder: parameters as plain dicts, token rows to hidden states.

The blocks are one `nn.scan` over parameters stacked on a leading layer axis,
so compile time does not grow with depth.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from dpo_jax import sharding
from dpo_jax.models import layers, moe
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Array, Params, Unembedding, typed

# What each dimension of a parameter is laid over, by the last two names of its
# path; the leading layer axis of a block's parameters is not listed. A norm
# is whole on every device.
AXES = {
  ("embedding",): ("vocab", "embed"),
  ("position_embedding",): (None, "embed"),
  ("head",): ("vocab", "embed"),
  ("head_bias",): ("vocab",),
  ("score",): (None, "embed"),
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
  ("query_heads_norm", "scale"): ("heads", None),
  ("key_heads_norm", "scale"): ("heads", None),
  ("mlp", "router"): ("embed", None),
  ("mlp", "expert_up"): ("experts", "embed", "mlp"),
  ("mlp", "expert_gate"): ("experts", "embed", "mlp"),
  ("mlp", "expert_down"): ("experts", "mlp", "embed"),
}

# The name of a block whose variables are arrays of their own.
BLOCK = "block_{}"

# The parameters with a row for each token.
VOCABULARY = ("embedding", "head", "head_bias")

# Which outputs of a block are kept for its backward pass.
REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nn.Module):
  """One layer, in the form that `nn.scan` takes: returns (x, no output)."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    slides: jax.Array | None,
    angles: jax.Array | None,
    key_start: jax.Array,
    key_end: jax.Array,
  ) -> tuple[jax.Array, None]:
    """Returns [R,T,D].

    Args:
      x: [R,T,D].
      slides: i32[], whether this layer is a sliding one; None: none is.
      angles: [R,T,half], or None where positions are learned.
      key_start: i32[R,T]. Where layers slide, this and `angles` have a leading
        axis: of a global layer, and of a sliding one.
      key_end: i32[R,T].
    """
    config = self.config
    if slides is not None:
      angles, key_start = jax.tree.map(
        lambda y: jax.lax.dynamic_index_in_dim(y, slides, keepdims=False),
        (angles, key_start),
      )
    is_first = config.norms != "output"
    is_last = config.norms != "input"
    before = lambda name, y: (
      layers.make_norm(config, name)(y) if is_first else y
    )
    after = lambda name, y: layers.make_norm(config, name)(y) if is_last else y
    if config.num_experts:
      experts = moe.Experts(config, name="mlp")
      feed_forward = lambda y: experts(y, key_start < key_end)
    else:
      feed_forward = layers.Mlp(config, name="mlp")
    normed = before("attention_norm", x)
    attended = layers.Attention(config, name="attention")(
      normed, angles, key_start, key_end
    )
    attended = after("attention_post_norm", attended)
    if config.residual == "parallel_one_norm":
      return self._add(x, attended, feed_forward(normed)), None
    if config.residual == "parallel":
      normed = before("mlp_norm", x)
      return self._add(x, attended, feed_forward(normed)), None
    x = self._add(x, attended)
    hidden = feed_forward(before("mlp_norm", x))
    return self._add(x, after("mlp_post_norm", hidden)), None

  def _add(self, *terms: jax.Array) -> jax.Array:
    """Returns the residual stream after these additions."""
    total = functools.reduce(jnp.add, terms)
    return sharding.constrain(total, "rows", None, None)


class Decoder(nn.Module):
  """Embeddings, blocks and the final norm; declares the head, if any.

  Attributes:
    config: the model.
    is_unrolled: whether each block's variables are arrays of their own (see
      `unstack`), and the blocks a loop that is traced.
  """

  config: ModelConfig
  is_unrolled: bool = False

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
    table_shape = (config.num_vocab_rows, config.d_model)
    if config.num_vocab_rows > config.vocab_size:
      # What is no token gives NaN, with padding as without.
      is_token = tokens < config.vocab_size
      tokens = jnp.where(is_token, tokens, config.num_vocab_rows)
    x = _look_up(self._table("embedding", table_shape), tokens)
    x = x.astype(config.dtype)
    angles = None
    if config.positions == "learned":
      table = self._table(
        "position_embedding", (config.max_positions, config.d_model)
      )
      x = x + _look_up(table, positions).astype(config.dtype)
    else:
      angles = layers.rotary_angles(config, positions)
    has_vocabulary = config.head == "vocabulary"
    if not has_vocabulary:
      self._table("score", (1, config.d_model), config.wide_dtype)
    elif not config.tied:
      self._table("head", table_shape)
    if has_vocabulary and "head" in config.biases:
      dtype = jnp.dtype(config.wide_dtype or config.param_dtype)
      shape = (config.num_vocab_rows,)
      self.param("head_bias", nn.initializers.zeros, shape, dtype)
    if config.scaled_embedding:
      x = x * jnp.asarray(config.d_model**0.5, x.dtype)
    x = sharding.constrain(x, "rows", None, None)
    slides = None
    if config.window is not None:
      slides = jnp.array(config.sliding, jnp.int32)
      local = _local_views(config, positions, angles, key_start, key_end)
      angles, key_start = jax.tree.map(
        lambda *views: jnp.stack(views), (angles, key_start), local
      )
    x = self._run_blocks(x, slides, angles, key_start, key_end)
    return layers.make_norm(config, "final_norm")(x)

  def _run_blocks(self, x, slides, *inputs):
    """Returns x after all blocks; `slides` has a leading layer axis."""
    config, block = self.config, Block
    if self.is_unrolled:
      for layer in range(config.num_layers):
        here = jax.tree.map(lambda y, layer=layer: y[layer], slides)
        x, _ = block(config, name=BLOCK.format(layer))(x, here, *inputs)
      return x
    if config.remat != "none":
      # Inside a scan nothing can be merged with the forward pass.
      block = nn.remat(
        block, policy=REMAT_POLICIES[config.remat], prevent_cse=False
      )
    blocks = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0, "routing": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=config.num_layers,
    )
    return blocks(config, name="blocks")(x, slides, *inputs)[0]

  def _table(
    self, name: str, shape: tuple[int, int], dtype: str | None = None
  ) -> jax.Array:
    """Returns the parameter `name`, a table of vectors."""
    init = nn.initializers.normal(layers.INIT_STDDEV)
    dtype = jnp.dtype(dtype or self.config.param_dtype)
    return self.param(name, init, shape, dtype)


def _local_views(
  config: ModelConfig,
  positions: jax.Array,
  angles: jax.Array | None,
  key_start: jax.Array,
  key_end: jax.Array,
) -> tuple[jax.Array | None, jax.Array]:
  """Returns angles and first keys as a sliding layer has them."""
  if config.local_rope_theta is not None:
    angles = layers.rotary_angles(config, positions, local=True)
  return angles, jnp.maximum(key_start, key_end - config.window)


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
  stream divided by sqrt(2 L)), norms multiply by one, biases are zero; rows
  of the vocabulary's padding are zero too.
  """
  nothing = jnp.zeros((1, 1), jnp.int32)
  whole = dataclasses.replace(config, vocab_multiple=1)
  params = Decoder(whole).init(rng, *[nothing] * 4)["params"]
  return fit_vocabulary(config, params)


def fit_vocabulary(config: ModelConfig, params: Params) -> Params:
  """Returns parameters with the config's padding in place of theirs."""
  padding = config.num_vocab_rows - config.vocab_size

  def fit(table):
    tokens = table[: config.vocab_size]
    return jnp.pad(tokens, ((0, padding), *[(0, 0)] * (table.ndim - 1)))

  is_table = lambda name, x: (
    name in VOCABULARY and len(x) != config.num_vocab_rows
  )
  return {
    name: fit(x) if is_table(name, x) else x for name, x in params.items()
  }


def param_shapes(config: ModelConfig) -> Params:
  """Returns the tree of parameters as shapes and dtypes, without values."""
  leaves, structure = _param_shapes(config)
  return structure.unflatten(leaves)


@functools.lru_cache(maxsize=64)  # It takes longer than reading small files.
def _param_shapes(config: ModelConfig) -> tuple[list[Any], Any]:
  return jax.tree.flatten(
    jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  )


def logical_axes(config: ModelConfig) -> dict[str, Any]:
  """Returns, for each parameter, its logical axis (or None) per dimension.

  The tree has the structure of the parameters, with a tuple for each; it is
  what `sharding.array_shardings(mesh, axes, shapes)` takes.
  """

  def axes_of(path, leaf):
    names = tuple(entry.key for entry in path)
    is_norm = len(names) > 1 and names[-2].endswith("_norm")
    axes = AXES.get(names[-2:], (None,)) if is_norm else AXES[names[-2:]]
    return (None,) * (len(leaf.shape) - len(axes)) + axes

  return jax.tree_util.tree_map_with_path(axes_of, param_shapes(config))


def layouts(mesh: Any, config: ModelConfig) -> Params:
  """Returns the layout of each parameter on a mesh."""
  return sharding.array_shardings(
    mesh, logical_axes(config), param_shapes(config)
  )


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
    params: its parameters, and under `lora` adapters, if it is to use any.
    tokens: token ids below `config.vocab_size`; others give NaN.
    positions: position ids; with learned positions, those from
      `config.max_positions` on give NaN.
    key_start: the first key of the row that each token sees. A sliding layer
      cuts it to the last `config.window` before `key_end`, so a sequence that
      is longer must stand in reading order.
    key_end: the key after the last; no more than `key_start` for padding,
      whose state is finite and means nothing.

  Returns:
    States in `config.dtype`; `unembedding` turns them into logits.
  """
  return Decoder(config).apply(
    _variables(params), tokens, positions, key_start, key_end
  )


def hidden_states_and_routing(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "R T"],
  positions: Int[Array, "R T"],
  key_start: Int[Array, "R T"],
  key_end: Int[Array, "R T"],
) -> tuple[jax.Array, moe.Routing]:
  """Returns `hidden_states` of a model with experts, and what they saw."""
  states, sown = Decoder(config).apply(
    _variables(params),
    *(tokens, positions, key_start, key_end),
    mutable=["routing"],
  )
  num_tokens = jnp.sum(key_start < key_end, dtype=jnp.float32)
  sums = sown["routing"]["blocks"]["mlp"]
  return states, moe.Routing(**sums, num_tokens=num_tokens)


def _variables(params: Params) -> dict[str, Params]:
  """Returns the collections of the decoder: the weights, and the adapters."""
  weights = {name: x for name, x in params.items() if name != "lora"}
  if "lora" not in params:
    return {"params": weights}
  return {"params": weights, "lora": params["lora"]}


def unembedding(config: ModelConfig, params: Params) -> Unembedding:
  """Returns what turns a state into logits, parameters as stored.

  Raises:
    ValueError: the model has a scalar head.
  """
  if config.head != "vocabulary":
    raise ValueError(
      f"the model has a {config.head} head: it scores texts and has no"
      " distribution over tokens; allowed: a language model"
    )
  return Unembedding(
    table=params["embedding"] if config.tied else params["head"],
    bias=params.get("head_bias"),
    vocab_size=config.vocab_size,
    soft_cap=config.logit_soft_cap,
  )

"""A decoder that reads prompts once and goes on token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dpo_jax import sharding
from dpo_jax.models import transformer
from dpo_jax.models.config import ModelConfig
from dpo_jax.models.transformer import Decoder
from dpo_jax.types import Array, Params, typed


def unstack(config: ModelConfig, params: Params) -> Params:
  """Returns parameters to sample from, each block's an array of its own.

  Those that are computed with in `config.dtype` are kept in it. A loop over
  tokens that scanned stacked blocks would copy every weight at every token.
  """
  kept = transformer.param_shapes(config.frozen(config.dtype))
  params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, kept)
  blocks = params.pop("blocks")
  return params | {
    transformer.BLOCK.format(layer): jax.tree.map(
      lambda x, layer=layer: x[layer], blocks
    )
    for layer in range(config.num_layers)
  }


@typed
def read_prompts(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "R T"],
  positions: Int[Array, "R T"],
  key_start: Int[Array, "R T"],
  key_end: Int[Array, "R T"],
) -> tuple[Float[Array, "R T D"], Params]:
  """Returns `hidden_states`, and the keys and values of all tokens.

  Args:
    config: the model.
    params: as `unstack` returns them.
    tokens: as for `hidden_states`, like what follows.
    positions: the same.
    key_start: the same.
    key_end: the same.
  """
  states, found = Decoder(config, is_unrolled=True).apply(
    {"params": params},
    *(tokens, positions, key_start, key_end),
    mutable=["prompt"],
  )
  return states, found["prompt"]


@typed
def extend(
  config: ModelConfig,
  params: Params,
  prompt: Params,
  cache: Params,
  tokens: Int[Array, "R 1"],
  positions: Int[Array, "R 1"],
  key_start: Int[Array, "R 1"],
  key_end: Int[Array, "R 1"],
) -> tuple[Float[Array, "R 1 D"], Params]:
  """Returns the state at one more token of each row, and the next cache.

  Args:
    config: the model.
    params: as `unstack` returns them.
    prompt: what `read_prompts` returned of P rows of T tokens that end in
      the last column; each is the beginning of R / P rows here.
    cache: of the tokens since; `make_cache` before the first.
    tokens: the token.
    positions: its position id.
    key_start: the first of T + U keys that it sees.
    key_end: the key after its own; equal in all rows.
  """
  states, found = Decoder(config, is_unrolled=True).apply(
    {"params": params, "prompt": prompt, "cache": cache},
    *(tokens, positions, key_start, key_end),
    mutable=["cache"],
  )
  return states, found["cache"]


def make_cache(prompt: Params, num_rows: int) -> Params:
  """Returns the cache of rows without tokens of their own yet."""

  def empty(like):
    return jnp.zeros((num_rows, like.shape[1], 0, like.shape[3]), like.dtype)

  return jax.tree.map(empty, prompt)


def grow_cache(cache: Params, length: int) -> Params:
  """Returns the cache with room for `length` tokens of each row."""

  def grow(x):
    more = ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))
    return sharding.constrain(jnp.pad(x, more), "rows", "heads", None, None)

  return jax.tree.map(grow, cache)

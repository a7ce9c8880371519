"""Sampling by a full forward pass for every new token: small, and exact."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.types import Params, Unembedding

# Prompts are padded to a multiple of this, so few lengths are ever compiled.
PROMPT_LENGTH_MULTIPLE = 4


def sample(
  hidden_fn: Callable[..., jax.Array],
  unembedding_fn: Callable[[Params], Unembedding],
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  rng: jax.Array,
  max_new_tokens: int,
  temperature: float,
  eos_id: int,
  batch_rows: int = 256,
) -> list[list[int]]:
  """Returns one sampled response per prompt, in the order of the prompts.

  The key of a token is `rng` with the prompt's place in the list and the
  token's index in the response folded in, so that samples do not depend on
  `batch_rows`, and a prompt that is listed twice gets two samples.

  Args:
    hidden_fn: (params, tokens, positions, key_start, key_end) -> [R,T,D].
      Compiled once per function object: pass the same one again.
    unembedding_fn: params -> what turns states into logits.
    params: what both functions take.
    prompts: token ids, of any lengths above 0. The longest, rounded up to a
      multiple of 4, and `max_new_tokens` must fit the model's positions.
    rng: a key.
    max_new_tokens: at which length a response is cut.
    temperature: logits are divided by it; 0 takes the most likely token.
    eos_id: the token that ends a response.
    batch_rows: how many prompts are sampled at once.

  Returns:
    Token ids of each response, with EOS where it was reached.

  Raises:
    ValueError: an argument out of range, or an empty prompt.
  """
  _check(prompts, max_new_tokens, temperature, batch_rows)
  longest = max((len(prompt) for prompt in prompts), default=0)
  prompt_length = -(-longest // PROMPT_LENGTH_MULTIPLE) * PROMPT_LENGTH_MULTIPLE
  sampled = []
  for first in range(0, len(prompts), batch_rows):
    tokens = np.full((batch_rows, prompt_length), eos_id, np.int32)
    lengths = np.zeros(batch_rows, np.int32)
    for row, prompt in enumerate(prompts[first : first + batch_rows]):
      tokens[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    sampled.append(
      _sample_rows(
        hidden_fn,
        unembedding_fn,
        params,
        tokens,
        lengths,
        np.arange(first, first + batch_rows, dtype=np.int32),
        rng,
        np.float32(temperature),
        np.int32(eos_id),
        max_new_tokens=max_new_tokens,
      )
    )
  rows = [row for batch in jax.device_get(sampled) for row in batch.tolist()]
  return [
    row[: row.index(eos_id) + 1] if eos_id in row else row
    for row in rows[: len(prompts)]
  ]


@functools.partial(
  jax.jit, static_argnums=(0, 1), static_argnames="max_new_tokens"
)
def _sample_rows(
  hidden_fn: Callable[..., jax.Array],
  unembedding_fn: Callable[[Params], Unembedding],
  params: Params,
  prompts: jax.Array,  # i32[R,P]  prompts from the left, then padding
  lengths: jax.Array,  # i32[R]  of the prompts; 0 is an unused row
  indices: jax.Array,  # i32[R]  places in the list of all prompts
  rng: jax.Array,
  temperature: jax.Array,
  eos_id: jax.Array,
  *,
  max_new_tokens: int,
) -> jax.Array:
  """Returns responses i32[R,max_new_tokens], EOS from their end on."""
  num_rows, prompt_length = prompts.shape
  # The last token sampled is never an input.
  shape = (num_rows, prompt_length + max_new_tokens - 1)
  tokens = jnp.pad(prompts, ((0, 0), (0, max_new_tokens - 1)))
  tokens = sharding.constrain(tokens, "rows", None)
  # What lies right of the token to extend is stale, and no query sees it.
  positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  key_start, key_end = jnp.zeros_like(positions), positions + 1
  unembedding = unembedding_fn(params)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, indices)
  rows = jnp.arange(num_rows)

  def unfinished(carry):
    step, _, _, ended = carry
    return (step < max_new_tokens) & ~jnp.all(ended)

  def extend(carry):
    step, tokens, responses, ended = carry
    hidden = hidden_fn(params, tokens, positions, key_start, key_end)
    last = hidden[rows, jnp.maximum(lengths + step - 1, 0)]
    logits = unembedding.logits(last)
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
    chosen = _choose(keys, logits, temperature)
    chosen = jnp.where(ended, eos_id, chosen)
    responses = responses.at[:, step].set(chosen)
    tokens = tokens.at[rows, lengths + step].set(chosen, mode="drop")
    return step + 1, tokens, responses, ended | (chosen == eos_id)

  responses = jnp.full((num_rows, max_new_tokens), eos_id, jnp.int32)
  carry = (jnp.int32(0), tokens, responses, lengths == 0)
  _, _, responses, _ = jax.lax.while_loop(unfinished, extend, carry)
  # Every process reads all responses.
  return sharding.constrain(responses, None, None)


def _choose(
  keys: jax.Array, logits: jax.Array, temperature: jax.Array
) -> jax.Array:
  """Returns a token i32[R] for logits f32[R,V]; greedy at temperature 0."""
  scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
  drawn = jax.vmap(jax.random.categorical)(keys, scaled)
  greedy = jnp.argmax(logits, axis=-1)
  return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def _check(
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  temperature: float,
  batch_rows: int,
) -> None:
  for name, value in (
    ("max_new_tokens", max_new_tokens),
    ("batch_rows", batch_rows),
  ):
    if value < 1:
      raise ValueError(f"{name}={value}: must be at least 1")
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"temperature={temperature}: must be finite, at least 0")
  for index, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f"prompt {index} is empty: must hold a token or more")

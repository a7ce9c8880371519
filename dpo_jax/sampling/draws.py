"""One token drawn from each row of logits."""

import jax
import jax.numpy as jnp

# Tokens of the vocabulary whose probabilities are summed first.
BLOCK = 256


def allowed(
  logits: jax.Array, top_k: int, top_p: jax.Array | None
) -> jax.Array:
  """Returns logits f32[R,V], -inf for what is left out."""
  if top_k:
    lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  if top_p is not None:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered)
    # What the more likely tokens hold without this one.
    is_in = jnp.cumsum(shares, axis=-1) - shares < top_p
    lowest = jnp.min(jnp.where(is_in, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return logits


def block_sums(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a row's highest logit f32[R], and sums of exp(logit - highest).

  The sums are f32[R,n], over `BLOCK` tokens each, the last over the rest.
  Nothing as large as the logits is written.
  """
  num_rows, vocab = logits.shape
  whole = vocab - vocab % BLOCK
  highest = logits.max(axis=-1)
  add = lambda x: jnp.exp(x - highest[:, None, None]).sum(axis=-1)
  blocks = add(logits[:, :whole].reshape(num_rows, -1, BLOCK))
  rest = add(logits[:, None, whole:])
  sums = jnp.concatenate([blocks, rest], axis=1)
  # Or else XLA makes a sum of these another one of all that is in them.
  return highest, jax.lax.optimization_barrier(sums)


def logps_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the log-probability f32[R] of a token i32[R] of each row."""
  highest, sums = block_sums(logits)
  found = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
  return found - (highest + jnp.log(sums.sum(axis=-1)))


def choose(uniform: jax.Array, logits: jax.Array) -> jax.Array:
  """Returns the token i32[R] at which the distribution passes f32[R] of [0,1).

  One random number a row: noise for every logit costs more than the product
  that makes the logits. The cumulative sum is taken over blocks of tokens,
  then within one of them.
  """
  highest, sums = block_sums(logits)
  place, rest = _passes(sums, uniform * sums.sum(axis=-1))
  tokens = place[:, None] * BLOCK + jnp.arange(BLOCK)[None]
  near = jnp.take_along_axis(
    logits, tokens, axis=1, mode="fill", fill_value=-jnp.inf
  )
  within, _ = _passes(jnp.exp(near - highest[:, None]), rest)
  return place * BLOCK + within


def _passes(
  weights: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns where the sum of f32[R,n] first is above f32[R], and what is left.

  A weight of 0 is never where; a target that rounding put at the sum of all
  weights is just below it.
  """
  sums = jnp.cumsum(weights, axis=-1)
  target = jnp.minimum(target, jnp.nextafter(sums[:, -1], 0.0))
  place = jnp.sum(sums <= target[:, None], axis=-1)
  take = lambda x: jnp.take_along_axis(x, place[:, None], axis=-1)[:, 0]
  return place, target - (take(sums) - take(weights))

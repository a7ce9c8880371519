"""Log-probabilities of response tokens, straight from hidden states.

The logits of a row are never held at once: scored positions are taken
`chunk_length` at a time, in the forward pass and again, recomputed, in the
backward pass, so that the largest array with a vocabulary axis is one chunk
of logits (and the unembedding itself). The number of chunks is read from the
batch: rows whose scored positions end early cost nothing past their end.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Num

from dpo_jax import sharding
from dpo_jax.types import Array, Rows, Unembedding, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogps:
  """What the model says of each scored token; 0 at padding, natural logs.

  Only `logps` carries a gradient.
  """

  logps: Array  # f32[R,S]  log p(target)
  entropy: Array | None = None  # f32[R,S]  -sum_v p_v log p_v, nats
  log_sum_squares: Array | None = None  # f32[R,S]  log sum_v p_v^2


@typed
def token_logps(
  hidden: Float[Array, "R T D"],
  unembedding: Unembedding | Float[Array, "V D"],
  rows: Rows,
  *,
  chunk_length: int,
  with_entropy: bool = False,
  with_log_sum_squares: bool = False,
) -> TokenLogps:
  """Returns the log-probability of every scored token.

  Logits are products in `hidden`'s dtype summed in float32; everything after
  them is float32.

  Args:
    hidden: states after the final norm.
    unembedding: one vector per token of the vocabulary, and what else makes
      logits of a state.
    rows: `score_index`, `targets` and `response` are read. Scored positions
      must stand first in a row's `S` entries.
    chunk_length: scored positions of a row whose logits are held at once, at
      least 1. Changes memory and speed, no number.
    with_entropy: also return the entropy of the distribution at each token.
    with_log_sum_squares: also return log sum_v p_v^2 at each token.
  """
  if not isinstance(unembedding, Unembedding):
    unembedding = Unembedding(unembedding)
  length = rows.targets.shape[1]
  chunk_length = min(chunk_length, length)
  padding = ((0, 0), (0, -length % chunk_length))
  logps, statistics = _token_logps(
    chunk_length,
    (with_entropy, with_log_sum_squares),
    hidden,
    unembedding,
    tuple(
      jnp.pad(x, padding)
      for x in (rows.score_index, rows.targets, rows.response >= 0)
    ),
  )
  entropy, log_sum_squares = jax.tree.map(lambda x: x[:, :length], statistics)
  return TokenLogps(logps[:, :length], entropy, log_sum_squares)


@typed
def response_sums(
  values: Num[Array, "R S"], rows: Rows, shape: tuple[int, int]
) -> Num[Array, "B C"]:
  """Returns the sum of `values` over each response's tokens.

  A response that these rows do not hold sums to 0. The sum over a mask takes
  the same order in every run, which a scatter with atomic adds does not.

  Args:
    values: one for each scored token.
    rows: `response` is read.
    shape: (B, C), pairs of the batch and sums of each.
  """
  responses = jnp.arange(math.prod(shape))
  mask = rows.response[None] == responses[:, None, None]
  sums = jnp.sum(jnp.where(mask, values[None], 0), axis=(1, 2))
  return sums.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logps(chunk_length, wanted, hidden, unembedding, scored):
  """Returns logps f[R,S] and the pair (entropy, log_sum_squares)."""
  return _forward(chunk_length, wanted, hidden, unembedding, scored)[0]


def _forward(chunk_length, wanted, hidden, unembedding, scored):
  whole = _whole(unembedding, hidden.dtype)

  def add_chunk(i, arrays):
    index, targets, mask = _chunk(scored, i, chunk_length)
    logits = _logits(_take(hidden, index), whole)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.where(_is_target(logits, targets), logits, 0).sum(-1)
    logps, statistics = jax.tree.map(
      lambda x: jnp.where(mask, x, 0),
      (at_target - log_z, _statistics(logits, log_z, wanted)),
    )
    # log_z is kept at padding too: without it the backward pass would take
    # exp of bare logits there, and an overflow times 0 is nan.
    return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(
        x, new, i * chunk_length, axis=1
      ),
      arrays,
      (logps, log_z, statistics),
    )

  zeros = jnp.zeros(scored[0].shape, _accumulator(hidden))
  logps, log_z, statistics = jax.lax.fori_loop(
    0,
    _num_chunks(scored, chunk_length),
    add_chunk,
    (zeros, zeros, tuple(zeros if want else None for want in wanted)),
  )
  return (logps, statistics), (hidden, unembedding, scored, log_z)


def _backward(chunk_length, wanted, residuals, cotangents):
  del wanted  # the statistics carry no gradient
  hidden, unembedding, scored, log_z = residuals
  whole = _whole(unembedding, hidden.dtype)
  groups = _num_groups(hidden.shape[0])

  def add_chunk(i, gradients):
    d_hidden, d_weights, d_bias = gradients
    index, targets, mask = _chunk(scored, i, chunk_length)
    d_logps, z = _chunk((cotangents[0], log_z), i, chunk_length)
    states = _take(hidden, index)
    logits = _logits(states, whole)
    residual = _is_target(logits, targets) - jnp.exp(logits - z[..., None])
    scale = jnp.where(mask, d_logps, 0)[..., None]
    d_logits = scale * residual
    if whole.soft_cap is not None:
      d_logits *= 1 - (logits / whole.soft_cap) ** 2
    if d_bias is not None:
      d_bias += d_logits.reshape(groups, -1, d_logits.shape[2]).sum(1)
    d_logits = d_logits.astype(hidden.dtype)
    d_states = jnp.einsum(
      "rsv,vd->rsd", d_logits, whole.table, preferred_element_type=z.dtype
    )
    d_weights += jnp.einsum(
      "grsv,grsd->gvd",
      d_logits.reshape(groups, -1, *d_logits.shape[1:]),
      states.reshape(groups, -1, *states.shape[1:]),
      preferred_element_type=z.dtype,
    )
    return _add_at(d_hidden, index, d_states), d_weights, d_bias

  def zeros_by_group(x, *axes):
    zeros = jnp.zeros((groups, *x.shape), log_z.dtype)
    return sharding.constrain(zeros, "rows", *axes)

  d_hidden, d_weights, d_bias = jax.lax.fori_loop(
    0,
    _num_chunks(scored, chunk_length),
    add_chunk,
    (
      jnp.zeros(hidden.shape, log_z.dtype),
      zeros_by_group(whole.table, "vocab", None),
      None if whole.bias is None else zeros_by_group(whole.bias, "vocab"),
    ),
  )
  d_weights = sharding.constrain(d_weights.sum(0), "vocab", "embed")
  if d_bias is not None:
    d_bias = sharding.constrain(d_bias.sum(0), "vocab")
    d_bias = d_bias.astype(unembedding.bias.dtype)
  return (
    d_hidden.astype(hidden.dtype),
    dataclasses.replace(
      unembedding,
      table=d_weights.astype(unembedding.table.dtype),
      bias=d_bias,
    ),
    None,
  )


_token_logps.defvjp(_forward, _backward)


def _statistics(logits, log_z, wanted):
  """Returns (entropy, log_sum_squares), None where not wanted."""
  with_entropy, with_log_sum_squares = wanted
  logp = logits - log_z[..., None]
  # The largest p is at least 1 / V, so the sum of squares is far from 0.
  return (
    -jnp.sum(jnp.exp(logp) * logp, axis=-1) if with_entropy else None,
    jnp.log(jnp.exp(2 * logp).sum(-1)) if with_log_sum_squares else None,
  )


def _whole(unembedding, dtype):
  """Returns the unembedding as the loop uses it: gathered once, before it."""
  table = sharding.constrain(unembedding.table.astype(dtype), "vocab", None)
  return dataclasses.replace(unembedding, table=table)


def _num_groups(num_rows):
  """Returns into how many parts the unembedding's gradient is summed.

  One for each shard of the rows: every device then adds up its own rows, and
  the devices' sums meet once after the loop and not once a chunk.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else sharding.num_row_shards(mesh)
  return shards if num_rows % shards == 0 else 1


def _num_chunks(scored, chunk_length):
  """Returns how many chunks the row with most scored positions needs."""
  longest = jnp.max(jnp.sum(scored[2], axis=1), initial=0)
  return (longest + chunk_length - 1) // chunk_length


def _chunk(arrays, i, chunk_length):
  """Returns the i-th chunk along axis 1 of each array."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(
      x, i * chunk_length, chunk_length, axis=1
    ),
    arrays,
  )


def _take(hidden, index):
  return jnp.take_along_axis(hidden, index[..., None], axis=1)


def _add_at(hidden, index, values):
  # Row by row (vmap), so that rows split over devices are added where they are.
  return jax.vmap(lambda h, i, x: h.at[i].add(x))(hidden, index, values)


def _logits(states, unembedding):
  return sharding.constrain(unembedding.logits(states), "rows", None, "vocab")


def _is_target(logits, targets):
  # A comparison, not a gather: it stays local where the vocabulary is split.
  vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
  return vocabulary == targets[..., None]


def _accumulator(x):
  """Returns float32, or float64 for float64 arrays (gradient checks)."""
  return jnp.promote_types(x.dtype, jnp.float32)

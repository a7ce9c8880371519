"""The arrays that pass between layers, and the one legend of their shapes.

Shape letters, used in every annotation and einsum of the repository:
  `B` pairs in a batch, `M` microbatches, `R` rows, `T` tokens in a row,
  `S` scored positions in a row, `D` model width, `F` mlp width,
  `N` query heads, `K` key heads, `H` head width, `L` layers, `E` experts,
  `V` vocabulary, `C` sums of log-probabilities (or scores of a reward model)
  that are kept of each pair: of its responses (chosen, rejected; or a ranked
  list, the best first), then of what else the loss needs.
"""

import dataclasses
from typing import Any

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

Array = jax.Array | np.ndarray
# The logit of what is no token: its exp is 0 beside any other, and unlike
# -inf it has a finite product with that 0.
NO_TOKEN = -1e9
Params = dict[str, Any]

# Checks shapes and dtypes when a function is traced; free under jit.
typed = jaxtyping.jaxtyped(typechecker=beartype.beartype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed token rows of one microbatch (all of a batch with a leading `M`).

  A query at index t sees the keys in `[key_start[t], key_end[t])` of its row
  and no others; padding has an empty interval. Scored positions stand first
  in a row's `S` entries; entries past the last have `response` -1. For a
  reward model each response has one: its own last token.
  """

  tokens: Array  # i32[R,T]
  positions: Array  # i32[R,T]  position ids, 0 at a prompt's first token
  key_start: Array  # i32[R,T]
  key_end: Array  # i32[R,T]  exclusive
  score_index: Array  # i32[R,S]  index in T of the state that is read
  targets: Array  # i32[R,S]  the token it predicts, or the last one itself
  response: Array  # i32[R,S]  C * pair + column; -1 padding
  rank: Array  # i32[R,S]  the target's index within its response


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A step's pairs: rows for at most `M` microbatches, of which some are used.

  A demonstration is a pair with `lengths[:, 1] == 0`, as is a response that is
  labelled desirable; an undesirable one has `lengths[:, 0] == 0`. An unused
  pair slot (in the last batch of an evaluation) has `lengths == 0`.
  """

  rows: Rows  # each leaf [M,R,...]
  num_microbatches: Array  # i32[]  how many of M are filled
  lengths: Array  # i32[B,C]  scored tokens: of chosen, of rejected, ...
  # Summed log-probability under the reference, where it comes with the batch.
  reference: Array | None = None  # f32[B,C]
  # f32[B]  of scored pairs: the score of chosen above that of rejected
  score_gaps: Array | None = None
  # Prompts with the response of another: scored, without a gradient.
  mismatched: Rows | None = None  # each leaf [M',R,...]
  num_mismatched: Array | None = None  # i32[]  how many of M' are filled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
  """What turns a state h into logits: c * tanh((table h + bias) / c).

  Without the soft cap c, the logits are table h + bias. Of a table that is
  padded for a mesh, the rows from `vocab_size` on are of no token.
  """

  table: Array  # f[V,D]
  bias: Array | None = None  # f[V]
  vocab_size: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  soft_cap: float | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  def logits(self, states: Array) -> Array:
    """Returns f32[...,V]: a product in the states' dtype, then float32.

    float64 states give float64 logits (gradient checks).
    """
    dtype = jnp.promote_types(states.dtype, jnp.float32)
    table = self.table.astype(states.dtype)
    logits = jnp.einsum(
      "...d,vd->...v", states, table, preferred_element_type=dtype
    )
    if self.bias is not None:
      bias = self.bias.astype(dtype)
      logits += jnp.expand_dims(bias, range(logits.ndim - 1))
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    if self.vocab_size not in (None, logits.shape[-1]):
      index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
      logits = jnp.where(index < self.vocab_size, logits, NO_TOKEN)
    return logits

"""The scalar head of a reward model or classifier: a state to its score."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from dpo_jax.models import layers
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Array, Params, Rows, typed

NAMES = ("head", "head_bias", "score")


@typed
def scores(
  params: Params, hidden: Float[Array, "R T D"], rows: Rows
) -> Float[Array, "R S"]:
  """Returns the score at each scored position, float32; 0 at padding.

  Args:
    params: of a model with a scalar head.
    hidden: states after the final norm.
    rows: `score_index` and `response` are read.
  """
  dtype = jnp.promote_types(hidden.dtype, jnp.float32)
  table = params["score"].astype(dtype)
  # The product of every state costs less than moving the few that count.
  at_tokens = jnp.einsum("rtd,cd->rtc", hidden.astype(dtype), table)[..., 0]
  at_ends = jnp.take_along_axis(at_tokens, rows.score_index, axis=1)
  return jnp.where(rows.response >= 0, at_ends, 0)


@typed
def with_new_score(
  params: Params, config: ModelConfig, rng: PRNGKeyArray
) -> Params:
  """Returns the parameters with a new scalar head for whatever head they had.

  Its weights are drawn like all others', normal with deviation 0.02.
  """
  shape = (1, config.d_model)
  dtype = jnp.dtype(config.wide_dtype or config.param_dtype)
  score = layers.INIT_STDDEV * jax.random.normal(rng, shape, jnp.float32)
  kept = {name: x for name, x in params.items() if name not in NAMES}
  return kept | {"score": score.astype(dtype)}

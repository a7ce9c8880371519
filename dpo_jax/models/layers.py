"""The parts of a block: norms, rotary positions, projections, attention, mlp.

Kernels keep heads apart (`[D,N,H]`, `[N,H,D]`), so that a mesh axis splits
whole heads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from dpo_jax import sharding
from dpo_jax.models import attention
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Array, typed

# The standard deviation of GPT-2's and Llama's initial weights.
INIT_STDDEV = 0.02

ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
  "gelu": lambda x: nn.gelu(x, approximate=False),
}


def rotary_frequencies(config: ModelConfig) -> Float[Array, "half"]:
  """Returns the angle in radians by which each pair turns per position.

  With `rope_scaling`, wavelengths that the trained length holds fewer than
  `low_freq_factor` times are stretched by `factor`, those it holds more than
  `high_freq_factor` times are kept, and those between are interpolated
  linearly in that count (Llama 3.1; Grattafiori et al. 2024, arXiv 2407.21783).
  """
  exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32)
  frequencies = config.rope_theta ** (-exponents / config.head_width)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  turns = scaling.original_max_positions * frequencies / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  kept = jnp.clip(kept, 0.0, 1.0)
  return frequencies * (kept + (1.0 - kept) / scaling.factor)


@typed
def rotary_angles(
  config: ModelConfig, positions: Int[Array, "R T"]
) -> Float[Array, "R T half"]:
  """Returns the float32 angle of each pair of a head at each position."""
  frequencies = rotary_frequencies(config)
  return positions.astype(jnp.float32)[..., None] * frequencies[None, None]


@typed
def rotate(
  x: Float[Array, "R T N H"], angles: Float[Array, "R T half"]
) -> Float[Array, "R T N H"]:
  """Returns x with elements i and i + H/2 of every head turned by angle i."""
  cos = jnp.cos(angles)[:, :, None]
  sin = jnp.sin(angles)[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def make_norm(config: ModelConfig, name: str) -> nn.Module:
  """Returns the config's norm, computed in float32."""
  settings = {
    "epsilon": config.norm_eps,
    "dtype": jnp.dtype(config.dtype),
    "param_dtype": jnp.dtype(config.param_dtype),
    "name": name,
  }
  if config.norm == "rms":
    return nn.RMSNorm(**settings)
  # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
  return nn.LayerNorm(use_fast_variance=False, use_bias=config.bias, **settings)


def make_projection(
  config: ModelConfig,
  features: int | tuple[int, ...],
  name: str,
  *,
  axis: int | tuple[int, ...] = -1,
  to_residual: bool = False,
) -> nn.Module:
  """Returns a projection of `axis` to `features`.

  Those that add to the residual stream begin smaller, by the square root of
  how many there are, so that its variance does not grow with depth (Radford
  et al. 2019, section 2.3).
  """
  scale = (2 * config.num_layers) ** -0.5 if to_residual else 1.0
  return nn.DenseGeneral(
    features,
    axis=axis,
    use_bias=config.bias,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nn.initializers.normal(INIT_STDDEV * scale),
    name=name,
  )


class Attention(nn.Module):
  """Self-attention over intervals of keys, with grouped key heads."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    angles: jax.Array | None,
    key_start: jax.Array,
    key_end: jax.Array,
  ) -> jax.Array:
    """Returns [R,T,D]; `angles` is None where positions are learned."""
    config = self.config
    kv_shape = (config.num_kv_heads, config.head_width)
    q = make_projection(config, (config.num_heads, config.head_width), "query")(
      x
    )
    k = make_projection(config, kv_shape, "key")(x)
    v = make_projection(config, kv_shape, "value")(x)
    q, k, v = (
      sharding.constrain(y, "rows", None, "heads", None) for y in (q, k, v)
    )
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    out = attention.interval_attention(q, k, v, key_start, key_end)
    out = sharding.constrain(out, "rows", None, "heads", None)
    return make_projection(
      config, config.d_model, "out", axis=(-2, -1), to_residual=True
    )(out)


class Mlp(nn.Module):
  """The feed-forward network of a block, gated (SwiGLU) or not."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [R,T,D]."""
    config = self.config
    activation = ACTIVATIONS[config.activation]
    hidden = make_projection(config, config.d_mlp, "up")(x)
    if config.gated:
      hidden *= activation(make_projection(config, config.d_mlp, "gate")(x))
    else:
      hidden = activation(hidden)
    hidden = sharding.constrain(hidden, "rows", None, "mlp")
    return make_projection(config, config.d_model, "down", to_residual=True)(
      hidden
    )


class Block(nn.Module):
  """One layer, in the form that `nn.scan` takes: returns (x, no output)."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    angles: jax.Array | None,
    key_start: jax.Array,
    key_end: jax.Array,
  ) -> tuple[jax.Array, None]:
    config = self.config
    attended = Attention(config, name="attention")(
      make_norm(config, "attention_norm")(x), angles, key_start, key_end
    )
    x = sharding.constrain(x + attended, "rows", None, None)
    x = x + Mlp(config, name="mlp")(make_norm(config, "mlp_norm")(x))
    return sharding.constrain(x, "rows", None, None), None

"""The parts of a block: norms, rotary positions, projections, attention, mlp.

Kernels keep heads apart (`[D,N,H]`, `[N,H,D]`), so that a mesh axis splits
whole heads.
"""

import math
from typing import Any

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


def rotary_frequencies(
  config: ModelConfig, *, local: bool = False
) -> Float[Array, "half"]:
  """Returns the angle in radians by which each pair turns per position.

  With `rope_scaling`, wavelengths that the trained length holds fewer than
  `low_freq_factor` times are stretched by `factor`, those it holds more than
  `high_freq_factor` times are kept, and those between are interpolated
  linearly in that count (Llama 3.1; Grattafiori et al. 2024, arXiv 2407.21783).
  Without those two, all are stretched.

  Args:
    config: the model.
    local: of sliding layers that have a theta of their own, unscaled.
  """
  width = config.rotary_width or config.head_width
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32)
  if local:
    return config.local_rope_theta ** (-exponents / width)
  frequencies = config.rope_theta ** (-exponents / width)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  if scaling.low_freq_factor is None:
    return frequencies / scaling.factor
  turns = scaling.original_max_positions * frequencies / (2 * math.pi)
  kept = (turns - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  kept = jnp.clip(kept, 0.0, 1.0)
  return frequencies * (kept + (1.0 - kept) / scaling.factor)


@typed
def rotary_angles(
  config: ModelConfig, positions: Int[Array, "R T"], *, local: bool = False
) -> Float[Array, "R T half"]:
  """Returns the float32 angle of each pair of a head at each position."""
  frequencies = rotary_frequencies(config, local=local)
  return positions.astype(jnp.float32)[..., None] * frequencies[None, None]


@typed
def rotate(
  x: Float[Array, "R T N H"],
  angles: Float[Array, "R T half"],
  pairs: str = "halves",
) -> Float[Array, "R T N H"]:
  """Returns x with pair i of every head turned by angle i.

  Pair i is elements i and i + W/2 of the first W of a head, or elements 2i
  and 2i + 1 where `pairs` is "neighbours" (GPT-J); W is twice the number of
  angles, and the other elements stay.
  """
  cos = jnp.cos(angles)[:, :, None]
  sin = jnp.sin(angles)[:, :, None]
  width = 2 * angles.shape[-1]
  turning, rest = x[..., :width].astype(jnp.float32), x[..., width:]
  if pairs == "halves":
    first, second = jnp.split(turning, 2, axis=-1)
    join = jnp.concatenate
  else:
    first, second = turning[..., ::2], turning[..., 1::2]
    join = lambda parts, axis: jnp.stack(parts, axis).reshape(turning.shape)
  turned = (first * cos - second * sin, second * cos + first * sin)
  turned = join(turned, axis=-1).astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.size else turned


class RMSNormPlusOne(nn.Module):
  """RMSNorm that multiplies by one plus its scale (Gemma)."""

  epsilon: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x in `dtype`, normalised over its last axis."""
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.zeros, shape, self.param_dtype)
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    scale = jnp.expand_dims(1.0 + scale.astype(jnp.float32), range(x.ndim - 1))
    return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(
      self.dtype
    )


def make_norm(config: ModelConfig, name: str) -> nn.Module:
  """Returns the config's norm, computed in float32."""
  settings = {
    "epsilon": config.norm_eps,
    "dtype": jnp.dtype(config.dtype),
    "param_dtype": jnp.dtype(config.wide_dtype or config.param_dtype),
    "name": name,
  }
  if config.norm == "rms":
    return nn.RMSNorm(**settings)
  if config.norm == "rms_plus_one":
    return RMSNormPlusOne(**settings)
  # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
  use_bias = "norm" in config.biases
  return nn.LayerNorm(use_fast_variance=False, use_bias=use_bias, **settings)


def make_head_norm(config: ModelConfig, name: str) -> nn.Module:
  """Returns the norm of queries or keys [R,T,N,H]."""
  if config.qk_norm == "head":
    return make_norm(config, f"{name}_norm")
  axes = (-2, -1)
  return nn.RMSNorm(
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.wide_dtype or config.param_dtype),
    reduction_axes=axes,
    feature_axes=axes,
    name=f"{name}_heads_norm",
  )


class Projection(nn.DenseGeneral):
  """A projection, with what the collection `lora` adds to it, if anything.

  y = x W + s (x B) A, with B the variable `first` and A the variable `last`
  (Hu et al. 2021, arXiv 2106.09685, equation 3; they, and PEFT, write the
  product W x + s B A x and so call the factor next to the input A).

  W may be the int8 kernel of `lora.quantize`: a layer's is brought back when
  it is used.
  """

  lora_scale: float = 0.0

  @nn.nowrap
  def param(self, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns a parameter, an int8 one in the dtype of its scales."""
    value = super().param(*args, **kwargs)
    if isinstance(value, Array):
      return value
    import qwix  # Needed for such a kernel alone.

    return qwix.dequantize(value)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [R,T,...] in `dtype`."""
    y = super().__call__(x)
    if not self.has_variable("lora", "first"):
      return y
    first, last = (
      self.get_variable("lora", name).astype(self.dtype)
      for name in ("first", "last")
    )
    narrow = jnp.tensordot(x.astype(self.dtype), first, first.ndim - 1)
    narrow = sharding.constrain(narrow, "rows", None, None)
    return y + self.lora_scale * jnp.tensordot(narrow, last, 1)


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
  return Projection(
    features,
    axis=axis,
    use_bias=name in config.biases,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=make_init(config, to_residual=to_residual),
    dot_general=_dot_tokens,
    lora_scale=config.lora.scale if config.lora else 0.0,
    name=name,
  )


def _dot_tokens(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **settings: Any
) -> jax.Array:
  """Returns `lax.dot_general` of [R,T,...], computed over R T tokens.

  The kernel's gradient then sums over one dimension, not two: over two, XLA
  for CPU first lays the output's cotangent out anew, and computes all that is
  fused with it (an activation's derivative) column after column.
  """
  (contracted, into), _ = dimension_numbers
  tokens = x.reshape(-1, *x.shape[2:])
  numbers = ((tuple(axis - 1 for axis in contracted), into), ((), ()))
  out = jax.lax.dot_general(tokens, kernel, numbers, **settings)
  return out.reshape(*x.shape[:2], *out.shape[1:])


def make_init(config: ModelConfig, *, to_residual: bool) -> Any:
  """Returns what draws a kernel; see `make_projection`."""
  scale = (2 * config.num_layers) ** -0.5 if to_residual else 1.0
  return nn.initializers.normal(INIT_STDDEV * scale)


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
    if config.qk_norm != "none":
      q = make_head_norm(config, "query")(q)
      k = make_head_norm(config, "key")(k)
    if angles is not None:
      q, k = (rotate(y, angles, config.rotary_pairs) for y in (q, k))
    settings = {
      "scale": (config.query_scalar or config.head_width) ** -0.5,
      "soft_cap": config.attention_soft_cap,
    }
    if self.has_variable("cache", "keys"):
      out = self._extend(q, k, v, key_start, key_end, settings)
    else:
      for name, y in (("keys", k), ("values", v)):
        self.sow("prompt", name, _by_head(y), reduce_fn=lambda _, new: new)
      out = attention.interval_attention(
        q, k, v, key_start, key_end, **settings
      )
    out = sharding.constrain(out, "rows", None, "heads", None)
    return make_projection(
      config, config.d_model, "out", axis=(-2, -1), to_residual=True
    )(out)

  def _extend(self, q, k, v, key_start, key_end, settings):
    """Returns what one query a row attends to, itself the last of its keys.

    The collection `prompt` has keys and values [P,K,T,H]; `cache` has a row's
    own [R,K,U,H], and takes those that are given.
    """
    prompt, own = [], []
    for name, y in (("keys", k), ("values", v)):
      prompt.append(self.get_variable("prompt", name))
      place = key_end[0, 0] - 1 - prompt[-1].shape[2]
      kept = jax.lax.dynamic_update_slice_in_dim(
        self.get_variable("cache", name), _by_head(y), place, axis=2
      )
      self.put_variable("cache", name, kept)
      own.append(kept)
    return attention.cached_attention(
      q[:, 0],
      tuple(prompt),
      tuple(own),
      key_start[:, 0],
      key_end[:, 0],
      **settings,
    )[:, None]


def _by_head(x: jax.Array) -> jax.Array:
  """Returns [R,T,K,H] as [R,K,T,H]."""
  return x.transpose(0, 2, 1, 3)


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

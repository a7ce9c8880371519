"""Mixture of experts: a router picks the mlps that see a token.

Tokens are sorted by expert, so that each expert is one matrix product of a
`jax.lax.ragged_dot` over its own run of tokens; none is dropped or padded
(Gale et al. 2022, arXiv 2211.15841, section 3).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models import layers
from dpo_jax.models.config import ModelConfig


class Experts(nn.Module):
  """The gated mlps of a block, `experts_per_token` of them for each token.

  Their outputs are weighted by the router's softmax over those picked (Jiang
  et al. 2024, arXiv 2401.04088, section 2.1).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [R,T,D]."""
    config = self.config
    num_experts, d_model = config.num_experts, config.d_model
    router = self._kernel("router", (d_model, num_experts))
    into = (num_experts, d_model, config.d_mlp)
    gate = self._kernel("expert_gate", into)
    up = self._kernel("expert_up", into)
    down = self._kernel("expert_down", (into[0], into[2], into[1]))
    tokens = x.reshape(-1, d_model)
    logits = (tokens @ router).astype(jnp.float32)
    weights, picked = route(logits, config.experts_per_token)
    out = apply_experts(
      tokens, weights, picked, (gate, up, down), config.activation
    )
    return out.reshape(x.shape)

  def _kernel(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns the parameter `name` in the dtype of activations."""
    init = layers.make_init(self.config, to_residual=name == "expert_down")
    kernel = self.param(name, init, shape, jnp.dtype(self.config.param_dtype))
    return kernel.astype(self.config.dtype)


def route(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the weights f32[n,k] and the experts i32[n,k] of each token.

  Args:
    logits: f32[n,E], the router's.
    count: k, how many experts see a token.
  """
  probabilities, picked = jax.lax.top_k(jax.nn.softmax(logits), count)
  return probabilities / probabilities.sum(-1, keepdims=True), picked


def apply_experts(
  tokens: jax.Array,
  weights: jax.Array,
  picked: jax.Array,
  kernels: tuple[jax.Array, jax.Array, jax.Array],
  activation: str,
) -> jax.Array:
  """Returns [n,D], the weighted sum of the picked experts' outputs.

  Args:
    tokens: [n,D].
    weights: f32[n,k].
    picked: i32[n,k].
    kernels: gate and up [E,D,F], down [E,F,D].
    activation: of the gate.
  """
  gate, up, down = kernels
  count = picked.shape[1]
  order = jnp.argsort(picked.reshape(-1), stable=True)
  sizes = jnp.bincount(picked.reshape(-1), length=len(gate))
  sorted_tokens = tokens[order // count]
  hidden = jax.lax.ragged_dot(sorted_tokens, up, sizes)
  gates = jax.lax.ragged_dot(sorted_tokens, gate, sizes)
  hidden *= layers.ACTIVATIONS[activation](gates)
  out = jax.lax.ragged_dot(hidden, down, sizes)
  # Back to the order of tokens, by the inverse of the permutation.
  out = out[jnp.argsort(order)].reshape(*picked.shape, -1)
  out = jnp.einsum("nk,nkd->nd", weights, out.astype(jnp.float32))
  return out.astype(tokens.dtype)

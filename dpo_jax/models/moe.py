"""Mixture of experts: a router picks the mlps that see a token.

Tokens are sorted by expert, so that each expert is one matrix product of a
`jax.lax.ragged_dot` over its own run of tokens; none is dropped or padded
(Gale et al. 2022, arXiv 2211.15841, section 3).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dpo_jax import sharding
from dpo_jax.models import layers
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Array, typed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Sums over tokens, padding left out; those of two halves add up."""

  picked: Array  # f32[L,E]  how many tokens an expert of a layer saw
  probability: Array  # f32[L,E]  what the router gave it, summed
  num_tokens: Array  # f32[]

  def load_balancing_loss(self) -> jax.Array:
    """Returns f32[], E sum_e f_e P_e: k where all experts see as much.

    f_e is the mean over tokens and layers of the picks of expert e, P_e that
    of its probability (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6,
    with k picks a token, as transformers computes it for Mixtral).
    """
    num_layers, num_experts = self.picked.shape
    total = jnp.maximum(num_layers * self.num_tokens, 1)
    picked, probability = self.picked.sum(0), self.probability.sum(0)
    return num_experts * jnp.sum(picked * probability) / total**2

  def largest_share(self) -> jax.Array:
    """Returns f32[], the busiest expert's picks as a multiple of the mean."""
    mean = jnp.maximum(self.picked.mean(-1), 1)
    return jnp.max(self.picked.max(-1) / mean)


class Experts(nn.Module):
  """The gated mlps of a block, `experts_per_token` of them for each token.

  Their outputs are weighted by the router's softmax over those picked (Jiang
  et al. 2024, arXiv 2401.04088, section 2.1).
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, is_token: jax.Array) -> jax.Array:
    """Returns [R,T,D]; sows the sums of `Routing` over `is_token` [R,T]."""
    config = self.config
    num_experts, d_model = config.num_experts, config.d_model
    into = (num_experts, d_model, config.d_mlp)
    router = self._kernel("router", (d_model, num_experts))
    kernels = (
      self._kernel("expert_gate", into),
      self._kernel("expert_up", into),
      self._kernel("expert_down", (into[0], into[2], into[1])),
    )
    logits = jnp.einsum(
      "rtd,de->rte", x, router, preferred_element_type=jnp.float32
    )
    probability = jax.nn.softmax(logits)
    weights, picked = jax.lax.top_k(probability, config.experts_per_token)
    weights /= weights.sum(-1, keepdims=True)
    counts = jax.nn.one_hot(picked, num_experts).sum(2)
    for name, values in (("picked", counts), ("probability", probability)):
      total = jnp.sum(jnp.where(is_token[..., None], values, 0), (0, 1))
      self.sow("routing", name, total, reduce_fn=lambda _, new: new)
    out = sharding.over_experts(
      lambda *arrays: apply_experts(*arrays, config.activation),
      (x, weights, picked),
      kernels,
    )
    return out.astype(x.dtype)

  def _kernel(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Returns the parameter `name` in the dtype of activations."""
    init = layers.make_init(self.config, to_residual=name == "expert_down")
    kernel = self.param(name, init, shape, jnp.dtype(self.config.param_dtype))
    return kernel.astype(self.config.dtype)


@typed
def apply_experts(
  x: Float[Array, "R T D"],
  weights: Float[Array, "R T k"],
  picked: Int[Array, "R T k"],
  is_here: Bool[Array, "R T k"],
  kernels: tuple[
    Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
  ],
  activation: str,
) -> Float[Array, "R T D"]:
  """Returns the float32 weighted sum of the outputs of experts that are here.

  Args:
    x: what the experts see.
    weights: of a token's picked experts.
    picked: their index among the kernels.
    is_here: whether there is a kernel of that index; elsewhere it is ignored.
    kernels: gate, up and down.
    activation: of the gate.
  """
  gate, up, down = kernels
  num_experts, count = len(gate), picked.shape[-1]
  expert = jnp.where(is_here, picked, num_experts).reshape(-1)
  order = jnp.argsort(expert, stable=True)
  sizes = jnp.bincount(expert, length=num_experts)
  # Rows of no group are undefined, in the output and in the gradient.
  is_computed = (expert[order] < num_experts)[:, None]
  tokens = x.reshape(-1, x.shape[-1])[order // count]
  tokens = jnp.where(is_computed, tokens, 0)
  hidden = jax.lax.ragged_dot(tokens, up, sizes)
  hidden *= layers.ACTIVATIONS[activation](
    jax.lax.ragged_dot(tokens, gate, sizes)
  )
  hidden = jnp.where(is_computed, hidden, 0)
  out = jnp.where(is_computed, jax.lax.ragged_dot(hidden, down, sizes), 0)
  # Back to the order of tokens, by the inverse of the permutation.
  out = out[jnp.argsort(order)].reshape(*picked.shape, -1)
  return jnp.einsum("rtk,rtkd->rtd", weights, out.astype(jnp.float32))

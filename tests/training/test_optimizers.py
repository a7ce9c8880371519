"""Optimizers and schedules: values by hand, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sharding
from dpo_jax.training import optimizers, state

PARAMS = {"a": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}}


def _schedule(**settings):
  return optimizers.make_schedule(
    0.1,
    **{"schedule": "constant", "warmup_steps": 0, "total_steps": 10} | settings,
  )


def _updates(name, grads, num_steps=1, clip=0.0, **options):
  optimizer = optimizers.make_optimizer(name, _schedule(), clip=clip, **options)
  params, opt_state = PARAMS, optimizer.init(PARAMS)
  for _ in range(num_steps):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_warmup_reaches_the_full_rate_after_its_last_step():
  rate = _schedule(warmup_steps=3)
  got = [float(rate(k)) for k in range(5)]
  np.testing.assert_allclose(got, [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name, half", [("linear", 0.5), ("cosine", 0.5)])
def test_decay_ends_at_zero(name, half):
  rate = _schedule(schedule=name, warmup_steps=2)
  np.testing.assert_allclose(float(rate(2)), 0.1, rtol=1e-6)
  np.testing.assert_allclose(float(rate(6)), 0.1 * half, rtol=1e-6)
  np.testing.assert_allclose(float(rate(10)), 0, atol=1e-8)


def test_rmsprop_is_the_papers():
  """Decay 0.99 from 0, epsilon outside the root, no momentum."""
  grads = jax.tree.map(lambda x: 0.3 * x, PARAMS)
  second, params = 0.0, np.array([1.0, -2.0])
  gradient = 0.3 * params
  for _ in range(3):
    second = 0.99 * second + 0.01 * gradient**2
    params = params - 0.1 * gradient / (np.sqrt(second) + 1e-8)
  got = _updates("rmsprop", grads, num_steps=3)
  np.testing.assert_allclose(got["a"]["kernel"], params, rtol=1e-6)


def test_clip_scales_the_whole_gradient():
  grads = jax.tree.map(jnp.ones_like, PARAMS)  # norm sqrt(3)
  optimizer = optimizers.make_optimizer("lion", _schedule(), clip=1.0)
  scaled, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
  np.testing.assert_allclose(optax.global_norm(scaled), 1, rtol=1e-6)
  assert len(optimizer.init(PARAMS)) == 2


def test_weight_decay_leaves_biases_alone():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  got = _updates("adamw", zeros, weight_decay=0.5)
  np.testing.assert_allclose(got["a"]["kernel"], [0.95, -1.9], rtol=1e-6)
  np.testing.assert_array_equal(got["a"]["bias"], PARAMS["a"]["bias"])


@pytest.mark.parametrize("name", sorted(optimizers.DEFAULTS))
def test_every_optimizer_descends_and_shards_its_moments(name):
  mesh = sharding.make_mesh()
  params = {"a": {"kernel": jnp.ones((256, 128)), "bias": jnp.ones((128,))}}
  axes = {"a": {"kernel": ("embed", None), "bias": (None,)}}
  layouts = sharding.array_shardings(mesh, axes, params)
  optimizer = optimizers.make_optimizer(name, _schedule(), clip=1.0)
  with jax.set_mesh(mesh):
    first = state.init_state(lambda: params, optimizer, layouts, mesh)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    grads = jax.grad(loss)(first.params)
    updates, _ = optimizer.update(grads, first.opt_state, first.params)
  assert loss(optax.apply_updates(params, updates)) < loss(params)
  kernel = first.params["a"]["kernel"]
  for leaf in jax.tree.leaves(first.opt_state):
    if leaf.shape == kernel.shape:
      assert leaf.sharding == kernel.sharding


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("adam", {}, "unknown optimizer.name 'adam'; known: adafactor, adamw"),
    ("rmsprop", {"b1": 0.9}, "'rmsprop' does not honour optimizer.b1=0.9"),
    ("lion", {"eps": 1e-8}, "'lion' does not honour optimizer.eps"),
    ("adamw", {"b2": 1.0}, "optimizer.b2=1.0: out of range"),
    ("adamw", {"clip": -1.0}, "optimizer.clip=-1.0"),
  ],
)
def test_what_an_optimizer_cannot_honour_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    optimizers.make_optimizer(name, _schedule(), **{"clip": 0.0} | options)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"schedule": "step"}, "unknown optimizer.schedule 'step'; known: const"),
    ({"warmup_steps": -1}, "optimizer.warmup_steps=-1: at least 0"),
  ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    _schedule(**settings)

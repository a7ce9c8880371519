"""Blocked interval attention against a softmax over the whole [T,T]."""

import functools
import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import attention


def _oracle(q, k, v, key_start, key_end, scale=None, soft_cap=None):
  """Returns the same attention with keys repeated and scores kept whole."""
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  index = jnp.arange(q.shape[1])[None, None, :]
  visible = (key_start[..., None] <= index) & (index < key_end[..., None])
  visible = visible[:, None]
  scores = jnp.einsum("rtnh,rsnh->rnts", q, k)
  scores *= scale or 1 / math.sqrt(q.shape[-1])
  if soft_cap:
    scores = soft_cap * jnp.tanh(scores / soft_cap)
  weights = jax.nn.softmax(jnp.where(visible, scores, -1e9), axis=-1)
  weights = jnp.where(visible, weights, 0.0)
  return jnp.einsum("rnts,rsnh->rtnh", weights, v)


def _inputs(length, *, num_rows=2, num_heads=4, num_kv_heads=2, width=8):
  """Returns q, k, v and random intervals, some of them empty."""
  rng = np.random.default_rng(length)
  q, k, v = (
    rng.normal(size=(num_rows, length, heads, width)).astype(np.float32)
    for heads in (num_heads, num_kv_heads, num_kv_heads)
  )
  start = rng.integers(0, length, size=(num_rows, length))
  end = start + rng.integers(0, length, size=start.shape)
  end = np.minimum(end, length)
  end[:, -1] = start[:, -1] = 0
  return q, k, v, start.astype(np.int32), end.astype(np.int32)


def test_weights_by_hand():
  q = np.array([[[[2.0]], [[2.0]], [[2.0]]]], np.float32)
  k = np.array([[[[5.0]], [[0.0]], [[math.log(3) / 2]]]], np.float32)
  v = np.array([[[[9.0]], [[1.0]], [[2.0]]]], np.float32)
  start = np.array([[0, 1, 1]], np.int32)
  end = np.array([[1, 3, 1]], np.int32)
  out = attention.interval_attention(q, k, v, start, end)
  # The first sees itself; the second, scores 0 and log 3; the third, nothing.
  expected = [9.0, (1.0 + 3.0 * 2.0) / 4.0, 0.0]
  np.testing.assert_allclose(out[0, :, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("length", "settings"),
  [
    pytest.param(1, {}, marks=pytest.mark.slow),
    pytest.param(64, {}, marks=pytest.mark.slow),
    (200, {}),
    (100, {"scale": 0.7, "soft_cap": 1.5}),
  ],
)
def test_blocks_equal_the_whole_softmax_forward_and_backward(length, settings):
  q, k, v, start, end = _inputs(length)
  cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

  def run(fn):
    fn = functools.partial(fn, **settings)
    out, pullback = jax.vjp(lambda *x: fn(*x, start, end), q, k, v)
    return out, *pullback(jnp.asarray(cotangent))

  actual = run(attention.interval_attention)
  for one, other in zip(actual, run(_oracle), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_jit_equals_no_jit():
  inputs = _inputs(70)
  np.testing.assert_allclose(
    jax.jit(attention.interval_attention)(*inputs),
    attention.interval_attention(*inputs),
    atol=1e-6,
  )


@pytest.mark.parametrize("soft_cap", [None, 0.8])
def test_gradient_is_the_numerical_one(soft_cap):
  q, k, v, start, end = _inputs(7, num_rows=1, width=2)
  jax.test_util.check_grads(
    lambda *x: attention.interval_attention(*x, start, end, soft_cap=soft_cap),
    (q, k, v),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


def test_queries_that_see_nothing_give_zeros_and_take_no_gradient():
  q, k, v, start, _ = _inputs(100)
  nothing = jnp.zeros_like(start)
  out, pullback = jax.vjp(
    lambda *x: attention.interval_attention(*x, nothing, nothing), q, k, v
  )
  assert not np.any(out)
  for cotangent in pullback(jnp.ones_like(out)):
    assert not np.any(cotangent)


def test_keys_outside_the_interval_change_nothing():
  q, k, v, _, _ = _inputs(130)
  start = np.full((2, 130), 40, np.int32)
  end = np.full((2, 130), 90, np.int32)
  outside = (np.arange(130) < 40) | (np.arange(130) >= 90)
  outside = outside[None, :, None, None]
  np.testing.assert_array_equal(
    attention.interval_attention(q, k, v, start, end),
    attention.interval_attention(
      q, np.where(outside, 50.0, k), np.where(outside, 50.0, v), start, end
    ),
  )


def test_capped_weights_by_hand():
  q, k, v = (
    np.array(x, np.float32).reshape(1, 2, 1, 1)
    for x in ([0, 1], [0, 50], [1, 2])
  )
  start, end = np.zeros((1, 2), np.int32), np.full((1, 2), 2, np.int32)
  out = attention.interval_attention(q, k, v, start, end, soft_cap=math.log(3))
  # Scores 0 and 0; then 0 and 50, of which the cap leaves log 3.
  np.testing.assert_allclose(out[0, :, 0, 0], [1.5, (1 + 3 * 2) / 4], rtol=1e-6)


def test_large_scores_do_not_overflow():
  q, k, v, start, end = _inputs(20)
  out = attention.interval_attention(100 * q, 100 * k, v, start, end)
  np.testing.assert_allclose(
    out, _oracle(100 * q, 100 * k, v, start, end), atol=1e-4
  )


def test_bfloat16_is_near_float32():
  q, k, v, start, end = _inputs(100)
  low = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  out = attention.interval_attention(*low, start, end)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    out.astype(jnp.float32),
    attention.interval_attention(q, k, v, start, end),
    atol=0.05,
  )


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "tensor": 2}])
def test_one_device_equals_eight(axes):
  inputs = _inputs(100, num_rows=8)

  def run(*inputs):
    q, k, v, start, end = inputs
    q, k, v = (
      sharding.constrain(x, "rows", None, "heads", None) for x in (q, k, v)
    )
    out, pullback = jax.vjp(
      lambda *x: attention.interval_attention(*x, start, end), q, k, v
    )
    return out, *pullback(out)

  expected = run(*inputs)
  mesh = sharding.make_mesh(**axes)
  with jax.set_mesh(mesh):
    placed = jax.device_put(inputs, sharding.rows(mesh))
    actual = jax.jit(run)(*placed)
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)

import dataclasses
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax import sharding
from dpo_jax.losses import logprobs
from dpo_jax.types import Rows, Unembedding
from tests import hlo

NUM_SCORED = (7, 3)  # of S = 7, in R = 2 rows
VOCABULARY, WIDTH, TOKENS = 11, 4, 6


def make_rows(num_scored=NUM_SCORED, vocabulary=VOCABULARY, tokens=TOKENS):
  """Returns rows of one pair each; every state scores about two targets."""
  rng = np.random.default_rng(0)
  num_rows, length = len(num_scored), max(max(num_scored), 1)
  shape = (num_rows, length)
  pair, rejected = np.arange(num_rows)[:, None], np.arange(length) % 2
  is_scored = np.arange(length) < np.array(num_scored)[:, None]
  unused = np.zeros((num_rows, tokens), np.int32)
  return Rows(
    tokens=unused,
    positions=unused,
    key_start=unused,
    key_end=unused,
    score_index=rng.integers(0, tokens, shape).astype(np.int32),
    targets=rng.integers(0, vocabulary, shape).astype(np.int32),
    response=np.where(is_scored, 2 * pair + rejected, -1).astype(np.int32),
    rank=np.zeros(shape, np.int32),
  )


def make_arrays(num_rows=2, vocabulary=VOCABULARY, dtype="float32"):
  rng = np.random.default_rng(1)
  hidden = rng.normal(size=(num_rows, TOKENS, WIDTH))
  unembedding = rng.normal(size=(vocabulary, WIDTH))
  return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype)


def plain_logps(hidden, unembedding, rows):
  """Returns f[R,S] by log_softmax of all logits."""
  index = rows.score_index[..., None]
  states = jnp.take_along_axis(hidden, index, axis=1).astype(jnp.float32)
  if not isinstance(unembedding, Unembedding):
    unembedding = Unembedding(unembedding)
  table = unembedding.table.astype(jnp.float32)
  logits = jnp.einsum("rsd,vd->rsv", states, table)
  if unembedding.bias is not None:
    logits += unembedding.bias[None, None]
  if unembedding.soft_cap is not None:
    logits = unembedding.soft_cap * jnp.tanh(logits / unembedding.soft_cap)
  logps = jax.nn.log_softmax(logits)
  logps = jnp.take_along_axis(logps, rows.targets[..., None], axis=-1)[..., 0]
  return jnp.where(rows.response >= 0, logps, 0)


def make_capped(dtype="float32", vocabulary=VOCABULARY, num_rows=2):
  """Returns arrays whose logits have a bias, and a cap that bites."""
  hidden, table = make_arrays(num_rows, vocabulary, dtype)
  bias = np.random.default_rng(3).normal(size=vocabulary)
  return hidden, Unembedding(table, jnp.asarray(bias, dtype), soft_cap=1.5)


def scalar(logps_fn, rows):
  """Returns a function of (hidden, unembedding) with a gradient per token."""
  weights = jnp.asarray(np.random.default_rng(2).normal(size=rows.rank.shape))

  def fn(hidden, unembedding):
    return jnp.sum(weights * jnp.sin(logps_fn(hidden, unembedding, rows)))

  return fn


def chunked(chunk_length):
  def logps_fn(hidden, unembedding, rows):
    return logprobs.token_logps(
      hidden, unembedding, rows, chunk_length=chunk_length
    ).logps

  return logps_fn


def assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerance
    ),
    actual,
    expected,
  )


def test_a_token_by_hand():
  # Logits (0, log 3): p = (1/4, 3/4).
  hidden = jnp.ones((1, 1, 1))
  unembedding = jnp.array([[0.0], [math.log(3)]])
  rows = dataclasses.replace(
    make_rows((2,), 2, 1), targets=np.array([[0, 1]], np.int32)
  )
  tokens = logprobs.token_logps(
    hidden,
    unembedding,
    rows,
    chunk_length=1,
    with_entropy=True,
    with_log_sum_squares=True,
  )
  np.testing.assert_allclose(
    tokens.logps, [[math.log(1 / 4), math.log(3 / 4)]], rtol=1e-6
  )
  entropy = -(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4
  np.testing.assert_allclose(tokens.entropy, [[entropy] * 2], rtol=1e-6)
  np.testing.assert_allclose(
    tokens.log_sum_squares, [[math.log(10 / 16)] * 2], rtol=1e-6
  )


@pytest.mark.parametrize(
  ("chunk_length", "make"),
  [*((n, make_arrays) for n in (1, 2, 3, 7, 20)), (3, make_capped)],
)
def test_chunks_equal_log_softmax_in_value_and_gradient(chunk_length, make):
  rows = make_rows()
  arrays = make()
  actual, expected = (
    jax.value_and_grad(scalar(fn, rows), (0, 1))(*arrays)
    for fn in (chunked(chunk_length), plain_logps)
  )
  assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_arrays, make_capped])
def test_gradients_equal_finite_differences(make):
  with jax.enable_x64(True):
    fn = scalar(chunked(3), make_rows())
    check_grads(fn, make(dtype="float64"), order=1, modes=["rev"])


@hypothesis.given(
  st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 10)
)
@hypothesis.settings(max_examples=6, deadline=None)
def test_any_number_of_scored_positions_and_any_chunk(num_scored, chunk_length):
  rows = make_rows(num_scored)
  arrays = make_arrays(len(num_scored))
  actual = jax.grad(scalar(chunked(chunk_length), rows), (0, 1))(*arrays)
  expected = jax.grad(scalar(plain_logps, rows), (0, 1))(*arrays)
  assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_no_scored_position_gives_zeros():
  rows = make_rows((0, 0))
  value, grads = jax.value_and_grad(scalar(chunked(2), rows), (0, 1))(
    *make_arrays()
  )
  assert_trees_close(
    (value, grads), jax.tree.map(np.zeros_like, (value, grads))
  )


def test_masked_equals_removed():
  rows = make_rows()
  short = jax.tree.map(lambda x: x[1:, :3], rows)
  hidden, unembedding = make_arrays()
  tokens = chunked(2)(hidden, unembedding, rows)
  np.testing.assert_allclose(
    tokens[1:, :3], chunked(2)(hidden[1:], unembedding, short), rtol=1e-6
  )
  np.testing.assert_array_equal(tokens[1:, 3:], 0)


def test_padding_never_makes_a_gradient_nan():
  # Logits of some 1e4: their bare exp is inf.
  rows = make_rows()
  hidden, unembedding = make_arrays()
  grads = jax.grad(scalar(chunked(7), rows), (0, 1))(1e4 * hidden, unembedding)
  assert all(jnp.isfinite(g).all() for g in grads)


def test_a_state_that_scores_two_targets_gets_both_gradients():
  hidden, unembedding = make_arrays(1)

  def gradient(targets):
    num_scored = len(targets)
    rows = dataclasses.replace(
      make_rows((num_scored,)),
      score_index=np.full((1, num_scored), 4, np.int32),
      targets=np.array([targets], np.int32),
    )
    return jax.grad(lambda h: chunked(2)(h, unembedding, rows).sum())(hidden)

  np.testing.assert_allclose(
    gradient([1, 2]), gradient([1]) + gradient([2]), rtol=1e-5, atol=1e-6
  )


def test_jit_equals_no_jit():
  rows = make_rows()
  fn = jax.value_and_grad(scalar(chunked(3), rows), (0, 1))
  arrays = make_arrays()
  assert_trees_close(jax.jit(fn)(*arrays), fn(*arrays), rtol=1e-5, atol=1e-6)


def test_bfloat16_states_are_summed_in_float32():
  rows = make_rows()
  arrays = make_arrays(dtype="bfloat16")
  tokens = logprobs.token_logps(
    *arrays, rows, chunk_length=3, with_entropy=True
  )
  assert tokens.logps.dtype == tokens.entropy.dtype == jnp.float32
  np.testing.assert_allclose(
    tokens.logps, plain_logps(*arrays, rows), rtol=1e-5, atol=1e-5
  )
  grads = jax.grad(scalar(chunked(3), rows), (0, 1))(*arrays)
  expected = jax.grad(scalar(plain_logps, rows), (0, 1))(*arrays)
  assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
  # d logits are rounded to bfloat16, 8 bits, before their products.
  assert_trees_close(grads, expected, rtol=0.02, atol=0.02)


def test_float32_unembedding_gets_a_float32_gradient_from_bfloat16_states():
  rows = make_rows()
  hidden, unembedding = make_arrays()
  grads = jax.grad(scalar(chunked(3), rows), (0, 1))(
    hidden.astype(jnp.bfloat16), unembedding
  )
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def test_entropy_and_sum_of_squares_are_those_of_the_softmax_without_gradient():
  rows = make_rows()
  hidden, unembedding = make_arrays()

  def statistics(hidden, unembedding):
    tokens = logprobs.token_logps(
      hidden,
      unembedding,
      rows,
      chunk_length=3,
      with_entropy=True,
      with_log_sum_squares=True,
    )
    return jnp.stack([tokens.entropy, tokens.log_sum_squares])

  states = jnp.take_along_axis(hidden, rows.score_index[..., None], axis=1)
  p = jax.nn.softmax(jnp.einsum("rsd,vd->rsv", states, unembedding))
  expected = jnp.stack([-(p * jnp.log(p)).sum(-1), jnp.log((p * p).sum(-1))])
  np.testing.assert_allclose(
    statistics(hidden, unembedding),
    jnp.where((rows.response >= 0)[None], expected, 0),
    rtol=1e-5,
    atol=1e-6,
  )
  total = lambda *arrays: statistics(*arrays).sum()
  grads = jax.grad(total, (0, 1))(hidden, unembedding)
  assert_trees_close(grads, jax.tree.map(np.zeros_like, grads))


def test_response_sums_add_each_response_and_drop_padding():
  rows = dataclasses.replace(
    make_rows((4, 4)),
    response=np.array([[0, 0, 1, -1], [4, 5, 5, -1]], np.int32),
  )
  values = jnp.array([[1.0, 2.0, 4.0, 100.0], [8.0, 16.0, 32.0, 100.0]])
  sums = logprobs.response_sums(values, rows, (3, 2))
  np.testing.assert_array_equal(sums, [[3, 4], [0, 0], [8, 48]])
  total = lambda v: logprobs.response_sums(v, rows, (3, 2)).sum()
  grads = jax.grad(total)(values)
  np.testing.assert_array_equal(grads, rows.response >= 0)


def test_a_capped_token_by_hand():
  # Logits (0, 50 + 1), of which the cap leaves (0, log 3): p = (1/4, 3/4).
  unembedding = Unembedding(
    jnp.array([[0.0], [50.0]]), jnp.array([0.0, 1.0]), soft_cap=math.log(3)
  )
  rows = dataclasses.replace(
    make_rows((2,), 2, 1), targets=np.array([[0, 1]], np.int32)
  )
  logps = chunked(1)(jnp.ones((1, 1, 1)), unembedding, rows)
  np.testing.assert_allclose(
    logps, [[math.log(1 / 4), math.log(3 / 4)]], rtol=1e-6
  )


@pytest.mark.parametrize("make", [make_arrays, make_capped])
def test_split_rows_and_vocabulary_change_nothing(make):
  rows = make_rows((7, 3, 5, 1), vocabulary=12)
  arrays = make(num_rows=4, vocabulary=12)

  def fn(hidden, unembedding, rows):
    return scalar(chunked(2), rows)(hidden, unembedding)

  gradient = jax.value_and_grad(fn, (0, 1))
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    layout = sharding.rows(mesh)
    hidden, unembedding = arrays
    split = jax.jit(gradient)(
      jax.device_put(hidden, layout),
      jax.tree.map(
        lambda x: jax.device_put(
          x,
          jax.NamedSharding(
            mesh,
            sharding.partition_spec(
              mesh, ("vocab", "embed")[: x.ndim], x.shape
            ),
          ),
        ),
        unembedding,
      ),
      jax.device_put(rows, layout),
    )
  assert_trees_close(
    jax.device_get(split), gradient(*arrays, rows), rtol=1e-4, atol=1e-5
  )


def test_the_unembedding_gradient_meets_other_devices_once_not_once_a_chunk():
  rows = make_rows((7, 3, 5, 1), vocabulary=12)
  hidden, unembedding = make_arrays(4, vocabulary=12)
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=1, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    layout = sharding.rows(mesh)
    compiled = (
      jax.jit(
        jax.grad(lambda h, w, r: scalar(chunked(2), r)(h, w), (0, 1)),
        out_shardings=(layout, sharding.replicated(mesh)),
      )
      .lower(
        jax.device_put(hidden, layout),
        jax.device_put(unembedding, sharding.replicated(mesh)),
        jax.device_put(rows, layout),
      )
      .compile()
      .as_text()
    )
  reductions = re.findall(
    r"f32\[(?:1,)?12,4\]\S* all-reduce\(.*op_name=\"([^\"]*)\"", compiled
  )
  assert len(reductions) == 1 and "while" not in reductions[0]


def test_no_buffer_holds_more_than_one_chunk_of_logits():
  num_rows, length, tokens, width, vocab, chunk = 2, 64, 48, 8, 32000, 16
  shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
  per_token = shape(num_rows, tokens, dtype=jnp.int32)
  per_score = shape(num_rows, length, dtype=jnp.int32)
  rows = Rows(*[per_token] * 4, *[per_score] * 4)
  unembedding = shape(vocab, width)

  def loss_fn(params, reference, hidden, rows):
    policy, reference = (
      logprobs.response_sums(
        logprobs.token_logps(hidden, w, rows, chunk_length=chunk).logps,
        rows,
        (2, 2),
      )
      for w in (params, jax.lax.stop_gradient(reference))
    )
    ratio = policy - reference
    return -jax.nn.log_sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean()

  text = (
    jax.jit(jax.value_and_grad(loss_fn))
    .lower(unembedding, unembedding, shape(num_rows, tokens, width), rows)
    .compile()
    .as_text()
  )
  buffers = hlo.vocabulary_buffers(text, vocab)
  assert (vocab, width) in buffers
  assert any(math.prod(s) == num_rows * chunk * vocab for s in buffers)
  largest = max(num_rows * chunk, width) * vocab
  assert {s for s in buffers if math.prod(s) > largest} == set()

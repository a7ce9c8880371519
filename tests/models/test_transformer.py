"""What a decoder may see, and what may not change its numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import layers, presets, transformer

CONFIGS = {
  "llama": model_config.llama(
    vocab_size=40,
    num_layers=2,
    d_model=32,
    d_mlp=48,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
  ),
  "gpt2": model_config.gpt2(
    vocab_size=40, num_layers=2, d_model=32, num_heads=4, max_positions=64
  ),
}


@pytest.fixture(
  params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)],
  scope="module",
)
def model(request):
  """A config and parameters none of which is zero or one."""
  config = CONFIGS[request.param]
  params = _init(config)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    leaf + 0.2 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys)
  ]
  return config, jax.tree.unflatten(tree, leaves)


def _init(config):
  init = jax.jit(lambda rng: transformer.init_params(config, rng))
  return init(jax.random.key(0))


def _causal(tokens):
  """Returns the arguments of `hidden_states` for sequences from position 0."""
  tokens = np.asarray(tokens, np.int32)
  positions = np.broadcast_to(np.arange(tokens.shape[1])[None], tokens.shape)
  positions = positions.astype(np.int32)
  return tokens, positions, np.zeros_like(positions), positions + 1


def _random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 40, shape).astype(np.int32)


def _hidden(model, *inputs, **changes):
  config, params = model
  config = dataclasses.replace(config, **changes)
  states = _jitted_hidden(config)(params, *inputs)
  return np.asarray(states)


@functools.cache
def _jitted_hidden(config):
  return jax.jit(functools.partial(transformer.hidden_states, config))


def test_a_state_depends_on_no_later_token(model):
  tokens = _random_tokens(1, 12)
  changed = tokens.copy()
  changed[0, 7] = (changed[0, 7] + 1) % 40
  before, after = (_hidden(model, *_causal(t)) for t in (tokens, changed))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (np.abs(before - after).max(-1)[:, 7:] > 1e-3).all()


def test_packed_sequences_equal_each_alone(model):
  first, second = _random_tokens(1, 9), _random_tokens(1, 5, seed=1)
  alone = [_hidden(model, *_causal(tokens)) for tokens in (first, second)]
  row = [
    np.concatenate([a, b + shift, np.zeros((1, 6), np.int32)], axis=1)
    for a, b, shift in zip(_causal(first), _causal(second), (0, 0, 9, 9))
  ]
  packed = _hidden(model, *row)
  np.testing.assert_allclose(packed[:, :9], alone[0], atol=1e-5)
  np.testing.assert_allclose(packed[:, 9:14], alone[1], atol=1e-5)


def test_memory_order_does_not_matter(model):
  tokens, positions, _, _ = inputs = _causal(_random_tokens(1, 10))
  index = np.arange(10, dtype=np.int32)[None]
  mirrored = (tokens[:, ::-1], positions[:, ::-1], index, index * 0 + 10)
  np.testing.assert_allclose(
    _hidden(model, *mirrored)[:, ::-1], _hidden(model, *inputs), atol=1e-5
  )


def test_padding_gives_finite_states_and_gradients(model):
  config, params = model
  tokens, positions, start, end = _causal(_random_tokens(2, 12))
  end = np.where(positions < 8, end, 0)
  end[1] = 0

  def total(params):
    states = transformer.hidden_states(
      config, params, tokens, positions, start, end
    )
    return jnp.sum(states**2)

  value, gradient = jax.jit(jax.value_and_grad(total))(params)
  for leaf in jax.tree.leaves((value, gradient)):
    assert np.isfinite(leaf).all()


@pytest.mark.slow
def test_remat_changes_no_number(model):
  config, params = model
  inputs = _causal(_random_tokens(2, 12))

  def value_and_grad(remat):
    remat_config = dataclasses.replace(config, remat=remat)

    def total(params):
      states = transformer.hidden_states(remat_config, params, *inputs)
      return jnp.sum(states**2)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(total))(params))

  expected = value_and_grad("none")
  for remat in ("full", "dots"):
    for one, other in zip(value_and_grad(remat), expected):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_scan_equals_a_loop_over_layers(model):
  config, params = model
  tokens, positions, start, end = _causal(_random_tokens(2, 12))
  x = params["embedding"][tokens]
  angles = None
  if config.positions == "learned":
    x = x + params["position_embedding"][positions]
  else:
    angles = layers.rotary_angles(config, positions)
  block_fn = transformer.Block(config)
  for layer in range(config.num_layers):
    block = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
    x, _ = block_fn.apply({"params": block}, x, None, angles, start, end)
  norm = layers.make_norm(config, "final_norm")
  x = norm.apply({"params": params["final_norm"]}, x)
  np.testing.assert_allclose(
    _hidden(model, tokens, positions, start, end), x, atol=1e-5
  )


def test_jit_equals_no_jit(model):
  config, params = model
  inputs = _causal(_random_tokens(2, 12))
  states = transformer.hidden_states(config, params, *inputs)
  np.testing.assert_allclose(_hidden(model, *inputs), states, atol=1e-5)


def test_bfloat16_is_near_float32(model):
  inputs = _causal(_random_tokens(2, 12))
  low = _hidden(model, *inputs, dtype="bfloat16")
  assert low.dtype == jnp.bfloat16
  high = _hidden(model, *inputs)
  assert np.abs(low.astype(np.float32) - high).mean() < 0.05


def test_one_device_equals_eight(model):
  config, params = model
  inputs = _causal(_random_tokens(8, 12))

  def value_and_grad(params, inputs):
    def total(params):
      return jnp.sum(transformer.hidden_states(config, params, *inputs) ** 2)

    return jax.value_and_grad(total)(params)

  expected = jax.jit(value_and_grad)(params, inputs)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  with jax.set_mesh(mesh):
    actual = jax.jit(value_and_grad)(
      jax.device_put(params, shardings),
      jax.device_put(inputs, sharding.rows(mesh)),
    )
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-3)


def test_every_matrix_is_split_over_fsdp_and_tensor(model):
  config, _ = model
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = transformer.param_shapes(config)
  shardings = sharding.array_shardings(
    mesh, transformer.logical_axes(config), shapes
  )
  for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
    spec = shardings
    for entry in path:
      spec = spec[entry.key]
    name = path[-1].key
    if name in ("kernel", "embedding", "head"):
      local = spec.shard_shape(shape.shape)
      assert np.prod(local) * 4 == np.prod(shape.shape), path


def test_initial_values():
  config = presets.make_config("gpt2", vocab_size=2000)
  config = dataclasses.replace(config, num_layers=2, d_model=96, d_mlp=384)
  params = _init(config)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [entry.key for entry in path]
    if names[-1] == "scale":
      assert (leaf == 1).all(), names
    elif names[-1] == "bias":
      assert (leaf == 0).all(), names
    else:
      to_residual = {"out", "down"} & set(names)
      expected = 0.01 if to_residual else 0.02
      assert np.std(leaf) == pytest.approx(expected, rel=0.05), names


def test_layers_begin_with_different_values():
  params = transformer.init_params(CONFIGS["llama"], jax.random.key(0))
  kernel = params["blocks"]["mlp"]["up"]["kernel"]
  assert np.abs(kernel[0] - kernel[1]).min() > 0


def test_parameters_are_kept_in_their_dtype(model):
  config = dataclasses.replace(model[0], param_dtype="bfloat16")
  params = _init(config)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def test_unembedding_is_the_embedding_only_if_tied():
  config = CONFIGS["llama"]
  params = _init(config)
  assert transformer.unembedding(config, params).table is params["head"]
  tied = dataclasses.replace(config, tied=True)
  params = _init(tied)
  assert "head" not in params
  table = transformer.unembedding(tied, params).table
  assert table is params["embedding"]


def test_ids_outside_a_table_give_nan():
  config = CONFIGS["gpt2"]
  params = _init(config)
  tokens, positions, start, end = _causal(_random_tokens(1, 4))
  for bad in ((tokens + 40, positions), (tokens, positions + 64)):
    assert np.isnan(_hidden((config, params), *bad, start, end)).all()


def test_rotation_depends_on_relative_position_only():
  config = CONFIGS["llama"]
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))

  def product(query_position, key_position):
    at = lambda p: layers.rotary_angles(config, np.array([[p]], np.int32))
    turned = (
      layers.rotate(jnp.asarray(q, jnp.float32), at(query_position)),
      layers.rotate(jnp.asarray(k, jnp.float32), at(key_position)),
    )
    return float(jnp.sum(turned[0] * turned[1]))

  assert product(9, 4) == pytest.approx(product(6, 1), abs=1e-5)
  assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_rope_scaling_keeps_short_waves_and_stretches_long_ones():
  scaling = model_config.RopeScaling(4.0, 1.0, 4.0, 32)
  config = dataclasses.replace(CONFIGS["llama"], rope_theta=100.0)
  plain = layers.rotary_frequencies(config)
  scaled = layers.rotary_frequencies(
    dataclasses.replace(config, rope_scaling=scaling)
  )
  # 32 positions hold the waves 5.09, 1.61, 0.51 and 0.16 times.
  middle = (32 * 10**-0.5 / (2 * np.pi) - 1) / 3
  factors = [1.0, middle + (1 - middle) / 4, 0.25, 0.25]
  np.testing.assert_allclose(scaled / plain, factors, rtol=1e-5)


def _sliding(window, num_layers=2):
  """Returns a model whose layers all slide, and random parameters."""
  config = dataclasses.replace(
    CONFIGS["llama"],
    num_layers=num_layers,
    window=window,
    sliding=(True,) * num_layers,
  )
  return config, _init(config)


def test_a_sliding_layer_sees_the_last_keys_only():
  model = _sliding(3, num_layers=1)
  tokens = _random_tokens(1, 12)
  changed = tokens.copy()
  changed[0, 5] = (changed[0, 5] + 1) % 40
  before, after = (_hidden(model, *_causal(t)) for t in (tokens, changed))
  moved = np.abs(before - after).max(-1)[0] > 1e-6
  assert moved.tolist() == [5 <= t < 8 for t in range(12)]


def test_mirrored_rows_are_exact_until_a_sequence_outgrows_the_window():
  tokens, positions, _, _ = inputs = _causal(_random_tokens(1, 10))
  index = np.arange(10, dtype=np.int32)[None]
  mirrored = (tokens[:, ::-1], positions[:, ::-1], index, index * 0 + 10)
  for window, is_exact in ((10, True), (9, False)):
    model = _sliding(window)
    difference = _hidden(model, *mirrored)[:, ::-1] - _hidden(model, *inputs)
    assert (np.abs(difference).max() < 1e-5) == is_exact, window


def test_rotation_of_neighbours_is_that_of_halves_of_a_reordered_head():
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  angles = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
  order = [0, 2, 4, 1, 3, 5, 6, 7]
  turned = layers.rotate(x, angles, "neighbours")
  np.testing.assert_allclose(
    turned[..., order], layers.rotate(x[..., order], angles), atol=1e-6
  )
  np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
  assert np.abs(turned - x)[:, 1:, :, :6].min() > 0


def test_no_gradient_of_a_kernel_sums_over_rows_and_tokens_apart():
  """One dimension of R T tokens: see `layers._dot_tokens`."""
  config = CONFIGS["llama"]
  arguments = _causal(np.zeros((5, 7)))
  program = jax.make_jaxpr(
    jax.grad(
      lambda params: transformer.hidden_states(config, params, *arguments).sum()
    )
  )(transformer.param_shapes(config))
  sizes = [
    tuple(
      operand.aval.shape[axis]
      for axis in equation.params["dimension_numbers"][0][0]
    )
    for equation in _equations(program.jaxpr)
    if equation.primitive.name == "dot_general"
    for operand in equation.invars[:1]
  ]
  assert (35,) in sizes
  assert (5, 7) not in sizes


def _equations(jaxpr):
  """Yields the equations of a program, those of its loops included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.core.jaxprs_in_params(equation.params):
      yield from _equations(inner)

"""Adapters: what they add, what their gradient is, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import lora, transformer
from tests import drawn

SIZES = {
  "vocab_size": 64,
  "num_layers": 2,
  "d_model": 32,
  "d_mlp": 48,
  "num_heads": 4,
  "max_positions": 32,
}
FAMILIES = {
  "gpt2": model_config.gpt2(**SIZES),
  "llama": model_config.llama(**SIZES, num_kv_heads=2),
  "gpt_neox": model_config.of_family("gpt_neox", **SIZES),
}
by_family = pytest.mark.parametrize(
  "family",
  [
    "llama",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("gpt2", "gpt_neox")),
  ],
)
MOE = model_config.of_family("mixtral", **SIZES, num_kv_heads=2)
ALL = model_config.Lora(4, 6.0, ".*")


@functools.cache
def _model(family, targets=".*"):
  """Returns a config with adapters, its base, and adapters that add a lot."""
  wanted = dataclasses.replace(ALL, targets=targets)
  config = lora.with_lora(FAMILIES[family], wanted)
  shapes = lora.shapes(config)
  trees = (
    drawn.weights(transformer.param_shapes(config)),
    drawn.new_adapters(shapes),
    drawn.weights(shapes, seed=2, stddev=0.3),
  )
  return config, *jax.tree.map(jax.device_put, trees)


@functools.cache
def _jitted(config):
  return jax.jit(functools.partial(transformer.hidden_states, config))


def _states(config, params):
  tokens = jax.random.randint(jax.random.key(3), (2, 16), 0, 64)
  index = jnp.broadcast_to(jnp.arange(16)[None], tokens.shape)
  return _jitted(config)(params, tokens, index, 0 * index, index + 1)


@by_family
def test_new_adapters_leave_the_base_as_it_is(family):
  config, base, new, far = _model(family)
  plain = dataclasses.replace(config, lora=None)
  expected = _states(plain, base)
  np.testing.assert_array_equal(_states(config, lora.over(base, new)), expected)
  # Off is without them.
  np.testing.assert_array_equal(
    _states(config, lora.over(base, None)), expected
  )
  states = _states(config, lora.over(base, far))
  assert np.abs(states - expected).max() > 0.1


@by_family
def test_adapters_compute_what_merged_weights_compute(family):
  config, base, _, far = _model(family)
  merged = lora.merge(config, base, far)
  plain = dataclasses.replace(config, lora=None)
  np.testing.assert_allclose(
    _states(plain, merged),
    _states(config, lora.over(base, far)),
    rtol=2e-4,
    atol=2e-4,
  )


def test_a_kernel_is_merged_by_hand():
  config, base, _, far = _model("llama")
  merged = lora.merge(config, base, far)
  for part, name, num_in in (
    ("attention", "key", 1),
    ("attention", "out", 2),
    ("mlp", "down", 1),
  ):
    factors = far["lora"]["blocks"][part][name]
    kernel = base["blocks"][part][name]["kernel"][1]
    inputs = int(np.prod(kernel.shape[:num_in]))
    first = np.asarray(factors["first"][1], np.float64).reshape(inputs, 4)
    last = np.asarray(factors["last"][1], np.float64).reshape(4, -1)
    np.testing.assert_allclose(
      merged["blocks"][part][name]["kernel"][1].reshape(inputs, -1),
      np.asarray(kernel).reshape(inputs, -1) + 6.0 / 4 * first @ last,
      rtol=1e-5,
      atol=1e-6,
    )


def test_the_last_factor_alone_has_a_gradient_at_first():
  config, base, new, far = _model("llama", "query|out|down")
  loss = lambda adapters: jnp.sum(_states(config, base | adapters) ** 3)
  gradient = jax.jit(jax.grad(loss))
  at_new, at_far = gradient(new), gradient(far)
  leaves = jax.tree_util.tree_leaves_with_path(at_new)
  assert len(leaves) == 2 * 3
  for (path, start), later in zip(leaves, jax.tree.leaves(at_far)):
    assert jnp.any(start != 0) == (path[-1].key == "last"), path
    assert jnp.any(later != 0), path


@pytest.mark.slow
def test_new_adapters_have_the_variance_that_is_said():
  config = lora.with_lora(
    model_config.llama(**SIZES | {"d_model": 128, "d_mlp": 256}),
    dataclasses.replace(ALL, targets="query|out|down|up|gate"),
  )
  new = lora.init(config, jax.random.key(0))["lora"]["blocks"]
  for part, name, inputs in (
    ("attention", "query", 128),
    ("attention", "out", 128),
    ("mlp", "down", 256),
  ):
    assert not np.any(new[part][name]["last"])
    deviation = np.std(new[part][name]["first"])
    assert deviation == pytest.approx((3 * inputs) ** -0.5, rel=0.1), name
  draws = [new["mlp"][name]["first"] for name in ("up", "gate")]
  assert np.abs(draws[0] - draws[1]).max() > 0.01


def test_only_targets_have_adapters():
  config, base, _, far = _model("llama", "query|value")
  assert sorted(far["lora"]["blocks"]) == ["attention"]
  assert sorted(far["lora"]["blocks"]["attention"]) == ["query", "value"]
  merged = lora.merge(config, base, far)
  differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), merged, base)
  changed = [
    jax.tree_util.keystr(path)
    for path, differs in jax.tree_util.tree_leaves_with_path(differs)
    if differs
  ]
  assert changed == [
    f"['blocks']['attention']['{name}']['kernel']"
    for name in ("query", "value")
  ]


def test_experts_and_the_router_have_none():
  shapes = lora.shapes(dataclasses.replace(MOE, lora=ALL))
  assert sorted(shapes["lora"]["blocks"]) == ["attention"]
  with pytest.raises(ValueError, match="matches no projection"):
    lora.with_lora(MOE, dataclasses.replace(ALL, targets="expert_up"))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"rank": -1}, "lora.rank=-1: at least 1"),
    ({"rank": 33}, "lora.rank=33: a projection is only 16 wide"),
    ({"alpha": 0.0}, "lora.alpha=0: must be above 0"),
    ({"targets": "q"}, "there are down, gate, key, out, query, up, value"),
    ({"targets": "("}, "is not a regular expression"),
  ],
)
def test_what_cannot_be_is_refused(settings, message):
  wanted = dataclasses.replace(ALL, **settings)
  with pytest.raises(ValueError, match="lora") as error:
    lora.with_lora(FAMILIES["llama"], wanted)
  assert message in str(error.value)


def test_factors_are_laid_out_as_the_kernels_are():
  config, _, new, _ = _model("llama")
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  layouts = lora.layouts(mesh, config)
  placed = jax.device_put(new, layouts)["lora"]["blocks"]
  shard = lambda x: x.addressable_shards[0].data.shape
  query, out = placed["attention"]["query"], placed["attention"]["out"]
  assert shard(query["first"]) == (2, 8, 4)
  assert shard(query["last"]) == (2, 4, 2, 8)
  assert shard(out["first"]) == (2, 2, 8, 4)
  assert shard(out["last"]) == (2, 4, 8)

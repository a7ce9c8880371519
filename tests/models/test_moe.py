"""Experts against a loop over them, and what the router is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.data import dataset, loader
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.models import moe, transformer
from dpo_jax.training import optimizers, state, steps
from dpo_jax.training import scorer as scorer_lib

CONFIG = model_config.of_family(
  "mixtral",
  vocab_size=40,
  num_layers=2,
  d_model=16,
  d_mlp=24,
  num_heads=2,
  max_positions=64,
  num_experts=3,
)


def _kernels(num_experts=3):
  rng = np.random.default_rng(0)
  shapes = ((4, 5), (4, 5), (5, 4))
  return tuple(
    rng.normal(size=(num_experts, *shape)).astype(np.float32)
    for shape in shapes
  )


def _routed():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(2, 7, 4)).astype(np.float32)
  weights = rng.uniform(size=(2, 7, 2)).astype(np.float32)
  picked = np.array([rng.permutation(3)[:2] for _ in range(14)])
  return x, weights, picked.reshape(2, 7, 2).astype(np.int32)


def _by_hand(x, weights, picked, kernels):
  """Returns the same, every expert on every token."""
  gate, up, down = kernels
  hidden = jax.nn.silu(jnp.einsum("rtd,edf->rtef", x, gate))
  hidden *= jnp.einsum("rtd,edf->rtef", x, up)
  out = jnp.einsum("rtef,efd->rted", hidden, down)
  out = jnp.take_along_axis(out, picked[..., None], axis=2)
  return jnp.einsum("rtk,rtkd->rtd", weights, out)


def test_sorted_tokens_equal_every_expert_on_every_token():
  x, weights, picked = _routed()
  kernels = _kernels()

  def total(fn):
    def value(x, weights, kernels):
      return jnp.sum(jnp.sin(fn(x, weights, kernels)))

    return jax.value_and_grad(value, (0, 1, 2))(x, weights, kernels)

  actual = total(
    lambda *a: moe.apply_experts(*a[:2], picked, picked >= 0, a[2], "silu")
  )
  expected = total(lambda *a: _by_hand(*a[:2], picked, a[2]))
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_experts_elsewhere_add_nothing_and_take_no_gradient():
  x, weights, picked = _routed()
  kernels = _kernels()
  here = jax.tree.map(lambda kernel: kernel[:2], kernels)

  def total(x, is_here):
    out = moe.apply_experts(x, weights, picked, is_here, here, "silu")
    return jnp.sum(out**2), out

  (_, out), d_x = jax.value_and_grad(total, has_aux=True)(x, picked < 2)
  masked = np.where(picked < 2, weights, 0)
  expected = _by_hand(x, masked, picked, kernels)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  assert np.isfinite(d_x).all()
  (_, out), d_x = jax.value_and_grad(total, has_aux=True)(x, picked < 0)
  assert not np.any(out) and not np.any(d_x)


def test_even_routing_costs_k_and_all_to_one_expert_costs_more():
  even = moe.Routing(
    picked=jnp.full((2, 4), 6.0),
    probability=jnp.full((2, 4), 3.0),
    num_tokens=jnp.float32(12),
  )
  # f = 2/4 and P = 1/4 of every expert: 4 * 4 * 1/2 * 1/4.
  assert float(even.load_balancing_loss()) == pytest.approx(2.0)
  assert float(even.largest_share()) == pytest.approx(1.0)
  one = dataclasses.replace(
    even,
    picked=jnp.array([[12.0, 12, 0, 0]] * 2),
    probability=jnp.array([[12.0, 0, 0, 0]] * 2),
  )
  assert float(one.load_balancing_loss()) == pytest.approx(4.0)
  assert float(one.largest_share()) == pytest.approx(2.0)


@jax.jit
def _init():
  return transformer.init_params(CONFIG, jax.random.key(0))


def _row(length):
  tokens = np.random.default_rng(length).integers(0, 40, (1, 12))
  index = np.arange(12)[None]
  end = np.where(index < length, index + 1, 0)
  return [x.astype(np.int32) for x in (tokens, index, 0 * index, end)]


@jax.jit
def _routing(params, rows):
  _, routing = transformer.hidden_states_and_routing(CONFIG, params, *rows)
  return routing


def test_padding_is_not_counted_and_halves_add_up():
  params = _init()
  rows = lambda *lengths: [np.concatenate(x) for x in zip(*map(_row, lengths))]
  both, first, second = rows(5, 9), rows(5, 0), rows(0, 9)
  routing = _routing(params, both)
  assert float(routing.num_tokens) == 14
  np.testing.assert_allclose(routing.picked.sum(-1), [28, 28])
  np.testing.assert_allclose(routing.probability.sum(-1), [14, 14], rtol=1e-5)
  halves = jax.tree.map(
    jnp.add, _routing(params, first), _routing(params, second)
  )
  for one, other in zip(jax.tree.leaves(halves), jax.tree.leaves(routing)):
    np.testing.assert_allclose(one, other, rtol=1e-5)


def _step(weight, microbatch_rows):
  """Returns the metrics and the parameters after one step."""
  rng = np.random.default_rng(0)
  lists = lambda: [
    rng.integers(1, 40, size=n).tolist() for n in rng.integers(3, 9, size=4)
  ]
  tokens = dataset.TokenDataset.from_lists(lists(), lists(), lists())
  batch = loader.Loader(
    tokens, batch_size=4, row_length=32, microbatch_rows=microbatch_rows
  ).batch(0)
  schedule = optimizers.make_schedule(
    1e-2, schedule="constant", warmup_steps=0, total_steps=1
  )
  optimizer = optimizers.make_optimizer("adamw", schedule, clip=0.0)
  settings = {"beta": 0.5, "gamma": 0.1, "label_smoothing": 0.0}
  objective = objectives.make_objective("simpo", settings)
  scorer = scorer_lib.Scorer(
    CONFIG, None, objective, chunk_length=16, router_loss=weight
  )
  params = _init()
  now = state.TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
  )
  step = jax.jit(steps.make_train_step(scorer, optimizer, schedule))
  now, metrics = step(now, batch)
  return {k: float(v) for k, v in metrics.items()}, now.params


@pytest.mark.slow
def test_the_router_learns_from_the_weighted_loss_only():
  plain, without = _step(0.0, 4)
  balanced, with_loss = _step(10.0, 4)
  assert plain["loss"] == balanced["loss"]
  for key in ("router/load_balancing_loss", "router/largest_share"):
    assert plain[key] == balanced[key] >= 1.0
  assert balanced["grad_norm"] > plain["grad_norm"]
  router = lambda params: np.asarray(params["blocks"]["mlp"]["router"])
  assert np.abs(router(without) - router(with_loss)).max() > 1e-3


@pytest.mark.slow
def test_metrics_of_the_router_do_not_depend_on_the_split():
  one, _ = _step(0.0, 4)
  two, _ = _step(0.0, 1)
  assert two.keys() == one.keys()
  for key, value in one.items():
    assert two[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key

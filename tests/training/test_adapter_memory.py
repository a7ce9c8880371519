"""How much memory a step takes, from its program alone: no weights are made.

At the shapes of Llama 7B over eight devices: of a TPU topology (v5p:2x2x2)
where libtpu is installed, else of the CPU. What is compared are whole steps of
the same batch, so that activations, which all have, cancel.
"""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from dpo_jax import sharding
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.models import lora, presets, transformer
from dpo_jax.training import optimizers, state, steps
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.types import Batch, Rows

NUM_DEVICES = 8
LOSSES = {"dpo": {"beta": 0.1}, "sft": {}}


def _devices():
  """Returns devices to compile for, and the dtype that suits them."""
  if importlib.util.find_spec("libtpu") is None:
    return jax.devices(), "float32"
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:2x2x2"
  )
  return topology.devices, "bfloat16"


def _batch(mesh, length):
  """Returns the shapes of 8 pairs in two microbatches of a row a device."""
  rows, whole = sharding.rows(mesh, leading=1), sharding.replicated(mesh)
  like = jax.ShapeDtypeStruct((2, NUM_DEVICES, length), jnp.int32)
  like = like.update(sharding=rows)
  scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  lengths = jax.ShapeDtypeStruct((8, 2), jnp.int32, sharding=whole)
  return Batch(Rows(*[like] * 8), scalar, lengths)


def _abstract(shapes, layouts):
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    shapes,
    layouts,
  )


def _memory(config, mesh, *, loss, reference, length):
  """Returns bytes of arguments and of temporaries that a device needs.

  Args:
    config: the policy's decoder, with its adapters.
    mesh: devices, which need not be there.
    loss: its name.
    reference: `off`, the base alone; `copy`, a frozen second one; or None.
    length: tokens in a row.
  """
  plain = dataclasses.replace(config, lora=None)
  scorer = scorer_lib.Scorer(
    config,
    plain if reference else None,
    objectives.make_objective(loss, LOSSES[loss]),
    chunk_length=128,
  )
  rate = lambda step: 1e-4 + 0 * step
  optimizer = optimizers.make_optimizer("adamw", rate, clip=0.0)
  weights = _abstract(
    transformer.param_shapes(plain), transformer.layouts(mesh, plain)
  )
  shapes, layouts = lora.shapes(config), lora.layouts(mesh, config)
  now = state.TrainState(
    step=jax.ShapeDtypeStruct(
      (), jnp.int32, sharding=sharding.replicated(mesh)
    ),
    params=_abstract(shapes, layouts),
    opt_state=_abstract(
      jax.eval_shape(optimizer.init, shapes),
      state.opt_state_shardings(optimizer, shapes, layouts, mesh),
    ),
    reference=weights if reference == "copy" else None,
    base=weights,
  )
  step = jax.jit(
    steps.make_train_step(scorer, optimizer, rate), donate_argnums=0
  )
  with jax.set_mesh(mesh):
    compiled = step.lower(now, _batch(mesh, length)).compile()
  memory = compiled.memory_analysis()
  return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def _assert_one_copy(config, devices, length):
  """Asserts what adapters are for; returns the figures, in bases."""
  mesh = sharding.make_mesh(devices=list(devices))
  memory = lambda **kwargs: np.array(
    _memory(config, mesh, length=length, **kwargs), float
  )
  shapes = jax.tree.leaves(transformer.param_shapes(config))
  base = sum(x.size * x.dtype.itemsize for x in shapes) / NUM_DEVICES
  off = memory(loss="dpo", reference="off") / base
  copy = memory(loss="dpo", reference="copy") / base
  none = memory(loss="sft", reference=None) / base
  figures = {"off": off, "copy": copy, "none": none}
  print({name: x.round(3).tolist() for name, x in figures.items()}, base / 1e9)
  assert 1 < off[0] < 1.15, figures
  assert copy[0] - off[0] == pytest.approx(1, abs=0.02), figures
  # Arguments and temporaries, less what a step without a reference has.
  assert off.sum() - none.sum() < 0.15, figures


@pytest.mark.slow
def test_a_reference_of_adapters_at_7b_has_no_second_copy():
  devices, dtype = _devices()
  config = presets.make_config(
    "llama-7b", dtype=dtype, param_dtype=dtype, remat="full"
  )
  config = lora.with_lora(config, model_config.Lora(8, 16.0, ".*"))
  _assert_one_copy(config, devices, 2048)

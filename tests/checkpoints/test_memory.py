"""Host memory while models of several files are read and written.

On a CPU the arrays of devices are in the host's memory too, so what is
measured is the peak of the resident set, less what was resident before, less
the bytes of the device arrays that came: what a machine with accelerators
would need beside them. Pages of memory-mapped files count.
"""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.data.sources import synthetic
from dpo_jax.models import config as model_config
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.models.huggingface import names as huggingface_names
from dpo_jax.models.huggingface import safetensors

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NUM_SHARDS = 4
# 1.9 GB in float32.
CONFIG = model_config.llama(
  vocab_size=32_000,
  num_layers=24,
  d_model=1024,
  d_mlp=4096,
  num_heads=16,
  max_positions=512,
)
SCRIPT = """
import json, os, sys
import jax, jax.numpy as jnp
from dpo_jax import sharding
from dpo_jax.inference import export
from dpo_jax.run import trainer
from dpo_jax.checkpoints import manager, run_folder
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface

what, folder, target = sys.argv[1:]

def memory(key):
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith(key))
  return 1024 * int(line.split()[1])

def num_bytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))

def measured(function):
  jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))
  before = memory("VmRSS")
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # The peak begins anew.
  result = function()
  came = (arrived or [num_bytes(result)])[0]
  print(json.dumps({"above": memory("VmHWM") - before - came, "came": came}))
  return result

arrived = []
mesh = sharding.make_mesh()
config = huggingface.read_config(folder + "/model" * (what == "run"))
layouts = transformer.layouts(mesh, config)
if what == "run":
  save_model = huggingface.save_model
  def spied(target, config, params, **kwargs):
    arrived.append(num_bytes(params))
    save_model(target, config, params, **kwargs)
  huggingface.save_model = spied
  measured(lambda: export.write(folder, target, max_shard_bytes=5e8))
else:
  params = measured(lambda: huggingface.load_params(folder, config, layouts))
  measured(
    lambda: huggingface.save_model(
      target + "/exported", config, params, max_shard_bytes=5e8
    )
  )
  model = target + "/run/model"
  os.makedirs(model)
  huggingface.write_config(model, config)
  with manager.Manager(target + "/run", every=1, keep=1) as checkpoints:
    checkpoints.save(1, {"params": params})
"""


def _run(num_devices, *args):
  """Returns what the script measured, in lines."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    "PYTHONPATH": str(REPOSITORY),
    # Blocks above 1 MB go back to the system when freed, so that what is held
    # is measured and not what the allocator keeps for later.
    "MALLOC_MMAP_THRESHOLD_": "1000000",
  }
  out = subprocess.run(
    [sys.executable, "-c", SCRIPT, *map(str, args)],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  return [json.loads(x) for x in out.splitlines() if x.startswith("{")]


def _write(folder):
  """Writes a model of random weights in four files."""
  outputs = []
  folder.mkdir()
  for place in huggingface_names.places(CONFIG).values():
    layers = range(CONFIG.num_layers) if place.tensor.num_stacked else [-1]
    for layer in layers:
      seed = sum(map(ord, place.tensor.name)) + 1000 * layer + 1000
      shape = place.file_shape

      def draw(seed=seed, shape=shape):
        return np.random.default_rng(seed).random(shape, np.float32)

      name = place.tensor.name.format(layer)
      dtype = np.dtype(np.float32)
      outputs.append(safetensors.Output(name, shape, dtype, draw))
  total, done = sum(x.num_bytes for x in outputs), 0
  shards = [[] for _ in range(NUM_SHARDS)]
  for output in outputs:
    shards[done * NUM_SHARDS // total].append(output)
    done += output.num_bytes
  names = [huggingface.SHARD.format(i + 1, NUM_SHARDS) for i in range(4)]
  for name, shard in zip(names, shards):
    safetensors.write_file(str(folder / name), shard)
  weight_map = {x.name: n for n, shard in zip(names, shards) for x in shard}
  index = {"weight_map": weight_map}
  huggingface.write_json(str(folder / huggingface.INDEX), index)
  huggingface.write_config(str(folder), CONFIG)
  return max(os.path.getsize(folder / name) for name in names)


def _tensors(folder):
  return {
    name: stored
    for path in folder.glob("*.safetensors")
    for name, stored in safetensors.open_file(str(path)).items()
  }


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 8])
def test_host_memory_is_below_the_largest_file(tmp_path, num_devices):
  folder = tmp_path / "model"
  largest = _write(folder)
  stored = _tensors(folder)
  total = sum(math.prod(x.shape) * 4 for x in stored.values())
  assert total > 1.8e9 and largest < 0.3 * total
  read, written = _run(num_devices, "folder", folder, tmp_path)
  assert read["came"] == total and written["came"] == 0
  synthetic.make_tokenizer().save_pretrained(tmp_path / "run" / "model")
  (exported,) = _run(num_devices, "run", tmp_path / "run", tmp_path / "again")
  assert exported["came"] == total
  above = {
    "read": read["above"],
    "written": written["above"],
    "run exported": exported["above"],
  }
  print({name: f"{x / largest:.2f}" for name, x in above.items()}, largest)
  for target in ("exported", "again"):
    found = _tensors(tmp_path / target)
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
      assert np.array_equal(found[name].view(), tensor.view()), name
  assert max(above.values()) < 1.3 * largest, above

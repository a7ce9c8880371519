"""The benchmark command, and the operations that it counts."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax.benchmarks import sampling as benchmark_sampling
from dpo_jax.benchmarks import train_step as benchmark
from dpo_jax.models import incremental, presets, transformer
from tests import test_end_to_end


def test_needed_operations_by_hand():
  config = presets.make_config(
    "tiny", vocab_size=100
  )  # 2 layers, d 64, mlp 176, 4 heads of 16, 2 key heads
  lengths = np.array([[3, 2, 1]])
  block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176
  # Keys seen: prompt 1 + 2 + 3, chosen 4 + 5, rejected 4.
  forward = (
    2 * 2 * block * 6 + 4 * 2 * 64 * (6 + 9 + 4) + 2 * 100 * 64 * (2 + 1)
  )
  got = benchmark.needed_flops(config, lengths, has_reference=True)
  assert got == 4 * forward
  assert benchmark.needed_flops(config, lengths, has_reference=False) == (
    3 * forward
  )


def test_needed_operations_agree_with_the_compilers_count():
  """One full row without a reference: XLA's own count of a forward pass."""
  config = presets.make_config("bench-58m", vocab_size=1000)
  params = transformer.param_shapes(config)
  block = benchmark.needed_flops(
    config, np.array([[64, 0, 0]]), has_reference=False
  )
  matmuls = (
    3
    * 2
    * 64
    * sum(
      np.prod(x.shape) for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2
    )
  )
  attention = 3 * 4 * config.num_layers * config.d_model * 64 * 65 / 2
  np.testing.assert_allclose(block, matmuls + attention)


def test_the_command_prints_and_writes_both_layouts(tmp_path):
  output = tmp_path / "speed.json"
  process = test_end_to_end.start(
    "--config=configs/benchmark.py",
    "--config.data.source=synthetic",
    "--config.data.path=pairs:100",
    "--config.data.max_length=64",
    f"--config.data.cache_dir={tmp_path}",
    "--config.model.preset=tiny",
    "--config.model.vocab_size=0",
    "--rounds=2",
    "--steps=2",
    f"--output={output}",
    module="launch.benchmark",
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, out + err
  assert "pairs/s" in out and "peak memory" in out
  variants = json.loads(output.read_text())["variants"]
  mirrored, padded = variants["mirrored"], variants["padded"]
  assert mirrored["needed_flops_per_step"] == padded["needed_flops_per_step"]
  assert mirrored["padding_fraction"] < padded["padding_fraction"]
  assert 0 < mirrored["share_of_matmul_rate"] < 1
  # The documented way to compare with another program reads that output.
  rate = [line for line in out.splitlines() if "pairs/s" in line][0]
  script = "docs/results/side_by_side.py"
  done = subprocess.run(
    [
      sys.executable,
      script,
      "--rounds=1",
      f"a=echo '{rate}'",
      "b=echo 1.0 pairs/s",
    ],
    capture_output=True,
    text=True,
    check=True,
    cwd=test_end_to_end.REPOSITORY,
  )
  assert "a is 1.00 times as fast" in done.stdout


def test_needed_work_of_a_token_by_hand():
  config = presets.make_config("tiny", vocab_size=100)
  weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176) + 100 * 64
  needed = benchmark_sampling.needed_work(config, 3, 10, 20)
  assert needed["weight_bytes"] == 4 * weights
  # Keys and values of 2 layers and 2 heads of 16, of 10 + 20 / 2 tokens.
  assert needed["cache_bytes"] == 4 * 3 * 20 * 2 * 2 * 2 * 16
  assert needed["flops"] == 2 * 3 * weights + 4 * 3 * 2 * 64 * 20


@pytest.mark.parametrize("num_experts", [0, 4])
def test_products_are_those_that_a_token_needs(num_experts):
  config = dataclasses.replace(
    presets.make_config("tiny", vocab_size=100),
    num_experts=num_experts,
    experts_per_token=num_experts // 2,
  )
  params = transformer.init_params(config, jax.random.key(0))
  products, arguments = benchmark_sampling._products(
    config, incremental.unstack(config, params), 8
  )
  needed = benchmark_sampling.needed_work(config, 8, 0, 0)["flops"]
  # It counts all experts: half are picked, in 2 layers of 3 matrices each.
  needed -= 2 * 8 * 2 * 3 * 64 * 176 * num_experts // 2
  counted = products.lower(*arguments).cost_analysis()["flops"]
  assert counted == pytest.approx(needed, rel=1e-4)


@pytest.mark.slow
def test_the_command_times_sampling(tmp_path):
  output = tmp_path / "speed.json"
  process = test_end_to_end.start(
    "sample",
    "--config=configs/benchmark.py",
    "--config.model.preset=tiny",
    "--config.model.vocab_size=100",
    "--rows=2,8",
    "--max_new_tokens=200",
    "--rounds=1",
    f"--output={output}",
    module="launch.benchmark",
  )
  out, err = process.communicate(timeout=200)
  assert process.returncode == 0, out + err
  assert "of the limit" in out
  variants = json.loads(output.read_text())["variants"]
  assert variants.keys() == {"2", "8"}
  for row in variants.values():
    assert row["tokens_per_second"] > 0
    assert all(share > 0 for share in row["share_of_limit"].values())
    # Of its own products, so few rows cannot be above the large ones' rate.
    assert row["share_of_limit"]["products"] > row["share_of_limit"]["matmul"]

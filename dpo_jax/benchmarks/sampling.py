"""Speed of sampling, against what memory and matmuls allow."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import sharding
from dpo_jax.benchmarks import train_step as benchmark
from dpo_jax.models import config as model_config
from dpo_jax.models import presets, transformer
from dpo_jax.sampling import decode
from dpo_jax.types import Params

REPEATS = 20  # of a pass over memory, and of a token's products


def run(
  config: ConfigDict,
  *,
  rows: Sequence[int],
  prompt_length: int,
  max_new_tokens: int,
  num_rounds: int,
) -> dict[str, Any]:
  """Returns what was measured, and prints a line per turn.

  No response ends early. What a token takes is the time of all tokens less
  that of the first, by the number of others, so prompts are left out.

  Three limits are reported, each as a share of the time taken: `memory`, all
  that a token reads, at the rate of a pass over memory; `matmul`, its
  operations, at the rate of large square products; and `products`, its matrix
  products alone, at their own shapes, run in turn with sampling, and after
  them its keys and values read at the rate of memory.

  Args:
    config: of the model: a preset, with random weights.
    rows: how many responses grow at once, compared in turns.
    prompt_length: tokens of each prompt.
    max_new_tokens: of each response, at least 2.
    num_rounds: turns of each.
  """
  model = presets.make_config(
    config.model.preset,
    vocab_size=config.model.vocab_size,
    dtype=sharding.matmul_dtype(config.model.dtype),
  )
  mesh = sharding.make_mesh(**config.mesh)
  layouts = transformer.layouts(mesh, model)
  init = lambda: transformer.init_params(model, jax.random.key(config.seed))
  flops_rate = benchmark.matmul_rate(model.dtype)
  with jax.set_mesh(mesh):
    sampler = decode.Sampler(model, jax.jit(init, out_shardings=layouts)())
    prompts = np.random.default_rng(config.seed).integers(
      0, model.vocab_size, (max(rows), prompt_length)
    )
    products = {n: _products(model, sampler.params, n) for n in rows}
    least: dict[int, list[float]] = {count: [] for count in rows}
    seconds: dict[int, list[float]] = {count: [] for count in rows}
    for number in range(num_rounds + 1):
      for count in rows:
        first, whole = (
          _time(sampler, prompts[:count], length)
          for length in (1, max_new_tokens)
        )
        multiplied = _time_products(*products[count])
        if number == 0:  # compiled
          continue
        least[count].append(multiplied)
        seconds[count].append((whole - first) / (max_new_tokens - 1))
        rate = count / seconds[count][-1]
        print(f"round {number} {count} rows: {rate:.1f} tokens/s", flush=True)
  variants = {}
  for count, times in seconds.items():
    work = needed_work(model, count, prompt_length, max_new_tokens)
    num_bytes = work["weight_bytes"] + work["cache_bytes"]
    bytes_rate = memory_rate(num_bytes)
    limits = {
      "memory": num_bytes / bytes_rate,
      "matmul": work["flops"] / flops_rate,
      "products": statistics.median(least[count])
      + work["cache_bytes"] / bytes_rate,
    }
    taken = statistics.median(times)
    variants[str(count)] = {
      "tokens_per_second": count / taken,
      "seconds_per_token": taken,
      "share_of_limit": {name: x / taken for name, x in limits.items()},
      "bytes_per_second": bytes_rate,
    }
  return {
    "device": str(jax.devices()[0].device_kind),
    "num_devices": jax.device_count(),
    "dtype": model.dtype,
    "matmul_flops_per_second": flops_rate,
    "prompt_length": prompt_length,
    "max_new_tokens": max_new_tokens,
    "variants": variants,
  }


def table(results: dict[str, Any]) -> str:
  """Returns the results of `run` as lines of text."""
  names = ("memory", "matmul", "products")
  lines = [
    f"{'rows':>6} {'tokens/s':>10}  of the limit of"
    + "".join(f" {name:>9}" for name in names)
    + "   memory GB/s"
  ]
  for count, row in results["variants"].items():
    lines.append(
      f"{count:>6} {row['tokens_per_second']:>10.1f} {'':>16}"
      + "".join(f" {row['share_of_limit'][name]:>9.1%}" for name in names)
      + f" {row['bytes_per_second'] / 1e9:>13.1f}"
    )
  lines.append(
    f"{results['num_devices']} x {results['device']}, {results['dtype']};"
    f" prompts of {results['prompt_length']} tokens,"
    f" {results['max_new_tokens']} new; matmul"
    f" {results['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"
  )
  return "\n".join(lines)


def memory_rate(num_bytes: float) -> float:
  """Returns bytes/s, read and written, of passes over memory in place.

  On all devices together, which hold `num_bytes` in all: what fits a cache is
  read as fast as the cache is.
  """
  count = jax.local_device_count()
  length = max(int(num_bytes) // (4 * jax.device_count()), 1)
  add = jax.pmap(lambda x: x + 1, donate_argnums=0)
  x = add(jnp.ones((count, length), jnp.float32)).block_until_ready()
  start = time.perf_counter()
  for _ in range(REPEATS):
    x = add(x)
  x.block_until_ready()
  seconds = time.perf_counter() - start
  return 2 * 4 * length * jax.device_count() * REPEATS / seconds


def needed_work(
  config: model_config.ModelConfig,
  rows: int,
  prompt_length: int,
  max_new_tokens: int,
) -> dict[str, float]:
  """Returns what one token of each row reads and multiplies, on average.

  `weight_bytes`, `cache_bytes` (of keys and values) and `flops`. Weights are
  read once for all rows, in the dtype computed in, keys and values as many as
  a token sees. The table of an untied embedding is not counted, nor are the
  logits; all experts are.
  """
  item = jnp.dtype(config.dtype).itemsize
  shapes = transformer.param_shapes(config)
  blocks = sum(
    math.prod(leaf.shape)
    for leaf in jax.tree.leaves(shapes["blocks"])
    if leaf.ndim > 2
  )
  weights = blocks + config.vocab_size * config.d_model
  seen = prompt_length + max_new_tokens / 2
  kept = 2 * config.num_layers * config.num_kv_heads * config.head_width
  width = config.num_heads * config.head_width
  return {
    "weight_bytes": item * weights,
    "cache_bytes": item * rows * seen * kept,
    "flops": 2 * rows * weights + 4 * rows * config.num_layers * width * seen,
  }


def _products(
  config: model_config.ModelConfig, params: Params, rows: int
) -> tuple[Callable[..., jax.Array], Params]:
  """Returns a program that runs a token's matrix products, and its argument.

  It does so `REPEATS` times, with weights as a sampler has them; rows are
  spread evenly over experts. Attention's products are not among them.
  """
  unembedding = transformer.unembedding(config, params)
  blocks = [
    params[transformer.BLOCK.format(i)] for i in range(config.num_layers)
  ]

  def product(value, path, kernel):
    fill = lambda *shape: jnp.full(shape, value, kernel.dtype)
    if path[-1].key.startswith("expert_"):
      sent = -(-rows * config.experts_per_token // config.num_experts)
      x = fill(config.num_experts, sent, kernel.shape[1])
      return jnp.einsum("erd,edm->erm", x, kernel)
    contracted = kernel.ndim - 1 if path[-2].key == "out" else 1
    x = sharding.constrain(
      fill(rows, *kernel.shape[:contracted]), "rows", *[None] * contracted
    )
    return jnp.tensordot(x, kernel, contracted)

  @jax.jit
  def run_products(unembedding, blocks):
    def repeat(_, value):
      for path, kernel in jax.tree_util.tree_leaves_with_path(blocks):
        if kernel.ndim > 1:
          # Each waits for the one before, and is computed whole.
          done = jax.lax.optimization_barrier(product(value, path, kernel))
          value += done.ravel()[0].astype(value.dtype) * 1e-20
      states = jnp.full((rows, config.d_model), value, config.dtype)
      states = sharding.constrain(states, "rows", None)
      logits = jax.lax.optimization_barrier(unembedding.logits(states))
      return value + logits[0, 0] * 1e-20

    return jax.lax.fori_loop(0, REPEATS, repeat, jnp.float32(1.0))

  return run_products, (unembedding, blocks)


def _time_products(run_products, arguments):
  """Returns seconds of the products of a token."""
  start = time.perf_counter()
  run_products(*arguments).block_until_ready()
  return (time.perf_counter() - start) / REPEATS


def _time(sampler, prompts, max_new_tokens):
  """Returns seconds to sample each prompt once."""
  start = time.perf_counter()
  sampler.sample(
    prompts.tolist(),
    decode.Settings(max_new_tokens),
    seed=0,
    stop_ids=(),
    batch_rows=len(prompts),
  )
  return time.perf_counter() - start

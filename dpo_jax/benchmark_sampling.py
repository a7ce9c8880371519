"""Speed of sampling, against what memory and matmuls allow."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import benchmark, sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.sampling import decode

REPEATS = 20  # of a pass over memory


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

  Args:
    config: of the model: a preset, with random weights.
    rows: how many responses grow at once, compared in turns.
    prompt_length: tokens of each prompt.
    max_new_tokens: of each response, at least 2.
    num_rounds: turns of each.
  """
  model = model_config.make_config(
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
    seconds: dict[int, list[float]] = {count: [] for count in rows}
    for number in range(num_rounds + 1):
      for count in rows:
        first, whole = (
          _time(sampler, prompts[:count], length)
          for length in (1, max_new_tokens)
        )
        if number == 0:  # compiled
          continue
        seconds[count].append((whole - first) / (max_new_tokens - 1))
        rate = count / seconds[count][-1]
        print(f"round {number} {count} rows: {rate:.1f} tokens/s", flush=True)
  variants = {}
  for count, times in seconds.items():
    needed = needed_work(model, count, prompt_length, max_new_tokens)
    limits = {"bytes": memory_rate(needed["bytes"]), "flops": flops_rate}
    least = max(needed[name] / limits[name] for name in limits)
    taken = statistics.median(times)
    variants[str(count)] = {
      "tokens_per_second": count / taken,
      "seconds_per_token": taken,
      "limit": max(needed, key=lambda name: needed[name] / limits[name]),
      "share_of_limit": least / taken,
      "bytes_per_second": limits["bytes"],
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
  lines = [
    f"{'rows':>6} {'tokens/s':>10} {'of the limit':>13}  limit   memory GB/s"
  ]
  names = {"bytes": "memory", "flops": "matmul"}
  for count, row in results["variants"].items():
    lines.append(
      f"{count:>6} {row['tokens_per_second']:>10.1f}"
      f" {row['share_of_limit']:>13.1%}  {names[row['limit']]}"
      f" {row['bytes_per_second'] / 1e9:>12.1f}"
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
  """Returns bytes read and operations of one token of each row, on average.

  Weights are read once for all rows, in the dtype computed in, keys and
  values as many as a token sees. The table of an untied embedding is not
  counted, nor are the logits; all experts are.
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
    "bytes": item * (weights + rows * seen * kept),
    "flops": 2 * rows * weights + 4 * rows * config.num_layers * width * seen,
  }


def _time(sampler, prompts, max_new_tokens):
  """Returns seconds to sample each prompt once."""
  start = time.perf_counter()
  sampler.sample(
    prompts.tolist(),
    decode.Settings(max_new_tokens),
    seed=0,
    eos_id=-1,
    batch_rows=len(prompts),
  )
  return time.perf_counter() - start

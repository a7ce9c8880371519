"""Speed and memory of the train step, layouts and references in turns."""

import copy
import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dpo_jax.data import placement
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.run import experiment as experiment_lib
from dpo_jax.run import trainer
from dpo_jax.run.experiment import Experiment

MATMUL_SIZE = 2048
WARMUP_STEPS = 2


def run(
  config: ConfigDict,
  *,
  layouts: Sequence[str],
  references: Sequence[str] = (),
  num_rounds: int,
  num_steps: int,
) -> dict[str, Any]:
  """Returns what was measured, and prints a line per turn.

  Every variant, a layout with a reference mode, trains on the same pairs; its
  first two steps are not timed, nor is the pass that fills a cache.

  Args:
    config: of the work; `data.layout` and `reference.mode` are replaced.
    layouts: compared in turns A B A B.
    references: reference modes, compared alike; by default the config's.
    num_rounds: turns of each.
    num_steps: steps in a turn.
  """
  variants = itertools.product(layouts, references or [config.reference.mode])
  runs = {
    f"{layout} {mode}" if len(references) > 1 else layout: _Run(
      config, layout, mode
    )
    for layout, mode in variants
  }
  dtype = next(iter(runs.values())).experiment.scorer.policy.dtype
  times: dict[str, list[float]] = {name: [] for name in runs}
  rates: list[float] = []
  for number in range(num_rounds):
    rates.append(matmul_rate(dtype))
    for name, timed in runs.items():
      seconds = timed.time_steps(num_steps)
      times[name].append(seconds)
      print(
        f"round {number + 1} {name}: {timed.pairs / seconds:.3f} pairs/s;"
        f" matmul {rates[-1] / 1e9:.0f} GFLOP/s {dtype}",
        flush=True,
      )
  rate = statistics.median(rates)
  first = times[next(iter(runs))]
  summaries = {}
  for name, timed in runs.items():
    summaries[name] = timed.summary(statistics.median(times[name]), rate)
    # The median over rounds, so that a slow spell of the machine cancels.
    summaries[name]["speed_ratio"] = statistics.median(
      theirs / ours for theirs, ours in zip(first, times[name], strict=True)
    )
  return {
    "device": str(jax.devices()[0].device_kind),
    "num_devices": jax.device_count(),
    "dtype": dtype,
    "matmul_flops_per_second": rate,
    "process_peak_bytes": _peak_bytes(),
    "variants": summaries,
  }


def table(results: dict[str, Any]) -> str:
  """Returns the results of `run` as lines of text."""
  variants = results["variants"]
  width = max(map(len, ["variant", *variants]))
  lines = [
    f"{'variant':<{width}} {'pairs/s':>8} {'tokens/s':>9} {'padding':>8}"
    f" {'of matmul rate':>14} {'program GB':>10} {'speed':>6}"
  ]
  for name, row in variants.items():
    lines.append(
      f"{name:<{width}} {row['pairs_per_second']:>8.3f}"
      f" {row['tokens_per_second']:>9.0f} {row['padding_fraction']:>8.1%}"
      f" {row['share_of_matmul_rate']:>14.1%}"
      f" {row['program_bytes'] / 1e9:>10.2f} {row['speed_ratio']:>6.2f}"
    )
  rate = results["matmul_flops_per_second"] / 1e9
  lines.append(
    f"{results['num_devices']} x {results['device']}, {results['dtype']};"
    f" matmul {rate:.0f} GFLOP/s; peak memory of the process"
    f" {results['process_peak_bytes'] / 1e9:.2f} GB"
  )
  return "\n".join(lines)


def matmul_rate(dtype: str) -> float:
  """Returns FLOP/s of square matrix products on all devices together."""
  count = jax.local_device_count()
  multiply = jax.pmap(lambda a: jnp.dot(a, a))
  a = jnp.ones((count, MATMUL_SIZE, MATMUL_SIZE), dtype)
  multiply(a).block_until_ready()
  repeats = 5
  start = time.perf_counter()
  for _ in range(repeats):
    b = multiply(a)
  b.block_until_ready()
  seconds = time.perf_counter() - start
  return 2 * MATMUL_SIZE**3 * repeats * jax.device_count() / seconds


def needed_flops(
  config: model_config.ModelConfig, lengths: np.ndarray, *, has_reference: bool
) -> float:
  """Returns the operations that a step on these pairs cannot do without.

  Matrix products only, every prompt once: forward and backward (three times
  a forward) of the policy, and a forward of the reference. The vocabulary
  meets scored positions only, an expert the tokens that are sent to it; a
  query meets the keys that it sees, windows left aside.

  Args:
    config: the decoder; the reference is taken to be alike.
    lengths: [n,1+C], tokens of the prompt and of each response.
    has_reference: whether a reference is computed too.
  """
  shapes = transformer.param_shapes(config)
  seen_by = lambda path: (
    config.experts_per_token / config.num_experts
    if path[-1].key.startswith("expert_")
    else 1
  )
  block = sum(
    math.prod(leaf.shape) * seen_by(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["blocks"])
    if leaf.ndim > 2
  )
  prompt, *responses = lengths.astype(np.float64).T
  tokens = lengths.sum()
  triangle = lambda n: n * (n + 1) / 2
  seen = sum(
    triangle(prompt + response) - triangle(prompt) for response in responses
  )
  seen = (seen + triangle(prompt)).sum()
  width = config.num_heads * config.head_width
  forward = 2 * block * tokens
  forward += 4 * config.num_layers * width * seen
  forward += 2 * config.vocab_size * config.d_model * lengths[:, 1:].sum()
  return float(forward * (4 if has_reference else 3))


class _Run:
  """A compiled step of one variant, and its state."""

  def __init__(self, config: ConfigDict, layout: str, mode: str):
    config = copy.deepcopy(config)
    config.data.layout = layout
    config.reference.mode = mode
    self.experiment: Experiment = experiment_lib.build(config)
    self.pairs = config.batch_size
    self._next = 0
    with jax.set_mesh(self.experiment.mesh):
      self.experiment, self._state = trainer.init_state(self.experiment)
      first = trainer.host_batch(self.experiment, 0).batch
      self._step = trainer.compile_train_step(
        self.experiment, self._state, first
      )
    self._timed: list[int] = []
    self.time_steps(WARMUP_STEPS)
    self._timed = []

  def time_steps(self, count: int) -> float:
    """Returns seconds a step, batches made beforehand."""
    numbers = [self._next + k for k in range(count)]
    self._next += count
    self._timed += numbers
    batches = [trainer.host_batch(self.experiment, k).batch for k in numbers]
    with jax.set_mesh(self.experiment.mesh):
      jax.block_until_ready(batches)
      start = time.perf_counter()
      for batch in batches:
        self._state, metrics = self._step(self._state, batch)
      jax.block_until_ready(metrics)
      return (time.perf_counter() - start) / count

  def summary(self, seconds: float, rate: float) -> dict[str, float]:
    """Returns the figures of a step that takes this long."""
    batches, scorer = self.experiment.loader, self.experiment.scorer
    lengths = np.concatenate(
      [batches.dataset.lengths[batches.indices(k)] for k in self._timed]
    )
    count = len(self._timed)
    flops = needed_flops(
      scorer.policy, lengths, has_reference=scorer.reference is not None
    )
    # Unique tokens: the padded layout's second copy of a prompt does no work.
    tokens = int(placement.span_lengths(lengths, "mirrored").sum())
    memory = self._step.memory_analysis()
    positions = sum(
      trainer.host_batch(self.experiment, k).num_positions for k in self._timed
    )
    return {
      "pairs_per_second": self.pairs / seconds,
      "tokens_per_second": tokens / count / seconds,
      "padding_fraction": 1 - tokens / positions,
      "needed_flops_per_step": flops / count,
      "share_of_matmul_rate": flops / count / seconds / rate,
      "program_bytes": memory.argument_size_in_bytes
      + memory.temp_size_in_bytes,
    }


def _peak_bytes() -> int:
  """Returns the most memory in use so far: of the device, or resident."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

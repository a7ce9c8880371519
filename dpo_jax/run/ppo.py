"""What a run of PPO does in a step: an iteration over a batch of prompts."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dpo_jax.data import loader, tokenize, tokenizer_files
from dpo_jax.models.config import ModelConfig
from dpo_jax.rewards import registry
from dpo_jax.sampling import decode
from dpo_jax.training import loop, ppo, ppo_iteration, ppo_rows, state
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.types import Array

BATCH_ROWS = 256  # responses that grow at once
# The group `ppo` of a config where nothing of it was changed.
DEFAULTS = {
  **{field.name: field.default for field in dataclasses.fields(ppo.Settings)},
  "reward": "",
  "max_new_tokens": 128,
  "temperature": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Reinforcement:
  """What a run of PPO needs besides.

  Attributes:
    settings: of its updates.
    sampling: of its responses.
    rows: what these are packed into.
    reward: a name of `rewards.registry`.
    seed: of samples and of the order of minibatches.
  """

  settings: ppo.Settings
  sampling: decode.Settings
  rows: ppo_rows.RowSettings
  reward: str
  seed: int

  @property
  def updates_per_step(self) -> int:
    """Updates of the parameters in an iteration, which is a step of a run."""
    return self.settings.epochs * self.settings.minibatches


def check_unused(options: Mapping[str, Any], loss_name: str) -> None:
  """Raises ValueError where an option of PPO is set for another loss."""
  for key, default in DEFAULTS.items():
    if options[key] != default:
      raise ValueError(
        f"ppo.{key}={options[key]!r}: loss '{loss_name}' does not honour it;"
        " 'ppo' does"
      )


def check(
  options: Mapping[str, Any],
  data: Mapping[str, Any],
  *,
  batch_size: int,
  reference_mode: str,
  lora_rank: int,
) -> tuple[ppo.Settings, decode.Settings]:
  """Returns the settings of PPO's updates and of its samples.

  Args:
    options: the group `ppo` of a config (see configs/base.py).
    data: the group `data`.
    batch_size: responses of an iteration.
    reference_mode: of the run.
    lora_rank: of the run.

  Raises:
    ValueError: one of them is not right.
  """
  options = dict(options)
  if not options.pop("reward"):
    raise ValueError("ppo.reward='': loss 'ppo' needs one")
  sampling = decode.Settings(
    options.pop("max_new_tokens"), options.pop("temperature")
  )
  if not sampling.temperature:
    raise ValueError("ppo.temperature=0: must be above 0")
  settings = ppo.Settings(**options)
  if batch_size % settings.minibatches:
    raise ValueError(
      f"ppo.minibatches={settings.minibatches}: must divide"
      f" batch_size={batch_size}"
    )
  longest = data["max_prompt_length"] + sampling.max_new_tokens
  for key, length in data.items():
    if key in ("max_length", "row_length") and 0 < length < longest:
      raise ValueError(
        f"data.{key}={length}: must hold"
        f" data.max_prompt_length={data['max_prompt_length']} and"
        f" ppo.max_new_tokens={sampling.max_new_tokens}"
      )
  if data["truncate_prompts"] == "never":
    raise ValueError(
      "data.truncate_prompts='never': loss 'ppo' cuts all prompts to"
      " data.max_prompt_length, behind which it samples"
    )
  if reference_mode != "live":
    raise ValueError(
      f"reference.mode='{reference_mode}': loss 'ppo' allows 'live' only"
    )
  if lora_rank:
    raise ValueError(f"lora.rank={lora_rank}: loss 'ppo' trains all weights")
  return settings, sampling


def make(
  settings: ppo.Settings,
  sampling: decode.Settings,
  prompts: loader.Loader,
  *,
  max_prompt_length: int,
  row_length: int,
  reward: str,
  seed: int,
) -> Reinforcement:
  """Returns what PPO needs besides.

  Args:
    settings: of its updates.
    sampling: of its responses.
    prompts: the batches of prompts.
    max_prompt_length: tokens.
    row_length: tokens; 0: the multiple of 128 that holds any response.
    reward: a name of `rewards.registry`.
    seed: of all draws.
  """
  longest = max_prompt_length + sampling.max_new_tokens
  rows = ppo_rows.RowSettings(
    row_length=row_length or math.ceil(longest / 128) * 128,
    max_length=longest,
    microbatch_rows=prompts.microbatch_rows,
    row_range=prompts.row_range,
  )
  return Reinforcement(settings, sampling, rows, reward, seed)


def make_iteration(
  options: Reinforcement,
  scorer: scorer_lib.Scorer,
  reference: ModelConfig,
  *,
  tokenizer: tokenizer_files.Tokenizer,
  stop_ids: Sequence[int],
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
) -> ppo_iteration.Iteration:
  """Returns what samples, scores and updates on a batch of prompts.

  A response is sampled under its prompt's place among the prompts of all
  iterations, so that draws are a function of the seed and the iteration.
  """
  reward_fn = registry.load(options.reward)
  actor = lambda model: ppo.Actor(
    model, scorer.chunk_length, options.sampling.temperature
  )

  def generate(params, prompts, numbers):
    found = decode.Sampler(scorer.policy, params).sample(
      prompts,
      options.sampling,
      seed=options.seed,
      stop_ids=stop_ids,
      batch_rows=min(len(prompts), BATCH_ROWS),
      indices=numbers,
    )
    samples = [sample for (sample,) in found]
    return [x.tokens for x in samples], [x.ended for x in samples]

  def score(prompts, responses, ended):
    # The stop token is no text, special or not.
    content = [
      tokens[:-1] if has_end else tokens
      for tokens, has_end in zip(responses, ended, strict=True)
    ]
    texts = tokenize.decode(tokenizer, prompts, content)
    return reward_fn(*texts, ended=ended)

  return ppo_iteration.Iteration(
    options.settings,
    policy=actor(scorer.policy),
    reference=actor(reference),
    optimizer=optimizer,
    rows=options.rows,
    max_new_tokens=options.sampling.max_new_tokens,
    generate_fn=generate,
    score_fn=score,
    mesh=mesh,
    seed=options.seed,
  )


def prompts_of(batches: loader.Loader, k: int) -> loop.HostBatch:
  """Returns the number of iteration k, counted from 0, and its prompts."""
  prompts = _prompts(batches, batches.indices(k))
  return loop.HostBatch((k, prompts), num_pairs=len(prompts))


def _prompts(batches: loader.Loader, indices: np.ndarray) -> ppo_rows.Tokens:
  found = batches.dataset.take(indices).prompt
  return [x.tolist() for x in np.split(found.values, found.offsets[1:-1])]


def make_step(
  options: Reinforcement,
  iterate: ppo_iteration.Iteration,
  learning_rate: Callable[[int], jax.Array],
) -> Callable[..., tuple[state.TrainState, dict[str, Array]]]:
  """Returns `step(state, (k, prompts)) -> (state, metrics)` for the loop."""

  def step(train_state, batch):
    k, prompts = batch
    # Responses come to the host and go back, which the loop else forbids.
    with jax.transfer_guard("allow"):
      train_state, metrics = iterate(train_state, k, prompts)
      # The next one samples before the loop looks at these.
      loop.check_finite(k + 1, jax.device_get(metrics))
      metrics["learning_rate"] = learning_rate(k * options.updates_per_step)
    return train_state, metrics

  return step


def make_eval_fn(
  batches: loader.Loader | None, iterate: ppo_iteration.Iteration
) -> loop.EvalFn | None:
  """Returns a function of the state that samples the held-out prompts."""
  if batches is None:
    return None
  prompts = _prompts(batches, np.arange(batches.num_pairs))
  return lambda train_state: iterate.evaluate(train_state, prompts)

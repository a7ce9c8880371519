"""From a config to an experiment: the one place that reads a ConfigDict."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpo_jax import sharding
from dpo_jax.checkpoints import manager, run_folder, source, stop_tokens
from dpo_jax.data import loader, token_ids, tokenizer_files
from dpo_jax.data.sources import synthetic
from dpo_jax.losses import objectives
from dpo_jax.models import heads, presets, transformer
from dpo_jax.run import adapters, batches, limits, reference_model
from dpo_jax.run import ppo as ppo_lib
from dpo_jax.training import loop, optimizers, ppo
from dpo_jax.training import reference as reference_lib
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a run needs, built from its config.

  Attributes:
    settings: the whole config as plain data, to be kept and shown.
    mesh: all devices.
    tokenizer: the policy's.
    opened: where the policy comes from; None for random weights.
    stop_ids: the tokens that each end a response of it.
    scorer: policy, reference and loss.
    shardings: the layout of each parameter that is trained.
    load_base: returns what adapters are added to; None without adapters.
    load_policy: returns what is trained, before the first update.
    reference: where reference log-probabilities come from.
    load_reference: returns the reference's parameters, given the policy's;
      for adapters see `TrainState`.
    cache_dir: folder of the caches of tokens and log-probabilities.
    optimizer: clips and updates.
    learning_rate: as a function of the updates done.
    loader: the training batches; of PPO, those of its prompts.
    eval_loader: the batches of the held-out pairs, if there are any.
    schedule: when to log, evaluate, save and end.
    num_checkpoints: how many of the last ones are kept.
    best_metric: by which the best one is kept as well.
    wandb_project: where to send metrics besides; empty for nowhere.
    reinforcement: of PPO; None for all other losses.
  """

  settings: dict[str, Any]
  mesh: Mesh
  tokenizer: Any
  opened: source.ModelSource | None
  stop_ids: tuple[int, ...]
  scorer: scorer_lib.Scorer
  shardings: Params
  load_base: Callable[[], Params | None]
  load_policy: Callable[[], Params]
  reference: reference_lib.Reference
  load_reference: Callable[[Params], Params | None]
  cache_dir: pathlib.Path
  optimizer: optax.GradientTransformation
  learning_rate: Callable[[jax.Array], jax.Array]
  loader: loader.Loader
  eval_loader: loader.Loader | None
  schedule: loop.Schedule
  num_checkpoints: int
  best_metric: str
  wandb_project: str
  reinforcement: ppo_lib.Reinforcement | None = None


def build(config: ConfigDict) -> Experiment:
  """Returns the experiment: data is tokenised, no weights are read yet.

  Raises:
    ValueError: something in the config or the data is not right.
  """
  check(config)
  objective = make_objective(config)
  mesh = sharding.make_mesh(**config.mesh)
  opened, policy = _policy_config(config)
  tokenizer = _load_tokenizer(config, opened)
  policy = _fit_policy(config, policy, tokenizer, from_scratch=not opened)
  policy = _with_head(config, objective, policy)
  lora_options = adapters.Options(
    **config.lora, base=config.model.path, dtype=config.model.param_dtype
  )
  policy = adapters.add(lora_options, policy)
  shardings = transformer.layouts(mesh, policy)
  load_base = lambda: None
  load_policy = _make_load_policy(config, opened, policy, shardings)
  reference, load_reference = reference_model.make(
    config.reference.to_dict(),
    policy,
    lora_options,
    shardings,
    mesh,
    loss_name=config.loss.name,
    has_reference=objective.needs_reference or config.loss.name == "ppo",
    compute=_compute_settings(config),
  )
  if policy.lora:
    load_base, load_policy, shardings = adapters.make_loads(
      lora_options, policy, load_policy, mesh, seed=config.seed
    )
  models = [model for model in (policy, reference.model) if model]
  data = config.data.to_dict()
  if config.loss.name == "ppo":  # all prompts leave room for samples
    data["truncate_prompts"] = "always"
  train_loader, eval_loader = batches.make_loaders(
    data,
    objective,
    tokenizer,
    mesh,
    models,
    cache_dir=_cache_dir(config),
    batch_size=config.batch_size,
    microbatch_rows=config.microbatch_rows,
    eval_pairs=config.eval.pairs,
    seed=config.seed,
  )
  total_steps = _total_steps(config, train_loader)
  reinforcement, num_updates = None, total_steps
  if config.loss.name == "ppo":
    reinforcement = ppo_lib.make(
      *_check_ppo(config),
      train_loader,
      max_prompt_length=config.data.max_prompt_length,
      row_length=config.data.row_length,
      reward=config.ppo.reward,
      seed=config.seed,
    )
    num_updates *= reinforcement.updates_per_step
    load_policy, shardings = ppo.with_value_head(
      load_policy, shardings, policy, mesh
    )
  learning_rate, optimizer = _make_optimizer(config, num_updates)
  return Experiment(
    settings=to_plain(config),
    mesh=mesh,
    tokenizer=tokenizer,
    opened=opened,
    stop_ids=stop_tokens.find(tokenizer, opened),
    scorer=scorer_lib.Scorer(
      policy=policy,
      reference=reference.traced,
      objective=objective,
      chunk_length=config.model.logprob_chunk,
      has_pairs=train_loader.has_pairs,
      router_loss=config.model.router_loss,
    ),
    shardings=shardings,
    load_base=load_base,
    load_policy=load_policy,
    reference=reference,
    load_reference=load_reference,
    cache_dir=_cache_dir(config),
    optimizer=optimizer,
    learning_rate=learning_rate,
    loader=train_loader,
    eval_loader=eval_loader,
    schedule=loop.Schedule(
      last_step=total_steps,
      log_every=config.log.every,
      eval_every=config.eval.every,
      save_every=config.checkpoint.every,
      save_minutes=config.checkpoint.minutes,
    ),
    num_checkpoints=config.checkpoint.keep,
    best_metric=_best_metric(config, objective, eval_loader),
    wandb_project=config.log.wandb_project,
    reinforcement=reinforcement,
  )


def check(config: ConfigDict) -> None:
  """Checks numbers, loss and optimizer; reads no data, touches no device.

  Raises:
    ValueError: one of their options is not right.
  """
  limits.check(run_folder.flatten(to_plain(config)))
  make_objective(config)
  _make_optimizer(config, max(config.steps, 1))


def to_plain(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON would have it."""
  return json.loads(config.to_json())


def make_objective(config: ConfigDict) -> objectives.Objective:
  """Returns the loss with its modifiers; of PPO, the one that reads alike.

  PPO needs of each row the prompt, which is what demonstrations have.
  """
  options = config.loss.to_dict()
  name = options.pop("name")
  if name == "ppo":
    _check_plain(options)
    _check_ppo(config)
    name = "sft"
  else:
    ppo_lib.check_unused(config.ppo.to_dict(), name)
  keys = (
    "f_divergence f_alpha ld_alpha wpo wpo_max_weight sft_weight prompt_nll"
  )
  modifiers = {key: options.pop(key) for key in keys.split()}
  given = {key: value for key, value in options.items() if value is not None}
  return objectives.make_objective(name, given, **modifiers)


def _check_plain(options):
  """Raises ValueError where an option of losses is set for PPO."""
  plain = dict(f_divergence="reverse_kl", ld_alpha=1.0, wpo_max_weight=1.0)
  for key, value in options.items():
    if value and value != plain.get(key):
      raise ValueError(f"loss.{key}={value}: 'ppo' has its own, under ppo")


def _check_ppo(config):
  return ppo_lib.check(
    config.ppo.to_dict(),
    config.data.to_dict(),
    batch_size=config.batch_size,
    reference_mode=config.reference.mode,
    lora_rank=config.lora.rank,
  )


def _policy_config(config):
  """Returns (ModelSource or None, the decoder as saved or as preset)."""
  options = config.model
  if bool(options.path) == bool(options.preset):
    raise ValueError(
      f"model.path='{options.path}' and model.preset='{options.preset}':"
      " give one of them (a preset starts from random weights)"
    )
  if options.path:
    opened = source.open_model(options.path)
    return opened, opened.config
  return None, presets.make_config(options.preset)


def _load_tokenizer(config, opened):
  if config.model.tokenizer:
    return tokenizer_files.load_tokenizer(config.model.tokenizer)
  if opened:
    return tokenizer_files.load_tokenizer(opened.tokenizer)
  if config.data.source == "synthetic":
    return synthetic.make_tokenizer()
  raise ValueError(
    f"model.preset='{config.model.preset}' needs model.tokenizer: a folder, a"
    " tokenizers file or a hub name"
  )


def _make_optimizer(config, total_steps):
  """Returns the learning rate as a function of updates, and the optimizer."""
  options = config.optimizer.to_dict()
  learning_rate = optimizers.make_schedule(
    options.pop("learning_rate"),
    schedule=options.pop("schedule"),
    warmup_steps=options.pop("warmup_steps"),
    total_steps=total_steps,
  )
  name = options.pop("name")
  return learning_rate, optimizers.make_optimizer(
    name, learning_rate, **options
  )


def _compute_settings(config):
  options = config.model
  names = ("param_dtype", "remat", "vocab_multiple")
  settings = {name: options[name] for name in names}
  return {"dtype": sharding.matmul_dtype(options.dtype)} | settings


def _fit_policy(config, policy, tokenizer, *, from_scratch):
  """Returns the decoder with compute settings and a fitting vocabulary."""
  settings = _compute_settings(config)
  if from_scratch:
    settings["vocab_size"] = config.model.vocab_size or token_ids.size(
      tokenizer
    )
  elif config.model.vocab_size:
    raise ValueError(
      f"model.vocab_size={config.model.vocab_size}: only for a model.preset"
    )
  policy = dataclasses.replace(policy, **settings)
  token_ids.check(tokenizer, policy.vocab_size)
  is_bounded = policy.positions == "learned"
  if is_bounded and config.data.max_length > policy.max_positions:
    raise ValueError(
      f"data.max_length={config.data.max_length}: the model has"
      f" {policy.max_positions} positions"
    )
  num_experts, shards = policy.num_experts, config.mesh.expert
  if shards > 1 and (not num_experts or num_experts % shards):
    raise ValueError(
      f"mesh.expert={shards}: must divide the model's {num_experts} experts"
    )
  return policy


def _with_head(config, objective, policy):
  """Returns the decoder with the head that the loss trains."""
  if policy.head == objective.head:
    return policy
  if objective.head == "vocabulary":
    raise ValueError(
      f"model.path='{config.model.path}' has a {policy.head} head: loss"
      f" '{config.loss.name}' needs a language model"
    )
  return dataclasses.replace(policy, head=objective.head)


def _make_load_policy(config, opened, policy, shardings):
  rng = jax.random.key(config.seed)
  if opened and opened.config.head != policy.head:
    return _make_load_body(config, opened, policy, shardings, rng)
  if opened:
    return lambda: opened.load(policy, shardings)
  return jax.jit(
    lambda: transformer.init_params(policy, rng), out_shardings=shardings
  )


def _make_load_body(config, opened, policy, shardings, rng):
  """Returns what loads a model of another head, and gives it a new one."""
  saved = dataclasses.replace(policy, head=opened.config.head)
  layouts = transformer.layouts(sharding.make_mesh(**config.mesh), saved)
  add_head = jax.jit(
    lambda params: heads.with_new_score(params, policy, rng),
    out_shardings=shardings,
  )
  return lambda: add_head(opened.load(saved, layouts))


def _cache_dir(config):
  default = pathlib.Path.home() / ".cache" / "dpo_jax"
  return pathlib.Path(config.data.cache_dir or default)


def _best_metric(config, objective, eval_loader):
  """Returns the metric that chooses the best, which evaluations must have."""
  metric = config.checkpoint.metric
  if metric not in manager.LOWER_IS_BETTER:
    raise ValueError(
      f"checkpoint.metric={metric!r}: must be one of"
      f" {', '.join(manager.LOWER_IS_BETTER)}"
    )
  if metric == "loss" or eval_loader is None:
    return metric
  is_scalar = objective.head != "vocabulary"
  has_rewards = is_scalar or objective.needs_reference
  if metric == "rewards/accuracies" and not is_scalar:
    has_rewards &= eval_loader.has_pairs
  if not has_rewards:
    raise ValueError(
      f"checkpoint.metric={metric!r}: evaluations of loss"
      f" '{config.loss.name}' on this data do not have it; allowed: loss"
    )
  return metric


def _total_steps(config, batches):
  if config.steps:
    return config.steps
  total = math.ceil(config.epochs * batches.num_pairs / config.batch_size)
  if not total:
    raise ValueError("steps=0 and epochs=0: nothing to do")
  return total

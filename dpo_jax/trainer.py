"""Runs an experiment: from its first state to the last checkpoint."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax import experiment as experiment_lib
from dpo_jax import sharding
from dpo_jax.checkpoints import manager, reader, run_folder, source
from dpo_jax.data import loader, tokenize
from dpo_jax.evaluation import preferences
from dpo_jax.experiment import Experiment
from dpo_jax.models import (
  huggingface,
  huggingface_adapters,
  lora,
  transformer,
)
from dpo_jax.rewards import registry as rewards
from dpo_jax.sampling import decode
from dpo_jax.training import (
  iteration,
  loop,
  ppo,
  recorder,
  scoring,
  state,
  steps,
)
from dpo_jax.training import reference as reference_lib
from dpo_jax.types import Batch, Params

PPO_BATCH_ROWS = 256  # responses that grow at once


def join_processes() -> None:
  """Joins the other processes of a multi-host run.

  Raises:
    ValueError: neither the cluster nor the environment says who they are.
  """
  number = os.environ.get("JAX_NUM_PROCESSES")
  index = os.environ.get("JAX_PROCESS_ID")
  try:
    jax.distributed.initialize(
      num_processes=int(number) if number else None,
      process_id=int(index) if index else None,
    )
  except ValueError as error:
    raise ValueError(f"--multihost: {error}") from error


def train(config: ConfigDict, workdir: str) -> bool:
  """Returns whether the run came to its end; False when told to stop.

  Args:
    config: see configs/base.py.
    workdir: the run folder; a run that is in it goes on.

  Raises:
    ValueError: something in the config, the data or the folder is not right.
  """
  run_folder.check_config(workdir, experiment_lib.to_plain(config))
  experiment = experiment_lib.build(config)
  for line in describe(experiment):
    _say(line)
  with jax.set_mesh(experiment.mesh):
    finished = _train(experiment, pathlib.Path(workdir))
  if finished and jax.process_index() == 0:
    run_folder.mark_finished(workdir)
  return finished


def export(
  path: str,
  target: str,
  *,
  step: int | None = None,
  dtype: str = "float32",
  max_shard_bytes: float = 5e9,
  adapter: bool = False,
) -> None:
  """Writes a model and its tokenizer as a Hugging Face folder.

  Adapters are merged into their base.

  Args:
    path: a run folder, a Hugging Face folder or a hub name.
    target: the folder to write; must not be what is read.
    step: which checkpoint of a run; see `source.open_model`.
    dtype: of the weights that are written.
    max_shard_bytes: several files are written above this.
    adapter: writes the adapters alone, in PEFT's format.

  Raises:
    ValueError: no such model, a target that is its source, or a whole model
      where adapters are asked for.
  """
  if os.path.realpath(path) == os.path.realpath(target):
    raise ValueError(f"the target {target!r} is the source")
  opened = source.open_model(path, step=step)
  if adapter:
    _export_adapter(path, target, step, dtype, opened)
    return
  config = dataclasses.replace(opened.config, param_dtype=dtype)
  tokenizer = tokenize.load_tokenizer(opened.tokenizer)
  layouts = transformer.layouts(sharding.make_mesh(), config)
  huggingface.save_model(
    target,
    config,
    opened.load(config, layouts),
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    max_shard_bytes=max_shard_bytes,
  )
  if jax.process_index() == 0:
    tokenizer.save_pretrained(target)


def _export_adapter(path, target, step, dtype, opened):
  adapter = source.open_adapter(path, step=step)
  if adapter is None:
    raise ValueError(f"{path!r} is a whole model: it has no adapters")
  config = lora.with_lora(opened.config, adapter.lora(opened.config))
  layouts = lora.layouts(sharding.make_mesh(), config)
  huggingface_adapters.save(
    target,
    config,
    adapter.load(config, layouts),
    base=adapter.base,
    dtype=dtype,
  )
  if jax.process_index() == 0:
    tokenize.load_tokenizer(opened.tokenizer).save_pretrained(target)


def describe(experiment: Experiment) -> Iterator[str]:
  """Yields lines that say what will run."""
  scorer, batches = experiment.scorer, experiment.loader
  shapes = jax.tree.leaves(transformer.param_shapes(scorer.policy))
  num_params = sum(math.prod(x.shape) for x in shapes)
  mesh = ", ".join(f"{k} {v}" for k, v in experiment.mesh.shape.items())
  yield (
    f"policy: {scorer.policy.family}, {num_params / 1e6:.1f} M parameters,"
    f" {scorer.policy.dtype}; reference: {experiment.reference}"
  )
  if scorer.policy.lora:
    adapters = jax.tree.leaves(lora.shapes(scorer.policy))
    count = sum(math.prod(x.shape) for x in adapters)
    base_dtype = experiment.settings["lora"]["base_dtype"]
    if base_dtype == "auto":
      base_dtype = scorer.policy.param_dtype
    yield (
      f"lora: rank {scorer.policy.lora.rank}, {count / 1e6:.2f} M parameters"
      f" are trained; base {base_dtype}"
    )
  yield (
    f"mesh: {mesh}; rows: {batches.row_length} tokens,"
    f" {batches.microbatch_rows} in a microbatch"
  )
  yield (
    f"{experiment.schedule.last_step} steps of {batches.batch_size} pairs;"
    f" {batches.num_pairs} pairs"
  )


def init_state(
  experiment: Experiment,
) -> tuple[Experiment, state.TrainState]:
  """Returns the experiment and its state before the first update.

  The state holds the reference; or, in mode `cached`, the experiment's
  batches hold what it says of them.
  """
  base = experiment.load_base()
  params = experiment.load_policy()
  reference = experiment.load_reference(params)
  if experiment.reference.is_cached:
    experiment = _with_cached_reference(experiment, lora.over(base, reference))
    # Its room is for the moments.
    jax.tree.map(lambda x: x.delete(), reference)
    reference = None
  first = state.init_state(
    params, experiment.optimizer, experiment.shardings, experiment.mesh
  )
  return experiment, dataclasses.replace(
    first,
    reference=reference,
    base=base,
    loss_state=_init_loss_state(experiment),
  )


def _init_loss_state(experiment):
  if experiment.reinforcement:
    settings = experiment.reinforcement.settings
    return ppo.init_loss_state(settings, experiment.mesh)
  names = experiment.scorer.objective.state
  return state.init_loss_state(names, experiment.mesh)


def compile_train_step(
  experiment: Experiment, first: state.TrainState, batch: Batch
) -> Any:
  """Returns the compiled step; it donates the state."""
  layouts = jax.tree.map(lambda x: x.sharding, first)
  step = steps.make_train_step(
    experiment.scorer,
    experiment.optimizer,
    experiment.learning_rate,
    experiment.reference,
  )
  jitted = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(layouts, sharding.replicated(experiment.mesh)),
  )
  return jitted.lower(first, batch).compile()


def host_batch(experiment: Experiment, k: int) -> loop.HostBatch:
  """Returns batch k, counted from 0, on the device."""
  batches = experiment.loader
  batch = batches.batch(k)
  return loop.HostBatch(
    batch=scoring.device_batch(batch, batches, experiment.mesh),
    num_pairs=batches.batch_size,
    num_tokens=batches.num_tokens(k),
    num_positions=batches.num_positions(batch),
  )


def make_iteration(experiment: Experiment) -> iteration.Iteration:
  """Returns what samples, scores and updates on a batch of prompts.

  A response is sampled under its prompt's place among the prompts of all
  iterations, so that draws are a function of the seed and the iteration.
  """
  options, tokenizer = experiment.reinforcement, experiment.tokenizer
  reward_fn = rewards.load(options.reward)
  actor = lambda model: ppo.Actor(
    model, experiment.scorer.chunk_length, options.sampling.temperature
  )

  def generate(params, prompts, numbers):
    found = decode.Sampler(experiment.scorer.policy, params).sample(
      prompts,
      options.sampling,
      seed=options.seed,
      eos_id=tokenizer.eos_token_id,
      batch_rows=min(len(prompts), PPO_BATCH_ROWS),
      indices=numbers,
    )
    return [sample.tokens for (sample,) in found]

  return iteration.Iteration(
    options.settings,
    policy=actor(experiment.scorer.policy),
    reference=actor(experiment.reference.model),
    optimizer=experiment.optimizer,
    rows=options.rows,
    max_new_tokens=options.sampling.max_new_tokens,
    generate_fn=generate,
    score_fn=lambda *tokens: reward_fn(*_texts(tokenizer, *tokens)),
    mesh=experiment.mesh,
    seed=options.seed,
  )


def prompts_of(experiment: Experiment, k: int) -> loop.HostBatch:
  """Returns the number of iteration k, counted from 0, and its prompts."""
  batches = experiment.loader
  prompts = _prompts(batches, batches.indices(k))
  return loop.HostBatch((k, prompts), num_pairs=len(prompts))


def _prompts(batches: loader.Loader, indices: np.ndarray) -> ppo.Tokens:
  found = batches.dataset.take(indices).prompt
  return [x.tolist() for x in np.split(found.values, found.offsets[1:-1])]


def _texts(tokenizer, prompts, responses) -> tuple[list[str], list[str]]:
  """Returns the texts of prompts and of responses, without special tokens.

  A response has the space before its first word, where decoding both shows it.
  """
  decode_all = functools.partial(
    tokenizer.batch_decode, skip_special_tokens=True
  )
  before, alone = decode_all(prompts), decode_all(responses)
  both = decode_all([p + list(r) for p, r in zip(prompts, responses)])
  return before, [
    text.removeprefix(prompt) if text.startswith(prompt) else response
    for text, prompt, response in zip(both, before, alone)
  ]


def _iteration_step(experiment, iterate):
  """Returns `step(state, (k, prompts)) -> (state, metrics)` for the loop."""
  updates = experiment.reinforcement.updates_per_step

  def step(train_state, batch):
    k, prompts = batch
    # Responses come to the host and go back, which the loop else forbids.
    with jax.transfer_guard("allow"):
      train_state, metrics = iterate(train_state, k, prompts)
      metrics["learning_rate"] = experiment.learning_rate(k * updates)
    return train_state, metrics

  return step


def _prompts_eval_fn(experiment, iterate):
  """Returns a function of the state that samples the held-out prompts."""
  batches = experiment.eval_loader
  if batches is None:
    return None
  prompts = _prompts(batches, np.arange(batches.num_pairs))
  return lambda train_state: iterate.evaluate(train_state, prompts)


def make_eval_fn(experiment: Experiment) -> loop.EvalFn | None:
  """Returns a function of the state, or None without evaluation data."""
  batches = experiment.eval_loader
  if batches is None:
    return None
  scorer = dataclasses.replace(experiment.scorer, has_pairs=batches.has_pairs)
  score_step = jax.jit(
    steps.make_score_step(scorer),
    out_shardings=sharding.replicated(experiment.mesh),
  )

  def evaluate(train_state):
    placed = (
      scoring.device_batch(batch, batches, experiment.mesh)
      for batch in batches.eval_batches()
    )
    return preferences.evaluate(scorer, score_step, placed, train_state)

  return evaluate


def _with_cached_reference(
  experiment: Experiment, params: Params
) -> Experiment:
  """Returns the experiment with batches that hold the reference's logps."""
  scorer, model = experiment.scorer, experiment.reference.model
  prints = jax.device_get(reader.fingerprints(params))
  prints = {name: int(value) for name, value in prints.items()}

  def with_logps(batches):
    compute = functools.partial(
      scoring.response_logps,
      model,
      params,
      scorer.objective,
      batches,
      experiment.mesh,
      chunk_length=scorer.chunk_length,
    )
    key = reference_lib.cache_key(batches, model, prints, scorer.objective)
    shape = (batches.num_pairs, batches.num_columns)
    logps = reference_lib.cached_logps(
      experiment.cache_dir, key, shape, compute, _say
    )
    return batches.with_reference(logps)

  evaluated = experiment.eval_loader
  return dataclasses.replace(
    experiment,
    loader=with_logps(experiment.loader),
    eval_loader=evaluated and with_logps(evaluated),
  )


def _train(experiment: Experiment, workdir: pathlib.Path) -> bool:
  experiment, first = init_state(experiment)
  _write_run_files(experiment, workdir)
  with manager.Manager(
    workdir,
    every=experiment.schedule.save_every,
    keep=experiment.num_checkpoints,
    metric=experiment.best_metric,
    lower_is_better=manager.LOWER_IS_BETTER[experiment.best_metric],
  ) as checkpoints:
    done = 0
    if checkpoints.latest_step() is not None:
      begun = _saved(experiment, first)
      wanted = state.abstract_state(begun)
      jax.tree.map(lambda x: x.delete(), begun)  # room for what is read
      done, restored = checkpoints.restore(wanted)
      if not experiment.reference.moves:
        restored = dataclasses.replace(restored, reference=first.reference)
      first = dataclasses.replace(restored, base=first.base)
      _say(f"goes on from step {done} of {experiment.schedule.last_step}")
    if done >= experiment.schedule.last_step:
      _say(f"finished at step {done}: nothing to do")
      return True
    with recorder.Recorder(
      workdir,
      total_steps=experiment.schedule.last_step,
      start_step=done,
      wandb_project=experiment.wandb_project,
      config=experiment.settings,
    ) as record:
      return _run_loop(experiment, first, done, checkpoints, record)


def _saved(
  experiment: Experiment, train_state: state.TrainState
) -> state.TrainState:
  """Returns what a checkpoint holds: what stays is read again."""
  return train_state.without_frozen(reference=not experiment.reference.moves)


def _run_loop(experiment, first, done, checkpoints, record) -> bool:
  if experiment.reinforcement:
    iterate = make_iteration(experiment)
    train_step = _iteration_step(experiment, iterate)
    eval_fn, batch_fn = _prompts_eval_fn(experiment, iterate), prompts_of
  else:
    eval_fn, batch_fn = make_eval_fn(experiment), host_batch
    train_step = compile_train_step(
      experiment, first, host_batch(experiment, done).batch
    )
  batches = loader.prefetch(
    functools.partial(batch_fn, experiment),
    done,
    experiment.schedule.last_step,
  )

  def save(step, train_state, eval_metrics):
    checkpoints.save(
      step, _saved(experiment, train_state), eval_metrics, force=True
    )

  _, finished = loop.run(
    first,
    train_step=train_step,
    batches=batches,
    waited=lambda: batches.wait_seconds,
    schedule=experiment.schedule,
    eval_fn=eval_fn,
    save_fn=save,
    record_fn=record.write,
  )
  return finished


def _write_run_files(experiment, workdir):
  if jax.process_index() == 0:
    folder = workdir / run_folder.MODEL_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    huggingface.write_config(
      str(folder),
      experiment.scorer.policy,
      bos_token_id=experiment.tokenizer.bos_token_id,
      eos_token_id=experiment.tokenizer.eos_token_id,
    )
    experiment.tokenizer.save_pretrained(folder)
    if experiment.scorer.policy.lora:
      base = experiment.settings["model"]["path"]
      source.write_lora(folder, experiment.scorer.policy.lora, base)
    run_folder.write_config(workdir, experiment.settings)
  multihost_utils.sync_global_devices("run folder written")


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)

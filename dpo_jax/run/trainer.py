"""Runs an experiment: from its first state to the last checkpoint."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax import sharding
from dpo_jax.checkpoints import (
  fingerprints,
  manager,
  reader,
  run_folder,
  source,
  stop_tokens,
)
from dpo_jax.data import prefetch as prefetch_lib
from dpo_jax.data import tokenizer_files
from dpo_jax.host import endings, files, processes
from dpo_jax.models import lora, transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.run import experiment as experiment_lib
from dpo_jax.run import ppo as ppo_run
from dpo_jax.run.experiment import Experiment
from dpo_jax.training import evaluation as preferences
from dpo_jax.training import (
  loop,
  ppo,
  recorder,
  scoring,
  state,
  steps,
)
from dpo_jax.training import reference as reference_lib
from dpo_jax.types import Batch, Params


def train(config: ConfigDict, workdir: str) -> bool:
  """Returns whether the run came to its end; False when told to stop.

  Args:
    config: see configs/base.py.
    workdir: the run folder; a run that is in it goes on.

  Raises:
    ValueError: something in the config, the data or the folder is not right.
    endings.NotFiniteError: a loss, a gradient or the weights are not finite;
      what was saved before stays.
  """
  _agree(config, workdir)
  with run_folder.owned(workdir, "trains in"):
    run_folder.check_config(workdir, experiment_lib.to_plain(config))
    experiment = experiment_lib.build(config)
    for line in describe(experiment):
      processes.say(line)
    with jax.set_mesh(experiment.mesh):
      finished = _train(experiment, pathlib.Path(workdir))
    if finished and jax.process_index() == 0:
      run_folder.mark_finished(workdir)
    return finished


def _agree(config, workdir):
  """Raises ValueError unless all processes have one config and one model."""
  if jax.process_count() == 1:
    return
  settings = experiment_lib.to_plain(config)
  given = run_folder.flatten({"--config": settings})
  processes.agree(given | {"--workdir": os.path.abspath(workdir)})
  paths = [settings["model"]["path"], settings["reference"]["path"]]
  reward = settings["ppo"]["reward"]
  paths += [reward.removeprefix("run:")] * reward.startswith("run:")
  for path in filter(None, paths):
    processes.agree(fingerprints.of_model(path))


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
  yield from _describe_warmup(experiment)
  for term in scorer.objective.terms:
    for text in term.loss.paragraphs("Beware:"):
      yield f"beware, {term.loss.name}: {text}"


def _describe_warmup(experiment):
  """Yields a line where the run ends before its warm-up does."""
  warmup = experiment.settings["optimizer"]["warmup_steps"]
  updates, unit = experiment.schedule.last_step, "steps"
  if experiment.reinforcement:
    updates *= experiment.reinforcement.updates_per_step
    unit = "updates"
  if warmup > updates:
    highest = float(experiment.learning_rate(updates - 1))
    yield (
      f"warm-up of {warmup} {unit} is longer than the run of {updates}: the"
      f" rate never exceeds {highest:.2g}"
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

  def with_logps(batches, as_trained=False):
    compute = functools.partial(
      scoring.response_logps,
      model,
      params,
      scorer.objective,
      batches,
      experiment.mesh,
      chunk_length=scorer.chunk_length,
      as_trained=as_trained,
    )
    key = reference_lib.cache_key(batches, model, prints, scorer.objective)
    shape = (batches.num_pairs, batches.num_columns)
    logps = reference_lib.cached_logps(
      experiment.cache_dir, key, shape, compute, processes.say
    )
    return batches.with_reference(logps)

  evaluated = experiment.eval_loader
  return dataclasses.replace(
    experiment,
    loader=with_logps(experiment.loader, as_trained=True),
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
      processes.say(
        f"goes on from step {done} of {experiment.schedule.last_step}"
      )
    if done >= experiment.schedule.last_step:
      processes.say(f"finished at step {done}: nothing to do")
      return True
    with recorder.Recorder(
      workdir,
      total_steps=experiment.schedule.last_step,
      start_step=done,
      wandb_project=experiment.wandb_project,
      config=experiment.settings,
    ) as record:
      finished = _run_loop(experiment, first, done, checkpoints, record)
    if not finished:
      step = checkpoints.latest_step()
      processes.say(
        f"saved at step {step}; the same command goes on from there"
      )
    return finished


def _saved(
  experiment: Experiment, train_state: state.TrainState
) -> state.TrainState:
  """Returns what a checkpoint holds: what stays is read again."""
  return train_state.without_frozen(reference=not experiment.reference.moves)


def _run_loop(experiment, first, done, checkpoints, record) -> bool:
  if experiment.reinforcement:
    train_step, eval_fn = _make_ppo(experiment)
    batch_fn = functools.partial(ppo_run.prompts_of, experiment.loader)
  else:
    eval_fn = make_eval_fn(experiment)
    batch_fn = functools.partial(host_batch, experiment)
    train_step = compile_train_step(experiment, first, batch_fn(done).batch)
  batches = prefetch_lib.prefetch(batch_fn, done, experiment.schedule.last_step)

  def save(step, train_state, eval_metrics):
    if not state.is_finite(train_state.params):
      raise endings.NotFiniteError(f"step {step}: the weights are not finite")
    checkpoints.save(
      step, _saved(experiment, train_state), eval_metrics, force=True
    )

  try:
    _, finished = loop.run(
      first,
      train_step=train_step,
      batches=batches,
      waited=lambda: batches.wait_seconds,
      schedule=experiment.schedule,
      eval_fn=eval_fn,
      save_fn=save,
      wait_fn=checkpoints.wait,
      record_fn=record.write,
    )
  except endings.NotFiniteError as error:
    checkpoints.wait()
    saved = checkpoints.latest_step()
    last = "none was saved" if saved is None else f"that of step {saved} stays"
    raise endings.NotFiniteError(
      f"{error}: the run ends; last good checkpoint: {last}"
    ) from error
  return finished


def _make_ppo(experiment):
  """Returns an iteration as a step, and the evaluation on held-out prompts."""
  options = experiment.reinforcement
  iterate = ppo_run.make_iteration(
    options,
    experiment.scorer,
    experiment.reference.model,
    tokenizer=experiment.tokenizer,
    stop_ids=experiment.stop_ids,
    optimizer=experiment.optimizer,
    mesh=experiment.mesh,
  )
  return (
    ppo_run.make_step(options, iterate, experiment.learning_rate),
    ppo_run.make_eval_fn(experiment.eval_loader, iterate),
  )


def _write_run_files(experiment, workdir):
  if jax.process_index() == 0:
    path = workdir / run_folder.MODEL_FOLDER
    with files.folder(path, marker="config.json") as folder:
      huggingface.write_config(
        str(folder),
        experiment.scorer.policy,
        bos_token_id=experiment.tokenizer.bos_token_id,
        eos_token_id=stop_tokens.in_config(experiment.stop_ids),
      )
      tokenizer_files.save_tokenizer(experiment.tokenizer, folder)
      if experiment.scorer.policy.head == "vocabulary":
        stop_tokens.write(folder, experiment.stop_ids, experiment.opened)
      if experiment.scorer.policy.lora:
        base = experiment.settings["model"]["path"]
        source.write_lora(folder, experiment.scorer.policy.lora, base)
    run_folder.write_config(workdir, experiment.settings)
  multihost_utils.sync_global_devices("run folder written")

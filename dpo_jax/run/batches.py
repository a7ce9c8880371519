"""The batches of a run: data as tokens, in a layout that its models allow."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax import sharding
from dpo_jax.data import dataset, loader, placement, tokenize, tokenizer_files
from dpo_jax.host import processes
from dpo_jax.losses import objectives
from dpo_jax.models.config import ModelConfig


def make_loaders(
  options: Mapping[str, Any],
  objective: objectives.Objective,
  tokenizer: tokenizer_files.Tokenizer,
  mesh: Mesh,
  models: Sequence[ModelConfig],
  *,
  cache_dir: pathlib.Path,
  batch_size: int,
  microbatch_rows: int,
  eval_pairs: int,
  seed: int,
) -> tuple[loader.Loader, loader.Loader | None]:
  """Returns the training batches, and those of held-out pairs, if any.

  Args:
    options: the group `data` of a config (see configs/base.py).
    objective: says what is read of a row and how batches hold it.
    tokenizer: the policy's.
    mesh: all devices.
    models: all that see the batches, whose windows choose the layout.
    cache_dir: folder of the cache of tokens.
    batch_size: pairs (or demonstrations) in an update.
    microbatch_rows: in memory at once; 0: one per device that splits rows.
    eval_pairs: of the evaluation data, from its start; 0: all.
    seed: of the order of pairs.

  Raises:
    ValueError: data that cannot be read, or an option that is not right.
  """
  read = functools.partial(
    _read_tokens, options, objective, tokenizer, cache_dir
  )
  train_data = read(options["path"], options["split"])
  eval_data = None
  if options["eval_path"]:
    eval_data = read(options["eval_path"], options["eval_split"])
    if eval_pairs:
      eval_data = eval_data.head(eval_pairs)
  layout = _layout(options["layout"], models, train_data, eval_data)
  shards = sharding.num_row_shards(mesh)
  if not microbatch_rows:
    microbatch_rows = shards + (shards % 2 if layout == "padded" else 0)
  if microbatch_rows % shards:
    raise ValueError(
      f"microbatch_rows={microbatch_rows}: must be a multiple of the"
      f" {shards} devices that rows are split over (mesh.data * mesh.fsdp *"
      " mesh.expert)"
    )
  settings = dict(
    microbatch_rows=microbatch_rows,
    row_length=options["row_length"],
    seed=seed,
    layout=layout,
    batch_size=batch_size,
    row_range=sharding.local_rows(mesh, microbatch_rows),
    extra_columns=objective.extra_columns,
    scored="tokens" if objective.head == "vocabulary" else "ends",
    max_prompt_length=options["max_prompt_length"],
  )
  train_loader = _make_loader(
    options["path"], train_data, shuffle=options["shuffle"], **settings
  )
  if batch_size > train_loader.num_pairs:
    raise ValueError(
      f"batch_size={batch_size}: larger than the data"
      f" ({train_loader.num_pairs} pairs in {options['path']}); pass"
      f" --config.batch_size={train_loader.num_pairs} or less"
    )
  if eval_data is None:
    return train_loader, None
  return train_loader, _make_loader(
    options["eval_path"], eval_data, shuffle=False, **settings
  )


def _make_loader(path, tokens, **settings):
  """Returns the batches of a file; a mistake of it names the file."""
  try:
    return loader.Loader(tokens, **settings)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _layout(layout, models, *data):
  """Returns the layout that every window and all data allow, and says so."""
  window = min((m.window for m in models if m.window), default=None)
  lengths = [tokens.lengths for tokens in data if tokens is not None]
  allowed = {placement.layout_for_window(x, layout, window) for x in lengths}
  if allowed == {layout}:
    return layout
  processes.say(
    f"data.layout: padded, as sequences are longer than the {window} keys that"
    " a sliding window of the model sees"
  )
  return "padded"


def _read_tokens(options, objective, tokenizer, cache_dir, path, split):
  """Returns the tokens of one file or data set, and says what was dropped."""
  tokens = dataset.load(
    cache_dir,
    source=options["source"],
    path=path,
    split=split,
    tokenizer=tokenizer,
    inputs=objective.inputs,
    max_length=options["max_length"],
    max_prompt_length=options["max_prompt_length"],
    truncate_prompts=options["truncate_prompts"],
    is_builder=jax.process_index() == 0,
    agree=processes.agree,
  )
  processes.say(
    f"data: {options['source']} {path}", *tokenize.report_lines(tokens.report)
  )
  return tokens

"""Models as Hugging Face folders, adapters as PEFT folders."""

import dataclasses
import os

import jax

from dpo_jax import sharding
from dpo_jax.checkpoints import source, stop_tokens
from dpo_jax.data import tokenizer_files
from dpo_jax.host import files
from dpo_jax.models import lora, transformer
from dpo_jax.models.huggingface import adapters as huggingface_adapters
from dpo_jax.models.huggingface import folder as huggingface

# What a model or an adapter is made of; the rest of a target stays as it is.
REPLACED = "|".join(
  [
    huggingface.WEIGHT_FILES,
    r"(generation_|adapter_)?config\.json",
    r"adapter_model\.safetensors",
    r"chat_template\.jinja",
  ]
)


def write(
  path: str,
  target: str,
  *,
  step: int | None = None,
  dtype: str = "float32",
  max_shard_bytes: float = 5e9,
  adapter: bool = False,
) -> None:
  """Writes a model and its tokenizer as a Hugging Face folder.

  All that end its responses stand in config.json and generation_config.json.
  Adapters are merged into their base. The folder is written whole or not at
  all, by one process at a time; a model or an adapter in it is replaced.

  Args:
    path: a run folder, a Hugging Face folder or a hub name.
    target: the folder to write; must not be what is read.
    step: which checkpoint of a run; see `source.open_model`.
    dtype: of the weights that are written.
    max_shard_bytes: several files are written above this.
    adapter: writes the adapters alone, in PEFT's format.

  Raises:
    ValueError: no such model, a target that is its source or that another
      process writes, or a whole model where adapters are asked for.
  """
  if os.path.realpath(path) == os.path.realpath(target):
    raise ValueError(f"the target {target!r} is the source")
  if jax.process_index() != 0:  # it takes part, and writes nothing
    _write(path, target, step, dtype, max_shard_bytes, adapter)
    return
  marker = huggingface_adapters.CONFIG if adapter else "config.json"
  with (
    files.owned_folder(target, "writes"),
    files.folder(target, marker=marker, stale=REPLACED) as part,
  ):
    _write(path, str(part), step, dtype, max_shard_bytes, adapter)


def _write(path, target, step, dtype, max_shard_bytes, adapter):
  opened = source.open_model(path, step=step)
  if adapter:
    _write_adapter(path, target, step, dtype, opened)
    return
  config = dataclasses.replace(opened.config, param_dtype=dtype)
  tokenizer = tokenizer_files.load_tokenizer(opened.tokenizer)
  stop_ids = stop_tokens.find(tokenizer, opened)
  layouts = transformer.layouts(sharding.make_mesh(), config)
  huggingface.save_model(
    target,
    config,
    opened.load(config, layouts),
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=stop_tokens.in_config(stop_ids),
    max_shard_bytes=max_shard_bytes,
  )
  if jax.process_index() == 0:
    _write_tokenizer(target, tokenizer, stop_ids, opened)


def _write_adapter(path, target, step, dtype, opened):
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
    tokenizer = tokenizer_files.load_tokenizer(opened.tokenizer)
    stop_ids = stop_tokens.find(tokenizer, opened)
    _write_tokenizer(target, tokenizer, stop_ids, opened)


def _write_tokenizer(target, tokenizer, stop_ids, opened):
  """Writes the tokenizer with its chat template, and what ends a response."""
  tokenizer_files.save_tokenizer(tokenizer, target)
  if opened.config.head == "vocabulary":
    stop_tokens.write(target, stop_ids, opened)

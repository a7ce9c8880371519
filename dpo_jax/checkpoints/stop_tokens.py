"""Which tokens end a model's response: decided here, for all that sample.

A response ends at the first of the tokenizer's end-of-sequence token, the ids
of `generation_config.json` and `config.json` under `eos_token_id`, and the
token that the chat template writes behind an assistant's message. What is
trained on ends as `data.tokenize` ends it; a response that was sampled up to
another stop token is read again, as text, with that end instead.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from dpo_jax.checkpoints import source
from dpo_jax.data import tokenizer_files
from dpo_jax.models.huggingface import folder as huggingface

GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"
CONVERSATION = (
  {"role": "user", "content": "question"},
  {"role": "assistant", "content": "<answer>"},
)
# What says by whom and how the file was written, not how to generate.
_WRITTEN_BY = ("_from_model_config", "transformers_version")


def find(
  tokenizer: tokenizer_files.Tokenizer, opened: source.ModelSource | None = None
) -> tuple[int, ...]:
  """Returns the ids that each end a response, the tokenizer's own first.

  Ids that the model has no row for are left out, as it never samples them.

  Args:
    tokenizer: the model's.
    opened: the model; None for one of random weights.

  Raises:
    ValueError: a file of the model that cannot be read, or ids that are none.
  """
  found, count = [tokenizer.eos_token_id], len(tokenizer)
  if opened is not None:
    count = opened.config.vocab_size
    for folder in opened.folders:
      for name in (GENERATION_CONFIG, "config.json"):
        found += _read_ids(os.path.join(folder, name))
  found += _end_of_turn(tokenizer)
  kept = [token for token in found[1:] if 0 <= token < count]
  return tuple(dict.fromkeys(found[:1] + kept))


def in_config(stop_ids: Sequence[int]) -> int | list[int]:
  """Returns the ids as Hugging Face's files have them: one is no list."""
  return stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)


def write(
  folder: str | os.PathLike[str],
  stop_ids: Sequence[int],
  opened: source.ModelSource | None = None,
) -> None:
  """Writes generation_config.json: the ids, and what else the model's says."""
  values: dict[str, Any] = {}
  for origin in opened.folders if opened is not None else ():
    values = _read(os.path.join(origin, GENERATION_CONFIG)) | values
  values = {key: x for key, x in values.items() if key not in _WRITTEN_BY}
  path = pathlib.Path(folder) / GENERATION_CONFIG
  huggingface.write_json(str(path), values | {KEY: in_config(stop_ids)})


def _read_ids(path: str) -> list[int]:
  value = _read(path).get(KEY)
  if value is None:
    return []
  ids = value if isinstance(value, list) else [value]
  if not all(type(token) is int for token in ids):
    raise ValueError(
      f"{path}: {KEY} is {json.dumps(value)}; allowed: a token id, a list of"
      " them, or null"
    )
  return ids


def _read(path: str) -> dict[str, Any]:
  """Returns a file of JSON; empty where it is not there."""
  if not os.path.isfile(path):
    return {}
  with open(path, encoding="utf-8") as file:
    try:
      values = json.load(file)
    except ValueError as error:
      raise ValueError(f"{path} is not JSON: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} is no JSON object")
  return values


def _end_of_turn(tokenizer: tokenizer_files.Tokenizer) -> list[int]:
  """Returns the token that the template writes behind an answer, if any."""
  if tokenizer.chat_template is None:
    return []
  try:
    text = tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False)
  except (jinja2.TemplateError, TypeError, ValueError):
    return []  # It takes other messages: where these come, it is refused.
  _, answer, rest = text.rpartition(CONVERSATION[-1]["content"])
  rest = rest.lstrip()
  written = [
    token
    for token in tokenizer.get_added_vocab()
    if answer and rest.startswith(token)
  ]
  if not written:
    return []
  return [tokenizer.convert_tokens_to_ids(max(written, key=len))]

"""Tokenizers: loaded whole or refused, written, and told apart."""

import glob
import json
import os

import transformers

from dpo_jax.data import (
  quiet,
  token_ids,
)
from dpo_jax.host import endings, schema

# What ends a text in a bare `tokenizers` file, which does not say it.
END_TOKENS = ("<|endoftext|>", "</s>")


START_TOKENS = ("<s>",)


Tokenizer = transformers.PreTrainedTokenizerBase


def load_tokenizer(path: str, vocab_size: int | None = None) -> Tokenizer:
  """Returns a tokenizer whose end-of-sequence token is known.

  Args:
    path: a folder in Hugging Face format, a `tokenizers` file (*.json), or a
      hub name. A file does not say which of its tokens ends a text: it is the
      first of `END_TOKENS` among its special tokens.
    vocab_size: of the model that reads its ids; see `token_ids.check`.

  Raises:
    ValueError: no tokenizer there that is whole, none with a backend of
      `tokenizers` and an end-of-sequence token, or one of another model. No
      code of a folder is run.
  """
  schema.check_regular(path)
  for pattern in ("*", "additional_chat_templates/*"):
    for file in glob.glob(os.path.join(glob.escape(path), pattern)):
      schema.check_regular(file)
  is_local = path.startswith(("/", ".")) or path.endswith(".json")
  if is_local and not os.path.exists(path):
    raise ValueError(f"no such tokenizer: {path!r}")
  try:
    with quiet.held_back_stderr():
      tokenizer = (
        _load_file(path)
        if os.path.isfile(path)
        else transformers.AutoTokenizer.from_pretrained(
          path, trust_remote_code=False
        )
      )
      tokenizer("")  # some are found to be broken when they are first used
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # `tokenizers` raises such where it panics
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
      reason = "its class is code of its own, which is never run"
    raise ValueError(
      f"no tokenizer at {path!r}: {reason}; allowed: a folder, a tokenizers"
      " file, or a hub name"
    ) from error
  if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
    raise ValueError(
      f"tokenizer {path!r} is a {type(tokenizer).__name__}, which has no"
      " tokenizer.json; allowed: one with a backend of the package tokenizers"
    )
  if not tokenizer.eos_token or tokenizer.eos_token_id is None:
    raise ValueError(
      f"tokenizer {path!r} has no end-of-sequence token; it must name one"
      " as eos_token"
    )
  template = tokenizer.chat_template
  if not isinstance(template, str | dict | None):
    raise ValueError(
      f"tokenizer {path!r}: chat_template={template!r}; allowed: a text"
    )
  if vocab_size is not None:
    token_ids.check(tokenizer, vocab_size)
  return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
  """Writes the files of a tokenizer into a folder, which is made if absent.

  Raises:
    OSError: they cannot be written.
  """
  # Of a file in its place transformers only logs.
  os.makedirs(folder, exist_ok=True)
  with endings.writing(folder):
    tokenizer.save_pretrained(folder)


def _load_file(path: str) -> Tokenizer:
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
  added = {
    token.content
    for token in tokenizer.added_tokens_decoder.values()
    if token.special
  }
  tokenizer.eos_token = next((t for t in END_TOKENS if t in added), None)
  tokenizer.bos_token = next((t for t in START_TOKENS if t in added), None)
  return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
  """Returns a text that changes whenever token ids or templates would."""
  content = json.loads(tokenizer.backend_tokenizer.to_str())
  # State of the last call, which the tokenizer itself sets.
  del content["truncation"], content["padding"]
  special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
  return json.dumps([content, special, tokenizer.chat_template])

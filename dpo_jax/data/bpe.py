"""Trains a small tokenizer, for models that start from random weights."""

import os
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
import transformers

from dpo_jax.data import examples, tokenizer_files
from dpo_jax.host import files

EOS = "<|endoftext|>"
NUM_BYTES = 256


def train(
  lines: Iterable[str], vocab_size: int
) -> transformers.PreTrainedTokenizerFast:
  """Returns a byte-level BPE tokenizer of the lines, GPT-2's kind.

  It depends on the lines and on `vocab_size` alone. Its first token is `EOS`,
  every byte is a token, and it adds no token of its own.

  Args:
    lines: what merges are counted in.
    vocab_size: tokens, at least 257; fewer come out where the lines have no
      more pairs to merge.

  Raises:
    ValueError: a vocabulary without room for the bytes.
  """
  if vocab_size <= NUM_BYTES:
    raise ValueError(
      f"vocab_size={vocab_size}: must be above {NUM_BYTES}, one for each byte"
      " and one that ends a text"
    )
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(lines, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token=EOS,
    clean_up_tokenization_spaces=False,
  )


def write(
  tokenizer: transformers.PreTrainedTokenizerFast, path: str | os.PathLike
) -> None:
  """Writes a tokenizer folder, whole or not at all."""
  with files.folder(path, marker="tokenizer_config.json") as part:
    tokenizer_files.save_tokenizer(tokenizer, part)


def texts(source: str, paths: Sequence[str], split: str) -> Iterator[str]:
  """Yields prompt and response of each demonstration, end to end.

  Args:
    source: a name of `examples.SOURCES`.
    paths: what it reads, one after another.
    split: which part; not looked at for a local file.

  Raises:
    ValueError: data that cannot be read, or that holds chat messages, which
      a new tokenizer has no template for.
  """
  for path in paths:
    for row in examples.read(
      source, path, split=split, inputs="demonstrations"
    ):
      if "dropped" in row:
        continue
      if not isinstance(row["prompt"], str):
        raise ValueError(f"{path!r} holds chat messages; allowed: strings")
      yield row["prompt"] + row["response"]

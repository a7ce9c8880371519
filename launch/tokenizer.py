"""Trains a byte-level BPE tokenizer on the text of a data set.

  python -m launch.tokenizer --data=imdb/train.jsonl.xz --data_source=imdb \\
    --vocab_size=8192 --output=runs/imdb_tokenizer

For models that start from random weights. The same data and size give the
same tokenizer. Prompts and responses are read as demonstrations.
"""

from absl import flags

from dpo_jax.host import files
from launch import cli

DATA = flags.DEFINE_multi_string("data", None, "File of text.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 8192, "Tokens, above 256.", 257, 2**22
)
DATA_SOURCE = flags.DEFINE_string(
  "data_source", "jsonl", "What reads the data: hh, imdb, tldr, jsonl, hub."
)
SPLIT = flags.DEFINE_string("split", "train", "Of a hub dataset, or of posts.")
flags.mark_flags_as_required(["data", "output"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  with files.owned_folder(OUTPUT.value, "writes"):
    from dpo_jax.data import bpe

    tokenizer = bpe.train(
      bpe.texts(DATA_SOURCE.value, DATA.value, SPLIT.value), VOCAB_SIZE.value
    )
    bpe.write(tokenizer, OUTPUT.value)
  print(f"{len(tokenizer)} tokens: {OUTPUT.value}")
  return 0


if __name__ == "__main__":
  cli.run(main)

"""A tokenizer's ids against the rows of a model.

Ids may leave some out, so how many tokens there are says nothing of how high
they go.
"""

import transformers


def size(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
  """Returns the highest token id plus 1; ids may leave some out."""
  return max(tokenizer.get_vocab().values()) + 1


def check(
  tokenizer: transformers.PreTrainedTokenizerBase, vocab_size: int
) -> None:
  """Raises ValueError that names a token whose id a model has no row for.

  Args:
    tokenizer: any.
    vocab_size: how many tokens the model knows; ids are below it.
  """
  token, highest = max(tokenizer.get_vocab().items(), key=lambda x: x[1])
  if highest >= vocab_size:
    raise ValueError(
      f"the tokenizer {tokenizer.name_or_path!r} has token {token!r} with id"
      f" {highest}, and the model has {vocab_size} tokens: ids must be below"
    )

"""Token ids of a text that continues another.

Some tokenizers put a space (`▁`) in front of every text that they are given,
and a response that is tokenised alone would begin with it. So prompt and
response are tokenised as one text, and cut behind the prompt's own tokens:

  "Once upon a time" + " there was"   ▁Once ▁upon ▁a ▁time | ▁there ▁was

Where the one text does not begin with the prompt's tokens, as one of them
would reach over the border, the border stays between tokens. The response is
then tokenised alone, by a copy of the tokenizer that puts nothing in front:

  "Hello wor" + "ld"                  ▁Hello ▁wor | ld

A wordpiece tokenizer, which marks the middle of a word, takes such a response
for a new word.
"""

import functools
import json
from typing import Any

import tokenizers
import transformers

Tokenizer = transformers.PreTrainedTokenizerBase


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
  """Returns the token ids of texts, to which no special token is added.

  Raises:
    ValueError: a text that the tokenizer has no tokens for.
  """
  if not texts:
    return []
  try:
    return tokenizer(
      texts,
      add_special_tokens=False,
      return_attention_mask=False,
      return_token_type_ids=False,
      verbose=False,  # no warning about lengths, which are cut later
    )["input_ids"]
  except Exception as error:  # `tokenizers` raises bare Exceptions
    reason = " ".join(str(error).split())
    raise ValueError(f"the tokenizer cannot encode it: {reason}") from error


def encode_behind(
  tokenizer: Tokenizer, texts: list[tuple[str, str]]
) -> list[list[int]]:
  """Returns the token ids of what follows the beginnings of texts.

  Args:
    tokenizer: of the texts.
    texts: of each its beginning, whose ids are not returned, and the whole.
  """
  beginnings = list(dict.fromkeys(before for before, _ in texts))
  heads = dict(zip(beginnings, encode(tokenizer, beginnings), strict=True))
  found = encode(tokenizer, [whole for _, whole in texts])
  crossed = {}  # texts of which a token reaches over the border, by place
  for place, (before, whole) in enumerate(texts):
    head, ids = heads[before], found[place]
    if ids[: len(head)] == head:
      found[place] = ids[len(head) :]
    else:
      crossed[place] = whole[len(before) :]
  if crossed:
    alone = encode(_without_prefix(tokenizer), list(crossed.values()))
    for place, ids in zip(crossed, alone, strict=True):
      found[place] = ids
  return found


@functools.lru_cache(maxsize=4)
def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
  """Returns a tokenizer that puts nothing in front of a text."""
  content = json.loads(tokenizer.backend_tokenizer.to_str())
  # State of the last call, which the tokenizer itself sets.
  content["truncation"] = content["padding"] = None
  names = ("normalizer", "pre_tokenizer")
  changed = {name: _without(content[name]) for name in names}
  if all(changed[name] == content[name] for name in names):
    return tokenizer
  backend = tokenizers.Tokenizer.from_str(json.dumps(content | changed))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def _without(part: dict[str, Any] | None) -> dict[str, Any] | None:
  """Returns a part of a tokenizer's file without what it puts in front."""
  kind = None if part is None else part["type"]
  if kind == "Prepend":
    return None
  if kind == "Metaspace":
    return part | {"prepend_scheme": "never"}
  if kind == "ByteLevel":
    return part | {"add_prefix_space": False}
  if kind == "Sequence":
    name = next(name for name in part if name != "type")
    kept = [x for x in map(_without, part[name]) if x is not None]
    return part | {name: kept}
  return part

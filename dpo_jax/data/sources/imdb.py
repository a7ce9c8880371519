r"""Film reviews with their sentiment (Maas et al. 2011, ACL).

A row holds a review, which keeps the site's line breaks:

  {"id": 7, "label": 0, "rating": 2,
   "text": "I waited weeks for this.<br /><br />It was not worth it."}

which becomes

  {"prompt": "I waited weeks for",
   "response": " this.\nIt was not worth it.", "label": 0}

A demonstration where these are asked for, and a labelled response; a review
of the unlabelled part (label -1) has no label. The prompt is the review's
first 2 to 8 words, how many being fixed by its text. Differs: Rafailov et al.
2023 (arXiv 2305.18290, sec 6.1) take 2 to 8 tokens, which would depend on the
tokenizer. A run of `<br />` becomes one line break.
"""

import re
import zlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data.sources import jsonl

MIN_PROMPT_WORDS, MAX_PROMPT_WORDS = 2, 8

_BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+")


def read(path: str, split: str) -> Iterator[dict[str, Any]]:
  """Yields prompt, response and, where known, label of each row of a file.

  Args:
    path: as of `jsonl.read`.
    split: not looked at.

  Raises:
    ValueError: a file that cannot be read, or a row without a text of two
      words or more.
  """
  for number, row in enumerate(jsonl.read(path, split), 1):
    text = row.get("text")
    if not isinstance(text, str) or len(text.split()) < 2:
      raise ValueError(
        f"{path}, row {number}: column 'text' is {text!r}; allowed: a review"
        " of two words or more"
      )
    prompt, response = split_review(clean(text))
    labels = {"label": row["label"]} if row.get("label", -1) != -1 else {}
    yield {"prompt": prompt, "response": response} | labels


def clean(text: str) -> str:
  """Returns a review with line breaks for its `<br />`."""
  return _BREAKS.sub("\n", text).strip()


def split_review(text: str) -> tuple[str, str]:
  """Returns the first words of a review, and all that follows them."""
  num_words = MIN_PROMPT_WORDS + zlib.crc32(text.encode()) % (
    MAX_PROMPT_WORDS - MIN_PROMPT_WORDS + 1
  )
  ends = [word.end() for word in re.finditer(r"\S+", text)]
  end = ends[min(num_words, len(ends) - 1) - 1]
  return text[:end], text[end:]

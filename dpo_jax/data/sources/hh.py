r"""Anthropic's helpful and harmless dialogues (Bai et al. 2022, 2204.05862).

A row holds two raw transcripts:

  {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
   "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."}

which becomes

  {"prompt": "\n\nHuman: Hi\n\nAssistant:",
   "chosen": " Hello.", "rejected": " Go away."}

A column `subset` (which part of the data a row is from) stays beside them.
"""

from collections.abc import Iterator

from dpo_jax.data.sources import jsonl

ASSISTANT = "\n\nAssistant:"
COLUMNS = ("chosen", "rejected", "subset")


def read(path: str, split: str) -> Iterator[dict]:
  """Yields `chosen`, `rejected` and `subset` of each row of a file."""
  for row in jsonl.read(path, split):
    yield {name: row[name] for name in COLUMNS if name in row}


def split_transcripts(
  chosen: str, rejected: str
) -> tuple[str, str, str] | None:
  """Returns prompt, chosen and rejected; None where the prompts differ.

  The prompt of a transcript ends with its last `ASSISTANT`.
  """
  prompt, chosen = _split_last(chosen)
  rejected_prompt, rejected = _split_last(rejected)
  return (prompt, chosen, rejected) if prompt == rejected_prompt else None


def _split_last(transcript: str) -> tuple[str, str]:
  prompt, assistant, response = transcript.rpartition(ASSISTANT)
  return prompt + assistant, response

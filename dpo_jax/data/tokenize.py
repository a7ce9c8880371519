"""Examples to token ids: prompt and responses as one text, cut between them.

A response's tokens stand behind its prompt's in the one text that both make
(see `continuation`), which is where a model samples them. A prompt gets the
beginning-of-sequence token if the tokenizer adds one; a response ends with the
end-of-sequence token, unless truncation cut it off or its row says that it had
not ended. Messages go through the tokenizer's chat template (see `chat`), which
writes all special tokens itself.
"""

import array
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dpo_jax.data import (
  chat,
  continuation,
  cuts,
  examples,
  truncation,
)
from dpo_jax.data.packing import PairTokens, Ragged
from dpo_jax.data.tokenizer_files import Tokenizer

CHUNK_ROWS = 1024  # rows that are given to the tokenizer at once


@dataclasses.dataclass
class Report:
  """What became of the rows that were read. Lengths are in tokens."""

  read: int = 0
  kept: int = 0
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  truncated_prompts: int = 0
  truncated_responses: int = 0
  identical: int = 0  # pairs whose responses are equal, kept
  not_ended: int = 0  # responses that were cut when they were sampled
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)

  def drop(self, reason: str) -> None:
    self.dropped[reason] = self.dropped.get(reason, 0) + 1


def report_lines(report: Report) -> list[str]:
  """Returns the report as lines of text, a number before each name."""
  rows = [(report.read, "rows read"), (report.kept, "kept")]
  rows += [
    (count, f"dropped: {reason}") for reason, count in report.dropped.items()
  ]
  rows += [
    (report.truncated_prompts, "truncated prompts"),
    (report.truncated_responses, "truncated responses"),
    (report.identical, "pairs with identical responses (kept)"),
  ]
  if report.not_ended:
    rows.append((report.not_ended, "responses that did not end (no EOS)"))
  lines = [f"{count:>10,}  {name}" for count, name in rows]
  for name, total in report.tokens.items():
    mean = total / max(report.kept, 1)
    lines.append(f"{mean:>10.1f}  mean tokens of {name}")
  return lines


def tokenize(
  rows: Iterable[dict],
  tokenizer: Tokenizer,
  *,
  inputs: str,
  where: Callable[[int], str] = "row {}".format,
  **lengths: Any,
) -> tuple[PairTokens, Report]:
  """Returns the tokens of the rows that are kept, and what became of all.

  Rows are cut as `truncation` says. One whose responses are lost whole is
  dropped.

  Args:
    rows: examples, as `examples.read` yields them.
    tokenizer: of `load_tokenizer`.
    inputs: one of `examples.INPUTS`. The response of a demonstration stands
      in the column of chosen ones, one that is labelled by itself in that of
      chosen or rejected; a list's responses have columns of their own.
    where: returns the place of a row, counted from 1, for an error.
    **lengths: the fields of `truncation.Limits`.

  Raises:
    ValueError: a length out of range, or messages that the tokenizer's chat
      template cannot write.
  """
  limits = truncation.Limits(**lengths)
  report = Report()
  columns = [_Lists(), _Lists(), _Lists()]
  score_gaps = array.array("f")
  rows = iter(rows)
  while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
    for row, lists in _tokenize_chunk(chunk, tokenizer, report, where):
      kept = _truncate(lists, limits, report)
      if kept:
        while len(columns) < len(kept):  # a list longer than those before it
          columns.append(_Lists.of_empty(report.kept - 1))
        for column, tokens in itertools.zip_longest(columns, kept):
          column.append(tokens or [])
        if inputs == "scored_pairs":
          score_gaps.append(row["score_gap"])
  prompt, *responses = (column.ragged() for column in columns)
  tokens = PairTokens(prompt, tuple(responses))
  if inputs == "scored_pairs":
    tokens = tokens._replace(score_gaps=np.array(score_gaps, np.float32))
  chosen, rejected = (len(x.values) for x in responses[:2])
  report.tokens = {
    "pairs": {"chosen": chosen, "rejected": rejected},
    "demonstrations": {"response": chosen},
    "labelled": {"desirable": chosen, "undesirable": rejected},
    "ranked": {"responses": sum(len(x.values) for x in responses)},
  }[inputs.removeprefix("scored_")]
  report.tokens = {"prompt": len(prompt.values)} | report.tokens
  return tokens, report


def encode_prompts(
  tokenizer: Tokenizer, prompts: list[examples.Text]
) -> list[list[int]]:
  """Returns the token ids of prompts, ready for a response to follow.

  An empty prompt is the beginning-of-sequence token, or the end-of-sequence
  token where there is no other.

  Raises:
    ValueError: messages that the tokenizer's chat template cannot write.
  """
  texts = []
  for number, prompt in enumerate(prompts, 1):
    with _naming(f"prompt {number} of {len(prompts)}"):
      texts.append(chat.prompt_text(tokenizer, prompt))
  return _encode_prompts(tokenizer, prompts, texts)


def encode_responses(
  tokenizer: Tokenizer,
  prompts: list[examples.Text],
  responses: list[examples.Text],
  ended: Sequence[bool] | None = None,
) -> list[list[int]]:
  """Returns the token ids of responses, each ended by one EOS token.

  They continue the ids that `encode_prompts` has of their prompts. What did not
  end has neither EOS nor what a template writes behind a message, and no token
  where it has no text.

  Args:
    tokenizer: of `load_tokenizer`.
    prompts: of each response.
    responses: what stands behind the prompts.
    ended: whether each response ended; by default all did.

  Raises:
    ValueError: messages that the tokenizer's chat template cannot write, or
      whose prompt it writes differently once its response is there.
  """
  ended = [True] * len(responses) if ended is None else ended
  texts = []
  rows = zip(prompts, responses, ended, strict=True)
  for number, (prompt, response, has_end) in enumerate(rows, 1):
    with _naming(f"response {number} of {len(responses)}"):
      before = chat.prompt_text(tokenizer, prompt)
      whole = chat.whole_text(tokenizer, prompt, response, before, has_end)
    texts.append((before, whole))
  return _encode_responses(tokenizer, texts, ended)


def decode(
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
) -> tuple[list[str], list[str]]:
  """Returns the texts of prompts and of responses, without special tokens.

  A response has the space before its first word, where decoding both shows it,
  so that `encode_responses` gives its tokens back. Of tokens that no text has,
  such as a word in more pieces than the tokenizer makes of it, or bytes that
  are no character, it gives others, which read the same.
  """
  decode_all = functools.partial(
    tokenizer.batch_decode,
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False,  # it takes away spaces of the text
  )
  before, alone = decode_all(prompts), decode_all(responses)
  both = decode_all([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
  return before, [
    text.removeprefix(prompt) if text.startswith(prompt) else response
    for text, prompt, response in zip(both, before, alone, strict=True)
  ]


def _tokenize_chunk(
  rows: list[dict],
  tokenizer: Tokenizer,
  report: Report,
  where: Callable[[int], str],
) -> Iterator[tuple[dict, tuple[list[int], ...]]]:
  """Yields rows that are not dropped, with tokens of prompt and responses."""
  kept, befores, wholes, ended, places = [], [], [], [], []
  for number, row in enumerate(rows, report.read + 1):
    if "dropped" in row:
      report.drop(row["dropped"])
      continue
    with _naming(where(number)):
      before = chat.prompt_text(tokenizer, row["prompt"])
      for response, has_end in zip(
        _responses(row), cuts.ended(row), strict=True
      ):
        if response is not None:
          whole = chat.whole_text(
            tokenizer, row["prompt"], response, before, has_end
          )
          wholes.append((before, whole))
          ended.append(has_end)
          places.append(where(number))
    kept.append(row)
    befores.append(before)
  report.read += len(rows)
  try:
    prompts = _encode_prompts(tokenizer, [x["prompt"] for x in kept], befores)
    encoded = iter(_encode_responses(tokenizer, wholes, ended))
  except ValueError:  # of some text among many: which one is said
    for place, (_, whole) in zip(places, wholes, strict=True):
      with _naming(place):
        continuation.encode(tokenizer, [whole])
    raise
  for row, prompt in zip(kept, prompts, strict=True):
    lists = [None if x is None else next(encoded) for x in _responses(row)]
    if [] in lists:  # as empty as a response that is absent
      report.drop("a response without a token that did not end")
      continue
    report.not_ended += sum(
      not has_end
      for tokens, has_end in zip(lists, cuts.ended(row), strict=True)
      if tokens
    )
    yield row, (prompt, *(tokens or [] for tokens in lists))


def _responses(row: dict) -> list[examples.Text | None]:
  """Returns an example's responses by column, None where one is absent."""
  if "responses" in row:
    return row["responses"]
  if "response" in row:
    response = row["response"]
    return [response, None] if row.get("label", True) else [None, response]
  return [row["chosen"], row["rejected"]]


def _truncate(
  lists: tuple[list[int], ...], limits: truncation.Limits, report: Report
) -> tuple[list[int], ...] | None:
  """Returns prompt and responses cut to length; None when dropped."""
  prompt, *responses = lists
  found = limits.cut(prompt, responses)
  if found is None:
    report.drop("no room for a response")
    return None
  kept_prompt, kept = found
  report.kept += 1
  report.truncated_prompts += len(kept_prompt) < len(prompt)
  report.truncated_responses += sum(
    len(x) < len(whole) for x, whole in zip(kept, responses, strict=True)
  )
  present = [tuple(tokens) for tokens in kept if tokens]
  report.identical += len(set(present)) < len(present)
  return kept_prompt, *kept


def _encode_prompts(
  tokenizer: Tokenizer,
  prompts: list[examples.Text],
  texts: list[str],
) -> list[list[int]]:
  """Returns the token ids of prompts, whose texts are given as well."""
  bos = tokenizer.bos_token_id
  adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
  empty = [tokenizer.eos_token_id if bos is None else bos]
  encoded = continuation.encode(tokenizer, texts)
  for prompt, ids in zip(prompts, encoded, strict=True):
    if adds_bos and isinstance(prompt, str) and ids[:1] != [bos]:
      ids.insert(0, bos)
  return [ids or empty for ids in encoded]


def _encode_responses(
  tokenizer: Tokenizer,
  texts: list[tuple[str, str]],
  ended: Sequence[bool],
) -> list[list[int]]:
  """Returns the token ids of responses, those that ended with one EOS token.

  Args:
    tokenizer: of the texts.
    texts: of each response its prompt, and prompt and response as one text.
    ended: whether each response ended.
  """
  eos = tokenizer.eos_token_id
  encoded = continuation.encode_behind(tokenizer, texts)
  for ids, has_end in zip(encoded, ended, strict=True):
    if has_end and ids[-1:] != [eos]:
      ids.append(eos)
  return encoded


@contextlib.contextmanager
def _naming(place: str) -> Iterator[None]:
  """Says in an error which text it is about."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{place}: {error}") from error


class _Lists:
  """Token lists, gathered end to end as they come."""

  def __init__(self):
    self._values, self._lengths = array.array("i"), array.array("q")

  @classmethod
  def of_empty(cls, count: int) -> "_Lists":
    lists = cls()
    lists._lengths.extend([0] * count)
    return lists

  def append(self, tokens: list[int]) -> None:
    self._values.extend(tokens)
    self._lengths.append(len(tokens))

  def ragged(self) -> Ragged:
    lengths = np.array(self._lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.array(self._values, np.int32), offsets)

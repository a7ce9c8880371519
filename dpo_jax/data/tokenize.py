"""Examples to token ids: prompt and responses apart, special tokens once.

Tokenised together, a prompt and a response could merge across the boundary,
so each is tokenised alone. A prompt gets the beginning-of-sequence token if
the tokenizer adds one; a response ends with the end-of-sequence token, unless
truncation cut it off. Messages go through the tokenizer's chat template,
which writes all special tokens itself.
"""

import array
import dataclasses
import functools
import glob
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import jinja2
import numpy as np
import transformers

from dpo_jax import schema
from dpo_jax.data import examples, token_ids
from dpo_jax.data.packing import PairTokens, Ragged

CHUNK_ROWS = 1024  # rows that are given to the tokenizer at once
# What ends a text in a bare `tokenizers` file, which does not say it.
END_TOKENS = ("<|endoftext|>", "</s>")
START_TOKENS = ("<s>",)

Tokenizer = transformers.PreTrainedTokenizerBase


@dataclasses.dataclass
class Report:
  """What became of the rows that were read. Lengths are in tokens."""

  read: int = 0
  kept: int = 0
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  truncated_prompts: int = 0
  truncated_responses: int = 0
  identical: int = 0  # pairs whose responses are equal, kept
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
  lines = [f"{count:>10,}  {name}" for count, name in rows]
  for name, total in report.tokens.items():
    mean = total / max(report.kept, 1)
    lines.append(f"{mean:>10.1f}  mean tokens of {name}")
  return lines


def load_tokenizer(path: str, vocab_size: int | None = None) -> Tokenizer:
  """Returns a tokenizer whose end-of-sequence token is known.

  Args:
    path: a folder in Hugging Face format, a `tokenizers` file (*.json), or a
      hub name. A file does not say which of its tokens ends a text: it is the
      first of `END_TOKENS` among its special tokens.
    vocab_size: of the model that reads its ids; see `token_ids.check`.

  Raises:
    ValueError: no tokenizer there, or none with an end-of-sequence token, or
      one of another model.
  """
  schema.check_regular(path)
  for pattern in ("*", "additional_chat_templates/*"):
    for file in glob.glob(os.path.join(glob.escape(path), pattern)):
      schema.check_regular(file)
  is_local = path.startswith(("/", ".")) or path.endswith(".json")
  if is_local and not os.path.exists(path):
    raise ValueError(f"no such tokenizer: {path!r}")
  try:
    if os.path.isfile(path):
      tokenizer = _load_file(path)
    else:
      tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  except Exception as error:  # `tokenizers` raises bare Exceptions
    reason = " ".join(str(error).split())
    raise ValueError(
      f"no tokenizer at {path!r}: {reason}; allowed: a folder, a tokenizers"
      " file, or a hub name"
    ) from error
  if tokenizer.eos_token_id is None:
    raise ValueError(
      f"tokenizer {path!r} has no end-of-sequence token; it must name one"
      " as eos_token"
    )
  if vocab_size is not None:
    token_ids.check(tokenizer, vocab_size)
  return tokenizer


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


def tokenize(
  rows: Iterable[dict],
  tokenizer: Tokenizer,
  *,
  inputs: str,
  max_length: int,
  max_prompt_length: int,
  max_response_length: int = 0,
) -> tuple[PairTokens, Report]:
  """Returns the tokens of the rows that are kept, and what became of all.

  Prompts lose tokens from the left, down to `max_prompt_length`; then
  responses from the right, down to `max_response_length` and until prompt and
  response hold `max_length`. A pair with a response that is lost whole is
  dropped.

  Args:
    rows: examples, as `examples.read` yields them.
    tokenizer: of `load_tokenizer`.
    inputs: one of `examples.INPUTS`. The response of a demonstration stands
      in the column of chosen ones, one that is labelled by itself in that of
      chosen or rejected; a list's responses have columns of their own.
    max_length: tokens in prompt and response together, at least 1.
    max_prompt_length: tokens in a prompt, at least 1.
    max_response_length: tokens in a response, EOS among them; 0: no bound.

  Raises:
    ValueError: a length out of range, messages without a chat template.
  """
  for name, value, least in (
    ("max_length", max_length, 1),
    ("max_prompt_length", max_prompt_length, 1),
    ("max_response_length", max_response_length, 0),
  ):
    if value < least:
      raise ValueError(f"{name}={value}: must be at least {least}")
  lengths = max_length, max_prompt_length, max_response_length or max_length
  report = Report()
  columns = [_Lists(), _Lists(), _Lists()]
  score_gaps = array.array("f")
  rows = iter(rows)
  while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
    for row, lists in _tokenize_chunk(chunk, tokenizer, report):
      kept = _truncate(lists, *lengths, report)
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
    ValueError: messages, and a tokenizer without a chat template.
  """
  texts = [_render_prompt(tokenizer, prompt) for prompt in prompts]
  bos = tokenizer.bos_token_id
  adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
  empty = [tokenizer.eos_token_id if bos is None else bos]
  encoded = _encode(tokenizer, texts)
  for prompt, ids in zip(prompts, encoded, strict=True):
    if adds_bos and isinstance(prompt, str) and ids[:1] != [bos]:
      ids.insert(0, bos)
  return [ids or empty for ids in encoded]


def encode_responses(
  tokenizer: Tokenizer,
  prompts: list[examples.Text],
  responses: list[examples.Text],
) -> list[list[int]]:
  """Returns the token ids of responses, each ended by one EOS token.

  Raises:
    ValueError: messages, and a tokenizer whose chat template is missing or
      writes a prompt differently once its response is there.
  """
  texts = [
    _render_response(tokenizer, prompt, response)
    for prompt, response in zip(prompts, responses, strict=True)
  ]
  eos = tokenizer.eos_token_id
  encoded = _encode(tokenizer, texts)
  for ids in encoded:
    if ids[-1:] != [eos]:
      ids.append(eos)
  return encoded


def decode(
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
) -> tuple[list[str], list[str]]:
  """Returns the texts of prompts and of responses, without special tokens.

  A response has the space before its first word, where decoding both shows it.
  """
  decode_all = functools.partial(
    tokenizer.batch_decode, skip_special_tokens=True
  )
  before, alone = decode_all(prompts), decode_all(responses)
  both = decode_all([[*p, *r] for p, r in zip(prompts, responses, strict=True)])
  return before, [
    text.removeprefix(prompt) if text.startswith(prompt) else response
    for text, prompt, response in zip(both, before, alone, strict=True)
  ]


def _tokenize_chunk(
  rows: list[dict], tokenizer: Tokenizer, report: Report
) -> Iterator[tuple[dict, tuple[list[int], ...]]]:
  """Yields rows that are not dropped, with tokens of prompt and responses."""
  report.read += len(rows)
  for row in rows:
    if "dropped" in row:
      report.drop(row["dropped"])
  rows = [row for row in rows if "dropped" not in row]
  if not rows:
    return
  responses = [_responses(row) for row in rows]
  prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
  present = [
    (row["prompt"], text)
    for row, texts in zip(rows, responses, strict=True)
    for text in texts
    if text is not None
  ]
  encoded = iter(encode_responses(tokenizer, *zip(*present, strict=True)))
  for row, prompt, texts in zip(rows, prompts, responses, strict=True):
    yield row, (prompt, *([] if x is None else next(encoded) for x in texts))


def _responses(row: dict) -> list[examples.Text | None]:
  """Returns an example's responses by column, None where one is absent."""
  if "responses" in row:
    return row["responses"]
  if "response" in row:
    response = row["response"]
    return [response, None] if row.get("label", True) else [None, response]
  return [row["chosen"], row["rejected"]]


def _truncate(
  lists: tuple[list[int], ...],
  max_length: int,
  max_prompt_length: int,
  max_response_length: int,
  report: Report,
) -> tuple[list[int], ...] | None:
  """Returns prompt and responses cut to length; None when dropped."""
  prompt, *responses = lists
  kept_prompt = prompt[-max_prompt_length:]
  room = min(max_length - len(kept_prompt), max_response_length)
  if room <= 0:
    report.drop("no room for a response")
    return None
  kept = [response[:room] for response in responses]
  report.kept += 1
  report.truncated_prompts += len(prompt) > max_prompt_length
  report.truncated_responses += sum(len(x) > room for x in responses)
  present = [tuple(tokens) for tokens in kept if tokens]
  report.identical += len(set(present)) < len(present)
  return kept_prompt, *kept


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
  if not texts:
    return []
  return tokenizer(
    texts,
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,  # no warning about lengths, which are cut later
  )["input_ids"]


def _render_prompt(tokenizer: Tokenizer, prompt: examples.Text) -> str:
  if isinstance(prompt, str):
    return prompt
  return _apply_template(tokenizer, prompt, add_generation_prompt=True)


def _render_response(
  tokenizer: Tokenizer, prompt: examples.Text, response: examples.Text
) -> str:
  """Returns the text of a response, up to the EOS token that ends it."""
  if isinstance(response, str):
    return response
  before = _render_prompt(tokenizer, prompt)
  whole = _apply_template(
    tokenizer, prompt + response, add_generation_prompt=False
  )
  if not whole.startswith(before):
    raise ValueError(
      "the tokenizer's chat template writes a prompt differently once its"
      f" response is there: {before[-40:]!r} is not in {whole!r}"
    )
  text = whole[len(before) :]
  ended = text.rstrip()
  return ended if ended.endswith(tokenizer.eos_token) else text


def _apply_template(
  tokenizer: Tokenizer, messages: list[dict], *, add_generation_prompt: bool
) -> str:
  if tokenizer.chat_template is None:
    raise ValueError(
      "the data holds chat messages, and the tokenizer"
      f" {tokenizer.name_or_path!r} has no chat template; allowed: strings,"
      " or a tokenizer with one"
    )
  try:
    return tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
  except jinja2.TemplateError as error:
    raise ValueError(
      f"the tokenizer's chat template refuses {messages!r}: {error}"
    ) from error


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

"""Examples: a prompt and its responses, as text or as chat messages.

An example is a dict of `prompt, chosen, rejected` (a pair), of `prompt,
response` (a demonstration), of `prompt, response, label` (a response that is
labelled by itself), of `prompt, responses` (a ranked list, the best first), or
of `dropped`, the reason why a row gives none. Prompt and responses are
strings, or lists of {role, content} messages (see `messages`); a prompt of
messages with tools is {messages, tools}. A scored pair has `score_gap` too, by
how much chosen scores above rejected. What `cuts` says of its responses
stands in it, too.

A new source is one module with a function `read(path, split)` that yields
rows, and one line in `SOURCES`. Its rows may have any of these columns:

  prompt, chosen, rejected   a pair
  chosen, rejected           a pair of whole dialogues: transcripts that are
                             split like `hh`, or messages, of which the shared
                             leading ones are the prompt
  prompt, response           a demonstration
  messages                   a demonstration whose response is the last one
  text                       a demonstration with an empty prompt
  chosen_score,              numbers beside a pair, read where scored pairs
    rejected_score           are asked for
  prompt, response, label    a labelled response: true or 1 is desirable
  prompt, responses          a ranked list of two responses or more
  tools                      beside messages: what the assistant may call, a
                             list of objects or its JSON
  chosen_ended,              beside these: false where a response was cut when
    rejected_ended, ended    it was sampled; see `cuts`
  dropped                    alone: why the source has nothing of the row

Where demonstrations are asked for, the response of a pair is `chosen`. Where
labelled responses are asked for, a pair is two of them; where ranked lists
are, it is one of two. Where prompts are, a row may be any of these, or have
`prompt` alone. A response of messages may begin with its whole prompt. One that
holds turns of others than the assistant is dropped, as every token of a
response is scored. A column `subset`, if a row has it, stands in its
example as text: evaluations count by it. Other columns are not looked at.
"""

import hashlib
import json
import numbers
import os
from collections.abc import Iterator
from typing import Any

from dpo_jax.data import cuts, messages
from dpo_jax.data.sources import hh, hub, imdb, jsonl, synthetic, tldr

SOURCES = {
  "hh": hh,
  "hub": hub,
  "imdb": imdb,
  "jsonl": jsonl,
  "synthetic": synthetic,
  "tldr": tldr,
}
SPLIT_FILES = ("tldr",)  # sources that read `split` of a file, too
INPUTS = (
  "pairs",
  "scored_pairs",
  "demonstrations",
  "labelled",
  "ranked",
  "prompts",
)
PROMPTS_DIFFER = "prompts differ"
NOT_ABOVE = "chosen scores no higher than rejected"
MAX_SCORE = 1e38  # differences are finite as float32
MIN_SCORE_GAP = 1e-30  # still a float32 above 0, which is what batches hold

Text = str | list[dict[str, Any]] | dict[str, list[dict[str, Any]]]


def read(source: str, path: str, *, split: str, inputs: str) -> Iterator[dict]:
  """Yields the example of each row, in order.

  Args:
    source: a name of `SOURCES`.
    path: a file, or what else the source takes.
    split: which part; of a local file only for `SPLIT_FILES`.
    inputs: one of `INPUTS`.

  Raises:
    ValueError: an unknown source, a path that cannot be read or is empty, a
      row without the columns asked for, a column of another type.
  """
  if inputs not in INPUTS:
    raise ValueError(f"unknown inputs {inputs!r}; known: {', '.join(INPUTS)}")
  make_example = {
    "pairs": _make_pair,
    "scored_pairs": _make_scored_pair,
    "demonstrations": _make_demonstration,
    "labelled": _make_labelled,
    "ranked": _make_ranked,
    "prompts": _make_prompt,
  }[inputs]
  number = 0
  is_table = source == "hub" or path.endswith(".parquet")
  for number, row in enumerate(_rows(source, path, split), 1):
    if row.keys() == {"dropped"}:
      yield row
      continue
    if is_table:
      row = {name: messages.without_nulls(x) for name, x in row.items()}
    place = where(path, number)
    row, tools = messages.split_tools(row)
    example = make_example(row, place)
    if "dropped" not in example:
      example |= cuts.read(row, example, place)
    if inputs != "prompts" and not _is_by_assistant(example):
      example = {"dropped": messages.LATER_TURNS}
    if tools and isinstance(example.get("prompt"), list):
      tools = _get_tools(tools, place)
      example["prompt"] = {"messages": example["prompt"], "tools": tools}
    if "subset" in row:
      example["subset"] = str(row["subset"])
    yield example
  if number == 0:
    raise ValueError(f"{path!r} is empty")


def where(path: str, number: int) -> str:
  """Returns the place of a row, counted from 1, in words for an error line."""
  is_line = ".jsonl" in os.path.basename(path)
  return f"{path}, {'line' if is_line else 'row'} {number}"


def fingerprint(source: str, path: str, split: str) -> str:
  """Returns a hash of what `read` would read: of the file, or of the rows."""
  digest = hashlib.sha256(source.encode())
  if source in SPLIT_FILES:
    digest.update(split.encode())
  if os.path.isfile(path):
    digest.update(os.path.basename(path).partition(".")[2].encode())
    with open(path, "rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  else:
    for row in _rows(source, path, split):
      digest.update(json.dumps(row, sort_keys=True, default=str).encode())
  return digest.hexdigest()


def _rows(source: str, path: str, split: str) -> Iterator[dict]:
  if source not in SOURCES:
    known = ", ".join(SOURCES)
    raise ValueError(f"unknown data source {source!r}; known: {known}")
  return SOURCES[source].read(path, split)


def _is_by_assistant(example: dict) -> bool:
  """Returns whether nobody else speaks in an example's responses."""
  responses = [example.get(x, "") for x in ("chosen", "rejected", "response")]
  responses += example.get("responses", [])
  return all(map(messages.is_by_assistant, responses))


def _make_pair(row: dict, where: str) -> dict:
  """Returns the pair of a row."""
  chosen = _get_text(row, "chosen", where)
  rejected = _get_text(row, "rejected", where)
  if isinstance(chosen, str) != isinstance(rejected, str):
    raise ValueError(
      f"{where}: column 'chosen' is {_kind(chosen)}, column 'rejected' is"
      f" {_kind(rejected)}; allowed: both strings or both messages"
    )
  prompt = _get_text(row, "prompt", where) if "prompt" in row else None
  if isinstance(chosen, str):
    if prompt is None:
      return _split_strings(chosen, rejected, where)
    if not isinstance(prompt, str):
      chosen, rejected = _as_response(chosen), _as_response(rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
  return _split_messages(prompt, chosen, rejected, where)


def _make_scored_pair(row: dict, where: str) -> dict:
  """Returns the pair of a row, with `score_gap` above 0."""
  pair = _make_pair(row, where)
  if "dropped" in pair:
    return pair
  chosen, rejected = (
    _get_number(row, name, where) for name in ("chosen_score", "rejected_score")
  )
  if chosen - rejected < MIN_SCORE_GAP:
    return {"dropped": NOT_ABOVE}
  return pair | {"score_gap": chosen - rejected}


def _split_strings(chosen: str, rejected: str, where: str) -> dict:
  """Returns the pair of two transcripts."""
  for name, text in (("chosen", chosen), ("rejected", rejected)):
    if hh.ASSISTANT not in text:
      raise ValueError(
        f"{where}: no column 'prompt', and column {name!r} holds no"
        f" {hh.ASSISTANT!r} to split it at; allowed: a column 'prompt', or"
        " transcripts"
      )
  parts = hh.split_transcripts(chosen, rejected)
  if parts is None:
    return {"dropped": PROMPTS_DIFFER}
  return dict(zip(("prompt", "chosen", "rejected"), parts, strict=True))


def _split_messages(
  prompt: Text | None, chosen: list, rejected: list, where: str
) -> dict:
  """Returns the pair of two lists of messages.

  A string prompt that stands beside whole dialogues (as in UltraFeedback) is
  in them already; beside lone responses it is the user's message. So is a
  prompt of messages, where they begin with it.
  """
  if isinstance(prompt, list):
    chosen, rejected = (
      prompt + messages.behind(prompt, x) for x in (chosen, rejected)
    )
  shared = 0
  for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
    if ours != theirs:
      break
    shared += 1
  roles = (chosen[shared]["role"], rejected[shared]["role"])
  if roles != ("assistant", "assistant"):
    return {"dropped": PROMPTS_DIFFER}
  if shared:
    prompt, chosen, rejected = (
      chosen[:shared],
      chosen[shared:],
      rejected[shared:],
    )
  elif prompt is not None:
    prompt = [{"role": "user", "content": prompt}]
  else:
    raise ValueError(
      f"{where}: no column 'prompt', and 'chosen' and 'rejected' begin with"
      " the assistant; allowed: a column 'prompt', or whole dialogues"
    )
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _make_demonstration(row: dict, where: str) -> dict:
  """Returns the demonstration of a row."""
  if "response" in row:
    prompt = _get_text(row, "prompt", where)
    response = _get_text(row, "response", where)
    if isinstance(prompt, str) and not isinstance(response, str):
      prompt = [{"role": "user", "content": prompt}]
    elif isinstance(response, str) and not isinstance(prompt, str):
      response = _as_response(response)
    if isinstance(response, list):
      response = messages.behind(prompt, response)
    return {"prompt": prompt, "response": response}
  if "chosen" in row:
    pair = _make_pair(row, where)
    if "dropped" in pair:
      return pair
    return {"prompt": pair["prompt"], "response": pair["chosen"]}
  if "messages" in row:
    dialogue = _get_text(row, "messages", where)
    is_dialogue = isinstance(dialogue, list) and len(dialogue) > 1
    if not is_dialogue or dialogue[-1]["role"] != "assistant":
      raise ValueError(
        f"{where}: column 'messages' must be a list of two messages or more,"
        " the last by the assistant"
      )
    return {"prompt": dialogue[:-1], "response": dialogue[-1:]}
  if "text" in row:
    text = _get_text(row, "text", where)
    if not isinstance(text, str):
      raise ValueError(
        f"{where}: column 'text' is {_kind(text)}; allowed: a string"
      )
    return {"prompt": "", "response": text}
  raise ValueError(
    f"{where}: no column 'response'; columns: {', '.join(row)}; allowed:"
    " prompt and response, chosen and rejected, messages, or text"
  )


def _make_prompt(row: dict, where: str) -> dict:
  """Returns the prompt of a row, and the response if it has one."""
  if "prompt" in row and not {"chosen", "response"} & row.keys():
    return {"prompt": _get_text(row, "prompt", where)}
  return _make_demonstration(row, where)


def _make_labelled(row: dict, where: str) -> dict:
  """Returns the labelled response of a row, or its pair."""
  if "label" not in row:
    if "chosen" in row:
      return _make_pair(row, where)
    raise ValueError(
      f"{where}: no column 'label'; columns: {', '.join(row)}; allowed:"
      " prompt, response and label, or chosen and rejected"
    )
  if row["label"] not in (0, 1):  # also True and False
    raise ValueError(
      f"{where}: column 'label' is {_kind(row['label'])}; allowed: true,"
      " false, 1, 0"
    )
  for name in ("prompt", "response"):
    _get_text(row, name, where)
  return _make_demonstration(row, where) | {"label": bool(row["label"])}


def _make_ranked(row: dict, where: str) -> dict:
  """Returns the ranked list of a row."""
  if "responses" not in row and "chosen" in row:
    pair = _make_pair(row, where)
    if "dropped" in pair:
      return pair
    responses = [pair["chosen"], pair["rejected"]]
    return {"prompt": pair["prompt"], "responses": responses}
  responses = row.get("responses")
  if not isinstance(responses, list) or len(responses) < 2:
    raise ValueError(
      f"{where}: column 'responses' is {_kind(responses)}; allowed: a list of"
      " two responses or more, the best first"
    )
  made = [
    _make_demonstration(row | {"response": response}, where)
    for response in responses
  ]
  prompts = [example["prompt"] for example in made]
  if any(prompt != prompts[0] for prompt in prompts):
    raise ValueError(
      f"{where}: column 'responses' has strings and messages; allowed: all of"
      " them strings or all messages"
    )
  return {"prompt": prompts[0], "responses": [x["response"] for x in made]}


def _get_text(row: dict, name: str, where: str) -> Text:
  """Returns a column, checked to be a string or messages."""
  if name not in row:
    raise ValueError(
      f"{where}: no column {name!r}; columns: {', '.join(row) or 'none'}"
    )
  value = row[name]
  if isinstance(value, str):
    return value
  found = messages.normalise(value)
  if found is None:
    raise ValueError(
      f"{where}: column {name!r} is {_kind(value)}; allowed: a string, or a"
      " list of {role, content} messages, whose content is a string, a list of"
      " {type, ...} parts, or null beside tool_calls"
    )
  return found


def _get_tools(value: Any, where: str) -> list[dict[str, Any]]:
  """Returns a column of tools, checked; it may be the JSON of a list."""
  try:
    found = json.loads(value) if isinstance(value, str) else value
  except json.JSONDecodeError:
    found = None
  if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
    raise ValueError(
      f"{where}: column 'tools' is {_kind(value)}; allowed: a list of objects,"
      " or its JSON"
    )
  return found


def _get_number(row: dict, name: str, where: str) -> float:
  """Returns a column, checked to be a number of at most `MAX_SCORE`."""
  if name not in row:
    raise ValueError(
      f"{where}: no column {name!r}; columns: {', '.join(row) or 'none'}"
    )
  value = row[name]
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not abs(value) <= MAX_SCORE:
    raise ValueError(
      f"{where}: column {name!r} is {_kind(value)}; allowed: a finite number"
    )
  return float(value)


def _kind(value: Any) -> str:
  """Returns what a value is, in words for an error line."""
  if messages.normalise(value) is not None:
    return "messages"
  names = {
    str: "a string",
    type(None): "null",
    list: "a list",
    dict: "an object",
  }
  text = json.dumps(value, default=str)
  text = text if len(text) <= 40 else text[:37] + "..."
  return f"{names.get(type(value), type(value).__name__)} ({text})"


def _as_response(text: str) -> list[dict[str, Any]]:
  return [{"role": "assistant", "content": text}]

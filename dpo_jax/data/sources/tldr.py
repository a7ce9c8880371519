r"""Reddit posts with a TL;DR, and summaries of posts that a judge compared.

Posts (JSON lines, of umbrae/reddit-top-2.5-million) hold what their author
wrote, and where in it the TL;DR stands:

  {"subreddit": "tifu", "title": "TIFU by cooking", "selftext":
   "I burnt the rice.\n\n**TL;DR**: burnt rice", "tldr_span": [21, 26],
   "tldr_position": "end", "summary": "burnt rice"}

which becomes a demonstration without the TL;DR in its prompt, as Stiennon et
al. 2020 (arXiv 2009.01325) write it:

  {"prompt": "SUBREDDIT: r/tifu\n\nTITLE: TIFU by cooking\n\n"
   "POST: I burnt the rice.\n\nTL;DR:", "response": " burnt rice"}

Of a TL;DR at the end all that follows is left out, edits too; of one at the
start all before it. One post of `TEST_SHARE`, by a hash of its text, is of the
split `test`, the others of `train`; `all` is both.

Judged summaries (CSV, of vwxyzjn/summarize_from_feedback_details; Huang et al.
2024, arXiv 2403.17031) hold a prompt as above (`query`), the summary of a 1.3B
PPO policy (`postprocessed_response`) and the author's
(`reference_responses`). `preferred` is a language model's choice, `ours` (the
policy's) or `reference`; it is no person's. `shuffled_index` says whether the
policy's was shown first (0) or second, and is not looked at. A row is a pair
whose `subset` is what was preferred; one without a choice is dropped. They are
all of one split.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data import xz
from dpo_jax.data.sources import jsonl

TEST_SHARE = 20
SPLITS = ("train", "test", "all")
NO_PREFERENCE = "no judge's preference"
NO_SUMMARY = "no summary that can be told from the post"
NO_POST = "nothing is left of the post without its summary"

_CSV_OPENERS = {".csv": open, ".csv.gz": gzip.open, ".csv.xz": xz.open_text}
_SUMMARIES = {
  "ours": "postprocessed_response",
  "reference": "reference_responses",
}
_MARKUP = " \n\t*_#()[]-:;>"  # what may stand around a TL;DR


def read(path: str, split: str) -> Iterator[dict[str, Any]]:
  """Yields a row for each post, or each judged pair, of a file.

  Args:
    path: posts, as of `jsonl.read`; or a judged CSV: *.csv, *.csv.gz, *.csv.xz.
    split: of posts, one of `SPLITS`.

  Raises:
    ValueError: an unknown split, a file that cannot be read, or a row that is
      no post or no comparison.
  """
  for extension, opener in _CSV_OPENERS.items():
    if path.endswith(extension):
      yield from _read_judged(path, opener)
      return
  if split not in SPLITS:
    raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
  for number, row in enumerate(jsonl.read(path, ""), 1):
    text = _text(row, "selftext", f"{path}, row {number}")
    is_test = zlib.crc32(text.encode()) % TEST_SHARE == 0
    if split in ("all", "test" if is_test else "train"):
      yield _make_demonstration(row, f"{path}, row {number}")


def make_prompt(subreddit: str, title: str, post: str) -> str:
  """Returns a post as the prompt that a summary follows."""
  return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def cut_summary(text: str, start: int, end: int, summary: str, position: str):
  """Returns a post without its TL;DR.

  Args:
    text: of the post.
    start: where the marker ("TL;DR") begins.
    end: where it ends.
    summary: what follows it.
    position: `end` or `start`, where in the post that is.
  """
  if position == "end":
    return text[:start].rstrip(_MARKUP)
  return text[text.index(summary, end) + len(summary) :].lstrip(_MARKUP)


def _make_demonstration(row: dict, where: str) -> dict[str, str]:
  text, summary = _text(row, "selftext", where), row.get("summary")
  span, position = row.get("tldr_span"), row.get("tldr_position")
  if position not in ("end", "start") or not summary:
    return {"dropped": NO_SUMMARY}
  is_span = isinstance(span, list) and [type(x) for x in span] == [int, int]
  if not is_span or not isinstance(summary, str):
    raise ValueError(
      f"{where}: tldr_span={span!r}, summary={summary!r}; allowed: two"
      " positions in selftext, and a string"
    )
  if text.find(summary, span[1]) < 0:
    return {"dropped": NO_SUMMARY}
  post = cut_summary(text, *span, summary, position)
  if not post or summary in post:
    return {"dropped": NO_POST}
  names = (_text(row, name, where).strip() for name in ("subreddit", "title"))
  return {
    "prompt": make_prompt(*names, post),
    "response": " " + summary.strip(),
  }


def _read_judged(path: str, opener) -> Iterator[dict[str, str]]:
  jsonl.check_file(path)
  rows = csv.DictReader(jsonl.lines(path, opener, newline=""), strict=True)
  try:
    for number, row in enumerate(rows, 1):
      yield _make_pair(row, f"{path}, row {number}")
  except csv.Error as error:
    raise ValueError(
      f"{path!r} cannot be read from line {rows.line_num + 1} on: {error}"
    ) from error


def _make_pair(row: dict, where: str) -> dict[str, str]:
  preferred = _text(row, "preferred", where)
  if not preferred:
    return {"dropped": NO_PREFERENCE}
  if preferred not in _SUMMARIES:
    raise ValueError(
      f"{where}: column 'preferred' is {preferred!r}; allowed:"
      f" {', '.join(_SUMMARIES)}, or nothing"
    )
  other = next(name for name in _SUMMARIES if name != preferred)
  summaries = [
    " " + _text(row, _SUMMARIES[name], where).strip()
    for name in (preferred, other)
  ]
  return {
    "prompt": _text(row, "query", where),
    "chosen": summaries[0],
    "rejected": summaries[1],
    "subset": preferred,
  }


def _text(row: dict, name: str, where: str) -> str:
  value = row.get(name)
  if not isinstance(value, str):
    raise ValueError(
      f"{where}: column {name!r} is {value!r}; allowed: a string"
    )
  return value

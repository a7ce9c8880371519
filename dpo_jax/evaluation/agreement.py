"""How often a judge agrees with people, and people with each other.

Rafailov et al. 2023 (arXiv 2305.18290), table 2, put the same question: a
judge is as good as people when it agrees with one as often as another does.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.data import xz
from dpo_jax.data.sources import jsonl
from dpo_jax.evaluation import intervals, markdown, win_rate_report
from dpo_jax.host import files
from dpo_jax.judges import judge as judges
from dpo_jax.judges.judge import Comparison, Decision

ALL = "all"
SHOWN = ("prompt", "first", "second")
NOT_TEXT = "a response is true or false"
LABELS = {0: judges.TIE, 1: judges.FIRST, 2: judges.SECOND}


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A comparison that people judged.

  Attributes:
    data: the file that it is from.
    row: its row in it, counted from 1; dropped rows count.
    subset: what its row calls its subset; empty where it does not.
    comparison: what they saw.
    labels: `first`, `second` or `tie`, one of each annotator in turn.
  """

  data: str
  row: int
  subset: str
  comparison: Comparison
  labels: tuple[str, ...]

  @property
  def majority(self) -> str | None:
    """The label that more than half of the annotators gave, if any."""
    label, count = collections.Counter(self.labels).most_common(1)[0]
    return label if 2 * count > len(self.labels) else None


def read(path: str) -> list[Labelled]:
  """Returns the rows of a file and prints how many were dropped.

  Before: {"input": "1+1?", "output_1": "2", "output_2": "3", "label": 1}
  After:  Comparison("1+1?", "2", "3"), labels ("first",)

  Args:
    path: JSON lines or parquet as `data.jsonl` reads them, or one JSON array
      (*.json, *.json.xz). Rows are those of LLMBar (Zeng et al. 2023, arXiv
      2310.07641), as above, or of PandaLM (Wang et al. 2023, arXiv
      2306.05087): `instruction, input, response1, response2, annotator1,
      annotator2, ...`, each 0 (tie), 1 or 2. A response that is a JSON boolean
      was text once, no one knows which: its row is dropped.

  Raises:
    ValueError: a file or a row that cannot be read, or none that is kept.
  """
  is_line = ".jsonl" in os.path.basename(path)
  rows, number, dropped = [], 0, 0
  for number, row in enumerate(_rows(path), 1):
    where = f"{path}, {'line' if is_line else 'row'} {number}"
    found = _make_labelled(row, where)
    if found is None:
      dropped += 1
    else:
      subset = str(row.get("subset", ""))
      rows.append(Labelled(path, number, subset, *found))
  note = f"; {dropped} dropped: {NOT_TEXT}" if dropped else ""
  if not rows:
    raise ValueError(f"{path!r}: none of {number} rows is kept{note}")
  print(f"data: {path}: {len(rows)} of {number} rows kept{note}", flush=True)
  return rows


def evaluate(
  judge: judges.Judge,
  data: Sequence[str],
  output: str,
  *,
  order: str,
  seed: int,
) -> str:
  """Returns a table of agreement, and writes what it is from.

  Args:
    judge: what is asked.
    data: files.
    output: folder; gets `comparisons.jsonl`, a line a row; `summary.jsonl`, a
      line for all rows and then one for each subset; and `summary.md`.
    order: of `judges.ORDERS`.
    seed: of random orders.

  Raises:
    ValueError: a file that cannot be read.
  """
  rows = [row for path in data for row in read(path)]
  comparisons = [row.comparison for row in rows]
  decisions = judges.decide(judge, comparisons, order=order, seed=seed)
  names = sorted({row.subset for row in rows} - {""})
  found = []
  for name in [ALL, *names]:
    group = [
      (row, decision)
      for row, decision in zip(rows, decisions, strict=True)
      if name in (ALL, row.subset)
    ]
    found.append({"subset": name} | summarise(*zip(*group, strict=True)))
  settings = {"judge": judge.name, "order": order, "seed": seed}
  found[0] |= settings | {"usage": judge.usage()}
  folder = pathlib.Path(output)
  lines = map(_record, rows, decisions)
  files.write_lines(folder / "comparisons.jsonl", lines, allow_nan=False)
  files.write_lines(folder / "summary.jsonl", found, allow_nan=False)
  files.write_text(folder / "summary.md", table(found) + "\n")
  return table(found)


def summarise(
  rows: Sequence[Labelled], decisions: Sequence[Decision]
) -> dict[str, Any]:
  """Returns the figures of a group of rows.

  Of the judge with the majority, over all rows that have a majority and a
  parsed decision: `ties_in`, where a tie is a label like others; `ties_half`,
  where a tie is half right beside another label, so that chance is one half if
  no majority is a tie; and `ties_out`, over rows where neither is a tie. Each
  has `share, low, high, effective_size, num_rows` and, but for `ties_half`,
  `kappa`. The interval is over prompts. Of the judge with one annotator, and of
  annotators with each other, which is the ceiling: the mean over them, or over
  their pairs.
  """
  both = [
    (row, x.preferred)
    for row, x in zip(rows, decisions, strict=True)
    if x.preferred is not None
  ]
  known = [
    (row.comparison.prompt, row.majority, preferred)
    for row, preferred in both
    if row.majority is not None
  ]
  decided = [x for x in known if judges.TIE not in x[1:]]
  single = [(row.labels, [preferred]) for row, preferred in both]
  return {
    "num_rows": len(rows),
    "no_majority": sum(row.majority is None for row in rows),
    "unparsed": len(rows) - len(both),
    "judge_ties": sum(preferred == judges.TIE for _, preferred in both),
    "majority_ties": sum(row.majority == judges.TIE for row in rows),
    "ties_in": _agreement(known) | _kappa(known),
    "ties_half": _agreement(known, tie=0.5),
    "ties_out": _agreement(decided) | _kappa(decided),
    "judge_annotator": _mean_agreement(
      [(label, x) for labels, (x,) in single for label in labels]
    ),
    "annotator_annotator": _mean_agreement(
      [y for row in rows for y in itertools.combinations(row.labels, 2)]
    ),
    **judges.position_statistics(decisions),
  }


def table(found: Sequence[dict[str, Any]]) -> str:
  """Returns the figures of each group as a Markdown table."""
  head = "subset,rows,unparsed,ties in,kappa,ties half,ties out,rows,kappa"
  head += ",with one annotator,annotators with each other,shown first"
  head += ",consistent"
  rows = []
  number = win_rate_report.number
  for x in found:
    ties_in, ties_half, ties_out = x["ties_in"], x["ties_half"], x["ties_out"]
    values = [x["subset"], x["num_rows"], x["unparsed"]]
    values += [_share(ties_in), number(ties_in["kappa"]), _share(ties_half)]
    values += [_share(ties_out), ties_out["num_rows"]]
    values += [number(ties_out["kappa"])]
    values += [number(x["judge_annotator"]["ties_in"])]
    values += [number(x["annotator_annotator"]["ties_in"])]
    values += [number(x["first_share"]), number(x["consistency"])]
    rows.append(values)
  return markdown.table(head.split(","), rows)


def _share(found: dict[str, Any]) -> str:
  """Returns a share with its interval as text."""
  if found["share"] is None:
    return "-"
  return f"{found['share']:.4f} ({found['low']:.3f} to {found['high']:.3f})"


def _agreement(
  known: Sequence[tuple[str, str, str]], *, tie: float = 0.0
) -> dict[str, Any]:
  """Returns the agreement of (prompt, majority, judge).

  Args:
    known: of each row.
    tie: what a tie counts beside another label.
  """
  points = [
    1.0 if ours == theirs else tie if judges.TIE in (ours, theirs) else 0.0
    for _, ours, theirs in known
  ]
  prompts = [prompt for prompt, _, _ in known]
  found = intervals.share(points, prompts, by_group=False)
  return found | {"num_rows": len(known)}


def _kappa(known: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
  ours, theirs = [x for _, x, _ in known], [x for _, _, x in known]
  return {"kappa": intervals.kappa(ours, theirs)}


def _mean_agreement(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """Returns the share of equal labels, ties in and out; None without any."""
  decided = [pair for pair in pairs if judges.TIE not in pair]
  share = lambda x: sum(a == b for a, b in x) / len(x) if x else None
  return {"ties_in": share(pairs), "ties_out": share(decided)}


def _record(row: Labelled, decision: Decision) -> dict[str, Any]:
  """Returns the line of one row."""
  return {
    "data": row.data,
    "row": row.row,
    "subset": row.subset,
    **dict(zip(SHOWN, row.comparison.texts, strict=True)),
    "labels": row.labels,
    "majority": row.majority,
    **decision.record(),
  }


def _rows(path: str) -> Iterator[dict]:
  """Yields the rows of a file."""
  openers = {".json": open, ".json.xz": xz.open_text}
  opener = next((openers[x] for x in openers if path.endswith(x)), None)
  if opener is None:
    yield from jsonl.read(path, "test")
    return
  text = "".join(jsonl.lines(path, opener))
  rows = jsonl.parse(text, repr(path))
  if not isinstance(rows, list) or not all(isinstance(x, dict) for x in rows):
    raise ValueError(f"{path!r}: must be a JSON array of objects")
  yield from rows


def _make_labelled(
  row: dict[str, Any], where: str
) -> tuple[Comparison, tuple[str, ...]] | None:
  """Returns the comparison and labels of a row; None where it is dropped."""
  if "annotator1" in row:
    names = ("instruction", "response1", "response2")
    keys = [x for x in row if x.startswith("annotator")]
    allowed = (0, 1, 2)
  elif "label" in row:
    names, keys, allowed = ("input", "output_1", "output_2"), ["label"], (1, 2)
  else:
    raise ValueError(
      f"{where}: no labels; columns: {', '.join(row) or 'none'}; allowed:"
      " instruction, input, response1, response2, annotator1, ... or input,"
      " output_1, output_2, label"
    )
  for key in keys:
    if isinstance(row[key], bool) or row[key] not in allowed:
      raise ValueError(
        f"{where}: column {key!r} is {row[key]!r}; allowed:"
        f" {', '.join(map(str, allowed))}"
      )
  if any(isinstance(row.get(name), bool) for name in names[1:]):
    return None
  prompt, first, second = (_text(row, name, where) for name in names)
  if "annotator1" in row and row.get("input"):
    prompt += "\n\n" + _text(row, "input", where)
  labels = tuple(LABELS[row[key]] for key in keys)
  return Comparison(prompt, first, second), labels


def _text(row: dict[str, Any], name: str, where: str) -> str:
  """Returns a column, checked to be a string."""
  if not isinstance(row.get(name), str):
    found = repr(row[name])[:40] if name in row else "not there"
    raise ValueError(f"{where}: column {name!r} is {found}; allowed: a string")
  return row[name]

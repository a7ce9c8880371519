"""The report of an experiment of `preferences`."""

import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from dpo_jax.evaluation import markdown, win_rate_report
from dpo_jax.pipelines import stages
from dpo_jax.pipelines.win_rates import data as win_rate_data
from dpo_jax.pipelines.win_rates.tasks import Task


def make(
  folder: pathlib.Path, task: Task, max_new_tokens: int, start: str
) -> str:
  """Returns the report as Markdown.

  Args:
    folder: of the experiment, with `data.json`, `judge.json`, `wins/`,
      `curve/` and the times of its stages.
    task: what was done.
    max_new_tokens: at which samples were cut.
    start: what `sft` started from, in words.
  """
  read = lambda name: json.loads((folder / name).read_text())
  counts, judge, wins = map(
    read, ("data.json", "judge.json", "wins/win_rate.json")
  )
  baseline_length = _characters(folder, "baseline", None)
  lines = [
    f"# {task.title}",
    "",
    f"From {markdown.escape(start)}. Win rates against {task.baseline}.",
    f"Pairs: {task.pairs}.",
    "",
    f"The paper: {task.paper}.",
    "",
    "Judge and model differ from the paper's, so the numbers cannot be"
    " compared, only their order. The judge here is the reward model. It"
    " learnt the pairs that DPO learnt, is PPO's reward and chooses the best of"
    " N, so the win rates of these two are its judgement of what it asked for.",
    "",
    f"On the pairs of {judge['file']}, where {task.judged_by} chose, it prefers"
    " what was chosen as often as the first table says. Where that is 0.5 or"
    " less, win rates say what the judge likes, not what is good. The best"
    " temperature is the best on these same prompts.",
    "",
    markdown.table(
      ["pairs", "number", "agreement, 95% interval"],
      [_agreement_row(*x) for x in judge["subsets"].items()],
    ),
    "",
    markdown.table(
      ["method", "best win rate, 95% interval", "at temperature", "characters"],
      [
        *(_best_row(x, folder) for x in _best_cells(wins["cells"])),
        [task.baseline, "", "", f"{baseline_length:.0f}"],
      ],
    ),
    "",
    (folder / "wins/win_rate.md").read_text().strip(),
    "",
    f"Rows for training: {_counts(counts['train'])}; {counts['held_out']:,} of"
    " those kept are held out.",
    f"Rows for tests: {_counts(counts['test'])}. Samples are cut at"
    f" {max_new_tokens} tokens.",
    "",
    "Figure: wins/win_rate.png. Comparisons: wins/comparisons.jsonl.",
    "",
    "Over training, where step 0 is sft (curve/win_rate.png):",
    "",
    (folder / "curve/win_rate.md").read_text().strip(),
    "",
    "Seconds of each stage:",
    "",
    *("    " + line for line in stages.read_seconds(folder).splitlines()),
  ]
  return "\n".join(lines) + "\n"


def _best_cells(cells: list[dict]) -> list[dict]:
  """Returns the cell of each method with its highest win rate."""
  best: dict[str, dict] = {}
  for x in cells:
    if x["win_rate"] > best.setdefault(x["method"], x)["win_rate"]:
      best[x["method"]] = x
  return list(best.values())


def _best_row(cell: Mapping[str, Any], folder: pathlib.Path) -> list[str]:
  method, temperature = cell["method"], cell["temperature"]
  shown = win_rate_report.interval(cell["low"], cell["high"])
  rate = win_rate_report.number(cell["win_rate"])
  length = _characters(folder, method, temperature)
  return [method, f"{rate}, {shown}", f"{temperature:g}", f"{length:.0f}"]


def _characters(
  folder: pathlib.Path, method: str, temperature: float | None
) -> float:
  """Returns how long a method's responses are, in the mean."""
  lines = (folder / f"responses/{method}.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  here = [x for x in rows if x.get("temperature") == temperature]
  return statistics.fmean(len(win_rate_data.response(x)) for x in here)


def _agreement_row(name: str, found: Mapping[str, Any]) -> list[str]:
  shown = win_rate_report.interval(found["low"], found["high"])
  rate = win_rate_report.number(found["share"])
  return [name, f"{found['pairs']:,}", f"{rate}, {shown}"]


def _counts(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{count:,} {name}" for name, count in counts.items())

"""Win rates as a table, a record and a figure."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib import axes, figure

from dpo_jax.evaluation import frontier, markdown, win_rate
from dpo_jax.evaluation.win_rate import Cell, Match
from dpo_jax.host import files
from dpo_jax.judges import judge as judges


def evaluate(
  judge: judges.Judge,
  policy: Sequence[str],
  baseline: str,
  output: str,
  *,
  order: str,
  seed: int,
) -> str:
  """Returns a table of win rates, and writes what it is from.

  Args:
    judge: what is asked.
    policy: files of responses.
    baseline: a file of responses to the same prompts.
    output: folder; see `write`.
    order: of `judges.ORDERS`.
    seed: of random orders.

  Raises:
    ValueError: a file that cannot be read or matched.
  """
  responses = [x for path in policy for x in win_rate.read_responses(path)]
  against = win_rate.read_responses(baseline)
  matches = win_rate.match(responses, against)
  decisions = win_rate.compare(judge, matches, order=order, seed=seed)
  prompts = {x.prompt for x in against}
  settings = {"order": order, "seed": seed, "baseline": baseline}
  settings |= {"num_baseline_prompts": len(prompts), "judge": judge.name}
  cells = win_rate.summarise(matches, decisions)
  settings["usage"] = judge.usage()
  return write(output, cells, settings, matches, decisions)


def write(
  folder: str | pathlib.Path,
  cells: Sequence[Cell],
  settings: dict[str, Any],
  matches: Sequence[Match],
  decisions: Sequence[judges.Decision],
) -> str:
  """Writes what was found; returns the table.

  Args:
    folder: gets `comparisons.jsonl`, a line each; `win_rate.json`, settings
      and cells; `win_rate.md`, the table; and `win_rate.png`.
    cells: at least one.
    settings: how they were found.
    matches: what was compared.
    decisions: of each.
  """
  folder = pathlib.Path(folder)
  lines = (_record(*x) for x in zip(matches, decisions, strict=True))
  files.write_lines(folder / "comparisons.jsonl", lines)
  record = settings | {"cells": [dataclasses.asdict(cell) for cell in cells]}
  files.write_json(folder / "win_rate.json", record, allow_nan=False)
  files.write_text(folder / "win_rate.md", table(cells) + "\n")
  fig = figure.Figure(figsize=(5.5, 3.8), layout="constrained")
  draw(fig.subplots(), cells)
  with files.replacing(folder / "win_rate.png") as part:
    fig.savefig(part, dpi=200, format="png")
  return table(cells)


def table(cells: Sequence[Cell]) -> str:
  """Returns the cells as a Markdown table; a dash stands for what is not."""
  head = "method,temperature,step,prompts,comparisons,wins,ties,losses,unparsed"
  head += ",win rate,95% interval,shown first,consistent"
  rows = []
  for x in cells:
    values = [x.method, "-" if x.temperature is None else f"{x.temperature:g}"]
    values += ["-" if x.step is None else x.step]
    values += [x.num_prompts, x.num_comparisons, x.wins, x.ties, x.losses]
    values += [x.unparsed, number(x.win_rate), interval(x.low, x.high)]
    values += [number(x.first_share), number(x.consistency)]
    rows.append(values)
  return markdown.table(head.split(","), rows)


def number(value: float | None) -> str:
  """Returns a share as text; a dash for None."""
  return "-" if value is None else f"{value:.4f}"


def interval(low: float | None, high: float | None) -> str:
  """Returns an interval as text; a dash for None."""
  return "-" if low is None else f"{low:.4f} to {high:.4f}"


def draw(ax: axes.Axes, cells: Sequence[Cell]) -> None:
  """Draws win rate against temperature, a line a method.

  Where rows say steps, against these, a line a method and temperature. What
  has neither is a dashed line across.
  """
  ax.axhline(0.5, color="0.6", linewidth=1, zorder=0)
  over = "temperature" if all(x.step is None for x in cells) else "step"
  lines = collections.defaultdict(list)
  for cell in cells:
    name = cell.method
    if over == "step" and cell.temperature is not None:
      name += f", temperature {cell.temperature:g}"
    lines[name].append(cell)
  for place, (name, line) in enumerate(lines.items()):
    color = frontier.COLORS[place % len(frontier.COLORS)]
    marker = frontier.MARKERS[place % len(frontier.MARKERS)]
    found = [x for x in line if x.win_rate is not None]
    for x in found:
      if getattr(x, over) is None:
        style = {"color": color, "linestyle": "--", "label": name}
        ax.axhline(x.win_rate, linewidth=1.2, **style)
        ax.axhspan(x.low, x.high, color=color, alpha=0.12, linewidth=0)
    found = [x for x in found if getattr(x, over) is not None]
    if found:
      # Rounding may leave a rate of 0 or 1 outside of its interval.
      below = [max(x.win_rate - x.low, 0) for x in found]
      above = [max(x.high - x.win_rate, 0) for x in found]
      ax.errorbar(
        [getattr(x, over) for x in found],
        [x.win_rate for x in found],
        yerr=[below, above],
        label=name,
        color=color,
        marker=marker,
        markersize=5,
        elinewidth=1,
        capsize=2,
      )
  ax.set_ylim(0, 1)
  names = {"temperature": "sampling temperature", "step": "updates"}
  ax.set_xlabel(names[over])
  ax.set_ylabel("win rate against the baseline")
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(color="0.92", linewidth=0.8)
  ax.set_axisbelow(True)
  if any(x.win_rate is not None for x in cells):
    ax.legend(frameon=False, fontsize="small", loc="best")


def _record(one: Match, decision: judges.Decision) -> dict[str, Any]:
  """Returns the line of one comparison."""
  return {
    "method": one.policy.method,
    "temperature": one.policy.temperature,
    "step": one.policy.step,
    "prompt": one.policy.prompt,
    "policy": one.policy.text,
    "baseline": one.baseline.text,
    "points": win_rate.POINTS.get(decision.preferred),
    **decision.record(),
  }

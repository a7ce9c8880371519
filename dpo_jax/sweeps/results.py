"""What a sweep leaves: sweep.csv, sweep.md and sweep.png.

They are made from the run folders alone, and hold no times: whatever the order
in which the runs ended, and however often the sweep was taken up, the table is
the same.
"""

import csv
import dataclasses
import io
import json
import numbers
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure

from dpo_jax.checkpoints import run_folder
from dpo_jax.evaluation import frontier, markdown
from dpo_jax.host import files
from dpo_jax.sweeps.points import ARGUMENT, Point

SEED = "seed"
TIMINGS = ("_per_second", "_seconds")


@dataclasses.dataclass(frozen=True)
class Row:
  """A run: its point, and its last metrics as `<split>/<name>`."""

  point: Point
  status: str
  metrics: dict[str, float]


def check_axis(points: Sequence[Point], x: str) -> None:
  """Raises ValueError unless some point has a number under this key."""
  flat = [run_folder.flatten(point.settings) for point in points]
  if not any(_is_number(settings.get(x)) for settings in flat):
    known = {k for values in flat for k, v in values.items() if _is_number(v)}
    raise ValueError(
      f"--x={x}: no number at any point; numbers: {', '.join(sorted(known))}"
    )


def read_row(point: Point, folder: pathlib.Path, is_finished: bool) -> Row:
  """Returns the row of a run; one that is not finished has no metrics."""
  if not is_finished:
    return Row(point, "failed", {})
  last = {}
  for line in (folder / "metrics.jsonl").read_text().splitlines():
    line = json.loads(line)
    last[line.pop("split")] = line
  metrics = {
    f"{split}/{key}": value
    for split, line in sorted(last.items())
    for key, value in sorted(line.items())
    if not key.endswith(TIMINGS)
  }
  return Row(point, "finished", metrics)


def write(
  folder: pathlib.Path, rows: Sequence[Row], *, metric: str, x: str
) -> str:
  """Writes the three files; returns the table as text.

  Args:
    folder: where to.
    rows: the runs, in the order of the table.
    metric: a key of the rows' metrics; without a split it is one of `eval`.
    x: a config key; where it is a number, the run is in the figure.

  Raises:
    ValueError: no finished run has the metric; then only sweep.csv is written.
  """
  known = sorted({key for row in rows for key in row.metrics})
  keys = sorted({key for row in rows for key in row.point.values})
  files.write_text(folder / "sweep.csv", _csv(rows, keys, known))
  if not metric.startswith(("eval/", "train/")):
    metric = f"eval/{metric}"
  if known and metric not in known:
    raise ValueError(
      f"--metric={metric}: no run has it; there are: {', '.join(known)}"
    )
  cells = [
    [
      *(_text(row.point.values.get(key, "")) for key in keys),
      row.status,
      f"{row.metrics[metric]:.4g}" if metric in row.metrics else "",
    ]
    for row in rows
  ]
  head = [*keys, "status", metric]
  text = markdown.table(head, cells, is_padded=True) + "\n"
  files.write_text(folder / "sweep.md", text)
  fig = figure.Figure(figsize=(5.5, 3.8), layout="constrained")
  draw(fig.subplots(), rows, metric=metric, x=x)
  with files.replacing(folder / "sweep.png") as part:
    fig.savefig(part, dpi=200, format="png")
  return text


def lines_of(
  rows: Sequence[Row], *, metric: str, x: str
) -> dict[str, dict[float, list[float]]]:
  """Returns for each line of the figure the values at each x, over seeds.

  A line is a loss, and what the points differ in besides x and the seed.
  """
  known = {key for row in rows for key in row.point.values}
  differing = [
    key
    for key in sorted(known - {x, SEED, ARGUMENT})
    if len({row.point.values.get(key) for row in rows}) > 1
  ]
  lines = {}
  for row in rows:
    place = run_folder.flatten(row.point.settings).get(x)
    if metric in row.metrics and _is_number(place):
      others = [
        f"{key} {_text(row.point.values[key])}"
        for key in differing
        if key in row.point.values
      ]
      label = ", ".join([row.point.settings["loss"]["name"], *others])
      places = lines.setdefault(label, {})
      places.setdefault(float(place), []).append(row.metrics[metric])
  return lines


def draw(ax: axes.Axes, rows: Sequence[Row], *, metric: str, x: str) -> None:
  """Draws the mean over seeds against x, with bands from least to most."""
  lines = lines_of(rows, metric=metric, x=x)
  for number, (label, values) in enumerate(lines.items()):
    places = sorted(values)
    mean, low, high = (
      np.array([reduce(values[place]) for place in places])
      for reduce in (np.mean, np.min, np.max)
    )
    style = {"color": frontier.COLORS[number % len(frontier.COLORS)]}
    marker = frontier.MARKERS[number % len(frontier.MARKERS)]
    ax.plot(places, mean, label=label, marker=marker, markersize=5, **style)
    ax.vlines(places, low, high, linewidth=1, **style)
    ax.fill_between(places, low, high, alpha=0.15, linewidth=0, **style)
  places = sorted({place for values in lines.values() for place in values})
  if places and places[0] > 0 and places[-1] >= 10 * places[0]:
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(places, [f"{place:g}" for place in places])
  ax.set_xlabel(x)
  ax.set_ylabel(metric)
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(color="0.92", linewidth=0.8)
  ax.set_axisbelow(True)
  if lines:
    ax.legend(frameon=False, fontsize="small", loc="best")


def _csv(
  rows: Sequence[Row], keys: Sequence[str], metrics: Sequence[str]
) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["run", *keys, "status", *metrics])
  for row in rows:
    values = [row.point.values.get(key, "") for key in keys]
    found = [row.metrics.get(key, "") for key in metrics]
    writer.writerow([row.point.name, *values, row.status, *found])
  return text.getvalue()


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)

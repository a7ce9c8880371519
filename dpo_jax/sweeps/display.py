"""Shows a sweep while it runs: a live table, or lines where no terminal is."""

import json
import pathlib
from typing import Protocol

import rich.console
import rich.live
import rich.table

TAIL_BYTES = 4096  # more than a line of metrics has


class Display(Protocol):
  """A context manager that is told what becomes of the runs."""

  def __enter__(self) -> "Display":
    """Begins to show."""

  def __exit__(self, *error: object) -> None:
    """Ends."""

  def begin(self, name: str, text: str) -> None:
    """Shows that a run is under way; may be told again."""

  def progress(self, name: str, folder: pathlib.Path) -> None:
    """Shows how far a run is."""

  def end(self, name: str, text: str) -> None:
    """Shows what became of a run."""


def make_display(num_points: int) -> Display:
  """Returns a live table on a terminal, and lines elsewhere."""
  console = rich.console.Console()
  return Live(num_points, console) if console.is_terminal else Lines(num_points)


class Lines:
  """A line for each beginning and each end."""

  def __init__(self, num_points: int):
    self._num_points = num_points
    self._num_ended = 0
    self._begun: set[str] = set()

  def __enter__(self) -> "Lines":
    return self

  def __exit__(self, *error: object) -> None:
    pass

  def begin(self, name: str, text: str) -> None:
    if name not in self._begun:
      self._begun.add(name)
      self._print(name, text)

  def progress(self, name: str, folder: pathlib.Path) -> None:
    pass

  def end(self, name: str, text: str) -> None:
    self._num_ended += 1
    self._print(name, text)

  def _print(self, name: str, text: str) -> None:
    print(f"[{self._num_ended}/{self._num_points}] {name} {text}", flush=True)


class Live:
  """A table of the runs under way, below the lines of those that ended."""

  def __init__(self, num_points: int, console: rich.console.Console):
    self._num_points = num_points
    self._num_ended = 0
    self._under_way: dict[str, str] = {}
    self._live = rich.live.Live(
      console=console, get_renderable=self._table, refresh_per_second=2
    )

  def __enter__(self) -> "Live":
    self._live.__enter__()
    return self

  def __exit__(self, *error: object) -> None:
    self._live.__exit__(*error)

  def begin(self, name: str, text: str) -> None:
    self._under_way.setdefault(name, text)

  def progress(self, name: str, folder: pathlib.Path) -> None:
    self._under_way[name] = progress(folder) or self._under_way[name]

  def end(self, name: str, text: str) -> None:
    self._num_ended += 1
    self._under_way.pop(name, None)
    self._live.console.print(f"{name} {text}", highlight=False, markup=False)

  def _table(self) -> rich.table.Table:
    table = rich.table.Table(
      f"{self._num_ended} of {self._num_points} ended", "step", box=None
    )
    # A copy: this runs in the thread of `Live`, beside the sweep's.
    for name, text in list(self._under_way.items()):
      table.add_row(name, text)
    return table


def progress(folder: pathlib.Path) -> str:
  """Returns the step and the loss of a run's newest metrics; "" before."""
  try:
    with (folder / "metrics.jsonl").open("rb") as file:
      size = file.seek(0, 2)
      file.seek(max(size - TAIL_BYTES, 0))
      lines = file.read().split(b"\n")
  except FileNotFoundError:
    return ""
  if len(lines) < 2:
    return ""
  # What follows the last end of line is a line that is being written.
  newest = json.loads(lines[-2])
  return f"{newest['step']}  loss {newest.get('loss', float('nan')):.4f}"

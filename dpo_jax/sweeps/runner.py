"""Runs the points of a sweep, some at once, until none is left."""

import dataclasses
import pathlib
import signal
import time
from collections.abc import Sequence

from dpo_jax.checkpoints import run_folder
from dpo_jax.evaluation import markdown
from dpo_jax.host import endings
from dpo_jax.sweeps import display, launchers, results
from dpo_jax.sweeps.points import Point

POLL_SECONDS = 0.2
TAIL_LINES = 12


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a sweep is.

  Attributes:
    points: its runs, in the order of its table.
    folder: gets a run folder for each point, and the table.
    command: trains, when a point's flags and --workdir are added to it.
    launcher: starts the runs.
    parallel: how many run at once.
    metric: the column that the table and the figure show, as `eval/loss`.
    x: the numeric config key that the figure has the metric against.
  """

  points: Sequence[Point]
  folder: pathlib.Path
  command: tuple[str, ...]
  launcher: launchers.Launcher
  parallel: int
  metric: str
  x: str

  def run_folder(self, point: Point) -> pathlib.Path:
    return self.folder / point.name

  def log(self, point: Point) -> pathlib.Path:
    return self.run_folder(point) / "log.txt"

  def command_of(self, point: Point) -> tuple[str, ...]:
    workdir = f"--workdir={self.run_folder(point)}"
    return *self.command, *point.arguments, workdir

  def is_finished(self, point: Point) -> bool:
    return run_folder.is_finished(self.run_folder(point), point.settings)


def check(sweep: Sweep) -> None:
  """Checks what can be checked before anything starts.

  Raises:
    ValueError: a folder holds a run of another config, or the figure cannot be
      drawn against that key.
  """
  for point in sweep.points:
    run_folder.check_config(sweep.run_folder(point), point.settings)
  results.check_axis(sweep.points, sweep.x)


def plan(sweep: Sweep) -> str:
  """Returns the table of points, and how far each is."""
  rows = []
  for point in sweep.points:
    if sweep.is_finished(point):
      state = "finished"
    elif sweep.launcher.is_busy(sweep.log(point)):
      state = "running"
    else:
      begun = (sweep.run_folder(point) / "config.json").exists()
      state = "begun" if begun else "new"
    rows.append([point.name, state])
  return markdown.table(["run", "state"], rows, is_padded=True) + "\n"


def run(sweep: Sweep) -> int:
  """Returns the exit status: 0 when every run finished, 1 when some failed.

  A signal to end (see `endings`) is passed on to the runs, which save; the
  status is then 128 and the signal's number. The sweep started again goes on
  from there, also after a kill: what is finished stays, and a run that is
  still alive is waited for.

  Raises:
    ValueError: no run has the metric; the table was written all the same.
  """
  display_of = display.make_display(len(sweep.points))
  with endings.deferred() as received, display_of as shown:
    queue = _Queue(sweep, shown)
    while not queue.is_empty:
      if received:
        queue.stop()
      queue.start()
      time.sleep(POLL_SECONDS)
      queue.gather()
  if received:
    name = signal.Signals(received[0]).name
    print(f"stopped by {name}; the same command goes on from here")
    return 128 + received[0]
  failed = [point for point in sweep.points if point.name in queue.failed]
  for point in failed:
    _print_failure(point.name, queue.failed[point.name], sweep.log(point))
  rows = [
    results.read_row(point, sweep.run_folder(point), sweep.is_finished(point))
    for point in sweep.points
  ]
  table = results.write(sweep.folder, rows, metric=sweep.metric, x=sweep.x)
  print(f"{table}{sweep.folder}: sweep.csv, sweep.md, sweep.png")
  return 1 if failed else 0


class _Queue:
  """Starts what waits while there is room, and gathers what ended."""

  def __init__(self, sweep: Sweep, shown: display.Display):
    self._sweep, self._shown = sweep, shown
    self._waiting = list(sweep.points)
    # Those that run on from an earlier sweep come first: they are there, and
    # count among the `parallel`.
    is_busy = lambda point: sweep.launcher.is_busy(sweep.log(point))
    self._waiting.sort(key=is_busy, reverse=True)
    self._jobs: dict[str, tuple[Point, launchers.Job, float]] = {}
    self._is_stopping = False
    self.failed: dict[str, int] = {}  # exit status by the point's name

  @property
  def is_empty(self) -> bool:
    return not (self._waiting or self._jobs)

  def start(self) -> None:
    """Starts runs until as many run as may, passing over finished ones."""
    sweep, num_busy = self._sweep, 0
    for point in list(self._waiting):
      if sweep.is_finished(point):
        self._waiting.remove(point)
        self._shown.end(point.name, "finished before")
      elif len(self._jobs) + num_busy < sweep.parallel:
        job = sweep.launcher.start(sweep.command_of(point), sweep.log(point))
        if job is None:
          num_busy += 1
          self._shown.begin(point.name, "runs on from an earlier sweep")
          continue
        self._waiting.remove(point)
        self._jobs[point.name] = point, job, time.monotonic()
        self._shown.begin(point.name, "started")

  def gather(self) -> None:
    """Takes away the runs that ended, and shows how far the others are."""
    for name, (point, job, start) in list(self._jobs.items()):
      status = job.poll()
      if status is None:
        self._shown.progress(name, self._sweep.run_folder(point))
        continue
      del self._jobs[name]
      how = "finished"
      if status:
        self.failed[name] = status
        what = "stopped" if self._is_stopping else "failed"
        how = f"{what} with status {status}"
      self._shown.end(name, f"{how} after {time.monotonic() - start:.0f} s")

  def stop(self) -> None:
    """Starts nothing more, and asks what runs to end, once."""
    if self._is_stopping:
      return  # a second SIGTERM would cut a run's last save short
    self._is_stopping = True
    self._waiting.clear()
    for _, job, _ in self._jobs.values():
      job.stop()


def _print_failure(name: str, status: int, log: pathlib.Path) -> None:
  print(f"{name} failed with status {status}; the end of {log}:")
  lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
  print(*(f"  {line}" for line in lines), sep="\n")

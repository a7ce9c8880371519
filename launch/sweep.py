"""Trains many policies, and ends in a table and a figure.

  python -m launch.sweep --config=configs/quickstart.py --workdir=runs/sweep \\
    --grid=loss=dpo,ipo,hinge --grid=loss.beta=0.03,0.1,0.3 --grid=seed=0,1

Every --grid multiplies the points; `loss` is the argument of the config.
--points gives them one by one: a file with one JSON object a line, or a Python
file with get_points(), as configs/sweeps/quickstart_beta.py. Other overrides
hold for all. Each point is a run of launch.train in a folder of its own. The
same command started again does what is not done, and --metric and --x draw the
figure anew.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from dpo_jax.host import files
from launch import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment, as configs/NAME.py."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
GRID = flags.DEFINE_multi_string("grid", [], "KEY=V1,V2,...")
POINTS = flags.DEFINE_string("points", None, "File of points, .jsonl or .py.")
LAUNCHER = flags.DEFINE_string("launcher", "local", "What starts the runs.")
PARALLEL = flags.DEFINE_integer(
  "parallel", 1, "Runs at once; they share the machine.", lower_bound=1
)
METRIC = flags.DEFINE_string(
  "metric", "eval/rewards/accuracies", "What the figure shows."
)
X = flags.DEFINE_string("x", "loss.beta", "Key that it is shown against.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only prints the points.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
  """Returns 0 when all runs finished, 1 when one failed, 128+n on signal n."""
  from dpo_jax.sweeps import launchers, points, runner

  if not (GRID.value or POINTS.value):
    raise ValueError("a sweep needs --grid=KEY=V1,V2,... or --points=FILE")
  grid = points.parse_grid(GRID.value)
  listed = points.read(POINTS.value) if POINTS.value else [{}]
  sweep = runner.Sweep(
    points=points.make_points(
      points.combine(listed, grid),
      config_path=config_flags.get_config_filename(flags.FLAGS["config"]),
      overrides=config_flags.get_override_values(flags.FLAGS["config"]),
      load_config=cli.load_config,
    ),
    folder=pathlib.Path(WORKDIR.value),
    command=(sys.executable, "-m", "launch.train"),
    launcher=launchers.make_launcher(LAUNCHER.value),
    parallel=PARALLEL.value,
    metric=METRIC.value,
    x=X.value,
  )
  runner.check(sweep)
  if DRY_RUN.value:
    print(runner.plan(sweep), end="")
    return 0
  with files.owned_folder(WORKDIR.value, "sweeps in"):
    return runner.run(sweep)


if __name__ == "__main__":
  cli.run(main)

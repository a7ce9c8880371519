"""The points of a sweep: which runs it has, and what they are called.

A point is a dict of dotted config keys, as `{"loss": "ipo", "loss.beta": 0.3}`.
`loss` is the argument of the config file, for each loss brings hyper-parameters
of its own.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dpo_jax.checkpoints import run_folder
from dpo_jax.host import user_code
from dpo_jax.run import experiment

ARGUMENT = "loss"
MAX_NAME = 120  # characters; file systems allow 255 bytes
LoadConfig = Callable[[str, Mapping[str, Any]], ConfigDict]


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: that of its folder, from the keys and values of the point alone.
    values: the point's own keys, sorted, with the values of its config.
    arguments: the flags of `launch.train`, without --workdir.
    settings: its whole config as plain data.
  """

  name: str
  values: dict[str, Any]
  arguments: tuple[str, ...]
  settings: dict[str, Any]


def parse_grid(texts: Sequence[str]) -> list[dict[str, str]]:
  """Returns the product of `KEY=V1,V2,...`, the last key changing fastest.

  Raises:
    ValueError: a text of another form, or a key or value that stands twice.
  """
  axes = {}
  for text in texts:
    key, equals, values = text.partition("=")
    values = values.split(",")
    if not (key and equals and all(values)):
      raise ValueError(f"--grid={text}: must be KEY=V1,V2,...")
    if key in axes:
      raise ValueError(f"--grid={text}: key {key!r} stands twice")
    axes[key] = values
  return [dict(zip(axes, row)) for row in itertools.product(*axes.values())]


def read(path: str) -> list[dict[str, Any]]:
  """Returns the points of a file: one JSON object a line, or `get_points()`.

  Raises:
    ValueError: no such file, or not of these forms.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--points={path}: there is no such file")
  found = _run(path) if path.endswith(".py") else _read_lines(path)
  if not found:
    raise ValueError(f"--points={path}: no point in it")
  for number, point in enumerate(found, 1):
    _check_point(f"--points={path}, point {number}", point)
  return found


def combine(
  listed: Sequence[Mapping[str, Any]], grid: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Returns every listed point at every point of the grid.

  Raises:
    ValueError: a key that both give.
  """
  for point in listed:
    for key in point.keys() & grid[0].keys():
      raise ValueError(f"both --points and --grid give {key!r}")
  return [{**a, **b} for a in listed for b in grid]


def make_points(
  values: Sequence[Mapping[str, Any]],
  *,
  config_path: str,
  overrides: Mapping[str, Any],
  load_config: LoadConfig,
) -> list[Point]:
  """Returns the points with their configs, each of which was checked.

  Args:
    values: what sets each point apart.
    config_path: a config file, with `:ARGUMENT` unless the points give `loss`.
    overrides: keys and values that hold for all points.
    load_config: returns the config of a path and overrides.

  Raises:
    ValueError: a key, a value, a loss or an optimizer that is not right, or
      two points of one config; the message names the point.
  """
  made = {}
  for point in values:
    label = ",".join(f"{key}={point[key]}" for key in sorted(point))
    try:
      new = _make_point(point, config_path, overrides, load_config)
    except ValueError as error:
      raise ValueError(f"point {label}: {error}") from error
    if new.name in made:
      raise ValueError(f"point {label}: it stands twice")
    made[new.name] = new
  return list(made.values())


def _make_point(point, config_path, overrides, load_config) -> Point:
  for key in point.keys() & overrides.keys():
    raise ValueError(f"--config.{key} gives {key!r} too")
  own = dict(point)
  if ARGUMENT in own:
    path, colon, argument = config_path.partition(":")
    if colon:
      raise ValueError(f"--config={config_path} gives the loss too")
    config_path = f"{path}:{own.pop(ARGUMENT)}"
  config = load_config(config_path, {**overrides, **own})
  experiment.check(config)
  settings = experiment.to_plain(config)
  flat = run_folder.flatten(settings)
  values = {
    key: flat[key] if key in own else point[key] for key in sorted(point)
  }
  given = {**overrides, **own}.items()
  return Point(
    name=_name(values),
    values=values,
    arguments=(
      f"--config={config_path}",
      *(f"--config.{key}={value}" for key, value in given),
    ),
    settings=settings,
  )


def _name(values: Mapping[str, Any]) -> str:
  """Returns `key=value,...` as a folder's name, cut and hashed if need be."""
  full = ",".join(f"{key}={_text(value)}" for key, value in values.items())
  safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", full)
  if safe == full and len(full) <= MAX_NAME:
    return full
  # What was replaced or cut may have been all that two points differed in.
  digest = hashlib.sha256(full.encode()).hexdigest()[:8]
  return f"{safe[:MAX_NAME]}-{digest}"


def _text(value: Any) -> str:
  return (
    str(value).removesuffix(".0") if isinstance(value, float) else str(value)
  )


def _read_lines(path: str) -> list[Any]:
  found = []
  lines = pathlib.Path(path).read_bytes().splitlines()
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        found.append(json.loads(line))
      except (ValueError, RecursionError) as error:
        raise ValueError(
          f"--points={path}, line {number}: not JSON: {error}"
        ) from error
  return found


def _run(path: str) -> list[Any]:
  """Returns what `get_points()` of a Python file returns."""
  with user_code.errors_in(path, f"--points={path}"):
    return list(user_code.load(path, "get_points").get_points())


def _check_point(where: str, point: Any) -> None:
  if not isinstance(point, dict) or not point:
    raise ValueError(f"{where}: must be an object of dotted keys, is {point!r}")
  for key, value in point.items():
    if not isinstance(key, str) or not key:
      raise ValueError(f"{where}: key {key!r} must be a config key")
    if not isinstance(value, str | int | float) or value == "":
      raise ValueError(
        f"{where}: {key!r} is {value!r}; allowed: a string, a number, a bool"
      )

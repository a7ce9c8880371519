"""Grids, files of points, names, and what is refused before anything runs."""

import json
import pathlib

import pytest

from dpo_jax.sweeps import points
from launch import cli

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs" / "quickstart.py")


def make(values, config_path=CONFIG, **overrides):
  return points.make_points(
    values,
    config_path=config_path,
    overrides=overrides,
    load_config=cli.load_config,
  )


def test_a_grid_is_the_product_of_its_keys():
  grid = points.parse_grid(["loss=dpo,ipo", "seed=0,1,2"])
  assert grid[:2] == [
    {"loss": "dpo", "seed": "0"},
    {"loss": "dpo", "seed": "1"},
  ]
  assert len(grid) == 6
  assert points.parse_grid([]) == [{}]


@pytest.mark.parametrize("text", ["seed", "seed=", "=1", "seed=1,,2"])
def test_a_grid_of_another_form_is_refused(text):
  with pytest.raises(ValueError, match="must be KEY=V1,V2"):
    points.parse_grid([text])


def test_a_key_stands_once():
  with pytest.raises(ValueError, match="'seed' stands twice"):
    points.parse_grid(["seed=0", "seed=1"])
  with pytest.raises(ValueError, match="both --points and --grid give 'seed'"):
    points.combine([{"seed": 1}], [{"seed": "0"}])


def test_points_and_a_grid_multiply():
  both = points.combine([{"loss": "dpo"}, {"loss": "ipo"}], [{"seed": "0"}])
  assert both == [{"loss": "dpo", "seed": "0"}, {"loss": "ipo", "seed": "0"}]


def test_a_name_comes_from_the_values_and_not_from_how_they_are_typed():
  (one,) = make([{"seed": "0", "loss.beta": "1e-1", "loss": "ipo"}])
  (two,) = make([{"loss": "ipo", "loss.beta": 0.10, "seed": 0}], steps=7)
  assert one.name == two.name == "loss=ipo,loss.beta=0.1,seed=0"
  assert one.values == {"loss": "ipo", "loss.beta": 0.1, "seed": 0}
  (whole,) = make([{"loss.beta": "1.0"}])
  assert whole.name == "loss.beta=1"


def test_names_are_safe_for_folders_and_still_differ():
  paths = ["runs/a", "runs:a", "x" * 300, "x" * 301]
  names = [p.name for p in make([{"data.path": path} for path in paths])]
  assert len(set(names)) == 4
  assert all(len(name) < 200 and not set(name) & set("/: ") for name in names)


def test_a_point_has_the_hyperparameters_of_its_loss_and_the_overrides():
  (point,) = make([{"loss": "exo"}], **{"steps": 7, "data.shuffle": False})
  assert point.settings["loss"]["label_smoothing"] == 0.001
  assert point.settings["steps"] == 7 and not point.settings["data"]["shuffle"]
  assert point.arguments == (
    f"--config={CONFIG}:exo",
    "--config.steps=7",
    "--config.data.shuffle=False",
  )


MISTAKES = {
  "an unknown key": ({"loss.betta": 1}, "did you mean 'loss.beta'?"),
  "a wrong type": ({"loss.beta": "high"}, "could not convert"),
  "a value out of range": ({"loss.beta": -1}, "must be above 0"),
  "no number": (
    {"optimizer.learning_rate": "inf"},
    "optimizer.learning_rate=inf: must be above 0 and finite",
  ),
  "an unknown loss": ({"loss": "dpoo"}, "did you mean 'dpo'?"),
  "an unknown optimizer": ({"optimizer.name": "adamx"}, "known: adafactor"),
  "an option it lacks": (
    {"loss": "sft", "loss.beta": 1},
    "does not honour loss.beta",
  ),
  "an override too": ({"steps": 1}, "--config.steps gives 'steps' too"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_point(name):
  point, message = MISTAKES[name]
  with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
    make([{"seed": 3}, point], steps=2)
  label = ",".join(f"{key}={point[key]}" for key in sorted(point))
  assert str(caught.value).startswith(f"point {label}: ")


def test_a_loss_may_not_be_given_twice_nor_a_point():
  with pytest.raises(ValueError, match=r"quickstart.py:ipo gives the loss too"):
    make([{"loss": "dpo"}], config_path=f"{CONFIG}:ipo")
  with pytest.raises(
    ValueError, match=r"point loss.beta=0.10: it stands twice"
  ):
    make([{"loss.beta": "0.1"}, {"loss.beta": "0.10"}])


def test_points_are_read_from_json_lines(tmp_path):
  path = tmp_path / "points.jsonl"
  path.write_text('{"loss": "dpo", "loss.beta": 0.3}\n\n{"seed": 4}\n')
  assert points.read(str(path)) == [
    {"loss": "dpo", "loss.beta": 0.3},
    {"seed": 4},
  ]


def test_the_example_in_configs_can_be_made():
  values = points.read(str(REPOSITORY / "configs/sweeps/quickstart_beta.py"))
  names = [point.name for point in make(values)]
  assert len(names) == 8 and names[-1] == "loss=dpo,loss.beta=5,seed=1"


FILES = {
  "broken.jsonl": ('{"seed": 1}\n{"seed"', "broken.jsonl, line 2: not JSON"),
  "empty.jsonl": ("\n", "no point in it"),
  "list.jsonl": ("[1]", "point 1: must be an object of dotted keys"),
  "inner.jsonl": (json.dumps({"loss": {"beta": 1}}), "'loss' is {'beta': 1}"),
  "none.py": ("POINTS = []\n", r"it has no get_points\(\)"),
  "syntax.py": (
    "\ndef get_points(:\n",
    r"syntax.py: SyntaxError: .* \(.*syntax.py, line 2\)$",
  ),
  "import.py": (
    "import absent_module\n",
    r"ModuleNotFoundError: .*absent_module.* \(.*import.py, line 1\)$",
  ),
  "bug.py": (
    "def get_points():\n  yield {'seed': 1}\n  yield {}['x']\n",
    r"bug.py: KeyError: 'x' \(.*bug.py, line 3\)$",
  ),
  "nothing.py": ("def get_points():\n  pass\n", "TypeError: 'NoneType'"),
  "keys.py": ("def get_points():\n  return [{1: 2}]\n", "key 1 must be a"),
  "deep.jsonl": ("[" * 100_000, "deep.jsonl, line 1: not JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_is_told(name, tmp_path):
  content, message = FILES[name]
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    points.read(str(tmp_path / name))


def test_a_file_of_another_encoding_is_told(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(b'{"seed": 1}\n{"loss": "\xff"}')
  with pytest.raises(ValueError, match="x.jsonl, line 2: not JSON: 'utf-8'"):
    points.read(str(tmp_path / "x.jsonl"))

"""The map of the package: floors, rooms, and how long a file may be.

A module imports only from floors below its own, or from its own folder.
"""

import ast
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "dpo_jax"
FLOORS = {
  "types": 0,
  "sharding": 1,
  "host": 1,
  "data": 2,
  "models": 2,
  "losses": 2,
  "training": 3,
  "checkpoints": 3,
  "sampling": 3,
  "inference": 4,
  "rewards": 5,
  "judges": 6,
  "run": 6,
  "evaluation": 7,
  "benchmarks": 7,
  "pipelines": 8,
  "sweeps": 8,
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def _unit(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(source: str) -> set[str]:
  """Returns dotted names that a module imports, `from x import y` as x.y."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def _breaks_floor(unit: str, name: str) -> bool:
  parts = name.split(".")
  if parts[0] in ("configs", "launch", "tests"):
    return True
  if parts[0] != "dpo_jax" or len(parts) == 1 or parts[1] == unit:
    return False
  return FLOORS[parts[1]] >= FLOORS[unit]


def test_a_sideways_import_is_seen():
  names = _imports("from dpo_jax.models import transformer")
  assert any(_breaks_floor("losses", name) for name in names)
  assert not any(_breaks_floor("training", name) for name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.name))
def test_imports_go_down_only(path):
  unit = _unit(path)
  if unit == "__init__":
    return
  names = _imports(path.read_text())
  assert not {name for name in names if _breaks_floor(unit, name)}


def test_flax_stays_in_models():
  outside = [
    path
    for path in MODULES
    if _unit(path) != "models"
    and any(n.split(".")[0] == "flax" for n in _imports(path.read_text()))
  ]
  assert not outside


def test_torch_is_never_imported():
  for path in MODULES:
    roots = {name.split(".")[0] for name in _imports(path.read_text())}
    assert not roots & {"torch", "trl", "peft"}, path


def test_only_sharding_names_a_mesh_axis():
  for path in MODULES:
    tree = ast.parse(path.read_text())
    strings = {
      node.value
      for node in ast.walk(tree)
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    if _unit(path) != "sharding" and path.name != "experiment.py":
      assert "fsdp" not in strings, path


def test_every_file_stands_in_a_room():
  top = {path.stem for path in PACKAGE.glob("*.py")}
  assert top == {"__init__", "types", "sharding"}
  rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
  assert rooms - {"__pycache__"} == FLOORS.keys() - {"types", "sharding"}


def test_a_file_has_at_most_400_lines():
  long = {p.name for p in MODULES if len(p.read_text().splitlines()) > 400}
  assert not long


def test_readme_shows_every_room():
  text = (PACKAGE.parent / "README.md").read_text()
  table = "\n".join(x for x in text.splitlines() if x.startswith("| `"))
  absent = [x for x in FLOORS if not re.search(rf"\b{x}(/|\.py)`", table)]
  assert not absent

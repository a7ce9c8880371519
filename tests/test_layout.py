"""The import floors: a module imports only from floors below its own."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "dpo_jax"
FLOORS = {
  "types": 0,
  "endings": 0,
  "supervisor": 1,
  "files": 1,
  "limits": 1,
  "markdown": 1,
  "sharding": 1,
  "user_code": 1,
  "schema": 1,
  "caches": 1,
  "processes": 2,
  "data": 2,
  "models": 2,
  "losses": 2,
  "training": 3,
  "checkpoints": 3,
  "sampling": 3,
  "rewards": 4,
  "adapters": 4,
  "evaluation": 5,
  "batches": 5,
  "export": 5,
  "reference_model": 5,
  "reinforcement": 5,
  "experiment": 6,
  "policy": 6,
  "trainer": 7,
  "benchmark": 8,
  "benchmark_sampling": 9,
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
    if _unit(path) not in ("sharding", "experiment"):
      assert "fsdp" not in strings, path

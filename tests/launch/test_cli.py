"""A user's mistake ends a script with status 2 and one line on stderr."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import cli

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

SCRIPT = '''"""Trains nothing."""
import sys

from absl import flags, logging
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file.")
flags.DEFINE_integer("processes", 1, "How many.", lower_bound=1)
flags.DEFINE_multi_float("price", [], "Of what.", lower_bound=0)
flags.mark_flag_as_required("config")


def main(argv):
  assert "jax" not in sys.modules, "launch.cli must not import jax"
  assert len(argv) == 1
  config = _CONFIG.value
  if config.loss.beta <= 0:
    raise ValueError(f"loss.beta={config.loss.beta}:\\n  must be above 0")
  if config.loss.name == "broken":
    raise KeyError("our own mistake")
  logging.info("shown with --verbosity=0 only")
  print(config.loss.name, config.loss.beta, config.steps)


if __name__ == "__main__":
  cli.run(main)
'''

CONFIG = """
import ml_collections


def get_config(name="dpo"):
  if name == "dpoo":
    raise ValueError("unknown loss 'dpoo'; known: dpo, ipo")
  if name == "unread":
    open("absent.json")
  if name == "bug":
    {}["absent"]
  if name == "wrong":
    int(name)
  if name == "none":
    return None
  if name == "exit":
    raise RuntimeError("no luck:\\n today")
  return ml_collections.ConfigDict(
      dict(
          steps=10,
          shuffle=True,
          loss=dict(name=name, beta=0.1),
          data=dict(max_length=1),
          model=dict(max_length=1),
      )
  )
"""


@pytest.fixture
def script(tmp_path):
  (tmp_path / "script.py").write_text(SCRIPT)
  (tmp_path / "config.py").write_text(CONFIG)
  (tmp_path / "syntax.py").write_text("\ndef get_config(:\n  pass\n")
  (tmp_path / "imports.py").write_text("import absent_module\n")
  (tmp_path / "empty.py").write_text("get_confg = None\n")

  def run(*args):
    return subprocess.run(
      [sys.executable, "script.py", *args],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
      capture_output=True,
      text=True,
    )

  return run


def test_overrides_reach_main_and_nothing_is_logged(script):
  done = script("--config=config.py:ipo", "--config.loss.beta=0.5")
  assert (done.returncode, done.stdout) == (0, "ipo 0.5 10\n")
  assert not done.stderr
  done = script("--config", "config.py", "--config.steps", "3", "--verbosity=0")
  assert (done.returncode, done.stdout) == (0, "dpo 0.1 3\n")
  assert "shown with --verbosity=0 only" in done.stderr


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_succeeds(script, flag):
  done = script(flag)
  assert done.returncode == 0
  assert "Trains nothing." in done.stdout and "--config" in done.stdout
  assert not done.stderr


MISTAKES = {
  "--config=config.py --config.loss.betta=1": (
    "unknown config key 'loss.betta'; did you mean 'loss.beta'?"
  ),
  "--config config.py --config.losss.beta=1": (
    "unknown config key 'losss.beta'; did you mean 'loss.beta'?"
  ),
  "--config=config.py --noconfig.shufle": (
    "unknown config key 'shufle'; did you mean 'shuffle'?"
  ),
  "--config=config.py --config.xyz=1": (
    "unknown config key 'xyz';"
    " known: data, data.max_length, loss, loss.beta, loss.name, model,"
    " model.max_length, shuffle, steps"
  ),
  "--config=config.py --config.beta=1": (
    "unknown config key 'beta'; did you mean 'loss.beta'?"
  ),
  "--config=config.py --config.eval.ml=1": (
    "unknown config key 'eval.ml'; did you mean 'data.max_length' or"
    " 'model.max_length'?"
  ),
  "--config=config.py --beta=1": (
    "unknown flag --beta; did you mean --config.loss.beta?"
  ),
  "--config=config.py --config.loss.beta=high": (
    "flag --config.loss.beta=high: could not convert string to float: 'high'"
  ),
  "--config=config.py --config.steps=1.5": "flag --config.steps=1.5: ",
  "--config=config.py --config.loss=dpo": "flag --config.loss=dpo: ",
  "--config=config.py --config.loss={}": (
    "a config override has the wrong type: 'loss' is a group; give its keys"
  ),
  "--config=config.py --config.loss.beta=-1": "loss.beta=-1.0: must be above 0",
  "--config=config.py:dpoo": (
    "--config=config.py:dpoo: unknown loss 'dpoo'; known: dpo, ipo"
  ),
  "--config=config.py:unread": (
    "--config=config.py:unread: FileNotFoundError: [Errno 2] No such file or"
    " directory: 'absent.json' (config.py, line 9)"
  ),
  "--config=config.py:bug": (
    "--config=config.py:bug: KeyError: 'absent' (config.py, line 11)"
  ),
  "--config=config.py:wrong": (
    "--config=config.py:wrong: ValueError: invalid literal for int() with base"
    " 10: 'wrong' (config.py, line 13)"
  ),
  "--config=config.py:exit": (
    "--config=config.py:exit: RuntimeError: no luck: today (config.py, line"
  ),
  "--config=config.py:none": (
    "--config=config.py:none: get_config() returns NoneType; allowed: a"
    " ConfigDict"
  ),
  "--config=syntax.py": "--config=syntax.py: SyntaxError: ",
  "--config=syntax.py --config.x=1": "--config=syntax.py: SyntaxError: ",
  "--config=imports.py:dpo": (
    "--config=imports.py:dpo: ModuleNotFoundError: No module named"
    " 'absent_module' (imports.py, line 1)"
  ),
  "--config=empty.py": "--config=empty.py: it has no get_config()",
  "--config=absent.py": "--config=absent.py: there is no such config file",
  "--config=absent.py:dpo --config.steps=1": (
    "--config=absent.py:dpo: there is no such config file"
  ),
  "--config=": "--config=: there is no such config file",
  "--confg=config.py": (
    "Unknown command line flag 'confg'. Did you mean: config ?"
  ),
  "--config": "Missing value for flag --config",
  "": "flag --config=None: Flag --config must have a value other than None.",
  "--config=config.py --processes=0": "flag --processes=0: ",
  f"--config=config.py --processes={2**63}": (
    "--processes=9223372036854775808: must be finite and fit 64 bits"
  ),
  "--config=config.py --price=1 --price=nan": "--price=nan: must be finite",
  "--config=config.py --price=inf": "--price=inf: must be finite",
  "--config.steps=1 --config=config.py": "Found --config.steps=1 in argv",
  "--config=config.py steps=1": (
    "unexpected argument 'steps=1'; flags begin with --"
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2(script, mistake):
  done = script(*mistake.split())
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {MISTAKES[mistake]}")
  assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
  assert not done.stdout


def test_other_exceptions_keep_their_traceback(script):
  done = script("--config=config.py:broken")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "KeyError" in done.stderr


def test_the_traceback_of_a_mistake_can_be_asked_for(script):
  done = script("--config=config.py", "--config.loss.beta=-1", "--verbosity=1")
  assert done.returncode == 2
  assert "Traceback" in done.stderr
  assert done.stderr.endswith("error: loss.beta=-1.0: must be above 0\n")


def test_a_config_that_is_no_file_is_refused_unopened(tmp_path):
  path = tmp_path / "config.py"
  os.mkfifo(path)
  with pytest.raises(ValueError, match=f"{path} is not a regular file"):
    cli.load_config(f"{path}:dpo", {})

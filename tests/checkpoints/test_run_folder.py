"""Whose a run folder is, and when it says that its run came to its end."""

import pytest

from configs import quickstart
from dpo_jax import processes, trainer
from dpo_jax.checkpoints import run_folder

CONFIG = {"steps": 5, "epochs": 1, "seed": 0}


@pytest.fixture
def finished(tmp_path):
  run_folder.write_config(tmp_path, CONFIG)
  run_folder.mark_finished(tmp_path)
  return tmp_path


def test_a_run_is_finished_once_it_says_so(tmp_path):
  assert not run_folder.is_finished(tmp_path / "absent", CONFIG)
  run_folder.write_config(tmp_path, CONFIG)
  assert not run_folder.is_finished(tmp_path, CONFIG)
  run_folder.mark_finished(tmp_path)
  assert run_folder.is_finished(tmp_path, CONFIG)


@pytest.mark.parametrize("longer", [{"steps": 6}, {"epochs": 2}])
def test_a_run_that_is_to_be_longer_is_not_finished(longer, finished):
  assert not run_folder.is_finished(finished, CONFIG | longer)


def test_a_run_that_begins_again_is_not_finished(finished):
  run_folder.write_config(finished, CONFIG)
  assert not run_folder.is_finished(finished, CONFIG)


def test_a_second_run_in_the_folder_is_refused_before_it_writes(tmp_path):
  config = quickstart.get_config("sft")
  with run_folder.owned(tmp_path / "run", "trains in"):
    with pytest.raises(ValueError, match="another process trains in .*/run$"):
      trainer.train(config, str(tmp_path / "run"))
    assert [x.name for x in (tmp_path / "run").iterdir()] == [".lock"]
  assert not (tmp_path / "run").exists()


def test_the_first_of_several_processes_owns_the_folder(tmp_path, monkeypatch):
  with run_folder.owned(tmp_path, "trains in"):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with run_folder.owned(tmp_path, "trains in"):
      pass
    assert (tmp_path / ".lock").exists()


def test_values_are_flattened_by_dotted_keys():
  tree = {"a": {"b": 1, "c": {"d": None}}, "e": 2}
  assert run_folder.flatten(tree) == {"a.b": 1, "a.c.d": None, "e": 2}

"""When a run folder says that its run came to its end."""

import pytest

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


def test_values_are_flattened_by_dotted_keys():
  tree = {"a": {"b": 1, "c": {"d": None}}, "e": 2}
  assert run_folder.flatten(tree) == {"a.b": 1, "a.c.d": None, "e": 2}


@pytest.mark.parametrize(
  "text, message",
  [
    ("[]", "must be a JSON object"),
    ("{", "not JSON"),
    ('{"steps": "5", "epochs": 1}', "steps='5': must be an integer"),
    ('{"steps": 5, "epochs": NaN}', "epochs=nan: must be a number"),
    ('{"steps": 5}', "'epochs' is missing"),
  ],
)
def test_a_config_that_lies_is_refused_by_file_and_key(text, message, finished):
  (finished / "config.json").write_text(text)
  with pytest.raises(ValueError) as error:
    run_folder.is_finished(finished, CONFIG)
  assert str(error.value).startswith(f"{finished}/config.json: ")
  assert message in str(error.value)

"""Whose a run folder is, and when it says that its run came to its end."""

import pytest

from configs import quickstart
from dpo_jax.checkpoints import run_folder
from dpo_jax.host import processes
from dpo_jax.run import trainer

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


def _config(schedule, **changes):
  return CONFIG | {"optimizer": {"schedule": schedule}} | changes


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(
  "changes, what",
  [
    ({"steps": 8}, "steps was 5 and is 8"),
    ({"steps": 0}, "steps was 5 and is 0"),
  ],
)
def test_a_decaying_rate_fixes_how_long_a_run_is(
  schedule, changes, what, tmp_path
):
  run_folder.write_config(tmp_path, _config(schedule))
  run_folder.check_config(tmp_path, _config(schedule))
  with pytest.raises(
    ValueError,
    match=f"{what}; .* optimizer.schedule='{schedule}'; allowed: the old value",
  ):
    run_folder.check_config(tmp_path, _config(schedule, **changes))


def test_a_decaying_rate_fixes_epochs_where_they_count(tmp_path):
  run_folder.write_config(tmp_path, _config("cosine"))
  run_folder.check_config(tmp_path, _config("cosine", epochs=2))  # steps win
  run_folder.write_config(tmp_path, _config("cosine", steps=0))
  with pytest.raises(ValueError, match="epochs was 1 and is 2; "):
    run_folder.check_config(tmp_path, _config("cosine", steps=0, epochs=2))


@pytest.mark.parametrize("changes", [{"steps": 8}, {"steps": 0, "epochs": 3}])
def test_a_constant_rate_lets_a_run_be_longer(changes, tmp_path):
  run_folder.write_config(tmp_path, _config("constant"))
  run_folder.check_config(tmp_path, _config("constant", **changes))


def test_a_file_where_the_run_folder_belongs_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(NotADirectoryError) as caught:
    run_folder.check_config(tmp_path / "file" / "run", CONFIG)
  assert caught.value.filename == str(tmp_path / "file")


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

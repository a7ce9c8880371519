"""Which files of a model two processes find to differ."""

import json

import pytest

from dpo_jax.checkpoints import fingerprints


@pytest.fixture
def folder(tmp_path):
  """A model of two large files; a run of one checkpoint; an adapter of it."""
  model = tmp_path / "model"
  model.mkdir()
  (model / "config.json").write_text("{}")
  for name in ("a", "b"):
    (model / f"{name}.safetensors").write_bytes(bytes(5 * 2**20))
  for name in ("run/model/config.json", "run/checkpoints/3/state/d"):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("{}")
  adapter = tmp_path / "adapter"
  adapter.mkdir()
  config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
  config |= {"target_modules": ["q"], "base_model_name_or_path": str(model)}
  (adapter / "adapter_config.json").write_text(json.dumps(config))
  return tmp_path


def changed(before, after):
  assert before.keys() == after.keys()
  return [key for key in before if before[key] != after[key]]


@pytest.mark.parametrize("place", [0, 5 * 2**20 - 1])
def test_the_file_that_changed_is_named(folder, place):
  path = str(folder / "model")
  before = fingerprints.of_model(path)
  assert list(before) == [
    f"{path}: {name}"
    for name in ("a.safetensors", "b.safetensors", "config.json")
  ]
  assert fingerprints.of_model(path) == before
  with (folder / "model/b.safetensors").open("r+b") as file:
    file.seek(place)
    file.write(b"x")
  after = fingerprints.of_model(path)
  assert changed(before, after) == [f"{path}: b.safetensors"]


def test_a_longer_file_and_a_small_change_are_seen(folder):
  path = str(folder / "model")
  before = fingerprints.of_model(path)
  with (folder / "model/a.safetensors").open("ab") as file:
    file.write(b"\0")
  (folder / "model/config.json").write_text("[]")
  after = fingerprints.of_model(path)
  assert changed(before, after) == [
    f"{path}: a.safetensors",
    f"{path}: config.json",
  ]


def test_a_run_is_its_newest_checkpoint(folder):
  path = str(folder / "run")
  found = fingerprints.of_model(path)
  assert list(found) == [f"{path}: config.json", f"{path}: state/d"]
  (folder / "run/checkpoints/4").mkdir()
  (folder / "run/checkpoints/4/e").write_text("")
  assert f"{path}: e" in fingerprints.of_model(path)
  older = fingerprints.of_model(f"{path}/checkpoints/3")
  assert list(older.values()) == list(found.values())


def test_an_adapter_is_with_its_base(folder):
  base, path = str(folder / "model"), str(folder / "adapter")
  found = fingerprints.of_model(path)
  assert f"{path}: adapter_config.json" in found
  assert found.items() >= fingerprints.of_model(base).items()


def test_no_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no such model"):
    fingerprints.of_model(str(tmp_path / "absent"))

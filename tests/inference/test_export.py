"""A model that is exported: whole or not at all, by one process."""

import jax
import pytest

from dpo_jax import sharding
from dpo_jax.checkpoints import source
from dpo_jax.data.sources import synthetic
from dpo_jax.host import files
from dpo_jax.inference import export
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.models.huggingface import safetensors
from tests import drawn

CONFIG = model_config.llama(
  vocab_size=len(synthetic.make_tokenizer()),
  num_layers=2,
  d_model=16,
  num_heads=2,
  max_positions=32,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Returns two models of other weights."""
  folder = tmp_path_factory.mktemp("models")
  for name in ("one", "two"):
    shapes = transformer.param_shapes(CONFIG)
    params = drawn.weights(shapes, seed=len(list(folder.iterdir())))
    layouts = transformer.layouts(sharding.make_mesh(), CONFIG)
    params = jax.device_put(params, layouts)
    huggingface.save_model(str(folder / name), CONFIG, params)
    synthetic.make_tokenizer().save_pretrained(folder / name)
  return folder


def contents(folder):
  return {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}


def break_at(monkeypatch, number):
  """Lets the writing of that file of weights fail."""
  write, calls = safetensors.write_file, []

  def broken(path, outputs):
    calls.append(path)
    if len(calls) == number:
      raise OSError("killed")
    write(path, outputs)

  monkeypatch.setattr(safetensors, "write_file", broken)


def test_an_export_that_breaks_leaves_nothing(models, tmp_path, monkeypatch):
  target = tmp_path / "out"
  break_at(monkeypatch, 2)
  with pytest.raises(OSError, match="killed"):
    export.write(str(models / "one"), str(target), max_shard_bytes=1e4)
  assert not list(tmp_path.iterdir())


def test_an_export_that_breaks_leaves_the_model_before(
  models, tmp_path, monkeypatch
):
  target = tmp_path / "out"
  export.write(str(models / "one"), str(target))
  before = contents(target)
  with monkeypatch.context() as patch:
    break_at(patch, 2)
    with pytest.raises(OSError, match="killed"):
      export.write(str(models / "two"), str(target), max_shard_bytes=1e4)
  assert contents(target) == before


def test_a_kill_while_files_are_put_in_place_leaves_no_model(
  models, tmp_path, monkeypatch
):
  """The target is there; the kill falls between two of its files."""
  target = tmp_path / "out"
  target.mkdir()
  replace, moved = files.pathlib.Path.replace, []

  def killed(path, to):
    if to.parent == target:
      if len(moved) == 4:
        raise KeyboardInterrupt
      moved.append(to.name)
    return replace(path, to)

  with monkeypatch.context() as patch:
    patch.setattr(files.pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
      export.write(str(models / "one"), str(target), max_shard_bytes=1e4)
  assert all((target / name).exists() for name in moved)
  with pytest.raises(ValueError, match="is no model"):
    source.open_model(str(target))
  export.write(str(models / "one"), str(target), max_shard_bytes=1e4)
  source.open_model(str(target))


def test_an_export_replaces_what_was_a_model_and_nothing_else(models, tmp_path):
  for name in ("adapter_config.json", "adapter_model.safetensors", "notes.md"):
    (tmp_path / name).write_text("{}")
  export.write(str(models / "one"), str(tmp_path), max_shard_bytes=1e4)
  export.write(str(models / "one"), str(tmp_path))
  names = set(contents(tmp_path))
  made = {"notes.md", "generation_config.json"}
  assert names == made | contents(models / "one").keys()


def test_one_process_writes_a_target(models, tmp_path):
  target = tmp_path / "out"
  with files.owned_folder(target, "writes"):
    with pytest.raises(ValueError, match="another process writes .*/out$"):
      export.write(str(models / "one"), str(target))
  assert not target.exists()

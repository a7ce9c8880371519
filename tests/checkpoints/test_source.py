"""What `model.path` names: a folder, a run, or a checkpoint of a run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.checkpoints import manager, source
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface
from tests import drawn

CONFIG = model_config.llama(
  vocab_size=50, num_layers=2, d_model=16, num_heads=2, max_positions=32
)


def _layouts():
  return transformer.layouts(sharding.make_mesh(), CONFIG)


def _params(seed):
  shapes = transformer.param_shapes(CONFIG)
  return jax.device_put(drawn.weights(shapes, seed=seed), _layouts())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Hugging Face folder of weights 0, and a run of 1 and 2."""
  folder = tmp_path_factory.mktemp("source")
  huggingface.save_model(str(folder / "hf"), CONFIG, _params(0))
  (folder / "run" / "model").mkdir(parents=True)
  huggingface.write_config(str(folder / "run" / "model"), CONFIG)
  with manager.Manager(folder / "run", every=1, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {"params": _params(step)})
  return folder


@pytest.mark.parametrize(
  "path, step, seed",
  [
    ("hf", None, 0),
    ("run", None, 2),
    ("run", 1, 1),
    ("run/checkpoints/1", None, 1),
    ("run/checkpoints/2/", 2, 2),
  ],
)
def test_a_path_is_the_model_that_it_names(folder, path, step, seed):
  opened = source.open_model(f"{folder}/{path}", step=step)
  assert opened.config == CONFIG
  got = opened.load(CONFIG, _layouts())
  jax.tree.map(np.testing.assert_array_equal, got, _params(seed))


@pytest.mark.parametrize(
  "path, step, message",
  [
    ("run/checkpoints", None, "is no model: not a Hugging Face folder"),
    ("moved", None, "is no model: not a Hugging Face folder"),
    ("run/checkpoints/1", 2, "is the checkpoint of that step, not of 2"),
    ("run/checkpoints/7", None, "no checkpoint of step 7"),
    ("hf", 3, "hf' has no steps; allowed: a run folder, or none"),
    ("absent", None, "no such model"),
  ],
)
def test_what_is_no_model_is_refused_in_one_line(folder, path, step, message):
  if not (folder / "moved").exists():
    shutil.copytree(folder / "run/checkpoints/1", folder / "moved")
  with pytest.raises(ValueError) as error:
    opened = source.open_model(f"{folder}/{path}", step=step)
    opened.load(CONFIG, _layouts())
  assert message in str(error.value) and "\n" not in str(error.value)


LORA = {"base": "x", "rank": 2, "alpha": 1.0, "targets": ".*"}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rank": "2"}, "rank='2': must be an integer"),
    ({"alpha": float("nan")}, "alpha=nan: must be"),
    ({"dtype": "float99"}, "dtype='float99': must be one of float32"),
    ({"base": None}, "'base' is missing"),
  ],
)
def test_adapters_of_a_run_that_lie_are_refused(tmp_path, changes, message):
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "model").mkdir()
  path = tmp_path / "model" / "lora.json"
  path.write_text(json.dumps(LORA | {"dtype": "float32"} | changes))
  with pytest.raises(ValueError) as error:
    source.open_adapter(str(tmp_path))
  assert str(error.value).startswith(f"{path}: {message}")


def test_adapters_that_are_each_other_s_base_are_refused(tmp_path):
  for name, base in (("a", "b"), ("b", "a"), ("c", "")):
    (tmp_path / name).mkdir()
    values = {"r": 1, "lora_alpha": 1}
    values["base_model_name_or_path"] = base and str(tmp_path / base)
    text = json.dumps(values)
    (tmp_path / name / "adapter_config.json").write_text(text)
  with pytest.raises(ValueError, match="leads back to it"):
    source.open_model(str(tmp_path / "a"))
  with pytest.raises(ValueError, match="does not name its base"):
    source.open_model(str(tmp_path / "c"))


@pytest.mark.parametrize(
  "config, metrics, message",
  [
    ({"metric": 3}, "{}", "checkpoint.metric=3: must be a string"),
    ({"metric": "x"}, "{}", "checkpoint.metric='x': must be one of loss"),
    ({}, "{}", "'checkpoint.metric' is missing"),
    ({"metric": "loss"}, "[]", "metrics/metrics: []: must be"),
    ({"metric": "loss"}, '{"loss": "0.5"}', "must be an object of a number"),
  ],
)
def test_a_run_that_lies_of_its_best_step_is_refused(
  folder, tmp_path, config, metrics, message
):
  run = tmp_path / "run"
  shutil.copytree(folder / "run", run)
  scalar = dataclasses.replace(CONFIG, head="reward")
  huggingface.write_config(str(run / "model"), scalar)
  (run / "config.json").write_text(json.dumps({"checkpoint": config}))
  path = run / "checkpoints" / "1" / "metrics" / "metrics"
  path.write_text(metrics)
  with pytest.raises(ValueError) as error:
    source.open_model(str(run))
  assert message in str(error.value) and str(run) in str(error.value)


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
  (tmp_path / "model").mkdir()
  huggingface.write_config(str(tmp_path / "model"), CONFIG)
  params = _params(1)
  params["head"] = params["head"].at[3, 2].set(np.nan)
  with manager.Manager(tmp_path, every=1, keep=1) as checkpoints:
    checkpoints.save(1, {"params": params})
  opened = source.open_model(str(tmp_path))
  with pytest.raises(ValueError, match="checkpoints/1: head holds NaN or inf"):
    opened.load(CONFIG, _layouts())


def test_a_run_that_says_tied_and_has_a_head_is_refused(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "run")
  tied = dataclasses.replace(CONFIG, tied=True)
  huggingface.write_config(str(tmp_path / "run" / "model"), tied)
  opened = source.open_model(str(tmp_path / "run"))
  layouts = transformer.layouts(sharding.make_mesh(), tied)
  with pytest.raises(ValueError, match="params/head is .* and absent here"):
    opened.load(tied, layouts)

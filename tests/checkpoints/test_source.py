"""What `model.path` names: a folder, a run, or a checkpoint of a run."""

import shutil

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.checkpoints import manager, source
from dpo_jax.models import config as model_config
from dpo_jax.models import huggingface, transformer
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

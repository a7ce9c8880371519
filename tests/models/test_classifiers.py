"""Classifier folders of every family: transformers' scores, both ways.

The numbers are those of `tests/golden/make_classifiers.py` (transformers
5.23.0, torch 2.13.0). Where torch is installed, transformers reads what we
write besides.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import sharding
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface
from tests.golden import make_classifiers, make_families

GOLDEN = json.loads(make_classifiers.PATH.read_text())
HAS_TORCH = importlib.util.find_spec("torch") is not None
STALE = "differs from transformers; if those changed, run the script above"


def _by_default(*cases):
  """Returns a parametrisation in which the other cases are slow."""
  slow = lambda case: pytest.param(case, marks=pytest.mark.slow)
  params = [case if case in cases else slow(case) for case in GOLDEN]
  return pytest.mark.parametrize("case", params)


def _write(case, folder, **changes):
  """Writes the folder of a case as transformers does."""
  golden = GOLDEN[case]
  config = golden["config"] | changes
  (folder / "config.json").write_text(json.dumps(config))
  tensors = {
    name: make_families.draw(name, shape, config["model_type"])
    for name, shape in golden["shapes"].items()
  }
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return folder


def _load(folder):
  config = huggingface.read_config(str(folder))
  layouts = sharding.array_shardings(
    sharding.make_mesh(devices=jax.devices()[:1]),
    transformer.logical_axes(config),
    transformer.param_shapes(config),
  )
  return config, huggingface.load_params(str(folder), config, layouts)


def _scores(config, params):
  """Returns what we make of the last token of each sequence."""
  tokens = jnp.asarray(make_families.sequences(), jnp.int32)
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  states = jax.jit(transformer.hidden_states, static_argnums=0)(
    config, params, tokens, index, 0 * index, index + 1
  )
  return np.asarray(states[:, -1] @ params["score"][0])


def _wanted(case):
  """Returns the score of one label, or the difference of two."""
  scores = np.array(GOLDEN[case]["scores"])
  return scores[:, 0] if scores.shape[1] == 1 else scores[:, 1] - scores[:, 0]


@_by_default("qwen2")
def test_scores_are_those_of_transformers_read_and_written(case, tmp_path):
  config, params = _load(_write(case, tmp_path))
  is_classifier = make_classifiers.CASES[case] == 2
  assert config.head == ("classifier" if is_classifier else "reward")
  scores = _scores(config, params)
  np.testing.assert_allclose(scores, _wanted(case), atol=1e-4, err_msg=STALE)

  written = tmp_path / "written"
  huggingface.save_model(str(written), config, params)
  assert huggingface.read_config(str(written)) == config
  stored = safetensors.numpy.load_file(written / "model.safetensors")
  shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
  assert shapes == GOLDEN[case]["shapes"]
  values = json.loads((written / "config.json").read_text())
  assert values["architectures"] == GOLDEN[case]["config"]["architectures"]
  assert values["pad_token_id"] is None  # a pad is what is never read
  again = _load(written)[1]
  np.testing.assert_array_equal(again["score"], params["score"])
  if HAS_TORCH:
    model = make_classifiers.load_model(str(written))
    theirs = make_classifiers.scores_of(model, make_families.sequences())
    theirs = np.diff(np.array(theirs), prepend=0)[:, -1]
    np.testing.assert_allclose(theirs, scores, atol=1e-4, err_msg=STALE)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "with 3 labels is not supp"),
    (
      {"problem_type": "multi_label_classification"},
      "problem_type 'multi_label_classification' is not supported",
    ),
    ({"id2label": {"0": "a"}}, "score.weight is \\[2, 32\\], not \\[1, 32\\]"),
    ({"model_type": "bert"}, "unknown architecture 'bert'; known: llama"),
    (
      {"architectures": ["Qwen2ForCausalLM"]},
      "unexpected tensors: score.weight",
    ),
  ],
)
def test_what_is_no_scalar_is_refused(changes, message, tmp_path):
  folder = _write("qwen2", tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as caught:
    _load(folder)
  assert "\n" not in str(caught.value)

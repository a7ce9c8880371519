"""What an experiment makes of its config and its model together."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax import experiment
from dpo_jax.data import synthetic
from dpo_jax.models import config as model_config
from dpo_jax.models import huggingface, transformer


def _build(monkeypatch, tmp_path, **changes):
  """Builds the quickstart on a model with a window of so many keys."""
  window = changes.pop("window")
  config = quickstart.get_config("dpo")
  config.model.preset = "tiny"
  config.data.path, config.data.eval_path = "pairs:16", "pairs:8"
  config.data.row_length = 0
  config.data.cache_dir = str(tmp_path)
  config.batch_size = 8
  config.mesh.update(changes)
  small = dataclasses.replace(
    model_config.PRESETS["tiny"], window=window, sliding=(True, False)
  )
  monkeypatch.setitem(model_config.PRESETS, "tiny", small)
  return experiment.build(config)


@pytest.mark.parametrize(
  ("window", "layout"), [(12, "padded"), (512, "mirrored")]
)
def test_pairs_longer_than_a_window_are_laid_out_as_two_sequences(
  window, layout, monkeypatch, tmp_path, capsys
):
  built = _build(monkeypatch, tmp_path, window=window)
  assert built.loader.layout == built.eval_loader.layout == layout
  said = f"longer than the {window} keys" in capsys.readouterr().out
  assert said == (layout == "padded")


def test_experts_that_a_mesh_does_not_divide_are_refused(monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="mesh.expert=2: must divide the model"):
    _build(monkeypatch, tmp_path, window=512, expert=2)


def test_kto_on_one_prompt_is_refused_by_file(tmp_path):
  config = quickstart.get_config("kto")
  config.data.source, config.batch_size = "jsonl", 2
  config.data.cache_dir = str(tmp_path / "cache")
  config.model.tokenizer = str(tmp_path / "tokenizer")
  synthetic.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
  for name, prompts in (("path", "ab"), ("eval_path", "aa")):
    config.data[name] = str(tmp_path / f"{name}.jsonl")
    rows = [{"prompt": p, "response": "c", "label": True} for p in prompts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text(lines)
  message = "/eval_path.jsonl: all 2 rows have the same prompt; mismatched"
  with pytest.raises(ValueError, match=message) as error:
    experiment.build(config)
  assert "\n" not in str(error.value)


def _saved(folder, head, preset="tiny"):
  """Writes a model with this head and the quickstart's tokenizer."""
  tokenizer = synthetic.make_tokenizer()
  config = model_config.make_config(preset, vocab_size=len(tokenizer))
  config = dataclasses.replace(config, head=head)
  init = jax.jit(transformer.init_params, static_argnums=0)
  params = init(config, jax.random.key(0))
  huggingface.save_model(str(folder), config, params)
  tokenizer.save_pretrained(folder)
  return params


def _build_from(folder, loss, tmp_path, **checkpoint):
  config = quickstart.get_config(loss)
  config.model.preset, config.model.path = "", str(folder)
  config.data.path, config.data.eval_path = "pairs:16", "pairs:8"
  config.data.cache_dir = str(tmp_path)
  config.batch_size = 8
  config.checkpoint.update(checkpoint)
  return experiment.build(config)


def test_a_reward_model_begins_as_a_language_model_with_a_new_head(tmp_path):
  params = _saved(tmp_path / "lm", "vocabulary")
  built = _build_from(tmp_path / "lm", "reward_model", tmp_path)
  assert built.scorer.policy.head == "reward"
  loaded = built.load_policy()
  assert loaded.keys() == (params.keys() - {"head"}) | {"score"}
  np.testing.assert_array_equal(loaded["embedding"], params["embedding"])
  assert np.any(loaded["score"])
  again = _build_from(tmp_path / "lm", "reward_model", tmp_path).load_policy()
  np.testing.assert_array_equal(loaded["score"], again["score"])


def test_a_reward_model_is_no_policy(tmp_path):
  _saved(tmp_path / "rm", "reward")
  with pytest.raises(ValueError, match="has a reward head: loss 'dpo' needs a"):
    _build_from(tmp_path / "rm", "dpo", tmp_path)


@pytest.mark.parametrize(
  ("loss", "metric", "message"),
  [
    ("dpo", "accuracy", "'accuracy': must be one of loss, rewards/accuracies"),
    ("simpo", "rewards/margins", "of loss 'simpo' on this data do not have it"),
  ],
)
def test_a_metric_that_evaluations_lack_is_refused(
  loss, metric, message, tmp_path
):
  _saved(tmp_path / "lm", "vocabulary")
  with pytest.raises(ValueError, match=message):
    _build_from(tmp_path / "lm", loss, tmp_path, metric=metric)
  built = _build_from(tmp_path / "lm", loss, tmp_path)
  assert built.best_metric == "loss"

"""What an experiment makes of its config and its model together."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax.checkpoints import source, stop_tokens
from dpo_jax.data.sources import synthetic
from dpo_jax.evaluation import held_out
from dpo_jax.inference import model as model_lib
from dpo_jax.judges import local as local_judge
from dpo_jax.models import presets, transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.rewards import learned
from dpo_jax.run import experiment, trainer


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
    presets.PRESETS["tiny"], window=window, sliding=(True, False)
  )
  monkeypatch.setitem(presets.PRESETS, "tiny", small)
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


@pytest.mark.parametrize("loss, warns", [("discopop", True), ("dpo", False)])
def test_a_run_says_at_its_start_what_its_loss_is_warned_of(
  loss, warns, tmp_path
):
  config = quickstart.get_config(loss)
  config.data.path, config.data.eval_path = "pairs:16", ""
  config.data.cache_dir = str(tmp_path)
  config.batch_size = 8
  *_, last = trainer.describe(experiment.build(config))
  begin = "beware, discopop: where tau is below (1 - log 2) / 3 = 0.102, the fi"
  assert last.startswith(begin) == warns


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
  config = presets.make_config(preset, vocab_size=len(tokenizer))
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


def test_a_run_folder_keeps_what_ends_a_response(tmp_path):
  model = tmp_path / "lm"
  _saved(model, "vocabulary")
  values = {"eos_token_id": [7, 5], "top_p": 0.9}
  (model / "generation_config.json").write_text(json.dumps(values))
  built = _build_from(model, "dpo", tmp_path)
  stops = (built.tokenizer.eos_token_id, 7, 5)
  assert built.stop_ids == stops
  trainer._write_run_files(built, tmp_path / "run")
  (tmp_path / "run/checkpoints").mkdir()
  opened = source.open_model(str(tmp_path / "run"))
  assert stop_tokens.find(built.tokenizer, opened) == stops
  written = tmp_path / "run/model/generation_config.json"
  assert json.loads(written.read_text()) == {
    "eos_token_id": list(stops),
    "top_p": 0.9,
  }


def _raise_highest_id(folder, token_id):
  """Gives one word of a tokenizer a higher id, so that ids have holes."""
  path = folder / "tokenizer.json"
  content = json.loads(path.read_text())
  words = content["model"]["vocab"]
  words[max(words, key=words.get)] = token_id
  path.write_text(json.dumps(content))


def test_a_preset_has_a_row_for_the_highest_id(tmp_path):
  synthetic.make_tokenizer().save_pretrained(tmp_path)
  _raise_highest_id(tmp_path, 700)
  config = quickstart.get_config("dpo")
  config.model.preset, config.model.tokenizer = "tiny", str(tmp_path)
  config.data.path, config.data.eval_path = "pairs:16", "pairs:8"
  config.data.cache_dir = str(tmp_path / "cache")
  config.batch_size = 8
  assert experiment.build(config).scorer.policy.vocab_size == 701
  config.model.vocab_size = 700
  with pytest.raises(ValueError, match="with id 700, and the model has 700"):
    experiment.build(config)


def test_whoever_reads_ids_refuses_those_that_a_model_has_no_row_for(tmp_path):
  folder, scalar = tmp_path / "lm", tmp_path / "rm"
  for path, head in ((folder, "vocabulary"), (scalar, "reward")):
    _saved(path, head)
    _raise_highest_id(path, 700)
  settings = held_out.make_settings(str(folder), reference="x", beta=1.0)
  for read in (
    lambda: _build_from(folder, "dpo", tmp_path),
    lambda: model_lib.Policy(str(folder)),
    lambda: local_judge.make_logps_fn(str(folder)),
    lambda: learned.load(str(scalar)),
    lambda: held_out.evaluate(
      settings, ["absent"], "", data_source="jsonl", split=""
    ),
  ):
    with pytest.raises(ValueError, match="with id 700, and the model has"):
      read()

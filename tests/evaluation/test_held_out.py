"""A trained run on a file of held-out pairs, as the command does it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax.data.sources import synthetic
from dpo_jax.evaluation import held_out
from dpo_jax.run import trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a folder of two short runs, the second begun where the first is.

  Its held-out file has 12 pairs, of two subsets, and one that is dropped.
  """
  folder = tmp_path_factory.mktemp("held_out")
  rows = list(synthetic.read("pairs:12", "test"))
  rows = [row | {"subset": f"s{i % 2}"} for i, row in enumerate(rows)]
  turns = lambda end: f"\n\nHuman: {end}?\n\nAssistant: b"
  rows.insert(3, {"chosen": turns("a"), "rejected": turns("c")})
  (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  for name in ("first", "second"):
    config = quickstart.get_config("dpo")
    config.steps, config.batch_size, config.data.path = 2, 8, "pairs:16"
    config.data.row_length = 128
    config.data.eval_path = ""
    config.data.cache_dir = str(folder / "cache")
    if name == "second":
      config.model.preset, config.model.path = "", str(folder / "first")
      config.data.source = "jsonl"
      config.data.path = str(folder / "pairs.jsonl")
      config.data.eval_path = str(folder / "pairs.jsonl")
    assert trainer.train(config, folder / name)
  return folder


def _evaluate(settings, folder, data):
  return held_out.evaluate(
    settings, data, str(folder / "out"), data_source="jsonl", split="test"
  )


def test_a_run_is_evaluated_as_it_evaluated_itself(run, capfd):
  settings = held_out.make_settings(str(run / "second"))
  assert settings.reference == str(run / "first") and settings.beta == 0.1
  table = _evaluate(settings, run, [str(run / "pairs.jsonl")])
  assert "s0" in table and "s1" in table
  said = capfd.readouterr().out
  assert "12 of 13 rows kept; 1 dropped: prompts differ" in said
  lines = (run / "second" / "metrics.jsonl").read_text().splitlines()
  expected = json.loads(lines[-1])
  assert expected["split"] == "eval" and expected["num_pairs"] == 12
  every, *subsets = [
    json.loads(line)
    for line in (run / "out" / "summary.jsonl").read_text().splitlines()
  ]
  assert every["num_pairs"] == 12
  assert [x["num_pairs"] for x in subsets] == [6, 6]
  for name, value in (
    ("rewards/accuracies", every["accuracy"]),
    ("rewards/margins", every["reward_margin_mean"]),
    ("loss", every["calibration"]["nll"]),
  ):
    assert value == pytest.approx(expected[name], abs=1e-5), name
  pairs = [
    json.loads(line)
    for line in (run / "out" / "pairs.jsonl").read_text().splitlines()
  ]
  assert [x["row"] for x in pairs] == [1, 2, 3, *range(5, 14)]
  assert [x["subset"] for x in pairs[:4]] == ["s0", "s1", "s0", "s1"]
  assert np.std([x["margin"] for x in pairs]) > 1e-3


def test_a_model_against_itself_has_no_margin(run):
  path = str(run / "second")
  settings = held_out.make_settings(path, reference=path, beta=2.0)
  _evaluate(settings, run, [str(run / "pairs.jsonl")])
  first = (run / "out" / "summary.jsonl").read_text().splitlines()[0]
  found = json.loads(first)
  assert found["margin_std"] == 0 and found["accuracy"] == 0
  assert found["calibration"]["nll"] == pytest.approx(np.log(2))
  assert found["beta"] == 2


def test_what_cannot_be_evaluated_is_refused(run, tmp_path):
  # From random weights: the reference is in no folder.
  with pytest.raises(ValueError, match="does not say its reference: give"):
    held_out.make_settings(str(run / "first"))
  with pytest.raises(ValueError, match="does not say its beta: give --beta"):
    held_out.make_settings(str(tmp_path), reference="x")
  with pytest.raises(ValueError, match="beta=-1: must be above 0"):
    held_out.make_settings(str(run / "second"), beta=-1.0)
  settings = held_out.make_settings(str(run / "second"), max_prompt_length=1)
  settings = dataclasses.replace(settings, max_length=1)
  with pytest.raises(ValueError, match="none of 13 rows is kept; 12 dropped"):
    _evaluate(settings, run, [str(run / "pairs.jsonl")])
  chat = [{"role": "assistant", "content": "a"}]
  row = {"prompt": chat, "chosen": chat, "rejected": chat}
  path = tmp_path / "chat.jsonl"
  path.write_text(json.dumps(row))
  with pytest.raises(ValueError, match=f"^{path}, line 1: .* no chat template"):
    _evaluate(settings, run, [str(path)])
  assert jax.default_backend() == "cpu" and settings.dtype == "float32"


def test_pairs_longer_than_a_window_are_two_sequences(run, tmp_path, capfd):
  folder = tmp_path / "sliding"
  shutil.copytree(run / "second", folder)
  path = folder / "model" / "config.json"
  values = json.loads(path.read_text())
  values |= {"model_type": "mistral", "sliding_window": 8}
  path.write_text(json.dumps(values))
  settings = held_out.make_settings(str(folder))
  _evaluate(settings, tmp_path, [str(run / "pairs.jsonl")])
  said = capfd.readouterr().out
  assert said.count("layout: padded, as sequences are longer than the 8") == 1

"""The quickstart, small and whole."""

import json

import pytest

from configs import quickstart
from dpo_jax.data.sources import synthetic
from dpo_jax.pipelines import quickstart as pipeline
from tests import test_end_to_end


def _small_config(loss):
  config = quickstart.get_config(loss)
  config.steps, config.batch_size, config.log.every = 4, 8, 1
  config.data.path = "reviews:200" if loss == "sft" else "pairs:200"
  config.data.eval_path = ""
  return config


@pytest.mark.slow
def test_a_small_quickstart_runs_its_stages_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(pipeline, "BETAS", (0.1,))
  monkeypatch.setattr(pipeline, "MAX_NEW_TOKENS", 8)
  monkeypatch.setattr(pipeline, "PREFIXES", 16)
  monkeypatch.setattr(pipeline, "TEST_PREFIXES", 8)
  monkeypatch.setattr(pipeline, "FRONTIER_SAMPLES", 4)
  assert pipeline.run(str(tmp_path), _small_config)
  record = json.loads((tmp_path / "frontier.json").read_text())
  assert [point["label"] for point in record["points"]] == [
    "SFT",
    *(f"DPO, beta {beta:g}" for beta in pipeline.BETAS),
  ]
  sft = record["points"][0]
  assert abs(sft["kl"]) < 1e-4 and sft["num_samples"] == 32
  assert (tmp_path / "frontier.png").stat().st_size > 10_000
  pairs = (tmp_path / "pairs.jsonl").read_text().splitlines()
  for row in map(json.loads, pairs):
    chosen, rejected = (
      synthetic.true_reward(row["prompt"] + row[name])
      for name in ("chosen", "rejected")
    )
    assert chosen > rejected
    assert {row["chosen_ended"], row["rejected_ended"]} <= {True, False}
  capsys.readouterr()
  assert pipeline.run(str(tmp_path), _small_config)
  shown = capsys.readouterr().out.splitlines()
  assert [x for x in shown if x.startswith("== ")] == [
    "== sft: a language model of the reviews, done",
    "== samples, paired and labelled by the true reward, done",
    "== DPO, beta 0.1, done",
    "== evaluation: reward and KL on held-out prefixes",
  ]


@pytest.mark.slow
def test_dpo_is_above_sft_by_more_than_five_standard_errors(tmp_path):
  process = test_end_to_end.start(
    "quickstart", f"--workdir={tmp_path}", module="launch.reproduce"
  )
  out, err = process.communicate(timeout=1500)
  assert process.returncode == 0, out + err
  record = json.loads((tmp_path / "frontier.json").read_text())
  sft, *others = record["points"]
  for point in others:
    error = (sft["reward_error"] ** 2 + point["reward_error"] ** 2) ** 0.5
    assert point["reward"] > sft["reward"] + 5 * error, point["label"]


def test_an_unknown_experiment_is_refused(tmp_path):
  process = test_end_to_end.start(
    "imdbb", f"--workdir={tmp_path}", module="launch.reproduce"
  )
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert (
    err
    == "error: unknown experiment 'imdbb'; known: quickstart, imdb, hh, tldr\n"
  )

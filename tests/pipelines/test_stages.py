"""Stages in turn."""

import json

import pytest

from configs import imdb_sentiment
from dpo_jax.checkpoints import run_folder
from dpo_jax.pipelines import measure, stages
from dpo_jax.run import experiment


def test_stages_stop_at_one_that_did_not_end_and_keep_their_times(tmp_path):
  calls = []

  def stage(name, result=True):
    return stages.Stage(name, lambda: calls.append(name) or result)

  assert not stages.run_all(
    tmp_path, [stage("a"), stage("b", False), stage("c")]
  )
  assert calls == ["a", "b"]
  first = json.loads((tmp_path / stages.SECONDS).read_text())
  assert stages.run_all(tmp_path, [stage("a"), stage("b"), stage("c")])
  again = json.loads((tmp_path / stages.SECONDS).read_text())
  assert list(again) == ["a", "b", "c"] and again["a"] > first["a"]
  assert stages.read_seconds(tmp_path).splitlines()[-1].startswith("sum")


def test_the_time_of_a_stage_that_fails_is_kept(tmp_path):
  def fail():
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    stages.run_all(tmp_path, [stages.Stage("a", fail)])
  assert list(json.loads((tmp_path / stages.SECONDS).read_text())) == ["a"]


def test_what_is_written_is_not_written_again(tmp_path, capsys):
  path = tmp_path / "deep/er.txt"
  stage = stages.writing("a", path, lambda path: path.write_text("once"))
  assert stages.run_all(tmp_path, [stage])
  seconds = (tmp_path / stages.SECONDS).read_text()
  again = stages.writing("a", path, lambda path: path.write_text("twice"))
  assert stages.run_all(tmp_path, [again])
  assert path.read_text() == "once"
  assert (tmp_path / stages.SECONDS).read_text() == seconds
  assert capsys.readouterr().out == "== a\n== a, done\n"


def test_a_run_of_another_config_is_refused(tmp_path):
  config = imdb_sentiment.get_config("dpo,cpu")
  run_folder.write_config(tmp_path, experiment.to_plain(config))
  stage = stages.training("dpo", config, tmp_path)
  assert not stage.is_done()
  run_folder.mark_finished(tmp_path)
  assert stage.is_done()
  config.loss.beta = 7.0
  with pytest.raises(ValueError, match=r"loss\.beta"):
    stages.training("dpo", config, tmp_path).is_done()


def test_a_packed_file_is_found(tmp_path):
  (tmp_path / "train.jsonl.xz").write_text("")
  assert stages.find_file(tmp_path, "train").endswith("train.jsonl.xz")
  with pytest.raises(ValueError, match=r"has no test\.jsonl"):
    stages.find_file(tmp_path, "test")


def test_pairs_are_all_of_a_prompt_but_ties(tmp_path):
  path = tmp_path / "pairs.jsonl"
  num_ties = measure.write_pairs(
    path,
    ["x", "y"],
    [["a", "b", "c"], ["d", "e"]],
    [[1, 3, 3], [0.5, 0]],
    [[False, True, True], [True, False]],
  )
  rows = [json.loads(line) for line in path.open()]
  found = [(x["prompt"], x["chosen"], x["rejected"]) for x in rows]
  assert num_ties == 1
  assert found == [("x", "b", "a"), ("x", "c", "a"), ("y", "d", "e")]
  assert rows[2]["chosen_score"] == 0.5 and rows[2]["rejected_score"] == 0
  assert [(x["chosen_ended"], x["rejected_ended"]) for x in rows] == [
    (True, False)
  ] * 3

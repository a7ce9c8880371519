"""Controlled sentiment on reviews of the miniature grammar, small and whole."""

import json

import pytest

from configs import imdb_sentiment
from dpo_jax.checkpoints import manager
from dpo_jax.data.sources import synthetic
from dpo_jax.evaluation import frontier
from dpo_jax.pipelines import sentiment, stages
from tests import test_end_to_end as end_to_end

GRID = (
  ("DPO", "dpo", {"loss.beta": 0.1}),
  ("PPO", "ppo", {"ppo.target_kl": 3.0}),
  ("PPO-GT", "ppo", {"ppo.target_kl": 3.0}),
)
PLAN = sentiment.Plan(
  num_prefixes=24,
  num_test_prefixes=4,
  test_samples=2,
  frontier_samples=4,
  max_new_tokens=8,
  grid=GRID,
  vocab_size=300,
)


FILES = {name: f"{name}.jsonl" for name in sentiment.FILES}
_get_config = imdb_sentiment.get_config


def make_config(argument):
  """Returns a config of seconds; "dpo" and "dpo,cpu" are the same."""
  loss = argument.removesuffix(",cpu")
  config = _get_config(f"{loss},cpu")
  if config.model.preset:
    config.model.preset = "tiny"
  config.batch_size, config.steps = 8, 2
  config.microbatch_rows = 8
  if loss in ("dpo", "ppo"):
    config.checkpoint.every = 1
  return config


@pytest.fixture
def reviews(tmp_path):
  """A folder of train, test and unsup reviews."""
  folder = tmp_path / "data"
  folder.mkdir()
  for name in sentiment.FILES:
    rows = synthetic.read("reviews:60", "test" if name == "test" else "train")
    texts = [row["prompt"] + row["response"] for row in rows]
    lines = (
      {"text": text, "label": int(synthetic.true_reward(text) > 0.5)}
      for text in texts
      if len(text.split()) > 2
    )
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


@pytest.mark.slow
def test_the_command_runs_its_stages_once(tmp_path, reviews):
  workdir = tmp_path / "run"

  def run():
    process = end_to_end.start(
      *("imdb", f"--data={reviews}", f"--workdir={workdir}"),
      module="tests.small_experiments",
    )
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, out + err
    return out

  run()
  record = json.loads((workdir / "frontier.json").read_text())
  labels = [point["label"] for point in record["points"]]
  assert labels == [
    "SFT",
    *(label for label, *_ in GRID for _ in range(2)),
    *["Best-of-N"] * 2,
  ]
  assert abs(record["points"][0]["kl"]) < 1e-3
  assert {point["num_samples"] for point in record["points"]} == {8, 16}
  for row in map(json.loads, (workdir / "pairs.jsonl").open()):
    assert row["chosen_score"] > row["rejected_score"]
  prompts = [
    {json.loads(line)["prompt"] for line in (workdir / name).open()}
    for name in ("pairs.jsonl", "held_out_pairs.jsonl")
  ]
  assert all(prompts) and not set.intersection(*prompts)
  # Dots are kept, the checkpoints that they were of are not.
  assert manager.saved_steps(workdir / "dpo_beta_0.1") == [2]
  report = (workdir / "report.md").read_text()
  assert "| PPO-GT |" in report and "reward model of the pairs" in report
  kept = (workdir / "points.jsonl").read_text()
  shown = [x for x in run().splitlines() if x.startswith("== ")]
  assert len(shown) == 8 + len(GRID) + 1
  assert all(x.endswith(", done") for x in shown[:-1])
  assert shown[-1] == "== figure and report"
  assert (workdir / "points.jsonl").read_text() == kept


def test_the_true_reward_is_ppo_gts_alone(tmp_path, reviews, monkeypatch):
  rewards = {}
  monkeypatch.setattr(
    stages.trainer,
    "train",
    lambda config, path: rewards.update({path: config.ppo.reward}) or True,
  )
  monkeypatch.setattr(sentiment._Experiment, "_measure", lambda *_: True)
  files = {name: str(reviews / name) for name in sentiment.FILES}
  experiment = sentiment._Experiment(tmp_path, files, make_config, PLAN, "")
  assert all(experiment._method(point).run() for point in GRID)
  assert rewards == {
    f"{tmp_path}/dpo_beta_0.1": "",
    f"{tmp_path}/ppo_target_kl_3": f"run:{tmp_path}/reward_model",
    f"{tmp_path}/ppo_gt_target_kl_3": f"run:{tmp_path}/classifier",
  }


def test_a_half_written_dot_is_measured_again(tmp_path):
  point = {"label": "DPO", "kl": 1.0, "kl_error": 0.1, "reward": 0.5}
  point |= {"reward_error": 0.1, "num_samples": 4}
  line = json.dumps({"run": "dpo", "step": 1} | point) + "\n"
  path = tmp_path / "points.jsonl"
  path.write_text(line + line[:30])
  experiment = sentiment._Experiment(tmp_path, FILES, make_config, PLAN, "")
  assert list(experiment._read_points()) == [("dpo", 1)]
  assert path.read_text() == line


def test_a_run_is_done_when_all_its_checkpoints_are_dots(tmp_path, monkeypatch):
  monkeypatch.setattr(stages.run_folder, "is_finished", lambda *_: True)
  monkeypatch.setattr(sentiment.manager, "saved_steps", lambda _: [1, 2])
  experiment = sentiment._Experiment(tmp_path, FILES, make_config, PLAN, "")
  is_done = experiment._method(GRID[0]).is_done
  point = frontier.Point("DPO", 1.0, 0.1, 0.5, 0.1, 4)
  assert not is_done()
  experiment._add_point("dpo_beta_0.1", 1, point)
  assert not is_done()
  experiment._add_point("dpo_beta_0.1", 2, point)
  assert is_done()


def test_a_folder_without_reviews_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"has no train\.jsonl"):
    sentiment.run(str(tmp_path / "run"), str(tmp_path), make_config, PLAN)

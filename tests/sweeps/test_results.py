"""The table and the figure of runs whose metrics are known."""

import csv
import json

import pytest
from matplotlib import figure

from dpo_jax.sweeps import results
from dpo_jax.sweeps.points import Point

METRIC = "eval/rewards/accuracies"


def make_point(loss, beta, seed, **others):
  values = {"loss": loss, "loss.beta": beta, "seed": seed} | others
  name = ",".join(f"{key}={value}" for key, value in values.items())
  settings = {"loss": {"name": loss, "beta": beta}, "seed": seed}
  return Point(name, values, (), settings)


def make_row(loss, beta, seed, value, **others):
  point = make_point(loss, beta, seed, **others)
  return results.Row(point, "finished", {METRIC: value})


ROWS = [
  make_row("dpo", 0.03, 0, 0.5),
  make_row("dpo", 0.03, 1, 0.7),
  make_row("dpo", 0.3, 0, 0.8),
  make_row("ipo", 0.03, 0, 0.4),
]


def draw(rows, x="loss.beta"):
  ax = figure.Figure().subplots()
  results.draw(ax, rows, metric=METRIC, x=x)
  return ax


def test_a_row_has_the_last_metrics_of_each_split_and_no_times(tmp_path):
  lines = [
    dict(step=1, split="train", loss=3.0, pairs_per_second=9.0),
    dict(step=2, split="train", loss=2.0, pairs_per_second=9.0),
    dict(step=2, split="eval", loss=1.0),
  ]
  text = "\n".join(json.dumps(line) for line in lines)
  (tmp_path / "metrics.jsonl").write_text(text)
  row = results.read_row(make_point("dpo", 0.1, 0), tmp_path, True)
  assert row.metrics == {
    "eval/loss": 1.0,
    "eval/step": 2,
    "train/loss": 2.0,
    "train/step": 2,
  }
  assert not results.read_row(row.point, tmp_path, False).metrics


def test_the_three_files_have_every_run(tmp_path):
  failed = results.Row(make_point("ipo", 0.3, 0), "failed", {})
  table = results.write(
    tmp_path, [*ROWS, failed], metric="rewards/accuracies", x="loss.beta"
  )
  with (tmp_path / "sweep.csv").open() as file:
    found = list(csv.DictReader(file))
  assert [row["run"] for row in found][:2] == [
    "loss=dpo,loss.beta=0.03,seed=0",
    "loss=dpo,loss.beta=0.03,seed=1",
  ]
  assert [row[METRIC] for row in found] == ["0.5", "0.7", "0.8", "0.4", ""]
  assert [row["status"] for row in found] == ["finished"] * 4 + ["failed"]
  assert (tmp_path / "sweep.md").read_text() == table
  assert table.splitlines()[-1].startswith("| ipo  | 0.3       | 0    | failed")
  assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_metric_lists_those_there_are(tmp_path):
  with pytest.raises(
    ValueError, match=f"eval/accuracy: .* there are: {METRIC}"
  ):
    results.write(tmp_path, ROWS, metric="accuracy", x="loss.beta")
  assert (tmp_path / "sweep.csv").exists()


def test_a_line_is_a_loss_and_seeds_are_its_band():
  ax = draw(ROWS)
  assert [line.get_label() for line in ax.lines] == ["dpo", "ipo"]
  dpo = ax.lines[0]
  assert dpo.get_xdata().tolist() == [0.03, 0.3]
  assert dpo.get_ydata().tolist() == pytest.approx([0.6, 0.8])
  band = ax.collections[1].get_paths()[0].vertices
  assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 0.8)


def test_other_keys_make_lines_of_their_own_where_they_differ():
  rate = "optimizer.learning_rate"
  rows = [make_row("dpo", 0.1, 0, 0.9, **{rate: 0.01}) for _ in range(2)]
  assert [line.get_label() for line in draw(rows).lines] == ["dpo"]
  rows.append(make_row("dpo", 0.1, 0, 0.9, **{rate: 0.1}))
  labels = [line.get_label() for line in draw(rows).lines]
  assert labels == [f"dpo, {rate} 0.01", f"dpo, {rate} 0.1"]


def test_the_axis_is_logarithmic_from_a_decade_on():
  assert draw(ROWS).get_xscale() == "log"
  assert draw(ROWS[:2]).get_xscale() == "linear"
  assert draw(ROWS, x="seed").get_xscale() == "linear"


def test_a_run_without_the_number_is_left_out():
  without = make_row("sft", None, 0, 0.1)
  assert results.lines_of([without], metric=METRIC, x="loss.beta") == {}
  with pytest.raises(
    ValueError, match="--x=loss.gamma: no number .*: loss.beta"
  ):
    results.check_axis([ROWS[0].point], "loss.gamma")

"""Accuracy, margins and calibration of held-out pairs, by hand."""

import json

import numpy as np
import pytest

from dpo_jax.evaluation import intervals, preference_report
from dpo_jax.evaluation.preference_report import Pair


def _pair(margin, row=1, subset="", prompt=None):
  """Returns a pair whose chosen response alone moved."""
  logps = (margin - 3, -4), (-3, -4)
  return Pair("a.jsonl", row, subset, *logps, (5, 6), prompt or str(row))


def test_calibration_by_hand():
  log3 = float(np.log(3))  # sigmoid: 3/4
  found = preference_report.calibration(
    np.array([2 * log3, 2 * log3, 2 * log3, -2 * log3]), beta=0.5
  )
  assert found["brier"] == pytest.approx((3 / 16 + 9 / 16) / 4)
  expected = -(3 * np.log(3 / 4) + np.log(1 / 4)) / 4
  assert found["nll"] == pytest.approx(expected)
  # Right three times of four at a confidence of 3/4: exactly calibrated.
  assert found["ece"] == pytest.approx(0, abs=1e-12)
  (only,) = found["bins"]
  assert only["count"] == 4 and only["accuracy"] == 0.75
  assert only["confidence"] == pytest.approx(0.75)


def test_sure_and_wrong_is_the_worst_calibration():
  found = preference_report.calibration(np.array([-1e4, -1e4]), beta=1.0)
  assert found["ece"] == pytest.approx(1) and found["brier"] == 1
  assert found["nll"] == 1e4  # finite, though p underflows
  assert found["bins"][0]["low"] == pytest.approx(0.95)


def test_a_margin_of_0_is_not_right():
  pairs = [_pair(0, 1), _pair(1, 2)]
  found = preference_report.summarise("all", pairs, beta=0.1)
  assert found["accuracy"] == 0.5


def test_the_accuracys_interval_is_over_prompts():
  def ends(pairs):
    found = preference_report.summarise("all", pairs, beta=0.1)
    return found["accuracy_low"], found["accuracy_high"]

  pairs = [_pair(1, row) for row in range(8)]
  assert ends(pairs) == pytest.approx(intervals.wilson(1, 8))
  pairs = [_pair(1, row, prompt=str(row // 4)) for row in range(8)]
  assert ends(pairs) == pytest.approx(intervals.wilson(1, 2))


def test_swapping_responses_negates_the_margin():
  pair = Pair("a", 1, "", (-1, -2), (-4, -3), (5, 6), "x")
  swapped = Pair("a", 1, "", (-2, -1), (-3, -4), (6, 5), "x")
  assert pair.margin == -swapped.margin == 2
  assert pair.logratios == swapped.logratios[::-1] == (3, 1)


def test_subsets_are_counted_apart(tmp_path):
  pairs = [_pair(1, 1, "maths"), _pair(-1, 2, "code"), _pair(2, 4, "maths")]
  table = preference_report.write(tmp_path, pairs, beta=0.1)
  read = lambda name: [
    json.loads(line) for line in (tmp_path / name).read_text().splitlines()
  ]
  every, code, maths = read("summary.jsonl")
  assert [x["subset"] for x in (every, code, maths)] == ["all", "code", "maths"]
  assert [x["num_pairs"] for x in (every, code, maths)] == [3, 1, 2]
  assert (code["accuracy"], maths["accuracy"]) == (0, 1)
  assert every["accuracy"] == pytest.approx(2 / 3)
  assert every["reference_accuracy"] == 1  # -3 is above -4
  assert every["reward_margin_mean"] == pytest.approx(0.1 * 2 / 3)
  histogram = every["logratio_histogram"]
  assert sum(histogram["chosen"]) == sum(histogram["rejected"]) == 3
  lines = read("pairs.jsonl")
  assert [x["row"] for x in lines] == [1, 2, 4]
  assert [x["is_right"] for x in lines] == [True, False, True]
  assert lines[0]["probability"] == pytest.approx(1 / (1 + np.exp(-0.1)))
  assert len(table.splitlines()) == 4
  image = (tmp_path / "preferences.png").read_bytes()
  assert image.startswith(b"\x89PNG")
  assert not list(tmp_path.glob("*.part"))

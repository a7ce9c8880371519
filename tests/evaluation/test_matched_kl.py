"""Methods at the same KL."""

import numpy as np
import pytest

from dpo_jax.evaluation import frontier, matched_kl
from dpo_jax.evaluation.frontier import Point

START = Point("SFT", 0.0, 0.0, 0.5, 0.02, 8)


def _point(kl, reward, error=0.02, label="DPO"):
  return Point(label, kl, 0.1, reward, error, 8)


def test_reward_is_linear_between_dots():
  points = [START, _point(2.0, 0.7, 0.04)]
  reward, error = matched_kl.reward_at(points, 1.0)
  assert reward == pytest.approx(0.6)
  assert error == pytest.approx(np.hypot(0.01, 0.02))
  assert matched_kl.reward_at(points, 2.0) == pytest.approx((0.7, 0.04))


def test_a_dot_with_more_kl_and_less_reward_is_passed_over():
  points = [START, _point(1.0, 0.8), _point(2.0, 0.6), _point(3.0, 0.9)]
  assert [x.kl for x in matched_kl.upper(points)] == [0.0, 1.0, 3.0]
  assert matched_kl.reward_at(points, 2.0)[0] == pytest.approx(0.85)


def test_nothing_is_said_past_the_last_dot():
  points = [START, _point(1.0, 0.8), _point(9.0, 0.7)]
  assert matched_kl.reward_at(points, 1.5) is None
  assert matched_kl.reward_at([_point(1.0, 0.8)], 0.5) is None


def test_the_table_says_at_least_where_the_best_is_not_known():
  # Of another mean than the reference's own dot.
  rewards = np.random.default_rng(0).uniform(0, 0.96, size=(50, 64))
  limit = frontier.optimal_frontier(rewards, np.geomspace(0.01, 100, 200))
  points = [START, _point(0.2, 0.6), _point(4.0, 0.75)]
  table = matched_kl.compare(points, limit, [0.2, 4.0, 9.0], max_reward=1.0)
  *_, dpo, best = table.splitlines()
  start = rewards.mean()
  share = (0.6 - start) / (limit.reward_at(0.2) - start)
  bound = (0.75 - start) / (1 - start)
  assert f"{bound:.0%}" != "50%"
  assert dpo == f"| DPO | 0.600 +- 0.020, {share:.0%} |" + (
    f" 0.750 +- 0.020, at least {bound:.0%} | - |"
  )
  assert best.startswith("| best possible, at least | ")
  assert best.count("at most 1") == 2

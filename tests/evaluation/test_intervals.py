"""Intervals and kappa against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dpo_jax.evaluation import intervals


@pytest.mark.parametrize(
  ("wins", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (61, 100), (1, 3)]
)
def test_wilson_is_scipys(wins, total):
  expected = stats.binomtest(wins, total).proportion_ci(0.95, "wilson")
  assert intervals.wilson(wins, total) == pytest.approx(tuple(expected))


def test_wilson_by_hand():
  # z^2 = 3.8415; (0.5 + 1.9207 / 4 -+ 1.96 sqrt(1/16 + 3.8415/64)) / 1.9604
  assert intervals.wilson(2, 4) == pytest.approx((0.150039, 0.849961), abs=1e-6)


def test_swapping_wins_and_losses_mirrors_wilson():
  low, high = intervals.wilson(3, 10)
  assert intervals.wilson(7, 10) == pytest.approx((1 - high, 1 - low))


def test_bootstrap_of_many_groups_is_near_the_normal_interval():
  values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=2_000)
  low, high = intervals.bootstrap(values, np.ones(2_000), seed=1)
  half = 1.959964 * values.std() / math.sqrt(2_000)
  assert low == pytest.approx(values.mean() - half, abs=1e-3)
  assert high == pytest.approx(values.mean() + half, abs=1e-3)


def test_bootstrap_draws_whole_groups():
  # Two groups of 10: (0, 0), (0, 1), (1, 0) and (1, 1) are as likely.
  sums, counts = np.array([0.0, 10.0]), np.array([10.0, 10.0])
  assert intervals.bootstrap(sums, counts, seed=0) == (0, 1)
  # 20 values drawn one by one would leave neither end this far.
  alone = np.repeat([0.0, 1.0], 10)
  low, high = intervals.bootstrap(alone, np.ones(20), seed=0)
  assert 0.2 < low < 0.35 and 0.65 < high < 0.8


def test_bootstrap_weighs_groups_by_their_counts():
  # Draws are 0/18, 1/10 or 2/2.
  sums, counts = np.array([0.0, 1.0]), np.array([9.0, 1.0])
  rng = np.random.default_rng(3)
  index = rng.integers(2, size=(100, 2))
  expected = np.quantile(
    sums[index].sum(axis=1) / counts[index].sum(axis=1), [0.025, 0.975]
  )
  found = intervals.bootstrap(sums, counts, seed=3, num_resamples=100)
  assert found == pytest.approx(tuple(expected))


def test_bootstrap_is_of_its_seed_and_one_group_says_nothing():
  values, ones = np.linspace(0, 1, 30) ** 3, np.ones(30)
  first = intervals.bootstrap(values, ones, seed=0)
  assert first == intervals.bootstrap(values, ones, seed=0)
  assert first != intervals.bootstrap(values, ones, seed=1)
  assert intervals.bootstrap(values[:1], ones[:1], seed=0) == (0, 1)


def test_blocks_of_draws_change_nothing(monkeypatch):
  values, ones = np.linspace(0, 1, 30) ** 3, np.ones(30)
  whole = intervals.bootstrap(values, ones, seed=0, num_resamples=101)
  monkeypatch.setattr(intervals, "_BLOCK", 70)
  parts = intervals.bootstrap(values, ones, seed=0, num_resamples=101)
  assert parts == pytest.approx(whole)


def test_a_share_of_wins_has_wilsons_interval():
  found = intervals.share([1, 0, 1, 1], list("abcd"), by_group=True, seed=0)
  low, high = intervals.wilson(3, 4)
  expected = {"share": 0.75, "low": low, "high": high, "interval": "wilson"}
  assert found == expected


@pytest.mark.parametrize(
  ("values", "groups"), [([1, 0.5, 0], "abc"), ([1, 0, 0], "aab")]
)
def test_ties_and_repeated_prompts_are_bootstrapped(values, groups):
  found = intervals.share(values, list(groups), by_group=True, seed=0)
  assert found["interval"] == "bootstrap"
  assert found["low"] <= found["share"] <= found["high"]


def test_groups_that_are_all_alike_are_as_many_trials():
  for value in (0.0, 1.0):
    found = intervals.share([value] * 6, list("aabbcc"), by_group=False, seed=0)
    expected = intervals.wilson(3 * int(value), 3)
    assert (found["low"], found["high"]) == expected


def test_groups_count_the_same_or_by_their_values():
  values, groups = [1, 1, 1, 0], list("aaab")
  mean = lambda by_group: intervals.share(
    values, groups, by_group=by_group, seed=0
  )["share"]
  assert mean(True) == 0.5 and mean(False) == 0.75


def test_no_values_have_no_share():
  assert set(intervals.share([], [], by_group=True, seed=0).values()) == {None}


def test_kappa_by_hand():
  # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o 0.7, p_e 0.5.
  ours = ["yes"] * 25 + ["no"] * 25
  theirs = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
  assert intervals.kappa(ours, theirs) == pytest.approx(0.4)
  assert intervals.kappa(theirs, ours) == pytest.approx(0.4)
  assert intervals.kappa(ours, ours) == 1
  assert intervals.kappa(["yes", "no"], ["no", "yes"]) == -1
  assert intervals.kappa(["yes"], ["yes"]) is None
  assert intervals.kappa([], []) is None

"""Intervals and kappa against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from dpo_jax.evaluation import intervals


@pytest.mark.parametrize(
  ("wins", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (61, 100), (1, 3)]
)
def test_wilson_is_scipys(wins, total):
  expected = stats.binomtest(wins, total).proportion_ci(0.95, "wilson")
  found = intervals.wilson(wins / total, total)
  assert found == pytest.approx(tuple(expected))


def test_wilson_by_hand():
  # z^2 = 3.8415; (0.5 + 1.9207 / 4 -+ 1.96 sqrt(1/16 + 3.8415/64)) / 1.9604
  assert intervals.wilson(0.5, 4) == pytest.approx(
    (0.150039, 0.849961), abs=1e-6
  )


def test_swapping_wins_and_losses_mirrors_wilson():
  low, high = intervals.wilson(0.3, 10)
  assert intervals.wilson(0.7, 10) == pytest.approx((1 - high, 1 - low))


def _share(values, groups, by_group=True):
  return intervals.share(values, list(groups), by_group=by_group)


def _coverage(num_prompts, num_samples, rate, *, bad=0.0, ties=0.0):
  """Returns how often the interval holds the true rate, of 1,000.

  Args:
    num_prompts: of one estimate.
    num_samples: comparisons of each.
    rate: the true share of wins at prompts that are not bad.
    bad: share of the prompts that are always lost.
    ties: share of ties.
  """
  rng = np.random.default_rng(0)
  shape = (1_000, num_prompts, num_samples)
  rates = np.where(rng.random(shape[:2]) < bad, 0, rate)[..., None]
  values = (rng.random(shape) < rates).astype(float)
  values[rng.random(shape) < ties] = 0.5
  groups = np.repeat(np.arange(num_prompts), num_samples).tolist()
  truth = rate * (1 - bad) * (1 - ties) + ties / 2
  found = [_share(row.ravel().tolist(), groups) for row in values]
  return np.mean([x["low"] <= truth <= x["high"] for x in found])


@pytest.mark.parametrize(
  ("num_prompts", "num_samples", "rate", "spread"),
  [
    (10, 1, 0.965, {}),
    (10, 1, 0.965, {"ties": 0.1}),
    (10, 16, 0.965, {}),
    # The true rate is 0.965, and 4 of 5 estimates know of no bad prompt.
    (10, 64, 0.985, {"bad": 0.02}),
    (20, 2, 0.02, {}),
    (40, 4, 0.9, {"bad": 0.1, "ties": 0.2}),
  ],
)
def test_intervals_hold_the_true_rate_95_times_of_100(
  num_prompts, num_samples, rate, spread
):
  # The binomial's steps and 1,000 draws leave a share of 95% within 0.02.
  assert _coverage(num_prompts, num_samples, rate, **spread) > 0.93


def test_a_share_of_wins_has_wilsons_interval():
  found = _share([1, 0, 1, 1], "abcd")
  assert found["share"] == 0.75
  assert found["effective_size"] == pytest.approx(4)
  expected = pytest.approx(intervals.wilson(0.75, 4))
  assert (found["low"], found["high"]) == expected


def test_samples_of_a_prompt_count_by_how_much_they_differ():
  size = lambda values: _share(values, np.repeat(np.arange(40), 2).tolist())[
    "effective_size"
  ]
  assert size(np.repeat([1, 0], 40).tolist()) == pytest.approx(40)
  # Every prompt won once of two: only the wins and losses that are added vary.
  z2 = intervals.Z**2
  assert size([1, 0] * 40) == pytest.approx(40 * (40 + z2) / z2)


def test_ties_vary_less_than_wins_and_losses():
  few, many = (
    _share([1, 0] * 10 + [0.5] * num_ties, range(20 + num_ties))
    for num_ties in (0, 40)
  )
  z2 = intervals.Z**2
  expected = 60 * (60 + z2) / (20 + z2)
  assert few["effective_size"] == pytest.approx(20)
  assert many["effective_size"] == pytest.approx(expected)


def test_groups_that_are_all_won_are_as_many_trials():
  for value in (0.0, 1.0):
    found = _share([value] * 6, "aabbcc", by_group=False)
    expected = intervals.wilson(value, 3)
    assert (found["low"], found["high"]) == pytest.approx(expected)


def test_one_group_says_little_of_others():
  found = _share([1, 0, 1, 1], "aaaa")
  assert found["effective_size"] < 1.5 and found["low"] < 0.2


def test_swapping_wins_and_losses_mirrors_a_share():
  values, groups = [1, 1, 0.5, 0, 1, 1, 1], "aabbccd"
  one, other = (
    _share(x, groups, by_group=False) for x in (values, [1 - x for x in values])
  )
  assert other["low"] == pytest.approx(1 - one["high"])
  assert other["high"] == pytest.approx(1 - one["low"])


def test_groups_count_the_same_or_by_their_values():
  mean = lambda by_group: _share([1, 1, 1, 0], "aaab", by_group)["share"]
  assert mean(True) == 0.5 and mean(False) == 0.75


def test_no_values_have_no_share():
  assert set(intervals.share([], [], by_group=True).values()) == {None}


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

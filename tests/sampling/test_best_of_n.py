"""Best of N against every subset, and against its KL by simulation."""

import itertools
import math

import numpy as np
import pytest

from dpo_jax.sampling import best_of_n

SCORES = np.array([[0.3, 0.1, 0.9, 0.5], [2.0, -1.0, 0.0, 1.0]])
VALUES = np.array([[1.0, 2.0, 3.0, 4.0], [0.1, 0.7, 0.2, 0.4]])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_expectation_is_the_mean_over_all_subsets(n):
  subsets = np.array(list(itertools.combinations(range(4), n)))
  for row, value, best, measured in zip(
    SCORES,
    VALUES,
    best_of_n.expected(SCORES, n),
    best_of_n.expected(SCORES, n, VALUES),
    strict=True,
  ):
    kept = subsets[np.arange(len(subsets)), row[subsets].argmax(axis=1)]
    assert best == pytest.approx(row[kept].mean())
    assert measured == pytest.approx(value[kept].mean())


def test_equal_scores_share_their_places():
  scores = np.array([[1.0, 1.0, 0.0]])
  values = np.array([[4.0, 2.0, 9.0]])
  # The best of two is one of the first two, as often the one as the other.
  assert best_of_n.expected(scores, 2, values)[0] == pytest.approx(3.0)
  assert best_of_n.expected(scores, 3, values)[0] == pytest.approx(3.0)


def test_of_equals_the_first_is_kept():
  assert best_of_n.choose(
    np.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
  ).tolist() == [1, 0]


def test_kl_is_that_of_the_distribution_of_the_best():
  # The best of n of uniform scores u has density n u^(n-1).
  u = (np.arange(200_000) + 0.5) / 200_000
  for n in (1, 2, 16, 128):
    density = n * u ** (n - 1)
    integral = np.mean(density * np.log(np.maximum(density, 1e-300)))
    assert best_of_n.kl(n) == pytest.approx(integral, abs=1e-3)


def test_128_of_128_are_exact_in_float64():
  scores = np.linspace(-1, 1, 128)[None]
  assert best_of_n.expected(scores, 128)[0] == 1.0
  assert best_of_n.expected(scores, 1)[0] == pytest.approx(0.0, abs=1e-12)
  assert math.isfinite(best_of_n.expected(scores, 64)[0])


@pytest.mark.parametrize("n", [0, 5])
def test_more_than_there_are_is_refused(n):
  with pytest.raises(ValueError, match=f"best of {n}: there are 4 samples"):
    best_of_n.expected(SCORES, n)


def test_a_score_that_is_not_finite_is_refused():
  with pytest.raises(ValueError, match="not finite"):
    best_of_n.expected(SCORES * np.nan, 2)

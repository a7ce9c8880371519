"""What is not finite is found on any device, and what is large is not."""

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import finite


def _spread(values):
  """Returns the values, two rows on each of eight devices."""
  mesh = sharding.make_mesh()
  layout = sharding.array_shardings(mesh, ("rows", None), values)
  return jax.device_put(values, layout)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 15])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(bad, row):
  values = np.ones((16, 4), np.float32)
  values[row, 3] = bad
  good = np.ones((16, 4), np.float32)
  params = {"good": _spread(good), "bad": _spread(values)}
  assert finite.broken(params) == ["bad"]


def test_numbers_whose_sum_is_not_finite_are():
  values = np.full((16, 4), 3e38, np.float32)
  assert finite.broken({"large": _spread(values)}) == []

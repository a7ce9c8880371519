"""Intervals of shares, and agreement beyond chance. All float64 numpy."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dpo_jax.types import Array, typed

Z = 1.959963984540054  # the normal quantile of 0.975: intervals hold 95%
NUM_RESAMPLES = 10_000
_BLOCK = 1_000_000  # drawn indices in memory at once


@typed
def wilson(wins: int, total: int) -> tuple[float, float]:
  """Returns the 95% score interval of a share (Wilson 1927).

  (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Args:
    wins: 0 to `total`.
    total: independent trials, at least 1.
  """
  share = wins / total
  centre = share + Z**2 / (2 * total)
  spread = share * (1 - share) / total + Z**2 / (4 * total**2)
  half, scale = Z * np.sqrt(spread), 1 + Z**2 / total
  low = max((centre - half) / scale, 0.0)
  high = min((centre + half) / scale, 1.0)
  return float(low), float(high)


@typed
def bootstrap(
  sums: Float[Array, "groups"],
  counts: Float[Array, "groups"],
  *,
  seed: int,
  num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
  """Returns the 95% percentile interval of sum(sums) / sum(counts).

  Groups, which are prompts, are drawn with replacement; what is in one stays
  together. Two groups at least: one says nothing of others, and gives (0, 1).

  Args:
    sums: of each group's values, which lie in 0..1.
    counts: of each group's values, above 0.
    seed: of the draws.
    num_resamples: how many draws of all groups.
  """
  num_groups = len(sums)
  if num_groups < 2:
    return 0.0, 1.0
  rng = np.random.default_rng(seed)
  sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
  drawn, rows = [], max(_BLOCK // num_groups, 1)
  for start in range(0, num_resamples, rows):
    shape = (min(rows, num_resamples - start), num_groups)
    index = rng.integers(num_groups, size=shape)
    drawn.append(sums[index].sum(axis=1) / counts[index].sum(axis=1))
  low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
  return float(low), float(high)


def share(
  values: Sequence[float], groups: Sequence[str], *, by_group: bool, seed: int
) -> dict[str, float | str | None]:
  """Returns a mean of values in 0..1 and its 95% interval.

  The interval is Wilson's where each group has one value, 0 or 1, or where all
  values are 0 or all 1, of which a bootstrap would be too sure; else it is a
  bootstrap over groups.

  Args:
    values: 1 right or won, 0 not, between them a part of it.
    groups: what each is of, such as its prompt.
    by_group: whether the values of a group are averaged first, so that groups
      count the same.
    seed: of the bootstrap.

  Returns:
    `share`, `low`, `high` and `interval`, its kind; None where there are no
    values.
  """
  if not values:
    return dict.fromkeys(("share", "low", "high", "interval"))
  places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
  index = [places[group] for group in groups]
  sums = np.bincount(index, np.asarray(values, np.float64))
  counts = np.bincount(index).astype(np.float64)
  if by_group:
    sums, counts = sums / counts, np.ones_like(counts)
  is_single = len(sums) == len(values) or len(set(values)) == 1
  if is_single and set(values) <= {0, 1}:
    kind, interval = "wilson", wilson(int((sums > 0).sum()), len(sums))
  else:
    kind, interval = "bootstrap", bootstrap(sums, counts, seed=seed)
  mean = float(sums.sum() / counts.sum())
  low, high = interval
  return {"share": mean, "low": low, "high": high, "interval": kind}


def kappa(ours: Sequence[str], theirs: Sequence[str]) -> float | None:
  """Returns Cohen's kappa (1960) of two raters: agreement beyond chance.

  (p_o - p_e) / (1 - p_e), with p_o the share of equal labels and p_e what it
  would be if each drew from its own labels at random. None where that is 1,
  or where there are no labels.
  """
  if not ours:
    return None
  ours, theirs = np.array(ours), np.array(theirs)
  labels = np.union1d(ours, theirs)
  chance = float(sum(np.mean(ours == x) * np.mean(theirs == x) for x in labels))
  if chance == 1:
    return None
  return (float(np.mean(ours == theirs)) - chance) / (1 - chance)

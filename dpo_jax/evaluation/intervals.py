"""Intervals of shares, and agreement beyond chance. All float64 numpy."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dpo_jax.types import Array, typed

Z = 1.959963984540054  # the normal quantile of 0.975: intervals hold 95%


@typed
def wilson(rate: float | int, total: float | int) -> tuple[float, float]:
  """Returns the 95% score interval of a share (Wilson 1927).

  (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Args:
    rate: the share that was seen, in 0..1.
    total: independent trials, above 0; an effective number need not be whole.
  """
  centre = rate + Z**2 / (2 * total)
  spread = rate * (1 - rate) / total + Z**2 / (4 * total**2)
  half, scale = Z * np.sqrt(spread), 1 + Z**2 / total
  low = max((centre - half) / scale, 0.0)
  high = min((centre + half) / scale, 1.0)
  return float(low), float(high)


@typed
def effective_size(
  means: Float[Array, "groups"], weights: Float[Array, "groups"]
) -> float:
  """Returns how many independent wins and losses tell as much as the groups.

  Kish's size of the weights times p (1 - p) / v, with v the variance between
  groups, which is p (1 - p) where each is a win or a loss and less where they
  have ties or several values. p and v are those of the groups and of z^2 / 2
  wins and as many losses more (as in Agresti and Coull 1998): else few groups,
  of which none happens to be lost, would seem to say that none ever is.

  Args:
    means: of each group's values, in 0..1.
    weights: of the groups in the mean of all, above 0.
  """
  size = weights.sum() ** 2 / np.sum(weights**2)
  shares = weights / weights.sum()
  rate = (size * shares @ means + Z**2 / 2) / (size + Z**2)
  spread = size**2 * shares**2 @ (means - rate) ** 2
  spread += Z**2 / 2 * (rate**2 + (1 - rate) ** 2)
  return float(size * rate * (1 - rate) / (spread / (size + Z**2)))


def share(
  values: Sequence[float], groups: Sequence[str], *, by_group: bool
) -> dict[str, float | None]:
  """Returns a mean of values in 0..1 and its 95% interval.

  The interval is Wilson's on the effective size; where each group has one
  value, 0 or 1, that is their number.

  Args:
    values: 1 right or won, 0 not, between them a part of it.
    groups: what each is of, such as its prompt.
    by_group: whether the values of a group are averaged first, so that groups
      count the same.

  Returns:
    `share`, `low`, `high` and `effective_size`; None where there are no
    values.
  """
  if not values:
    return dict.fromkeys(("share", "low", "high", "effective_size"))
  places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
  index = [places[group] for group in groups]
  counts = np.bincount(index).astype(np.float64)
  means = np.bincount(index, np.asarray(values, np.float64)) / counts
  weights = np.ones_like(counts) if by_group else counts
  mean = float(np.average(means, weights=weights))
  size = effective_size(means, weights)
  low, high = wilson(mean, size)
  return {"share": mean, "low": low, "high": high, "effective_size": size}


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

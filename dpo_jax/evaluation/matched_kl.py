"""Methods compared at the same KL, and with the best that is possible there.

A method's dots are joined where none has less KL and more reward; between two
dots the reward is linear in KL. The choice among noisy dots flatters a method
with many of them a little: compare methods of as many dots.
"""

import math
from collections.abc import Sequence

from dpo_jax.evaluation import markdown
from dpo_jax.evaluation.frontier import Frontier, Point


def reward_at(points: Sequence[Point], kl: float) -> tuple[float, float] | None:
  """Returns reward and standard error of a method at a KL.

  None where its dots do not reach: at more KL than its best dot has, or less
  than the first.

  Args:
    points: of one method, the reference itself among them.
    kl: nats.
  """
  joined = upper(points)
  for low, high in zip(joined, joined[1:]):
    if low.kl <= kl <= high.kl:
      share = (kl - low.kl) / (high.kl - low.kl) if high.kl > low.kl else 1.0
      reward = (1 - share) * low.reward + share * high.reward
      error = math.hypot(
        (1 - share) * low.reward_error, share * high.reward_error
      )
      return reward, error
  return None


def upper(points: Sequence[Point]) -> list[Point]:
  """Returns the dots that no other has more reward at no more KL, by KL."""
  kept: list[Point] = []
  for point in sorted(points, key=lambda x: (x.kl, -x.reward)):
    if not kept or point.reward > kept[-1].reward:
      kept.append(point)
  return kept


def compare(
  points: Sequence[Point],
  limit: Frontier,
  kls: Sequence[float],
  *,
  max_reward: float,
  reference_label: str = "SFT",
) -> str:
  """Returns a Markdown table: a line a method, a column a KL.

  A cell has the reward, its standard error and the share of the possible gain
  over the reference's mean reward, as the line of what is possible has it: to
  that line where it is trusted, else to `max_reward`, and then "at least" that
  share.

  Args:
    points: of all methods.
    limit: the best possible frontier.
    kls: nats at which methods are compared.
    max_reward: the largest reward that there is.
    reference_label: of the dot that all methods start from.
  """
  (start,) = (x for x in points if x.label == reference_label)
  methods = dict.fromkeys(x.label for x in points if x.label != reference_label)
  head = ["method", *(f"{kl:g} nats" for kl in kls)]
  rows = []
  for label in methods:
    dots = [start, *(x for x in points if x.label == label)]
    cells = [_cell(dots, limit, kl, max_reward) for kl in kls]
    rows.append([label, *cells])
  bests = [limit.reward_at(kl) for kl in kls]
  shown = [
    f"at most {max_reward:g}" if x is None else f"{x:.3f}" for x in bests
  ]
  rows.append(["best possible, at least", *shown])
  return markdown.table(head, rows, num_left=len(head))


def _cell(dots, limit, kl, max_reward) -> str:
  found = reward_at(dots, kl)
  if found is None:
    return "-"
  reward, error = found
  best = limit.reward_at(kl)
  bound = "at least " if best is None else ""
  most = max_reward if best is None else best
  share = (reward - limit.start) / (most - limit.start)
  return f"{reward:.3f} +- {error:.3f}, {bound}{share:.0%}"

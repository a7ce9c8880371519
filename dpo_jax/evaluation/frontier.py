"""Reward against KL(policy || reference): what was reached, and what can be.

Rafailov et al. 2023 (arXiv 2305.18290), figure 2 left. KL is per response,
summed over its tokens with EOS where it was sampled, in nats. Everything here
is float64 numpy; one sample is one response to one prompt.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import axes, figure

from dpo_jax.host import files
from dpo_jax.types import Array, typed

# Of the gain over the reference: what the line may lose with half the samples.
# It loses about as much again against the truth where its error is as 1 / n.
MAX_LOSS = 0.05
# Okabe and Ito's colours, told apart by colour-blind readers and in print.
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #F0E442".split()
MARKERS = "osD^vP"


@dataclasses.dataclass(frozen=True)
class Point:
  """A policy's mean reward and KL, with standard errors.

  Points of one method, at different strengths or steps, share a label.
  """

  label: str
  kl: float
  kl_error: float
  reward: float
  reward_error: float
  num_samples: int


@dataclasses.dataclass(frozen=True)
class Frontier:
  """The best mean reward for each KL, estimated from reference samples."""

  betas: np.ndarray  # f64[betas]
  reward: np.ndarray  # f64[betas]
  kl: np.ndarray  # f64[betas]
  start: float  # the mean reward of the samples, which is that at KL 0
  samples_per_prompt: int
  max_trusted_kl: float

  @property
  def is_trusted(self) -> Bool[np.ndarray, "betas"]:
    """True where the samples suffice; see `optimal_frontier`."""
    return self.kl <= self.max_trusted_kl

  def reward_at(self, kl: float) -> float | None:
    """Returns the best mean reward at this KL; None where it is not trusted.

    Below 0, where the estimate of a small KL may fall, the KL counts as 0.
    """
    order = np.argsort(self.kl)
    kls, rewards = self.kl[order], self.reward[order]
    if not max(kl, kls[0]) <= min(self.max_trusted_kl, kls[-1]):
      return None
    return float(np.interp(kl, kls, rewards))


@typed
def sequence_kl(
  policy_logps: Float[Array, "*samples"],
  reference_logps: Float[Array, "*samples"],
) -> Float[np.ndarray, "*samples"]:
  """Returns the estimate of KL(policy || reference) from each sample, in nats.

  The log-ratio of a response, where the policy is what it was drawn from: its
  mean has no bias, and single values may be below 0.
  """
  return np.asarray(policy_logps, np.float64) - np.asarray(
    reference_logps, np.float64
  )


@typed
def mean_and_error(values: Float[Array, "prompts *n"]) -> tuple[float, float]:
  """Returns the mean over prompts and its standard error.

  Several samples of a prompt are averaged first: they are not independent.

  Raises:
    ValueError: fewer than two prompts, or a value that is not finite.
  """
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    raise ValueError(
      f"a standard error needs at least 2 prompts, got {len(values)}"
    )
  if not np.isfinite(values).all():
    raise ValueError("a sample's reward or log-probability is not finite")
  means = values.reshape(len(values), -1).mean(axis=1)
  error = means.std(ddof=1) / math.sqrt(len(means))
  return float(means.mean()), float(error)


@typed
def make_point(
  label: str,
  *,
  policy_logps: Float[Array, "prompts *n"],
  reference_logps: Float[Array, "prompts *n"],
  rewards: Float[Array, "prompts *n"],
) -> Point:
  """Returns the point of a policy from its own samples.

  Args:
    label: the method, as the legend and the table call it.
    policy_logps: log-probability of each response under the policy, nats.
    reference_logps: the same under the reference.
    rewards: reward of each response.
  """
  kl, kl_error = mean_and_error(sequence_kl(policy_logps, reference_logps))
  reward, reward_error = mean_and_error(rewards)
  return Point(label, kl, kl_error, reward, reward_error, np.size(rewards))


@typed
def optimal_frontier(
  rewards: Float[Array, "prompts n"], betas: Float[Array, "betas"]
) -> Frontier:
  """Returns reward and KL of the best policy there is, for each beta.

  That policy is reference * exp(r / beta) / Z (Rafailov et al. 2023, eq 4).
  From n reference samples of a prompt, with w_i = exp(r_i / beta),

      reward = sum_i w_i r_i / sum_i w_i
      KL     = reward / beta - log(mean_i w_i)

  and both are averaged over prompts. Beta to infinity gives the mean reward
  at KL 0; beta to 0 the largest reward, at most log n away.

  The line lies too low in the mean, as max over policies of reward - beta KL,
  which is beta log(mean_i w_i), is concave in the mean weight. How far is seen
  from the line of half the samples: it is trusted up to the KL at which that
  one has lost `MAX_LOSS` of the gain over the mean reward. Fewer than about
  1 / (2 MAX_LOSS) samples are trusted nowhere.

  Args:
    rewards: rewards of n samples of the reference at temperature 1.
    betas: strengths above 0, in units of reward per nat, in any order; such
      as `np.geomspace(0.01, 100, 200)` for rewards in (0,1).

  Raises:
    ValueError: a beta not above 0, fewer than two samples, or a reward that
      is not finite.
  """
  rewards = np.asarray(rewards, np.float64)
  betas = np.asarray(betas, np.float64)
  num_samples = rewards.shape[1]
  if num_samples < 2 or not np.isfinite(rewards).all():
    raise ValueError(
      "the optimal frontier needs at least 2 samples a prompt, got"
      f" {num_samples}, and finite rewards"
    )
  if not (betas > 0).all():
    raise ValueError(f"the frontier's betas={betas.tolist()}: must be above 0")
  reward, kl = _line(rewards, betas)
  return Frontier(
    betas=betas,
    reward=reward,
    kl=kl,
    start=float(rewards.mean()),
    samples_per_prompt=num_samples,
    max_trusted_kl=_max_trusted_kl(rewards, betas, reward, kl),
  )


def _line(rewards: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns f64[betas] reward and KL of the line; see `optimal_frontier`."""
  # Rewards less their prompt's largest: no weight overflows, no figure moves.
  top = rewards.max(axis=1, keepdims=True)
  shifted = rewards - top
  reward, kl = [], []
  for beta in betas:
    weights = np.exp(shifted / beta)
    mean = (weights * shifted).sum(axis=1) / weights.sum(axis=1)
    reward.append(np.mean(mean + top[:, 0]))
    kl.append(np.mean(mean / beta - np.log(weights.mean(axis=1))))
  return np.array(reward), np.array(kl)


def _max_trusted_kl(
  rewards: np.ndarray, betas: np.ndarray, reward: np.ndarray, kl: np.ndarray
) -> float:
  """Returns the KL up to which half the samples have nearly the same gain."""
  num_prompts, num_samples = rewards.shape
  half = num_samples // 2
  halves = rewards[:, : 2 * half].reshape(2 * num_prompts, half)
  half_reward, half_kl = _line(halves, betas)
  order, half_order = np.argsort(kl), np.argsort(half_kl)
  kl, gain = kl[order], reward[order] - rewards.mean()
  # Past its end, where all weight is on the best sample, a line is flat.
  half_gain = np.interp(kl, half_kl[half_order], half_reward[half_order])
  half_gain -= halves.mean()
  # The slack is for rounding where there is no gain.
  is_lost = gain - half_gain > MAX_LOSS * gain + 1e-12
  first = int(np.argmax(is_lost)) if is_lost.any() else len(kl)
  return float(kl[first - 1]) if first else 0.0


def write(
  folder: str | pathlib.Path,
  points: Sequence[Point],
  frontier: Frontier | None = None,
  *,
  reference_label: str = "SFT",
  reward_name: str = "mean reward",
) -> str:
  """Writes `frontier.png` and `frontier.json`; returns the table as text.

  Args:
    folder: where to; it is made if it is not there.
    points: what was measured, in the table's order.
    frontier: the line of what is possible, if it was estimated.
    reference_label: the label of the points that are marked with a star.
    reward_name: what the reward is called on the figure's axis.
  """
  folder = pathlib.Path(folder)
  fig = figure.Figure(figsize=(5.5, 3.8), layout="constrained")
  draw(
    fig.subplots(),
    points,
    frontier,
    reference_label=reference_label,
    reward_name=reward_name,
  )
  with files.replacing(folder / "frontier.png") as part:
    fig.savefig(part, dpi=200, format="png")
  record = {
    "units": {"kl": "nats per response", "errors": "standard error"},
    "points": [dataclasses.asdict(point) for point in points],
    "frontier": frontier and _frontier_record(frontier),
  }
  files.write_json(folder / "frontier.json", record, allow_nan=False)
  return table(points, frontier)


def table(points: Sequence[Point], frontier: Frontier | None = None) -> str:
  """Returns lines of KL, reward and what the best has at least at that KL.

  A dash stands for the best reward where its estimate is not trusted.
  """
  width = max([len(point.label) for point in points] + [len("policy")])
  lines = [
    f"{'policy':<{width}}  {'samples':>7}  {'KL (nats)':>16}"
    f"  {'reward':>17}  {'best, at least':>14}"
  ]
  for point in points:
    best = frontier and frontier.reward_at(point.kl)
    lines.append(
      f"{point.label:<{width}}  {point.num_samples:>7}"
      f"  {point.kl:>7.3f} +- {point.kl_error:<5.3f}"
      f"  {point.reward:>7.4f} +- {point.reward_error:<6.4f}"
      f"  {'-' if best is None else f'{best:.4f}':>14}"
    )
  return "\n".join(lines)


def draw(
  ax: axes.Axes,
  points: Sequence[Point],
  frontier: Frontier | None,
  *,
  reference_label: str,
  reward_name: str,
) -> None:
  """Draws the points with error bars, and the frontier as a line."""
  if frontier is not None:
    _draw_frontier(ax, frontier)
  labels = list(dict.fromkeys(point.label for point in points))
  methods = [label for label in labels if label != reference_label]
  for label in labels:
    of_label = [point for point in points if point.label == label]
    style = {"color": "black", "marker": "*", "markersize": 11}
    if label != reference_label:
      place = methods.index(label)
      style = {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 5,
      }
    ax.errorbar(
      [point.kl for point in of_label],
      [point.reward for point in of_label],
      xerr=[point.kl_error for point in of_label],
      yerr=[point.reward_error for point in of_label],
      label=label,
      linestyle="none",
      elinewidth=1,
      capsize=2,
      **style,
    )
  ax.set_xlabel("KL(policy || reference), nats per response")
  ax.set_ylabel(reward_name)
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(color="0.92", linewidth=0.8)
  ax.set_axisbelow(True)
  ax.legend(frameon=False, fontsize="small", loc="best")


def _draw_frontier(ax: axes.Axes, frontier: Frontier) -> None:
  """Draws the line, dashed where its estimate is not trusted."""
  order = np.argsort(frontier.kl)
  kl, reward = frontier.kl[order], frontier.reward[order]
  num_trusted = int(frontier.is_trusted.sum())
  line = {"color": "0.35", "linewidth": 1.4, "zorder": 1}
  trusted = slice(None, num_trusted)
  ax.plot(kl[trusted], reward[trusted], label="best possible, at least", **line)
  if num_trusted == len(kl):
    return
  # The last trusted beta is drawn twice, so that the two lines meet.
  rest = slice(max(num_trusted - 1, 0), None)
  ax.plot(
    kl[rest],
    reward[rest],
    linestyle=(0, (4, 3)),
    label=f"past what {frontier.samples_per_prompt} samples can tell",
    **line,
  )


def _frontier_record(frontier: Frontier) -> dict:
  """Returns the frontier as plain lists."""
  return {
    "betas": frontier.betas.tolist(),
    "kl": frontier.kl.tolist(),
    "reward": frontier.reward.tolist(),
    "is_trusted": frontier.is_trusted.tolist(),
    "samples_per_prompt": frontier.samples_per_prompt,
    "max_trusted_kl": frontier.max_trusted_kl,
  }

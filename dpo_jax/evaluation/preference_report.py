"""Held-out pairs one by one, and what they say together.

With logratio = policy minus reference log-probability of a response, summed
over its tokens, EOS included, in nats, and margin = chosen minus rejected
log-ratio, a policy says that chosen is better with probability
sigmoid(beta * margin) (Rafailov et al. 2023, arXiv 2305.18290, eq 6). All
here is float64 numpy.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import axes, figure

from dpo_jax.evaluation import intervals
from dpo_jax.host import files
from dpo_jax.types import Array, typed

ALL = "all"
CHOSEN_COLOR, REJECTED_COLOR, OTHER_COLOR = "#0072B2", "#D55E00", "0.35"
NUM_CONFIDENCE_BINS = 10  # of width 0.05 from 1/2 to 1
NUM_HISTOGRAM_BINS = 40


@dataclasses.dataclass(frozen=True)
class Pair:
  """One held-out pair.

  Attributes:
    data: the file that it is from.
    row: its row in it, counted from 1; dropped rows count.
    subset: what its row calls its subset; empty where it does not.
    policy: log-probabilities of chosen and rejected, nats.
    reference: the same under the reference.
    lengths: tokens of chosen and rejected.
    prompt: what tells its prompt from others.
  """

  data: str
  row: int
  subset: str
  policy: tuple[float, float]
  reference: tuple[float, float]
  lengths: tuple[int, int]
  prompt: str

  @property
  def logratios(self) -> tuple[float, float]:
    """Policy minus reference log-probability of chosen and rejected."""
    chosen, rejected = zip(self.policy, self.reference, strict=True)
    return chosen[0] - chosen[1], rejected[0] - rejected[1]

  @property
  def margin(self) -> float:
    """Chosen minus rejected log-ratio."""
    return self.logratios[0] - self.logratios[1]


@typed
def calibration(
  margins: Float[Array, "pairs"], beta: float
) -> dict[str, float | list]:
  """Returns how far sigmoid(beta * margin) is to be believed.

  Which response is called chosen is no news, so a pair counts by its
  confidence, max(p, 1 - p), and by whether the response it goes to is chosen;
  a margin of 0 is not right, as in training.

  Args:
    margins: chosen minus rejected log-ratios, nats.
    beta: above 0.

  Returns:
    `nll`, the mean of -log p, which is the DPO loss; `brier`, the mean of
    (1 - p)^2; `ece`, the mean over pairs of |confidence - accuracy| of a
    pair's bin; and `bins`, each with its `low` end, `count`, mean
    `confidence` and `accuracy` (empty bins are left out).
  """
  scores = beta * np.asarray(margins, np.float64)
  nll = np.logaddexp(0, -scores)
  p = np.exp(-nll)
  confidence = np.exp(-np.logaddexp(0, -np.abs(scores)))
  right = scores > 0
  place = ((confidence - 0.5) * 2 * NUM_CONFIDENCE_BINS).astype(int)
  place = np.minimum(place, NUM_CONFIDENCE_BINS - 1)  # 1 is in the last one
  bins = []
  for number in np.unique(place).tolist():
    here = place == number
    bins.append(
      {
        "low": 0.5 + number / (2 * NUM_CONFIDENCE_BINS),
        "count": int(here.sum()),
        "confidence": float(confidence[here].mean()),
        "accuracy": float(right[here].mean()),
      }
    )
  gaps = [x["count"] * abs(x["confidence"] - x["accuracy"]) for x in bins]
  return {
    "nll": float(nll.mean()),
    "brier": float(np.mean((1 - p) ** 2)),
    "ece": sum(gaps) / len(scores),
    "bins": bins,
  }


def summarise(name: str, pairs: Sequence[Pair], beta: float) -> dict[str, Any]:
  """Returns the figures of a group of at least one pair.

  The accuracy's ends are of its 95% interval over prompts.

  Args:
    name: what the group is called.
    pairs: its pairs.
    beta: scales log-ratios to rewards.
  """
  logratios = np.array([pair.logratios for pair in pairs], np.float64)
  margins = logratios[:, 0] - logratios[:, 1]
  accuracy = intervals.share(
    np.float64(margins > 0).tolist(), [x.prompt for x in pairs], by_group=False
  )
  reference = np.array([pair.reference for pair in pairs], np.float64)
  edges = np.histogram_bin_edges(logratios, NUM_HISTOGRAM_BINS)
  return {
    "subset": name,
    "num_pairs": len(pairs),
    "beta": beta,
    "accuracy": accuracy["share"],
    "accuracy_low": accuracy["low"],
    "accuracy_high": accuracy["high"],
    "reference_accuracy": float(np.mean(reference[:, 0] > reference[:, 1])),
    "margin_mean": float(margins.mean()),
    "margin_std": float(margins.std()),
    "logratio_chosen_mean": float(logratios[:, 0].mean()),
    "logratio_rejected_mean": float(logratios[:, 1].mean()),
    "reward_margin_mean": float(beta * margins.mean()),
    "calibration": calibration(margins, beta),
    "logratio_histogram": {
      "edges": edges.tolist(),
      "chosen": np.histogram(logratios[:, 0], edges)[0].tolist(),
      "rejected": np.histogram(logratios[:, 1], edges)[0].tolist(),
    },
  }


def summaries(pairs: Sequence[Pair], beta: float) -> list[dict[str, Any]]:
  """Returns the figures of all pairs, then of each subset by name."""
  names = sorted({pair.subset for pair in pairs} - {""})
  groups = {ALL: pairs} | {
    name: [pair for pair in pairs if pair.subset == name] for name in names
  }
  return [summarise(name, group, beta) for name, group in groups.items()]


def write(
  folder: str | pathlib.Path, pairs: Sequence[Pair], beta: float
) -> str:
  """Writes a line per pair, a line per subset and a figure; returns a table.

  Args:
    folder: gets `pairs.jsonl`, `summary.jsonl`, whose first line is of all
      pairs, and `preferences.png`.
    pairs: at least one.
    beta: scales log-ratios to rewards.
  """
  folder = pathlib.Path(folder)
  found = summaries(pairs, beta)
  lines = (_record(x, beta) for x in pairs)
  files.write_lines(folder / "pairs.jsonl", lines, allow_nan=False)
  files.write_lines(folder / "summary.jsonl", found, allow_nan=False)
  fig = figure.Figure(figsize=(10, 3.4), layout="constrained")
  left, middle, right = fig.subplots(1, 3)
  _draw_logratios(left, found[0])
  _draw_calibration(middle, found[0])
  _draw_accuracies(right, found)
  with files.replacing(folder / "preferences.png") as part:
    fig.savefig(part, dpi=200, format="png")
  return table(found)


def table(found: Sequence[dict[str, Any]]) -> str:
  """Returns the figures of each group as lines of text."""
  width = max(len(x["subset"]) for x in [*found, {"subset": "subset"}])
  lines = [
    f"{'subset':<{width}}  {'pairs':>6}  {'accuracy, 95%':>23}"
    f"  {'reference':>9}"
    f"  {'margin (nats)':>13}  {'NLL':>6}  {'ECE':>6}"
  ]
  for x in found:
    lines.append(
      f"{x['subset']:<{width}}  {x['num_pairs']:>6}"
      f"  {x['accuracy']:>6.4f} ({x['accuracy_low']:.3f} to"
      f" {x['accuracy_high']:.3f})"
      f"  {x['reference_accuracy']:>9.4f}  {x['margin_mean']:>13.3f}"
      f"  {x['calibration']['nll']:>6.4f}  {x['calibration']['ece']:>6.4f}"
    )
  return "\n".join(lines)


def _record(pair: Pair, beta: float) -> dict[str, Any]:
  """Returns the line of one pair."""
  chosen, rejected = pair.logratios
  return {
    "data": pair.data,
    "row": pair.row,
    "subset": pair.subset,
    "logps/chosen": pair.policy[0],
    "logps/rejected": pair.policy[1],
    "reference_logps/chosen": pair.reference[0],
    "reference_logps/rejected": pair.reference[1],
    "logratio/chosen": chosen,
    "logratio/rejected": rejected,
    "margin": pair.margin,
    "reward_margin": beta * pair.margin,
    "probability": float(np.exp(-np.logaddexp(0, -beta * pair.margin))),
    "is_right": pair.margin > 0,
    "length/chosen": pair.lengths[0],
    "length/rejected": pair.lengths[1],
  }


def _draw_logratios(ax: axes.Axes, summary: dict[str, Any]) -> None:
  histogram = summary["logratio_histogram"]
  for name, color in (("chosen", CHOSEN_COLOR), ("rejected", REJECTED_COLOR)):
    ax.stairs(histogram[name], histogram["edges"], color=color, label=name)
  ax.set_xlabel("log-ratio, nats per response")
  ax.set_ylabel("pairs")
  _finish(ax)


def _draw_calibration(ax: axes.Axes, summary: dict[str, Any]) -> None:
  bins = summary["calibration"]["bins"]
  ax.plot([0.5, 1], [0.5, 1], color=OTHER_COLOR, linestyle="--", label="exact")
  ax.scatter(
    [x["confidence"] for x in bins],
    [x["accuracy"] for x in bins],
    s=[12 + 150 * x["count"] / summary["num_pairs"] for x in bins],
    color=CHOSEN_COLOR,
    label="bins, by size",
  )
  ax.set_xlabel("confidence: sigmoid(beta |margin|)")
  ax.set_ylabel("accuracy")
  _finish(ax)


def _draw_accuracies(ax: axes.Axes, found: Sequence[dict[str, Any]]) -> None:
  low, mean, high = (
    np.array([x[f"accuracy{end}"] for x in found])
    for end in ("_low", "", "_high")
  )
  ax.errorbar(
    mean,
    range(len(found)),
    # Rounding may leave an accuracy of 0 or 1 outside of its interval.
    xerr=np.maximum([mean - low, high - mean], 0),
    fmt="o",
    color=CHOSEN_COLOR,
    capsize=2,
    label="policy against reference",
  )
  ax.plot(
    [x["reference_accuracy"] for x in found],
    range(len(found)),
    "s",
    color=OTHER_COLOR,
    markersize=4,
    label="reference alone",
  )
  ax.set_yticks(range(len(found)), [x["subset"] for x in found])
  ax.invert_yaxis()
  ax.set_xlabel("accuracy")
  _finish(ax)


def _finish(ax: axes.Axes) -> None:
  ax.spines[["top", "right"]].set_visible(False)
  ax.grid(color="0.92", linewidth=0.8)
  ax.set_axisbelow(True)
  ax.legend(frameon=False, fontsize="small", loc="best")

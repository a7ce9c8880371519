"""Reward functions by name."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dpo_jax.data.sources import synthetic


class RewardFn(Protocol):
  """Returns f32[n], how good each response is; higher is better.

  `ended` says of each whether it ended or was cut; by default all ended.
  """

  def __call__(
    self,
    prompts: Sequence[str],
    responses: Sequence[str],
    ended: Sequence[bool] | None = None,
  ) -> np.ndarray: ...


def load(name: str) -> RewardFn:
  """Returns a reward function.

  Args:
    name: `synthetic`, the true reward of synthetic reviews; or `run:FOLDER`,
      the score of a trained reward model, or a classifier's probability of
      label 1. The folder is what `learned.load` takes.

  Raises:
    ValueError: a name of another form, or no such model.
  """
  kind, _, path = name.partition(":")
  if name == "synthetic":
    return _true_rewards
  if kind == "run" and path:
    # Reads a model: only where one is asked for.
    from dpo_jax.rewards import learned

    return learned.load(path, output="auto")
  raise ValueError(
    f"unknown reward '{name}'; known: run:FOLDER of a reward model or"
    " classifier, synthetic"
  )


def _true_rewards(
  prompts: Sequence[str],
  responses: Sequence[str],
  ended: Sequence[bool] | None = None,  # reviews count by their words alone
) -> np.ndarray:
  pairs = zip(prompts, responses, strict=True)
  rewards = [synthetic.true_reward(prompt + text) for prompt, text in pairs]
  return np.array(rewards, np.float32)

"""What the experiments share: labelled pairs, and points of reward and KL."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_jax.data import tokenize
from dpo_jax.evaluation import frontier
from dpo_jax.host import files
from dpo_jax.inference.model import Policy
from dpo_jax.rewards.registry import RewardFn
from dpo_jax.sampling import decode

BATCH_ROWS = 512  # responses that grow at once


class Prompts:
  """Held-out prompts, their tokens, and what they are sampled with.

  Attributes:
    texts: the prompts.
    tokens: their token ids.
  """

  def __init__(
    self,
    reference: Policy,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    reward_fn: RewardFn,
  ):
    """Tokenises; `reference` is what KL is measured to."""
    self.texts = list(texts)
    self.tokens = tokenize.encode_prompts(reference.tokenizer, self.texts)
    self._reference = reference
    self._settings = decode.Settings(max_new_tokens)
    self._reward_fn = reward_fn

  def sample(
    self, policy: Policy, num_samples: int, *, seed: int
  ) -> list[list[decode.Sample]]:
    """Returns samples of each prompt at temperature 1."""
    return policy.sample(
      self.tokens,
      self._settings,
      seed=seed,
      samples_per_prompt=num_samples,
      batch_rows=BATCH_ROWS,
    )

  def scores(
    self,
    policy: Policy,
    samples: Sequence[Sequence[decode.Sample]],
    reward_fn: RewardFn | None = None,
  ) -> np.ndarray:
    """Returns f64[prompts, n], the reward of each sample.

    Args:
      policy: whose tokens they are.
      samples: n of each prompt.
      reward_fn: another reward than the true one.
    """
    texts = [
      text
      for prompt, of_prompt in zip(self.tokens, samples, strict=True)
      for text in policy.responses(prompt, of_prompt)
    ]
    repeated = [x for x, row in zip(self.texts, samples) for _ in row]
    ended = [sample.ended for row in samples for sample in row]
    found = (reward_fn or self._reward_fn)(repeated, texts, ended=ended)
    return np.asarray(found, np.float64).reshape(len(self.texts), -1)

  def point(
    self, label: str, policy: Policy, num_samples: int, *, seed: int
  ) -> frontier.Point:
    """Returns a policy's mean true reward and its KL to the reference."""
    samples = self.sample(policy, num_samples, seed=seed)
    shape = (len(self.texts), num_samples)
    reference_logps = self._reference.logps(
      [prompt for prompt in self.tokens for _ in range(num_samples)],
      [sample.tokens for row in samples for sample in row],
    )
    policy_logps = [[x.logps.sum() for x in row] for row in samples]
    return frontier.make_point(
      label,
      policy_logps=np.array(policy_logps, np.float64),
      reference_logps=np.asarray(reference_logps, np.float64).reshape(shape),
      rewards=self.scores(policy, samples),
    )


def write_pairs(
  path: pathlib.Path,
  prompts: Iterable[str],
  responses: Iterable[Sequence[str]],
  rewards: Iterable[Sequence[float]],
  ended: Iterable[Sequence[bool]],
) -> int:
  """Writes all pairs of each prompt's responses; returns how many were ties.

  Six of four, as in Rafailov et al. 2023, sec 6.1. The higher reward is
  chosen; of equals there is no pair. `ended` says which responses ended.
  """
  rows, num_ties = [], 0
  groups = zip(prompts, responses, rewards, ended, strict=True)
  for prompt, texts, scores, ends in groups:
    scored = zip(texts, map(float, scores), ends, strict=True)
    for pair in itertools.combinations(scored, 2):
      low, high = sorted(pair, key=lambda x: x[1])
      num_ties += low[1] == high[1]
      if low[1] < high[1]:
        names = ("{}", "{}_score", "{}_ended")
        row = {"prompt": prompt}
        for side, values in (("chosen", high), ("rejected", low)):
          keys = (name.format(side) for name in names)
          row |= dict(zip(keys, values, strict=True))
        rows.append(row)
  files.write_lines(path, rows)
  return num_ties

"""Best of N: sample N responses of a prompt, keep the one that scores highest.

The baseline of Rafailov et al. 2023 (arXiv 2305.18290, section 6.1). From M
samples of a prompt every N up to M is known without sampling again. Float64
numpy.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from dpo_jax.types import Array, typed


@typed
def choose(scores: Float[Array, "prompts n"]) -> Int[np.ndarray, "prompts"]:
  """Returns which sample of each prompt is kept: of equals the first."""
  return np.argmax(np.asarray(scores), axis=1)


@typed
def expected(
  scores: Float[Array, "prompts m"],
  n: int,
  values: Float[Array, "prompts m"] | None = None,
) -> Float[np.ndarray, "prompts"]:
  """Returns the mean value of the best of n samples, for each prompt.

  The mean over all subsets of n of the m samples, without bias: the sample of
  rank i from below is the best in C(i - 1, n - 1) of C(m, n) subsets. Samples
  of one score are in each other's place equally often.

  Args:
    scores: what the best is chosen by.
    n: at least 1, at most m.
    values: what is measured of it, such as a true reward where a learned one
      chooses; the scores by default.

  Raises:
    ValueError: n out of range, or a score that is not finite.
  """
  scores = np.asarray(scores, np.float64)
  values = scores if values is None else np.asarray(values, np.float64)
  m = scores.shape[1]
  if not 1 <= n <= m:
    raise ValueError(f"best of {n}: there are {m} samples of a prompt")
  if not (np.isfinite(scores).all() and np.isfinite(values).all()):
    raise ValueError("a score of a sample is not finite")
  # Of each rank from below.
  shares = [math.comb(i, n - 1) / math.comb(m, n) for i in range(m)]
  return np.array(
    [_mean_of_ties(row) @ shares for row in _by_score(scores, values)]
  )


def kl(n: int) -> float:
  """Returns KL(best of n || reference) in nats, log n - (n - 1) / n.

  Exact where no two samples score the same, else a bound from above (Beirami
  et al. 2024, arXiv 2401.01879).
  """
  return math.log(n) - (n - 1) / n


def _by_score(scores, values):
  """Yields [m,2], score and value of a prompt's samples, the lowest first."""
  for row, measured in zip(scores, values, strict=True):
    order = np.argsort(row, kind="stable")
    yield np.stack([row[order], measured[order]], axis=1)


def _mean_of_ties(pairs: np.ndarray) -> np.ndarray:
  """Returns values, each the mean over the samples of its score."""
  _, place, counts = np.unique(
    pairs[:, 0], return_inverse=True, return_counts=True
  )
  return (np.bincount(place, pairs[:, 1]) / counts)[place]

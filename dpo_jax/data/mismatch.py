"""Mismatched responses: of each prompt, a response to another one.

KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq 8) estimates its reference
point from them. The partner of a pair stands half the dataset away, as pairs of
one prompt often stand side by side; where that has the same prompt, as in a
file of all desirable and then all undesirable responses, it is the next behind
it with another. Of pairs, chosen and rejected responses are taken in turns.
"""

import hashlib
from typing import Any

import numpy as np

READ_PAIRS = 4096  # whose prompts are in memory at once


def find(
  dataset: Any, max_prompt_length: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each pair's partner, which response of it, and how much of that.

  Args:
    dataset: a `loader.Dataset`, of pairs or labelled responses.
    max_prompt_length: tokens to which prompts may have been cut; 0: none were.

  Returns:
    i64[n], the partner; i64[n], 0 for its chosen response and 1 for its
    rejected one; and i64[n], the tokens of it that are taken, with which no
    sequence is longer than the dataset's longest.

  Raises:
    ValueError: there is one prompt only.
  """
  prompts = _number_prompts(dataset, max_prompt_length)
  count = len(prompts)
  if (prompts == prompts[0]).all():
    raise ValueError(
      f"all {count} rows have the same prompt; mismatched responses, which"
      " this loss needs, are taken from rows with another"
    )
  partner = np.roll(np.arange(count), -(count // 2))
  # Where each run of equal prompts ends; the last may go on at the start.
  ends = np.flatnonzero(prompts != np.roll(prompts, -1)) + 1
  following = ends[np.searchsorted(ends, np.arange(count), "right") % len(ends)]
  partner = np.where(
    prompts[partner] == prompts, following[partner] % count, partner
  )
  prompt, chosen, rejected = dataset.lengths.T
  is_rejected = np.where(
    (chosen > 0) & (rejected > 0), np.arange(count) % 2, rejected > 0
  )
  longest = (prompt + np.maximum(chosen, rejected)).max()
  theirs = np.where(is_rejected, rejected, chosen)[partner]
  column = is_rejected[partner].astype(np.int64)
  return partner, column, np.minimum(theirs, longest - prompt)


def _number_prompts(dataset: Any, max_prompt_length: int) -> np.ndarray:
  """Returns i64[n], a number for each pair, equal where prompts are the same.

  A prompt can stand whole in one row and cut to its last `max_prompt_length`
  tokens in another, whose response is longer: what ends like one that may have
  been cut is the same prompt.
  """
  hashes, ends, is_cut = [], [], dataset.lengths[:, 0] == max_prompt_length
  for first in range(0, len(dataset.lengths), READ_PAIRS):
    last = min(first + READ_PAIRS, len(dataset.lengths))
    prompts = dataset.take(np.arange(first, last)).prompt
    for tokens in np.split(prompts.values, prompts.offsets[1:-1]):
      hashes.append(_hash(tokens))
      is_long = 0 < max_prompt_length < len(tokens)
      end = _hash(tokens[-max_prompt_length:]) if is_long else hashes[-1]
      ends.append(end)
  cut = {end for end, is_so in zip(ends, is_cut, strict=True) if is_so}
  keys = [
    end if end in cut else whole
    for whole, end in zip(hashes, ends, strict=True)
  ]
  numbers: dict[bytes, int] = {}
  return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def _hash(tokens: np.ndarray) -> bytes:
  return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()

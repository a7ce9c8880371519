"""Judges: which of two responses to a prompt is the better one.

A judge is shown a first and a second response and prefers one of them, or
neither. What it can be is a line of `KINDS` in `judge_kinds`; this module has
what they are made of: scores, log-probabilities of an answer, or a chat.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np

from dpo_jax.judges import prompts as judge_prompts

FIRST, SECOND, TIE = "first", "second", "tie"
SWAPPED = {FIRST: SECOND, SECOND: FIRST, TIE: TIE, None: None}
ORDERS = ("both", "random")

Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two responses to a prompt, in the order in which they are shown.

  Attributes:
    prompt, first, second: texts.
    first_ended, second_ended: whether the response ended or was cut, which a
      reward model sees.
  """

  prompt: str
  first: str
  second: str
  first_ended: bool = True
  second_ended: bool = True

  @property
  def texts(self) -> tuple[str, str, str]:
    """All that can be read of it."""
    return self.prompt, self.first, self.second

  def swapped(self) -> "Comparison":
    """Returns the same with the second response first."""
    responses = self.second, self.first
    return Comparison(
      self.prompt, *responses, self.second_ended, self.first_ended
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a judge said.

  Attributes:
    preferred: `first`, `second` or `tie`; None where it cannot be told.
    text: the judge's own words, or its two numbers.
  """

  preferred: str | None
  text: str

  @property
  def is_parsed(self) -> bool:
    """Whether it could be told what the judge prefers."""
    return self.preferred is not None


@dataclasses.dataclass(frozen=True)
class Judge:
  """What compares responses.

  Attributes:
    name: what reports call it.
    compare: returns a verdict for each comparison, in order.
    usage: returns what was spent so far, by name.
    assumes_dialogue: whether its question is that of dialogue for want of a
      name of another.
  """

  name: str
  compare: Callable[[Sequence[Comparison]], list[Verdict]]
  usage: Callable[[], dict[str, float]] = dict
  assumes_dialogue: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
  """What one or two verdicts on a comparison say together.

  Attributes:
    preferred: `first` or `second` of the comparison as it was given, `tie`, or
      None where a verdict could not be parsed.
    verdicts: each with whether the responses were shown swapped; none where
      the responses are equal.
  """

  preferred: str | None
  verdicts: tuple[tuple[bool, Verdict], ...]

  @property
  def is_consistent(self) -> bool:
    """Whether all verdicts prefer the same response."""
    return len({_unswapped(*x) for x in self.verdicts}) == 1

  def record(self) -> dict:
    """Returns plain data, the verdicts with the order that was shown."""
    return {
      "preferred": self.preferred,
      "verdicts": [
        {"is_swapped": is_swapped, **dataclasses.asdict(verdict)}
        for is_swapped, verdict in self.verdicts
      ],
    }


def decide(
  judge: Judge, comparisons: Sequence[Comparison], *, order: str, seed: int
) -> list[Decision]:
  """Returns a decision for each comparison; the judge is called once.

  Equal responses are a tie, of which it is not asked.

  Args:
    judge: what is asked.
    comparisons: at least one.
    order: `both`: as given and swapped, where verdicts that differ are a tie;
      or `random`: one of the two, by a hash of the seed and the texts, so that
      comparisons that come or go change no other's.
    seed: of random orders.

  Raises:
    ValueError: an unknown order.
  """
  if order not in ORDERS:
    raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
  orders = [_swaps(x, order, seed) for x in comparisons]
  shown = [
    x.swapped() if is_swapped else x
    for x, swaps in zip(comparisons, orders, strict=True)
    for is_swapped in swaps
  ]
  verdicts = iter(judge.compare(shown) if shown else ())
  return [_decide([(s, next(verdicts)) for s in swaps]) for swaps in orders]


def position_statistics(decisions: Sequence[Decision]) -> dict:
  """Returns how far positions matter.

  Returns:
    `first_share`, the share of verdicts for the response shown first among
    those for either; `consistency`, the share of comparisons whose two
    verdicts prefer the same response, among those with two that could be
    parsed. None where there are none.
  """
  verdicts = [v.preferred for x in decisions for _, v in x.verdicts]
  either = sum(verdict in (FIRST, SECOND) for verdict in verdicts)
  twice = [
    x.is_consistent
    for x in decisions
    if len(x.verdicts) == 2 and x.preferred is not None
  ]
  return {
    "first_share": verdicts.count(FIRST) / either if either else None,
    "consistency": sum(twice) / len(twice) if twice else None,
  }


def score_judge(name: str, score_fn: Callable[..., np.ndarray]) -> Judge:
  """Returns the judge that prefers the higher score; equal ones are a tie.

  Args:
    name: what reports call it.
    score_fn: (prompts, responses, ended) -> f[n], such as a reward model;
      `ended` says which responses ended. It is given none twice.
  """

  def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
    pairs = [
      (
        (x.prompt, x.first, x.first_ended),
        (x.prompt, x.second, x.second_ended),
      )
      for x in comparisons
    ]
    asked = list(dict.fromkeys(itertools.chain(*pairs)))
    prompts, responses, ended = map(list, zip(*asked, strict=True))
    scores = score_fn(prompts, responses, ended=ended)
    scores = np.asarray(scores, np.float64)
    if scores.shape != (len(asked),) or not np.isfinite(scores).all():
      raise ValueError(
        f"judge {name!r}: {len(asked)} responses have scores of shape"
        f" {scores.shape}, {int((~np.isfinite(scores)).sum())} of them not"
        " finite; allowed: one finite number each"
      )
    of = dict(zip(asked, scores.tolist(), strict=True))
    return [_higher(of[first], of[second]) for first, second in pairs]

  return Judge(name, compare)


def length_judge() -> Judge:
  """Returns the judge that prefers more characters: what others must beat."""

  def count(prompts, responses, ended):
    return np.array([len(x) for x in responses], np.float64)

  return score_judge("length", count)


def likelihood_judge(
  name: str,
  logps_fn: Callable[[list[str], list[str]], np.ndarray],
  template: judge_prompts.Template,
) -> Judge:
  """Returns the judge that prefers the letter that is likelier as the answer.

  Differs: the paper's judge writes a comparison before its choice, this one
  only chooses.

  Args:
    name: what reports call it.
    logps_fn: (prompts, answers) -> f[n], log-probability of each answer after
      its prompt, nats; NaN where they are too long, which counts as unparsed.
    template: the question.
  """

  def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
    questions = [template.fill(*x.texts) for x in comparisons]
    letters = judge_prompts.LETTERS
    logps = logps_fn(
      [question for question in questions for _ in letters],
      [template.answer(letter) for _ in questions for letter in letters],
    )
    pairs = np.asarray(logps, np.float64).reshape(-1, 2).tolist()
    return [
      Verdict(None, "too long") if np.isnan(pair).any() else _higher(*pair)
      for pair in pairs
    ]

  return Judge(name, compare)


def chat_judge(
  name: str,
  answer_fn: Callable[[list[Messages]], list[str]],
  template: judge_prompts.Template,
  *,
  max_asks: int = 3,
  usage: Callable[[], dict[str, float]] = dict,
) -> Judge:
  """Returns the judge that is asked in words and answers in words.

  A malformed answer goes back with a reminder of the format, and is unparsed
  when the last one is malformed as well.

  Args:
    name: what reports call it.
    answer_fn: conversations -> the next message of each.
    template: the question.
    max_asks: how often one comparison is asked at most, at least 1.
    usage: what was spent so far.

  Raises:
    ValueError: `max_asks` below 1.
  """
  if max_asks < 1:
    raise ValueError(f"judge {name!r}: max_asks={max_asks}: must be at least 1")

  def compare(comparisons: Sequence[Comparison]) -> list[Verdict]:
    questions = [template.fill(*x.texts) for x in comparisons]
    chats = [[{"role": "user", "content": x}] for x in questions]
    verdicts = {}
    open_chats = dict(enumerate(chats))
    for _ in range(max_asks):
      answers = answer_fn(list(open_chats.values()))
      for index, answer in zip(list(open_chats), answers, strict=True):
        letter = template.parse(answer)
        verdicts[index] = Verdict(_OF_LETTER[letter], answer)
        if letter:
          del open_chats[index]
        else:
          open_chats[index] = open_chats[index] + [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": template.reminder},
          ]
      if not open_chats:
        break
    return [verdicts[index] for index in range(len(chats))]

  return Judge(name, compare, usage)


_OF_LETTER = dict(zip(judge_prompts.LETTERS, (FIRST, SECOND), strict=True))
_OF_LETTER[None] = None


def _higher(first: float, second: float) -> Verdict:
  """Returns the verdict of two numbers."""
  preferred = TIE if first == second else FIRST if first > second else SECOND
  return Verdict(preferred, f"first {first:.9g}, second {second:.9g}")


def _swaps(comparison: Comparison, order: str, seed: int) -> tuple[bool, ...]:
  """Returns whether it is shown swapped, each time that it is shown."""
  if comparison.first == comparison.second:
    return ()
  if order == "both":
    return False, True
  texts = json.dumps([seed, *comparison.texts])
  return (bool(hashlib.sha256(texts.encode()).digest()[0] & 1),)


def _unswapped(is_swapped: bool, verdict: Verdict) -> str | None:
  preferred = verdict.preferred
  return SWAPPED[preferred] if is_swapped else preferred


def _decide(verdicts: list[tuple[bool, Verdict]]) -> Decision:
  preferred = {_unswapped(*x) for x in verdicts}
  if None in preferred:
    decision = None
  else:
    decision = preferred.pop() if len(preferred) == 1 else TIE
  return Decision(decision, tuple(verdicts))

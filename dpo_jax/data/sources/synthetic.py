"""Short film reviews from a grammar whose ground-truth reward is known.

The controlled-sentiment experiment (Rafailov et al. 2023, arXiv 2305.18290,
section 6.1) in miniature, with nothing to download: `true_reward` stands for
the sentiment classifier, a prompt is the first words of a review. Words are
separated by single spaces, punctuation included, and one word is one token.
"""

import functools
import itertools
import math
import random
import re
import zlib
from collections.abc import Iterator
from typing import Any

import tokenizers
import transformers

# How much each word says for the film, by part of speech; others say nothing.
STRENGTHS_BY_PART = {
  "ADJECTIVE": {
    2.0: "superb brilliant wonderful stunning masterful flawless",
    1.5: "excellent great moving gripping beautiful delightful",
    1.0: "good charming clever funny engaging tender lively",
    0.5: "decent pleasant fine solid watchable likable neat",
    0.0: "long loud quiet short familiar simple modern serious strange",
    -0.5: "uneven predictable plain thin forgettable stiff odd",
    -1.0: "bad weak dull clumsy boring flat shallow",
    -1.5: "poor tedious annoying lifeless ugly messy",
    -2.0: "terrible awful dreadful horrible unbearable atrocious",
  },
  "VERB": {
    2.0: "adored",
    1.5: "loved",
    1.0: "enjoyed admired",
    0.5: "liked",
    0.0: "noticed remembered",
    -0.5: "tolerated",
    -1.0: "disliked regretted",
    -1.5: "hated",
    -2.0: "despised",
  },
  "THING": {
    2.0: "masterpiece triumph",
    1.5: "gem delight",
    1.0: "treat pleasure",
    0.0: "surprise puzzle",
    -1.0: "bore letdown",
    -1.5: "mess failure",
    -2.0: "disaster nightmare",
  },
}
# What a word multiplies the strength of the sentiment word after it by.
INTENSIFIERS = {"extremely": 2.0, "very": 1.5, "really": 1.5, "truly": 1.5}
SOFTENERS = {"slightly": 0.5, "somewhat": 0.5, "rather": 0.75}
NEGATORS = {"not": -1.0, "never": -1.0, "hardly": -0.5}
ARTICLES = ("a", "the", "this")

# A symbol in capitals is replaced by one alternative, all equally likely. One
# with a tilde stands under a negation: it is drawn for the opposite opinion.
RULES = {
  "REVIEW": (
    "CLAIM , JOIN CLAIM .",
    "CLAIM . CLAIM .",
    "CLAIM , JOIN CLAIM . VERDICT .",
    "CLAIM . CLAIM . VERDICT .",
    "VERDICT . CLAIM , JOIN CLAIM .",
    "SETTING . VERDICT .",
    "SETTING . CLAIM , JOIN CLAIM .",
    "SETTING , JOIN CLAIM . VERDICT .",
  ),
  "CLAIM": (
    "the ASPECT LINK QUALITY",
    "the ASPECT LINK QUALITY",
    "the ASPECT LINK QUALITY and ADJECTIVE",
    "WHO found the ASPECT QUALITY",
    "WHO OPINION the ASPECT",
    "the ASPECT was VALUE",
    "the ADJECTIVE ASPECT and the ADJECTIVE ASPECT stood out",
  ),
  "VERDICT": (
    "this FILM LINK QUALITY",
    "what a THING",
    "WHO OPINION this FILM",
    "in the end it was VALUE",
    "overall this was VALUE",
  ),
  "SETTING": (
    "WHO saw this FILM PLACE",
    "WHO watched it TIME",
    "this is a FILM about TOPIC",
  ),
  "QUALITY": (
    "ADJECTIVE",
    "ADJECTIVE",
    "DEGREE ADJECTIVE",
    "NEGATOR ~ADJECTIVE",
    "NEGATOR very ~ADJECTIVE",
  ),
  "OPINION": ("VERB", "VERB", "really VERB", "never ~VERB"),
  "VALUE": ("a THING", "truly a THING", "not a ~THING"),
  "DEGREE": tuple(INTENSIFIERS | SOFTENERS),
  "NEGATOR": tuple(NEGATORS),
  "LINK": ("was", "was", "is", "seemed", "felt"),
  "JOIN": ("and", "but", "while", "although"),
  "WHO": ("i", "i", "we", "my friends", "my family", "everyone", "critics"),
  "ASPECT": (
    *"plot story script acting cast music score photography dialogue".split(),
    *"pacing ending opening direction editing humor lighting scenery".split(),
    *"villain hero romance action suspense premise sound design".split(),
  ),
  "FILM": (*"film movie picture drama comedy thriller western sequel".split(),),
  "PLACE": (
    "at home",
    "at the cinema",
    "at a festival",
    "on a plane",
    "with my family",
  ),
  "TIME": ("last night", "last week", "yesterday", "today", "twice"),
  "TOPIC": (*"war love crime money music family sailors robots chess".split(),),
}

STRENGTHS = {
  word: strength
  for part in STRENGTHS_BY_PART.values()
  for strength, words in part.items()
  for word in words.split()
}
MODIFIERS = INTENSIFIERS | SOFTENERS | NEGATORS
# Bounds keep any text that a model may sample off 0 and 1: a run of modifiers
# multiplies by at most 3, and the classifier is never surer than 1 in 400.
MAX_FACTOR = 3.0
MAX_LOGIT = 6.0
# Reward logits per unit of strength; with TILT it spreads rewards over (0,1).
LOGIT_SCALE = 0.75
# Words are drawn in proportion to exp(TILT * opinion * strength).
TILT = 0.6
OPINIONS = (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0)

MIN_WORDS, MAX_WORDS = 8, 24
MIN_PROMPT_WORDS, MAX_PROMPT_WORDS = 2, 4
# One text in so many is kept for the test split, so splits share no review.
TEST_SHARE = 4
DEFAULT_ROWS = {"train": 10_000, "test": 1_000}
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def true_reward(text: str) -> float:
  """Returns the probability in (0,1) that a review is positive, exactly.

      reward = sigmoid(clip(0.75 * sum_i factor_i * strength_i, -6, 6))

  Strengths are those of `STRENGTHS`, 0 for all other words. The factor is the
  product of the unbroken run of modifiers before the word, articles left out,
  clipped to [-3, 3]. So `good` counts 1, `very good` 1.5, `not good` -1, `not
  very good` -1.5, `not a gem` -1.5, and an empty text is worth 0.5.
  """
  total, factor = 0.0, 1.0
  for word in text.split():
    if word in MODIFIERS:
      factor *= MODIFIERS[word]
    elif word not in ARTICLES:
      bounded = min(max(factor, -MAX_FACTOR), MAX_FACTOR)
      total += bounded * STRENGTHS.get(word, 0.0)
      factor = 1.0
  logit = min(max(LOGIT_SCALE * total, -MAX_LOGIT), MAX_LOGIT)
  return 1.0 / (1.0 + math.exp(-logit))


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Returns a tokenizer with one token for each word of the grammar.

  Decoding gives back the words joined by single spaces. It adds no token of
  its own; a word that the grammar does not know becomes `<unk>`.
  """
  words = [PAD, EOS, UNKNOWN, *vocabulary()]
  ids = {word: index for index, word in enumerate(words)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(ids, unk_token=UNKNOWN)
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=EOS,
    unk_token=UNKNOWN,
    clean_up_tokenization_spaces=False,
  )


def vocabulary() -> list[str]:
  """Returns every word that the grammar can write, in alphabetical order."""
  written = {
    word
    for alternatives in RULES.values()
    for alternative in alternatives
    for word in alternative.split()
    if word.lstrip("~") not in RULES
    and word.lstrip("~") not in STRENGTHS_BY_PART
  }
  return sorted(written | set(STRENGTHS))


def read(path: str, split: str) -> Iterator[dict[str, Any]]:
  """Returns the rows of a split, the same ones every time.

  A row of `pairs`, two reviews with the same beginning:

      {"prompt": "the plot was",
       "chosen": " not bad , but we liked the music .",
       "rejected": " rather dull . overall this was a mess .",
       "chosen_score": 0.7549, "rejected_score": 0.1561}

  A score is the `true_reward` of the whole review, higher for chosen; ties are
  dropped. A row of `reviews` is one review, `prompt` and `response`. Prompts
  are 2 to 4 words. Train and test share no review.

  Args:
    path: `pairs` (also when empty) or `reviews`, and how many rows after a
      colon: `pairs:4000`. By default 10,000 for train and 1,000 for test; a
      smaller number gives the first of the same rows.
    split: `train` or `test`.

  Raises:
    ValueError: a path or a split that is none of these.
  """
  match = re.fullmatch(r"(pairs|reviews)?(?::([1-9][0-9]*))?", path)
  if match is None:
    raise ValueError(
      f"data.path='{path}': the synthetic source takes 'pairs' or 'reviews',"
      " with a number of rows after a colon if wanted: 'pairs:4000'"
    )
  if split not in DEFAULT_ROWS:
    raise ValueError(
      f"unknown split '{split}' of the synthetic source; known: test, train"
    )
  kind = match[1] or "pairs"
  num_rows = int(match[2] or DEFAULT_ROWS[split])
  rng = random.Random(f"{kind} {split}")
  rows = _pairs if kind == "pairs" else _reviews
  return itertools.islice(rows(rng, split), num_rows)


def _reviews(rng: random.Random, split: str) -> Iterator[dict[str, str]]:
  """Yields reviews of a split without end, each cut after a few words."""
  while True:
    words = _write(rng, rng.choice(OPINIONS))
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
      continue
    is_test = zlib.crc32(" ".join(words).encode()) % TEST_SHARE == 0
    if is_test == (split == "test"):
      length = rng.randint(MIN_PROMPT_WORDS, MAX_PROMPT_WORDS)
      prompt, response = " ".join(words[:length]), " ".join(words[length:])
      yield {"prompt": prompt, "response": " " + response}


def _pairs(rng: random.Random, split: str) -> Iterator[dict[str, Any]]:
  """Yields pairs: each review meets the next one with the same prompt."""
  waiting: dict[str, str] = {}
  for row in _reviews(rng, split):
    prompt, response = row["prompt"], row["response"]
    other = waiting.pop(prompt, None)
    if other is None:
      waiting[prompt] = response
      continue
    (high, chosen), (low, rejected) = sorted(
      ((true_reward(prompt + text), text) for text in (response, other)),
      reverse=True,
    )
    if high > low:
      yield {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_score": high,
        "rejected_score": low,
      }


def _write(rng: random.Random, opinion: float) -> list[str]:
  """Returns the words of one derivation from `REVIEW`."""
  words, pending = [], ["REVIEW"]
  while pending:
    symbol = pending.pop()
    part = symbol.lstrip("~")
    if part in STRENGTHS_BY_PART:
      held = opinion if part == symbol else -opinion
      candidates, cumulative = _candidates(part, held)
      words += rng.choices(candidates, cum_weights=cumulative)
    elif symbol in RULES:
      pending += rng.choice(RULES[symbol]).split()[::-1]
    else:
      words.append(symbol)
  return words


@functools.cache
def _candidates(part: str, opinion: float) -> tuple[list[str], list[float]]:
  """Returns a part of speech's words and their cumulative weights."""
  words = " ".join(STRENGTHS_BY_PART[part].values()).split()
  weights = [math.exp(TILT * opinion * STRENGTHS[word]) for word in words]
  return words, list(itertools.accumulate(weights))

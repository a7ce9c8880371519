"""Judges made of numbers and of words, and decisions over both orders."""

import numpy as np
import pytest

from dpo_jax.judges import judge as judges
from dpo_jax.judges import prompts as judge_prompts
from dpo_jax.judges.judge import Comparison, Judge, Verdict

TEMPLATE = judge_prompts.TEMPLATES["summary_simple"]
PAIRS = [
  Comparison("p", "long one", "one"),
  Comparison("p", "one", "long one"),
  Comparison("q", "one", "two"),
]


def _preferences(judge, comparisons):
  return [verdict.preferred for verdict in judge.compare(comparisons)]


def _always(name):
  """Returns a judge that says the same of everything."""
  return Judge(name, lambda asked: [Verdict(name, name) for _ in asked])


def test_the_higher_score_wins_and_equal_ones_tie():
  assert _preferences(judges.length_judge(), PAIRS) == [
    "first",
    "second",
    "tie",
  ]
  first = judges.length_judge().compare(PAIRS)[0]
  assert first.text == "first 8, second 3" and first.is_parsed


def test_a_reward_model_scores_each_prompt_and_response_once():
  asked = []

  def score_fn(prompts, responses, ended):
    assert all(ended)
    asked.append(list(zip(prompts, responses, strict=True)))
    return np.array([-len(x) for x in responses], np.float32)

  judge = judges.score_judge("short", score_fn)
  assert _preferences(judge, PAIRS) == ["second", "first", "tie"]
  expected = [("p", "long one"), ("p", "one"), ("q", "one"), ("q", "two")]
  assert asked == [expected]


def test_a_score_knows_which_response_ended_in_both_orders():
  def score_fn(prompts, responses, ended):
    return np.array(ended, np.float32)

  judge = judges.score_judge("whole", score_fn)
  cut = Comparison("p", "one two", "one", False, True)
  for order in judges.ORDERS:
    (decision,) = judges.decide(judge, [cut], order=order, seed=0)
    assert decision.preferred == judges.SECOND
  # The same text, once whole and once cut, has two scores.
  both = [Comparison("p", "x", "y"), Comparison("p", "x", "y", False)]
  assert _preferences(judge, both) == ["tie", "second"]


@pytest.mark.parametrize("scores", [[0.0, np.nan], [1.0], [[1.0, 2.0]]])
def test_scores_that_say_nothing_are_refused(scores):
  judge = judges.score_judge("broken", lambda *_, ended: np.array(scores))
  with pytest.raises(
    ValueError, match="judge 'broken': 2 responses have score"
  ):
    judge.compare(PAIRS[:1])


def test_the_likelier_letter_wins_and_what_is_too_long_is_unparsed():
  shown = []

  def logps_fn(prompts, answers):
    shown.extend(zip(prompts, answers, strict=True))
    return np.array([-1.0, -2.0, -2.0, -1.0, -3.0, np.nan])

  judge = judges.likelihood_judge("local", logps_fn, TEMPLATE)
  assert _preferences(judge, PAIRS) == ["first", "second", None]
  question = TEMPLATE.fill("p", "long one", "one")
  assert shown[:2] == [(question, "Preferred: A"), (question, "Preferred: B")]
  assert judge.compare(PAIRS)[2].text == "too long"


def test_malformed_answers_are_asked_again_with_a_reminder():
  rounds = []
  good, bad = "Comparison: x.\nPreferred: B", "I like B"

  def answer_fn(chats):
    rounds.append(chats)
    if len(rounds) == 1:
      return [good, bad, bad]
    return [bad, good] if len(rounds) == 2 else [bad]

  judge = judges.chat_judge("chat", answer_fn, TEMPLATE, max_asks=3)
  verdicts = judge.compare(PAIRS)
  assert [x.preferred for x in verdicts] == ["second", None, "second"]
  assert [x.text for x in verdicts] == [good, bad, good]
  assert [len(chats) for chats in rounds] == [3, 2, 1]
  question = {"role": "user", "content": TEMPLATE.fill("p", "one", "long one")}
  assert rounds[0][1] == [question]
  assert rounds[1][0] == [
    question,
    {"role": "assistant", "content": bad},
    {"role": "user", "content": TEMPLATE.reminder},
  ]
  assert len(rounds[2][0]) == 5
  with pytest.raises(ValueError, match="max_asks=0: must be at least 1"):
    judges.chat_judge("chat", answer_fn, TEMPLATE, max_asks=0)


def test_both_orders_agree_or_tie():
  longer = judges.length_judge()
  found = judges.decide(longer, PAIRS, order="both", seed=0)
  assert [x.preferred for x in found] == ["first", "second", "tie"]
  assert all(x.is_consistent for x in found)
  assert judges.position_statistics(found) == {
    "first_share": 0.5,
    "consistency": 1.0,
  }


def test_a_judge_of_positions_ties_with_itself():
  found = judges.decide(_always("first"), PAIRS, order="both", seed=0)
  assert [x.preferred for x in found] == ["tie"] * 3
  assert judges.position_statistics(found) == {
    "first_share": 1.0,
    "consistency": 0.0,
  }
  record = found[0].record()
  assert [x["is_swapped"] for x in record["verdicts"]] == [False, True]
  assert record["verdicts"][1]["preferred"] == "first"


@pytest.mark.parametrize("order", judges.ORDERS)
def test_equal_responses_tie_unasked(order):
  asked = []

  def compare(comparisons):
    asked.append(len(comparisons))
    return [Verdict("first", "") for _ in comparisons]

  judge, same = Judge("judge", compare), Comparison("p", "x", "x")
  found = judges.decide(judge, [same, PAIRS[0], same], order=order, seed=0)
  assert [len(x.verdicts) for x in found][::2] == [0, 0]
  assert found[0].preferred == found[2].preferred == "tie"
  assert asked == [2 if order == "both" else 1]
  assert judges.decide(judge, [same], order=order, seed=0) == [found[0]]
  assert len(asked) == 1
  empty = {"first_share": None, "consistency": None}
  assert judges.position_statistics([found[0]]) == empty


def test_a_tie_in_one_order_alone_is_a_tie():
  say = iter([Verdict("first", ""), Verdict("tie", "")])
  judge = Judge("judge", lambda asked: [next(say) for _ in asked])
  (found,) = judges.decide(judge, PAIRS[:1], order="both", seed=0)
  assert found.preferred == "tie" and not found.is_consistent


def test_one_unparsed_order_leaves_no_decision():
  say = iter([Verdict("first", ""), Verdict(None, "?")])
  judge = Judge("judge", lambda asked: [next(say) for _ in asked])
  (found,) = judges.decide(judge, PAIRS[:1], order="both", seed=0)
  assert found.preferred is None
  assert judges.position_statistics([found]) == {
    "first_share": 1.0,
    "consistency": None,
  }


def test_random_orders_are_of_the_seed_and_the_texts_alone():
  many = [Comparison(str(i), "long one", "one") for i in range(400)]
  swaps = lambda pairs, seed: [
    x.verdicts[0][0]
    for x in judges.decide(
      judges.length_judge(), pairs, order="random", seed=seed
    )
  ]
  found = judges.decide(judges.length_judge(), many, order="random", seed=0)
  assert {x.preferred for x in found} == {"first"}  # however it was shown
  assert 160 < sum(swaps(many, 0)) < 240
  assert swaps(many[::-1], 0) == swaps(many, 0)[::-1]
  assert swaps(many, 1) != swaps(many, 0)
  assert judges.position_statistics(found)["consistency"] is None
  with pytest.raises(ValueError, match="unknown order 'all'; known: both, ran"):
    judges.decide(judges.length_judge(), many, order="all", seed=0)

"""The paper's questions, and strict reading of their answers."""

import pytest

from dpo_jax.judges import prompts as judge_prompts

ALL = judge_prompts.TEMPLATES


@pytest.mark.parametrize("template", ALL.values(), ids=ALL)
def test_a_question_shows_each_text_once_and_the_first_as_a(template):
  text = template.fill("{prompt} 100%", "{second} one", "two \\n {}")
  assert text.count("{prompt} 100%") == 1
  before, after = text.split("{second} one")
  assert before.endswith(" A:\n") and " B:\ntwo \\n {}\n\nFIRST" in after
  assert text.endswith(
    "Your response should use the format:\n"
    "Comparison: <one-sentence comparison and explanation>\n"
    f'{template.choice}: <"A" or "B">'
  )


def test_the_concise_question_is_the_simple_one_with_a_condition():
  simple = ALL["summary_simple"].fill("p", "a", "b")
  concise = ALL["summary_concise"].fill("p", "a", "b")
  assert concise.replace(
    ", without including unimportant or irrelevant details? A good summary is"
    " both precise and concise.",
    "?",
  ) == (simple)
  assert "Query:\np\n\nResponse A:\na\n\nResponse B:\nb\n\n" in ALL[
    "dialogue"
  ].fill("p", "a", "b")


@pytest.mark.parametrize(
  ("answer", "letter"),
  [
    ("Comparison: A is better.\nPreferred: A", "A"),
    ("Comparison: A is better.\n\nPreferred: B\n", "B"),
    ('  Comparison: Both, "A" or "B".\r\nPreferred: "B"', "B"),
    ("Comparison: x\nPreferred:'A'", "A"),
    ("Comparison: x\nPreferred: 'A\"", None),
    ("Comparison: x\nPreferred: A or B", None),
    ("Comparison: x\nPreferred: A\nPreferred: B", None),
    ("Comparison: x\nMore helpful: A", None),
    ("Comparison: x\nPreferred: C", None),
    ("Comparison: x\nPreferred: a", None),
    ("Comparison:\nPreferred: A", None),
    ("Comparison: x. Preferred: A", None),
    ("Comparison: Preferred: A", None),
    ("Preferred: A", None),
    ("A", None),
    ("", None),
  ],
)
def test_answers_are_read_strictly(answer, letter):
  assert ALL["summary_simple"].parse(answer) == letter


@pytest.mark.parametrize("template", ALL.values(), ids=ALL)
def test_the_answer_asked_for_is_the_answer_read(template):
  for letter in judge_prompts.LETTERS:
    assert (
      template.parse(f"Comparison: x.\n{template.answer(letter)}") == letter
    )
  assert template.parse(template.format) is None
  assert template.format in template.reminder


@pytest.mark.parametrize(
  "prompt, asks",
  [
    ("POST: I burnt the rice.\n\nTL;DR:", True),
    ("An article.\nTLDR", True),
    ("An article.\n\nSummary: ", True),
    ("What does TL;DR: mean?", False),
    ("Write a poem", False),
    ("", False),
  ],
)
def test_a_prompt_that_a_summary_follows_is_known(prompt, asks):
  assert judge_prompts.asks_summary(prompt) == asks


def test_an_unknown_prompt_is_refused():
  with pytest.raises(
    ValueError, match="unknown judge prompt 'tldr'; known: su"
  ):
    judge_prompts.find("tldr")

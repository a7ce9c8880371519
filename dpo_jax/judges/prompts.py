"""What a judge that reads is asked, and how its answer is read.

The prompts are those of Rafailov et al. 2023 (arXiv 2305.18290), appendix C.2:
two for summaries of forum posts, of which the second asks for conciseness, and
one for dialogue.
"""

import dataclasses
import re

LETTERS = ("A", "B")  # of the first response and the second

_SUMMARY = """\
Post:
{prompt}

Summary A:
{first}

Summary B:
{second}

FIRST provide a one-sentence comparison of the two summaries, explaining which \
you prefer and why. SECOND, on a new line, state only "A" or "B" to indicate \
your choice. Your response should use the format:
"""
_SIMPLE = """\
Which of the following summaries does a better job of summarizing the most \
important points in the given forum post?

"""
_CONCISE = """\
Which of the following summaries does a better job of summarizing the most \
important points in the given forum post, without including unimportant or \
irrelevant details? A good summary is both precise and concise.

"""
_DIALOGUE = """\
For the following query to a chatbot, which response is more helpful?

Query:
{prompt}

Response A:
{first}

Response B:
{second}

FIRST provide a one-sentence comparison of the two responses and explain which \
you feel is more helpful. SECOND, on a new line, state only "A" or "B" to \
indicate which response is more helpful. Your response should use the format:
"""


@dataclasses.dataclass(frozen=True)
class Template:
  """A question about two responses.

  Attributes:
    question: has the fields `prompt`, `first` and `second`; the format of the
      answer comes after it.
    choice: what the last line of an answer begins with.
  """

  question: str
  choice: str

  @property
  def format(self) -> str:
    """The two lines that an answer is to have."""
    return (
      "Comparison: <one-sentence comparison and explanation>\n"
      f'{self.choice}: <"A" or "B">'
    )

  @property
  def reminder(self) -> str:
    """What a malformed answer is answered with; not from the paper."""
    return (
      "Your response does not use the format. Answer once more with these two"
      f" lines and nothing else:\n{self.format}"
    )

  def fill(self, prompt: str, first: str, second: str) -> str:
    """Returns the question about two responses to a prompt."""
    fields = {"prompt": prompt, "first": first, "second": second}
    return self.question.format(**fields) + self.format

  def answer(self, letter: str) -> str:
    """Returns the last line of an answer that chooses a letter."""
    return f"{self.choice}: {letter}"

  def parse(self, text: str) -> str | None:
    """Returns the letter that an answer chooses; None if it is malformed.

    An answer is one line that begins with `Comparison:` and says something,
    then one line of the choice, quoted or not; empty lines do not count. One
    that says more, less, or it differently is malformed.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != 2 or not re.fullmatch(r"Comparison:\s*\S.*", lines[0]):
      return None
    pattern = rf"""{re.escape(self.choice)}:\s*(["']?)([AB])\1"""
    match = re.fullmatch(pattern, lines[1])
    return match and match[2]


TEMPLATES = {
  "summary_simple": Template(_SIMPLE + _SUMMARY, "Preferred"),
  "summary_concise": Template(_CONCISE + _SUMMARY, "Preferred"),
  "dialogue": Template(_DIALOGUE, "More helpful"),
}


# How a prompt ends that a summary is to follow.
_SUMMARY_NEXT = re.compile(r"(tl;?dr|\bsummary):?$", re.IGNORECASE)


def asks_summary(prompt: str) -> bool:
  """Returns whether a prompt's last word asks for a summary of the rest."""
  return bool(_SUMMARY_NEXT.search(prompt.strip()))


def find(name: str) -> Template:
  """Returns a template by its name.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in TEMPLATES:
    known = ", ".join(TEMPLATES)
    raise ValueError(f"unknown judge prompt {name!r}; known: {known}")
  return TEMPLATES[name]

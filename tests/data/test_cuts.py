"""Whether responses ended: what rows say, and where nothing else is known."""

import pytest

from dpo_jax.data import cuts, examples

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
ONE = {"prompt": "p", "response": "r"}
RANKED = {"prompt": "p", "responses": ["a", "b", "c"]}


@pytest.fixture
def read(write_lines):
  """Returns a function that reads one row as an example."""

  def read_row(row, inputs):
    path = write_lines(row)
    (example,) = examples.read("jsonl", path, split="", inputs=inputs)
    return example

  return read_row


@pytest.mark.parametrize(
  ("row", "inputs", "expected"),
  [
    (PAIR, "pairs", [True, True]),
    (PAIR | {"rejected_ended": False}, "pairs", [True, False]),
    (PAIR | {"chosen_ended": 0, "rejected_ended": 1}, "pairs", [False, True]),
    (PAIR | {"chosen_ended": None, "ended": False}, "pairs", [True, True]),
    (PAIR | {"chosen_ended": False}, "demonstrations", [False, False]),
    (PAIR | {"rejected_ended": False}, "demonstrations", [True, True]),
    (PAIR | {"rejected_ended": False}, "labelled", [True, False]),
    (PAIR | {"rejected_ended": False}, "ranked", [True, False]),
    (ONE | {"ended": False}, "demonstrations", [False, False]),
    (ONE | {"ended": False, "label": True}, "labelled", [False, False]),
    ({"text": "t", "ended": False}, "demonstrations", [False, False]),
    (RANKED, "ranked", [True] * 3),
    (RANKED | {"ended": [True, None, False]}, "ranked", [True, True, False]),
  ],
)
def test_a_response_ended_unless_its_row_says_no(row, inputs, expected, read):
  assert cuts.ended(read(row, inputs)) == expected


def test_prompts_alone_have_no_endings(read):
  assert read({"prompt": "p", "ended": "x"}, "prompts") == {"prompt": "p"}


@pytest.mark.parametrize(
  ("row", "inputs", "message"),
  [
    (PAIR | {"chosen_ended": "no"}, "pairs", "'chosen_ended' is \"no\"; all"),
    (ONE | {"ended": 2}, "demonstrations", "line 1: column 'ended' is 2; all"),
    (RANKED | {"ended": False}, "ranked", "is false; allowed: a list of 3,"),
    (RANKED | {"ended": [True]}, "ranked", r"is \[true\]; allowed: a list of"),
    (RANKED | {"ended": [1, 0, 7]}, "ranked", r"'ended\[2\]' is 7; allowed"),
  ],
)
def test_what_is_neither_true_nor_false_is_refused(row, inputs, message, read):
  with pytest.raises(ValueError, match=message):
    read(row, inputs)

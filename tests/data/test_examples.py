"""Rows of every kind become examples, or a line that says what is wrong."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.data import examples

USER = {"role": "user", "content": "u"}
OTHER = {"role": "user", "content": "v"}
GOOD = {"role": "assistant", "content": "g"}
BAD = {"role": "assistant", "content": "b"}
ASK = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture
def read(write_lines):
  """Returns a function from rows to examples."""

  def read_rows(*rows, inputs="pairs"):
    path = write_lines(*rows)
    return list(examples.read("jsonl", path, split="", inputs=inputs))

  return read_rows


@pytest.mark.parametrize(
  "row, expected",
  [
    # Strings.
    (("p", "c", "r"), ("p", "c", "r")),
    ((None, ASK + " c", ASK + " r"), (ASK, " c", " r")),
    (("p", ASK, "r"), ("p", ASK, "r")),
    # Messages.
    (([USER], [GOOD], [BAD]), ([USER], [GOOD], [BAD])),
    (([USER], "g", "b"), ([USER], [GOOD], [BAD])),
    ((None, [USER, GOOD], [USER, BAD]), ([USER], [GOOD], [BAD])),
    ((None, [USER, GOOD], [USER, GOOD]), ([USER], [GOOD], [GOOD])),
    (
      (None, [USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD]),
      ([USER, GOOD, USER], [GOOD], [BAD]),
    ),
    # A string prompt beside messages.
    (("u", [USER, GOOD], [USER, BAD]), ([USER], [GOOD], [BAD])),
    (("u", [GOOD], [BAD]), ([USER], [GOOD], [BAD])),
    # Messages beside whole dialogues.
    (([USER], [USER, GOOD], [USER, BAD]), ([USER], [GOOD], [BAD])),
    (([USER], [USER, GOOD], [BAD]), ([USER], [GOOD], [BAD])),
    (
      ([USER], [USER, GOOD, OTHER, GOOD], [USER, GOOD, OTHER, BAD]),
      ([USER, GOOD, OTHER], [GOOD], [BAD]),
    ),
  ],
)
def test_pair(row, expected, read):
  names = ("prompt", "chosen", "rejected")
  row = {k: v for k, v in zip(names, row) if v is not None}
  assert read(row | {"other": 3}) == [dict(zip(names, expected))]


def test_pairs_whose_prompts_differ_are_dropped(read):
  rows = [
    {"chosen": ASK + " a", "rejected": "No" + ASK + " a"},
    {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, OTHER, BAD]},
  ]
  assert read(*rows) == [{"dropped": "prompts differ"}] * 3


LATER = {"dropped": "a response holds turns of others than the assistant"}
TURNS = [GOOD, USER, GOOD]


@pytest.mark.parametrize(
  "row, inputs",
  [
    ({"chosen": [USER, *TURNS], "rejected": [USER, BAD, USER, BAD]}, "pairs"),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD, OTHER, BAD]}, "pairs"),
    ({"prompt": [USER], "chosen": TURNS, "rejected": [BAD]}, "pairs"),
    ({"prompt": [USER], "response": TURNS}, "demonstrations"),
    ({"prompt": [USER], "response": TURNS, "label": 1}, "labelled"),
    ({"prompt": [USER], "responses": [[GOOD], TURNS]}, "ranked"),
  ],
)
def test_a_response_with_later_turns_is_dropped_and_says_why(row, inputs, read):
  assert read(row, inputs=inputs) == [LATER]
  if inputs != "ranked":  # the prompt is one all the same
    assert read(row, inputs="prompts")[0]["prompt"] == [USER]


TOOLS = [{"type": "function", "function": {"name": "f", "x": None}}]
CALL = {"function": {"name": "f", "arguments": {"x": "y"}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "r"}


def test_tools_stand_beside_the_messages_of_a_prompt(read):
  pair = {"prompt": [USER, CALLING, RESULT]}
  pair |= {"chosen": [GOOD], "rejected": [CALLING]}
  with_tools = pair | {"prompt": {"messages": pair["prompt"], "tools": TOOLS}}
  tools = (None, [], TOOLS, json.dumps(TOOLS))
  rows = [pair | {"tools": value} for value in tools]
  expected = [pair, pair, with_tools, with_tools]
  assert read(*rows) == expected
  # As samples of such prompts are written.
  assert read(with_tools) == [with_tools]
  assert read(GOOD_PAIR | {"tools": 3}) == [GOOD_PAIR]
  for value, shown in ((3, "int"), ("{", "a string"), ([1], "a list")):
    with pytest.raises(ValueError, match=f"line 1: column 'tools' is {shown}"):
      read(pair | {"tools": value})


def test_rows_of_a_table_are_those_of_lines(read, tmp_path):
  """A table has every key in every row, null where a row has none."""
  rows = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {
      "prompt": [USER, CALLING, RESULT],
      "chosen": [CALLING | {"content": None}],
      "rejected": [BAD],
      "tools": [{"name": "f", "x": {"a": "b"}}, {"name": "g"}],
    },
  ]
  path = str(tmp_path / "pairs.parquet")
  parquet.write_table(pa.Table.from_pylist(rows[::-1]), path)
  table = list(examples.read("jsonl", path, split="", inputs="pairs"))
  assert table[::-1] == read(*rows)


@pytest.mark.parametrize(
  "row, prompt, response",
  [
    ({"prompt": "p", "response": "r"}, "p", "r"),
    ({"prompt": [USER], "response": "g"}, [USER], [GOOD]),
    ({"prompt": "u", "response": [GOOD]}, [USER], [GOOD]),
    ({"messages": [USER, BAD, USER, GOOD]}, [USER, BAD, USER], [GOOD]),
    ({"prompt": [USER], "response": [USER, GOOD]}, [USER], [GOOD]),
    ({"prompt": "u", "response": [USER, GOOD]}, [USER], [GOOD]),
    ({"text": "t"}, "", "t"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD]),
  ],
)
def test_demonstration(row, prompt, response, read):
  expected = {"prompt": prompt, "response": response}
  assert read(row, inputs="demonstrations") == [expected]


GOOD_PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
  "row, message",
  [
    (
      {"prompt": "p", "chosen": "c"},
      "no column 'rejected'; columns: prompt, c",
    ),
    (GOOD_PAIR | {"chosen": 3.5}, r"column 'chosen' is float \(3.5\); allowed"),
    (GOOD_PAIR | {"prompt": None}, r"'prompt' is null \(null\)"),
    (GOOD_PAIR | {"chosen": []}, r"'chosen' is a list \(\[\]\)"),
    (GOOD_PAIR | {"prompt": []}, r"'prompt' is a list \(\[\]\)"),
    (GOOD_PAIR | {"chosen": [{"role": "user"}]}, "'chosen' is a list"),
    (GOOD_PAIR | {"chosen": [GOOD]}, "'chosen' is messages, .* is a string"),
    (
      {"chosen": "c", "rejected": "r"},
      "no column 'prompt', and column 'chosen'",
    ),
    ({"chosen": [GOOD], "rejected": [BAD]}, "begin with the assistant"),
  ],
)
def test_wrong_pair_names_line_column_and_what_is_allowed(row, message, read):
  with pytest.raises(
    ValueError, match=f"pairs.jsonl, line 2: .*{message}"
  ) as e:
    read(GOOD_PAIR, row)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "row, message",
  [
    ({"response": "r"}, "no column 'prompt'; columns: response"),
    (
      {"prompt": "p"},
      "no column 'response'; columns: prompt; allowed: .* text",
    ),
    ({"text": 1}, "'text' is int"),
    ({"text": [USER]}, "'text' is messages; allowed: a string"),
    ({"messages": [GOOD]}, "two messages or more"),
    ({"messages": [USER, OTHER]}, "the last by the assistant"),
  ],
)
def test_wrong_demonstration_is_refused(row, message, read):
  with pytest.raises(ValueError, match=f"pairs.jsonl, line 1: .*{message}"):
    read(row, inputs="demonstrations")


def test_wrong_source_and_inputs_and_empty_file_are_refused(write_lines):
  path = write_lines()
  for source, inputs, message in (
    ("jsonl", "pairs", "pairs.jsonl' is empty"),
    ("json", "pairs", "unknown data source 'json'; known: hh, hub, imdb, jso"),
    (
      "jsonl",
      "pear",
      "unknown inputs 'pear'; known: pairs, scored_pairs, demonstrations",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      list(examples.read(source, path, split="", inputs=inputs))


def test_fingerprint_follows_content_and_not_place(write_lines):
  def fingerprint(*rows, name="a.jsonl", source="jsonl"):
    return examples.fingerprint(source, write_lines(*rows, name=name), "")

  assert fingerprint({"a": 1}) == fingerprint({"a": 1}, name="b.jsonl")
  assert fingerprint({"a": 1}) != fingerprint({"a": 2})
  assert fingerprint({"a": 1}) != fingerprint({"a": 1}, source="hh")


def test_fingerprint_without_a_file_follows_the_rows():
  one, two, again = (
    examples.fingerprint("synthetic", f"pairs:{n}", "train") for n in (3, 4, 3)
  )
  assert one == again != two


def test_a_scored_pair_has_the_difference_of_its_scores(read):
  pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
  rows = [
    pair | {"chosen_score": chosen, "rejected_score": rejected}
    for chosen, rejected in ((4, 1.5), (-1.0, -1.5), (2, 2), (1, 3))
  ]
  dropped = {"dropped": "chosen scores no higher than rejected"}
  assert read(*rows, inputs="scored_pairs") == [
    pair | {"score_gap": 2.5},
    pair | {"score_gap": 0.5},
    dropped,
    dropped,
  ]
  assert read(*rows) == [pair] * 4


@pytest.mark.parametrize(
  "scores, message",
  [
    ({"chosen_score": 1}, "line 1: no column 'rejected_score'; columns: prom"),
    (
      {"chosen_score": "1", "rejected_score": 0},
      "line 1: column 'chosen_score' is a string (\"1\"); allowed: a finite",
    ),
    (
      {"chosen_score": 1, "rejected_score": True},
      "line 1: column 'rejected_score' is bool (true); allowed: a finite",
    ),
  ],
)
def test_a_score_that_is_no_number_is_refused(scores, message, read):
  row = {"prompt": "p", "chosen": "c", "rejected": "r"} | scores
  with pytest.raises(ValueError) as error:
    read(row, inputs="scored_pairs")
  assert message in str(error.value)


GOOD_RESPONSE = {"prompt": "p", "response": "r", "label": True}


def test_a_labelled_response_is_desirable_or_not_and_a_pair_stays_one(read):
  rows = [GOOD_RESPONSE | {"label": label} for label in (True, False, 1, 0.0)]
  assert read(*rows, GOOD_PAIR, inputs="labelled") == [
    GOOD_RESPONSE,
    GOOD_RESPONSE | {"label": False},
    GOOD_RESPONSE,
    GOOD_RESPONSE | {"label": False},
    *read(GOOD_PAIR),
  ]


@pytest.mark.parametrize(
  "row, message",
  [
    (
      {"prompt": "p", "response": "r"},
      "no column 'label'; columns: prompt, response; allowed: prompt, response"
      " and label, or chosen and rejected",
    ),
    (GOOD_RESPONSE | {"label": "yes"}, "'label' is a string"),
    (GOOD_RESPONSE | {"label": 2}, "'label' is int .2.; allowed: true, false"),
    ({"prompt": "p", "label": True}, "no column 'response'"),
    ({"text": "t", "label": True}, "no column 'prompt'"),
  ],
)
def test_a_wrong_label_is_refused(row, message, read):
  with pytest.raises(ValueError, match=f"pairs.jsonl, line 2: .*{message}"):
    read(GOOD_RESPONSE, row, inputs="labelled")


def test_a_ranked_list_keeps_its_order_and_a_pair_is_one_of_two(read):
  rows = [
    {"prompt": "p", "responses": ["a", "b", "c"]},
    {"prompt": [USER], "responses": ["a", "b"]},
    {"prompt": "p", "responses": [[GOOD], [BAD]]},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
  ]
  said = lambda text: [{"role": "assistant", "content": text}]
  assert read(*rows, inputs="ranked") == [
    {"prompt": "p", "responses": ["a", "b", "c"]},
    {"prompt": [USER], "responses": [said("a"), said("b")]},
    {
      "prompt": [{"role": "user", "content": "p"}],
      "responses": [[GOOD], [BAD]],
    },
    {"prompt": "p", "responses": ["c", "r"]},
  ]


@pytest.mark.parametrize(
  "row, message",
  [
    ({"prompt": "p"}, "'responses' is null .*two responses or more, the best"),
    ({"prompt": "p", "responses": ["a"]}, "'responses' is a list"),
    ({"prompt": "p", "responses": "ab"}, "'responses' is a string"),
    ({"prompt": "p", "responses": ["a", 1]}, "'response' is int"),
    (
      {"prompt": "p", "responses": ["a", [GOOD]]},
      "'responses' has strings and messages",
    ),
    ({"responses": ["a", "b"]}, "no column 'prompt'"),
  ],
)
def test_a_wrong_list_is_refused(row, message, read):
  with pytest.raises(ValueError, match=f"pairs.jsonl, line 1: .*{message}"):
    read(row, inputs="ranked")

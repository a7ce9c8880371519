"""Messages of every kind are brought to one form, or known to be none."""

import pytest

from dpo_jax.data import messages

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
  "message, expected",
  [
    ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
    (
      {"role": "user", "content": "a", "tool_calls": None, "name": "b"},
      {"role": "user", "content": "a", "name": "b"},
    ),
    (
      {"role": "assistant", "content": "a", "tool_calls": []},
      {"role": "assistant", "content": "a"},
    ),
    (
      {"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "assistant", "tool_calls": [CALL]},
    ),
    (
      {"role": "user", "content": [{"type": "text", "text": "a"}]},
      {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ),
  ],
)
def test_a_message_is_brought_to_one_form(message, expected):
  assert messages.normalise([message]) == [expected]


@pytest.mark.parametrize(
  "value",
  [
    "a",
    [],
    ["a"],
    [{"content": "a"}],
    [{"role": None, "content": "a"}],
    [{"role": "user"}],
    [{"role": "user", "content": None, "tool_calls": []}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": ["a"]}],
    [{"role": "user", "content": "a"}, {"role": "user"}],
  ],
)
def test_what_says_nothing_is_no_message(value):
  assert messages.normalise(value) is None


def test_a_message_says_its_content_and_its_calls():
  call = {"role": "assistant", "tool_calls": [{"id": 1}]}
  assert messages.text(call) == '{"id": 1}'
  assert messages.text(call | {"content": "Wait."}) == 'Wait.\n{"id": 1}'
  parts = [{"type": "text", "text": "a"}, {"type": "image"}]
  assert messages.text({"role": "user", "content": parts}) == "a[image]"

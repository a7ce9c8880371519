"""Chat messages: what one may hold, and what of a dialogue is its prompt.

A message is an object with a `role`, a `content` and whatever else the chat
template reads, such as `tool_calls`. Its content is a string or a list of parts
({type, ...}); beside `tool_calls` it may be null or absent.
"""

import json
from typing import Any

# Why a row with such a response is dropped: only the assistant's words may be
# scored, and a response is scored from its first token to its last.
LATER_TURNS = "a response holds turns of others than the assistant"


def normalise(value: Any) -> list[dict[str, Any]] | None:
  """Returns messages as templates are given them; None where it is none.

  Keys that are null say as much as keys that are absent, and so do empty
  `tool_calls`: they are left out, as many templates ask whether a key is there
  and write out what it has.
  """
  if not isinstance(value, list) or not value:
    return None
  found = [_message(message) for message in value]
  return None if None in found else found


def _message(value: Any) -> dict[str, Any] | None:
  if not isinstance(value, dict) or not isinstance(value.get("role"), str):
    return None
  message = {name: x for name, x in value.items() if x is not None}
  if message.get("tool_calls") == []:
    del message["tool_calls"]
  content, calls = message.get("content"), message.get("tool_calls")
  is_call = content is None and isinstance(calls, list)
  is_known = isinstance(content, str) or is_call or _is_parts(content)
  return message if is_known else None


def _is_parts(value: Any) -> bool:
  return (
    isinstance(value, list)
    and len(value) > 0
    and all(
      isinstance(x, dict) and isinstance(x.get("type"), str) for x in value
    )
  )


def without_nulls(value: Any) -> Any:
  """Returns a value without the null entries of its objects, at any depth.

  A table gives every row all keys that any row has, null where there is none.
  """
  if isinstance(value, dict):
    return {k: without_nulls(x) for k, x in value.items() if x is not None}
  if isinstance(value, list):
    return [without_nulls(x) for x in value]
  return value


def behind(prompt: list[dict], response: list[dict]) -> list[dict]:
  """Returns a response without its prompt, which it may begin by repeating."""
  is_repeated = (
    len(response) > len(prompt) and response[: len(prompt)] == prompt
  )
  return response[len(prompt) :] if is_repeated else response


def text(message: dict) -> str:
  """Returns what a message says: its content, and its calls as JSON."""
  content = message.get("content", "")
  if not isinstance(content, str):
    content = "".join(part.get("text", f"[{part['type']}]") for part in content)
  calls = [json.dumps(x) for x in message.get("tool_calls", [])]
  return "\n".join([content, *calls] if content else calls)


def is_by_assistant(response: Any) -> bool:
  """Returns whether nobody but the assistant speaks; strings are its words."""
  return isinstance(response, str) or all(
    message["role"] == "assistant" for message in response
  )


def split_tools(row: dict) -> tuple[dict, Any]:
  """Returns a row and its tools, which may stand in its prompt."""
  prompt = row.get("prompt")
  if isinstance(prompt, dict) and prompt.keys() == {"messages", "tools"}:
    return row | {"prompt": prompt["messages"]}, prompt["tools"]
  return row, row.get("tools")

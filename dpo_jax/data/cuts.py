"""Whether responses ended, or were cut when they were sampled.

Columns that a row may have: `chosen_ended` and `rejected_ended` beside a pair,
`ended` beside one response, and beside a ranked list `ended`, a list. Each is
true or false (or 1 or 0); without it, or null, a response ended. An example has
the same, but one that was made of a pair has those of its own kind.
"""

import json
from collections.abc import Sequence
from typing import Any

PAIR = ("chosen_ended", "rejected_ended")


def read(row: dict, example: dict, where: str) -> dict[str, Any]:
  """Returns what a row says of the responses of its example.

  Args:
    row: as its source has it.
    example: what `examples` made of it.
    where: file and row, for error lines.

  Raises:
    ValueError: a column that is neither true nor false.
  """
  if "chosen" in example:
    return _flags(row, PAIR, where)
  is_pair = "chosen" in row and not {"response", "responses"} & row.keys()
  if "response" in example:
    name = PAIR[0] if is_pair else "ended"
    flags = _flags(row, [name], where)
    return {"ended": flags[name]} if flags else {}
  if "responses" not in example:
    return {}
  names = PAIR
  if not is_pair:
    count = len(example["responses"])
    values = row.get("ended")
    if values is None:
      return {}
    if not isinstance(values, list) or len(values) != count:
      raise ValueError(
        f"{where}: column 'ended' is {_shown(values)}; allowed: a list of"
        f" {count}, true or false, one for each response"
      )
    names = [f"ended[{place}]" for place in range(count)]
    row = dict(zip(names, values, strict=True))
  flags = _flags(row, names, where)
  return {"ended": [flags.get(name, True) for name in names]} if flags else {}


def ended(example: dict) -> list[bool]:
  """Returns whether each response of an example ended, in their order.

  One response counts twice, as it stands in one of two columns.
  """
  if "responses" in example:
    return example.get("ended", [True] * len(example["responses"]))
  if "response" in example:
    return [example.get("ended", True)] * 2
  return [example.get(name, True) for name in PAIR]


def _flags(row: dict, names: Sequence[str], where: str) -> dict[str, bool]:
  """Returns the columns that a row has, checked to be true or false."""
  found = {name: row[name] for name in names if row.get(name) is not None}
  for name, value in found.items():
    if value not in (0, 1):  # also True and False
      raise ValueError(
        f"{where}: column {name!r} is {_shown(value)}; allowed: true, false,"
        " 1, 0, or no such column"
      )
  return {name: bool(value) for name, value in found.items()}


def _shown(value: Any) -> str:
  text = json.dumps(value, default=str)
  return text if len(text) <= 40 else text[:37] + "..."

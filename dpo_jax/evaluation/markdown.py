"""Markdown of what users' files hold: it looks as it is, and does nothing."""

import re
from collections.abc import Sequence
from typing import Any

# What begins code, emphasis, links, HTML, formulas, cells; addresses that
# become links by themselves; and names of characters, such as &copy;.
_SPECIAL = re.compile(
  r"[\\`*\[\]<|~$]|(?<!\w)_(?=\S)|:(?=//)|(?<=www)\.|@|&(?=#?\w+;)"
)


def escape(value: Any) -> str:
  """Returns a value as text of one line, shown as it is anywhere in a line."""
  text = " ".join(str(value).split())
  return _SPECIAL.sub(lambda found: "\\" + found[0], text)


def table(
  head: Sequence[str],
  rows: Sequence[Sequence[Any]],
  *,
  num_left: int = 1,
  is_padded: bool = False,
) -> str:
  """Returns a table, its cells escaped, without an end of line.

  Args:
    head: of the columns.
    rows: as many cells each.
    num_left: columns that begin at their left; the others end at their right.
    is_padded: whether the text itself has columns; these begin at their left.
  """
  lines = [list(map(escape, row)) for row in (head, *rows)]
  rule = ["---"] * num_left + ["---:"] * (len(head) - num_left)
  if is_padded:
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * width for width in widths]
    lines = [
      [cell.ljust(width) for cell, width in zip(line, widths)] for line in lines
    ]
  lines.insert(1, rule)
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""What others' JSON may hold: keys, and the kinds of value that they have.

A schema maps a key to its `Kind`, or to the schema of the object that it
holds. A key may be absent or null, and what no schema names may be anything:
files of other programs hold much that is not read here.
"""

import dataclasses
import json
import os
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

# The smallest and the largest normal float32, in which numbers are computed.
TINY, HUGE = 1.2e-38, 3.4e38
# Indices and positions are int32.
MAX_INDEX = 2**31 - 1
MAX_COUNT = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of value.

  Attributes:
    name: what a message says is allowed.
    types: those that `json` reads it as.
    bounds: of a number, the least and the most.
    items: of a list's elements, or of an object's values.
    length: of a list; None: any.
    choices: the only values; empty: all.
  """

  name: str
  types: tuple[type, ...]
  bounds: tuple[float, float] | None = None
  items: "Kind | None" = None
  length: int | None = None
  choices: tuple[str, ...] = ()

  def allows(self, value: Any) -> bool:
    """Returns whether a value is of the kind; True is not a number."""
    if type(value) not in self.types:
      return False
    if self.bounds and not self.bounds[0] <= value <= self.bounds[1]:
      return False  # NaN among them.
    if self.choices and value not in self.choices:
      return False
    if self.items is None:
      return True
    if self.length not in (None, len(value)):
      return False
    values = value.values() if isinstance(value, dict) else value
    return all(map(self.items.allows, values))


Schema = Mapping[str, "Kind | Schema"]


def integer(least: int, most: int) -> Kind:
  """Returns the kind of whole numbers from `least` to `most`."""
  return Kind(f"an integer from {least} to {most}", (int,), (least, most))


def number(name: str, least: float, most: float) -> Kind:
  """Returns the kind of numbers from `least` to `most`; NaN is none."""
  return Kind(name, (int, float), (least, most))


def choice(*choices: str) -> Kind:
  """Returns the kind of these strings."""
  return Kind(f"one of {', '.join(choices)}", (str,), choices=choices)


def list_of(items: Kind, length: int | None = None) -> Kind:
  """Returns the kind of lists, of `length` where it is given."""
  size = "" if length is None else f"{length} times "
  return Kind(f"a list of {size}{items.name}", (list,), None, items, length)


def object_of(items: Kind) -> Kind:
  """Returns the kind of objects whose values are all of one kind."""
  return Kind(f"an object of {items.name}", (dict,), None, items)


STRING = Kind("a string", (str,))
COUNT = integer(0, MAX_COUNT)
BOOLEAN = Kind("true or false", (bool,))
NUMBER = Kind("a number", (int, float))
POSITIVE = number("a finite number above 0", TINY, HUGE)
FRACTION = number("a number above 0, at most 1", TINY, 1)


def check(
  values: Mapping[str, Any],
  schema: Schema,
  required: Collection[str] = (),
  prefix: str = "",
) -> None:
  """Checks the values of an object.

  Args:
    values: what the JSON says.
    schema: of it.
    required: keys that must be there and not null.
    prefix: what the keys begin with in messages.

  Raises:
    ValueError: a key is missing, or its value is of another kind; the message
      names both.
  """
  for key in required:
    if values.get(key) is None:
      raise ValueError(f"{prefix + key!r} is missing")
  for key, kind in schema.items():
    value = values.get(key)
    if value is None:
      continue
    is_object = isinstance(kind, Mapping)
    if is_object and isinstance(value, dict):
      check(value, kind, prefix=f"{prefix}{key}.")
    elif is_object or not kind.allows(value):
      allowed = "an object" if is_object else kind.name
      raise ValueError(
        f"{prefix}{key}={reprlib.repr(value)}: must be {allowed}"
      )


def read(
  path: str | os.PathLike[str],
  schema: Schema,
  required: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the object of a JSON file, checked.

  Raises:
    ValueError: no such file, one that is not regular, or not of an object as
      `check` wants it; the message names the file.
  """
  check_file(path)
  with open(path, "rb") as file:
    text = file.read()
  try:
    values = parse(text)
    check(values, schema, required)
  except ValueError as error:
    raise ValueError(f"{os.fspath(path)}: {error}") from error
  return values


def parse(text: bytes) -> dict[str, Any]:
  """Returns the object of a JSON text.

  Raises:
    ValueError: it is not JSON, not an object, or one whose key has two values.
  """
  try:
    values = json.loads(text, object_pairs_hook=_object)
  except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
    raise ValueError(f"not JSON ({error})") from error
  if not isinstance(values, dict):
    raise ValueError(f"{reprlib.repr(values)}: must be a JSON object")
  return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) < len(pairs):
    for key, value in pairs:
      if repr(values[key]) != repr(value):
        raise ValueError(f"{key!r} stands there twice with other values")
  return values


def check_file(path: str | os.PathLike[str]) -> None:
  """Raises ValueError unless a path is a regular file.

  A FIFO, a socket or a device is never opened: that could wait for ever.
  """
  if not os.path.isfile(path):
    if os.path.exists(path):
      raise ValueError(f"{os.fspath(path)} is not a regular file")
    raise ValueError(f"no such file {os.fspath(path)}")


def check_regular(path: str | os.PathLike[str]) -> None:
  """Raises ValueError where a path is neither file, folder nor absent."""
  if not os.path.isdir(path) and os.path.exists(path):
    check_file(path)

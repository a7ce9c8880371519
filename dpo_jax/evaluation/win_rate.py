"""How often a judge prefers a policy's responses to a baseline's.

Rafailov et al. 2023 (arXiv 2305.18290), figures 2 right and 3: one number a
method and sampling temperature. A tie is half a win. Several comparisons of
one prompt are averaged first, and intervals are over prompts.
"""

import collections
import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

from dpo_jax.data import jsonl
from dpo_jax.evaluation import intervals, judges
from dpo_jax.evaluation.judges import Decision

POINTS = {judges.FIRST: 1.0, judges.TIE: 0.5, judges.SECOND: 0.0}


@dataclasses.dataclass(frozen=True)
class Response:
  """A response in a file.

  Attributes:
    where: file and line, for error lines.
    prompt: as text, whatever it was.
    text: the response.
    method: what produced it.
    temperature: that it was sampled at; None if its row does not say.
  """

  where: str
  prompt: str
  text: str
  method: str
  temperature: float | None


@dataclasses.dataclass(frozen=True)
class Match:
  """A policy's response and what it is compared with."""

  policy: Response
  baseline: Response

  @property
  def cell(self) -> tuple[str, float | None]:
    """Method and temperature, of which one number is given."""
    return self.policy.method, self.policy.temperature


@dataclasses.dataclass(frozen=True)
class Cell:
  """What came of a method at a temperature; None where nothing was parsed.

  Attributes:
    method: its name.
    temperature: None where rows did not say.
    num_prompts: distinct ones with a comparison that could be parsed.
    num_comparisons: all of them.
    wins, ties, losses, unparsed: they add up to that.
    win_rate: mean over prompts.
    low, high: the 95% interval.
    interval: its kind, `wilson` or `bootstrap`.
    first_share, consistency: of `judges.position_statistics`.
  """

  method: str
  temperature: float | None
  num_prompts: int
  num_comparisons: int
  wins: int
  ties: int
  losses: int
  unparsed: int
  win_rate: float | None
  low: float | None
  high: float | None
  interval: str | None
  first_share: float | None
  consistency: float | None


def read_responses(path: str) -> list[Response]:
  """Returns the responses of a file.

  Before: {"prompt": "Hi", "response": "Hello.", "temperature": 0.7}
  After:  Response("dpo.jsonl, line 1", "Hi", "Hello.", "dpo", 0.7)

  Args:
    path: a file that `data.jsonl` reads. Prompts and responses are strings or
      chat messages; `method` is the file's name without extension where a row
      has none.

  Raises:
    ValueError: a file or a row that cannot be read.
  """
  kind = "line" if ".jsonl" in os.path.basename(path) else "row"
  default = os.path.basename(path).partition(".")[0]
  responses = []
  for number, row in enumerate(jsonl.read(path, "test"), 1):
    where = f"{path}, {kind} {number}"
    method = row.get("method", default)
    if not isinstance(method, str) or not method:
      raise ValueError(
        f"{where}: column 'method' is {method!r}; allowed: a name, or no such"
        " column"
      )
    responses.append(
      Response(
        where,
        _text(row, "prompt", where),
        _text(row, "response", where),
        method,
        _temperature(row, where),
      )
    )
  if not responses:
    raise ValueError(f"{path!r} is empty")
  return responses


def match(
  policy: Sequence[Response], baseline: Sequence[Response]
) -> list[Match]:
  """Returns what is to be compared, in the policy's order.

  The k-th response of a method and temperature to a prompt is compared with
  the baseline's k-th to it, which begins anew after its last. The baseline's
  methods and temperatures are not looked at.

  Raises:
    ValueError: a prompt to which the baseline has no response.
  """
  of_prompt = collections.defaultdict(list)
  for response in baseline:
    of_prompt[response.prompt].append(response)
  seen, matches = collections.Counter(), []
  for response in policy:
    against = of_prompt.get(response.prompt)
    if not against:
      raise ValueError(
        f"{response.where}: the baseline has no response to its prompt"
        f" {response.prompt[:60]!r}; allowed: the baseline's prompts, letter"
        " by letter"
      )
    key = (response.method, response.temperature, response.prompt)
    matches.append(Match(response, against[seen[key] % len(against)]))
    seen[key] += 1
  return matches


def compare(
  judge: judges.Judge, matches: Sequence[Match], *, order: str, seed: int
) -> list[Decision]:
  """Returns a decision for each match, in which the policy is `first`."""
  comparisons = [
    judges.Comparison(x.policy.prompt, x.policy.text, x.baseline.text)
    for x in matches
  ]
  return judges.decide(judge, comparisons, order=order, seed=seed)


def summarise(
  matches: Sequence[Match], decisions: Sequence[Decision], *, seed: int
) -> list[Cell]:
  """Returns the cells by method as they came, then by temperature.

  Args:
    matches: at least one.
    decisions: of `compare`.
    seed: of the bootstrap.
  """
  groups = collections.defaultdict(list)
  for one, decision in zip(matches, decisions, strict=True):
    groups[one.cell].append((one.policy.prompt, decision))
  methods = list(dict.fromkeys(method for method, _ in groups))
  place = lambda cell: (methods.index(cell[0]), cell[1] is None, cell[1] or 0)
  cells = sorted(groups, key=place)
  return [_cell(*cell, groups[cell], seed) for cell in cells]


def _cell(
  method: str,
  temperature: float | None,
  group: list[tuple[str, Decision]],
  seed: int,
) -> Cell:
  decisions = [decision for _, decision in group]
  counts = collections.Counter(decision.preferred for decision in decisions)
  parsed = [(x, y.preferred) for x, y in group if y.preferred is not None]
  prompts = [prompt for prompt, _ in parsed]
  found = intervals.share(
    [POINTS[preferred] for _, preferred in parsed],
    prompts,
    by_group=True,
    seed=seed,
  )
  return Cell(
    method=method,
    temperature=temperature,
    num_prompts=len(set(prompts)),
    num_comparisons=len(group),
    wins=counts[judges.FIRST],
    ties=counts[judges.TIE],
    losses=counts[judges.SECOND],
    unparsed=counts[None],
    win_rate=found.pop("share"),
    **found,
    **judges.position_statistics(decisions),
  )


def _text(row: dict[str, Any], name: str, where: str) -> str:
  """Returns a column as text: messages as a transcript, one alone as it is."""
  if name not in row:
    raise ValueError(
      f"{where}: no column {name!r}; columns: {', '.join(row) or 'none'}"
    )
  value = row[name]
  if isinstance(value, str):
    return value
  is_messages = isinstance(value, list) and value
  if not is_messages or not all(map(_is_message, value)):
    raise ValueError(
      f"{where}: column {name!r} is {str(value)[:40]!r}; allowed: a string, or"
      " a list of {role, content} messages"
    )
  if len(value) == 1:
    return value[0]["content"]
  return "\n\n".join(f"{x['role'].title()}: {x['content']}" for x in value)


def _is_message(value: Any) -> bool:
  return isinstance(value, dict) and all(
    isinstance(value.get(key), str) for key in ("role", "content")
  )


def _temperature(row: dict[str, Any], where: str) -> float | None:
  value = row.get("temperature")
  if value is None:
    return None
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not 0 <= value < math.inf:
    raise ValueError(
      f"{where}: column 'temperature' is {value!r}; allowed: a number of at"
      " least 0, or no such column"
    )
  return float(value)

"""How often a judge prefers a policy's responses to a baseline's.

Rafailov et al. 2023 (arXiv 2305.18290), figures 2 right and 3: one number a
method, sampling temperature and, over training, step. A tie is half a win.
Several comparisons of one prompt are averaged first, and intervals are over
prompts.
"""

import collections
import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

from dpo_jax.data import examples, messages
from dpo_jax.data.sources import jsonl
from dpo_jax.evaluation import intervals
from dpo_jax.judges import judge as judges
from dpo_jax.judges import prompts as judge_prompts
from dpo_jax.judges.judge import Decision

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
    step: of the run that produced it; None if its row does not say.
    ended: whether it ended or was cut.
  """

  where: str
  prompt: str
  text: str
  method: str
  temperature: float | None
  step: int | None = None
  ended: bool = True

  @property
  def cell(self) -> tuple[str, float | None, int | None]:
    """Method, temperature and step, of which one number is given."""
    return self.method, self.temperature, self.step


@dataclasses.dataclass(frozen=True)
class Match:
  """A policy's response and what it is compared with."""

  policy: Response
  baseline: Response


@dataclasses.dataclass(frozen=True)
class Cell:
  """What came of responses of one kind; None where nothing was parsed.

  Attributes:
    method: its name.
    temperature: None where rows did not say.
    step: the same.
    num_prompts: distinct ones with a comparison that could be parsed.
    num_comparisons: all of them.
    wins, ties, losses, unparsed: they add up to that.
    win_rate: mean over prompts.
    low, high: the 95% interval.
    effective_size: independent comparisons that would tell as much.
    first_share, consistency: of `judges.position_statistics`.
  """

  method: str
  temperature: float | None
  step: int | None
  num_prompts: int
  num_comparisons: int
  wins: int
  ties: int
  losses: int
  unparsed: int
  win_rate: float | None
  low: float | None
  high: float | None
  effective_size: float | None
  first_share: float | None
  consistency: float | None


def read_responses(spec: str) -> list[Response]:
  """Returns the responses of a file and prints how many rows were dropped.

  Before: {"prompt": "Hi", "response": "Hello.", "temperature": 0.7}
  After:  Response("dpo.jsonl, line 1", "Hi", "Hello.", "dpo", 0.7)

  Args:
    spec: a file that `data.jsonl` reads, or METHOD=FILE. Its rows are what
      `data.examples` takes as demonstrations: `launch.sample` writes them, and
      of pairs the chosen response counts. `method` is that of the row, else
      METHOD, else the file's name without extension.

  Raises:
    ValueError: a file or a row that cannot be read, or none that is kept.
  """
  name, equals, path = spec.partition("=")
  if not equals or "/" in name:
    name, path = os.path.basename(spec).partition(".")[0], spec
  kind = "line" if ".jsonl" in os.path.basename(path) else "row"
  kept, dropped = [], collections.Counter()
  found = examples.read("jsonl", path, split="", inputs="demonstrations")
  rows = jsonl.read(path, "")
  for number, (row, example) in enumerate(zip(rows, found, strict=True), 1):
    if "dropped" in example:
      dropped[example["dropped"]] += 1
      continue
    where = f"{path}, {kind} {number}"
    method = row.get("method", name)
    if not isinstance(method, str) or not method:
      raise ValueError(
        f"{where}: column 'method' is {method!r}; allowed: a name, or no such"
        " column"
      )
    prompt, text = _as_text(example["prompt"]), _as_text(example["response"])
    cell = method, _temperature(row, where), _step(row, where)
    ended = example.get("ended", True)
    kept.append(Response(where, prompt, text, *cell, ended))
  notes = "".join(f"; {n} dropped: {why}" for why, n in dropped.items())
  if not kept:
    raise ValueError(f"{path!r}: no row is kept{notes}")
  print(f"data: {path}: {len(kept)} responses{notes}", flush=True)
  return kept


def match(
  policy: Sequence[Response], baseline: Sequence[Response]
) -> list[Match]:
  """Returns what is to be compared, in the policy's order.

  The k-th response of a method, temperature and step to a prompt is compared
  with the baseline's k-th to it, which begins anew after its last. Of the
  baseline these are not looked at.

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
    key = (response.cell, response.prompt)
    matches.append(Match(response, against[seen[key] % len(against)]))
    seen[key] += 1
  return matches


def compare(
  judge: judges.Judge, matches: Sequence[Match], *, order: str, seed: int
) -> list[Decision]:
  """Returns a decision for each match, in which the policy is `first`.

  Raises:
    ValueError: a prompt that asks for a summary, and a judge that would be
      asked which answer to a chatbot is more helpful.
  """
  for one in matches if judge.assumes_dialogue else ():
    if judge_prompts.asks_summary(one.policy.prompt):
      raise ValueError(
        f"{one.policy.where}: the prompt, which ends"
        f" {one.policy.prompt[-20:]!r}, asks for a summary: name the judge's"
        f" prompt; allowed: --judge_prompt={'|'.join(judge_prompts.TEMPLATES)}"
      )
  comparisons = [
    judges.Comparison(
      *(x.policy.prompt, x.policy.text, x.baseline.text),
      *(x.policy.ended, x.baseline.ended),
    )
    for x in matches
  ]
  return judges.decide(judge, comparisons, order=order, seed=seed)


def summarise(
  matches: Sequence[Match], decisions: Sequence[Decision]
) -> list[Cell]:
  """Returns the cells by method as they came, by temperature, and by step.

  Args:
    matches: at least one.
    decisions: of `compare`.
  """
  groups = collections.defaultdict(list)
  for one, decision in zip(matches, decisions, strict=True):
    groups[one.policy.cell].append((one.policy.prompt, decision))
  methods = list(dict.fromkeys(method for method, *_ in groups))
  place = lambda x: (x is None, x or 0)
  order = lambda cell: (methods.index(cell[0]), *map(place, cell[1:]))
  cells = sorted(groups, key=order)
  return [_cell(*cell, groups[cell]) for cell in cells]


def _cell(
  method: str,
  temperature: float | None,
  step: int | None,
  group: list[tuple[str, Decision]],
) -> Cell:
  decisions = [decision for _, decision in group]
  counts = collections.Counter(decision.preferred for decision in decisions)
  parsed = [(x, y.preferred) for x, y in group if y.preferred is not None]
  prompts = [prompt for prompt, _ in parsed]
  found = intervals.share(
    [POINTS[preferred] for _, preferred in parsed], prompts, by_group=True
  )
  return Cell(
    method=method,
    temperature=temperature,
    step=step,
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


def _as_text(value: examples.Text) -> str:
  """Returns messages as a transcript, one alone as what it says."""
  if isinstance(value, str):
    return value
  if isinstance(value, dict):  # messages with tools
    value = value["messages"]
  said = [messages.text(message) for message in value]
  if len(value) == 1:
    return said[0]
  turns = zip(value, said, strict=True)
  return "\n\n".join(f"{x['role'].title()}: {text}" for x, text in turns)


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


def _step(row: dict[str, Any], where: str) -> int | None:
  value = row.get("step")
  if value is not None and (type(value) is not int or value < 0):
    raise ValueError(
      f"{where}: column 'step' is {value!r}; allowed: a whole number of at"
      " least 0, or no such column"
    )
  return value

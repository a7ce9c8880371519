"""What a preference loss is, and the table of them.

A loss is one function of a `PairLogps` and keyword-only hyper-parameters. Its
signature says which hyper-parameters it has and, by their annotations, what
each may be; `register` puts it in `LOSSES` under its own name.
"""

import dataclasses
import difflib
import inspect
import math
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
from jaxtyping import Float

from dpo_jax.types import Array

Logps = Float[Array, "B"]
Scalar = int | float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers between `low` and `high`; `[` and `]` include the end."""

  low: float
  high: float
  brackets: str

  def __contains__(self, value: float) -> bool:
    above = value > self.low or (self.brackets[0] == "[" and value == self.low)
    below = value < self.high or (
      self.brackets[1] == "]" and value == self.high
    )
    return above and below

  def __str__(self) -> str:
    if self.low == -math.inf:
      return "finite"
    if self.high == math.inf:
      return (
        f"{'at least' if self.brackets[0] == '[' else 'above'} {self.low:g}"
      )
    return f"in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"


Positive = Annotated[Scalar, Range(0, math.inf, "()")]
NotNegative = Annotated[Scalar, Range(0, math.inf, "[)")]
UnitInterval = Annotated[Scalar, Range(0, 1, "[]")]
Fraction = Annotated[Scalar, Range(0, 1, "[)")]
Share = Annotated[Scalar, Range(0, 1, "(]")]
Finite = Annotated[Scalar, Range(-math.inf, math.inf, "()")]
# A label wrong half of the time says nothing, and more often, the opposite.
FlipRate = Annotated[Scalar, Range(0, 0.5, "[)")]
PositiveFlipRate = Annotated[Scalar, Range(0, 0.5, "()")]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLogps:
  """Log-probabilities of a batch's responses: summed over tokens, nats.

  Of a model with a scalar head, the scores of the responses instead.
  The lengths are those of the whole batch, also where only some of its pairs
  are present; an absent pair's log-probabilities are 0, and a slot that holds
  no pair has length 0.
  """

  policy_chosen: Array  # f32[B]
  policy_rejected: Array  # f32[B]
  reference_chosen: Array | None  # f32[B]
  reference_rejected: Array | None  # f32[B]
  chosen_lengths: Array  # f32[B]  response tokens
  rejected_lengths: Array  # f32[B]
  score_gaps: Array | None = None  # f32[B]  of scored pairs; 0 without a pair
  # Of the prompt's tokens from its second on, where the loss counts them.
  policy_prompt: Array | None = None  # f32[B]
  prompt_lengths: Array | None = None  # f32[B]
  # Policy minus reference of another pair's response behind the prompt, of
  # every pair of the batch, present or not; 0 in a slot without one.
  mismatched_logratio: Array | None = None  # f32[B]
  # Policy minus reference of each response of a ranked list, the best first;
  # absent ones have length 0 and stand last. None: the pair is the list.
  ranked_logratios: Array | None = None  # f32[B,K]
  ranked_lengths: Array | None = None  # f32[B,K]

  @property
  def present(self) -> Array:
    """Which slots hold a pair, or either of its responses, bool[B]."""
    return (self.chosen_lengths > 0) | (self.rejected_lengths > 0)

  @property
  def chosen_logratio(self) -> Array:
    """Policy minus reference log-probability of the chosen response."""
    assert self.reference_chosen is not None, "a loss without a reference"
    return self.policy_chosen - self.reference_chosen

  @property
  def rejected_logratio(self) -> Array:
    """Policy minus reference log-probability of the rejected response."""
    assert self.reference_rejected is not None, "a loss without a reference"
    return self.policy_rejected - self.reference_rejected

  @property
  def margin(self) -> Array:
    """Chosen minus rejected log-ratio."""
    return self.chosen_logratio - self.rejected_logratio


@dataclasses.dataclass(frozen=True)
class Loss:
  """A preference loss and what the training step must know of it."""

  name: str
  # (PairLogps, *, hyper-parameters) -> f[B]; with a state, it comes second.
  fn: Callable[..., Array]
  hyperparameters: tuple[str, ...]  # from the signature, without defaults
  needs_reference: bool
  # "pairs", "scored_pairs", "demonstrations" (chosen responses alone),
  # "labelled" (pairs or lone responses), or "ranked" (lists)
  inputs: str
  looks_across_batch: bool  # a pair's loss depends on the batch's other pairs
  # Of f_divergence, ld_alpha, wpo, sft_weight, prompt_nll.
  honours: frozenset[str]
  reads_mismatched: bool = False
  state: tuple[str, ...] = ()  # scalars that steps hand on, 0 at first
  next_state: Callable[..., dict[str, Array]] | None = None  # called as `fn`
  head: str = "vocabulary"  # of `ModelConfig`; others yield scores, not logps

  def paragraphs(self, begin: str) -> list[str]:
    """Returns those of its docstring that begin so, without that, a line each.

    `Differs:` tells it from its source, `Beware:` is said when it is run.
    """
    found = inspect.getdoc(self.fn).split("\n\n")
    lines = (" ".join(x.split()) for x in found)
    return [x[len(begin) :].strip() for x in lines if x.startswith(begin)]

  def range_of(self, hyperparameter: str) -> Range:
    """Returns what values the loss allows."""
    hints = typing.get_type_hints(self.fn, include_extras=True)
    return hints[hyperparameter].__metadata__[0]


LOSSES: dict[str, Loss] = {}


def register(
  *,
  honours: frozenset[str],
  needs_reference: bool = True,
  inputs: str = "pairs",
  looks_across_batch: bool = False,
  reads_mismatched: bool = False,
  state: tuple[str, ...] = (),
  next_state: Callable[..., dict[str, Array]] | None = None,
  head: str = "vocabulary",
) -> Callable[[Any], Any]:
  """Returns a decorator that adds a loss to `LOSSES` under its own name."""

  def add(fn):
    parameters = inspect.signature(fn).parameters.values()
    LOSSES[fn.__name__] = Loss(
      name=fn.__name__,
      fn=fn,
      hyperparameters=tuple(
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY
      ),
      needs_reference=needs_reference,
      inputs=inputs,
      looks_across_batch=looks_across_batch,
      honours=honours,
      reads_mismatched=reads_mismatched,
      state=state,
      next_state=next_state,
      head=head,
    )
    return fn

  return add


def find(name: str) -> Loss:
  """Returns the loss of that name.

  Raises:
    ValueError: there is none; the message names the nearest.
  """
  if name in LOSSES:
    return LOSSES[name]
  nearest = difflib.get_close_matches(str(name), LOSSES, n=1)
  hint = f", did you mean {nearest[0]!r}?" if nearest else ""
  raise ValueError(
    f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}{hint}"
  )


def check_hyperparameters(
  loss: Loss, hyperparameters: Mapping[str, float]
) -> None:
  """Raises ValueError unless the loss finds each of its own in its range."""
  for key in loss.hyperparameters:
    if key not in hyperparameters:
      raise ValueError(f"loss {loss.name!r} needs loss.{key}")
    check(key, hyperparameters[key], loss.range_of(key))


def check(key: str, value: float, allowed: Range) -> None:
  """Raises ValueError unless loss.key is a number in the range."""
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise ValueError(f"loss.{key}={value!r}: must be a number")
  if not math.isfinite(value):
    raise ValueError(f"loss.{key}={value:g}: must be finite")
  if value not in allowed:
    raise ValueError(f"loss.{key}={value:g}: must be {allowed}")


def does_not_honour(name: str, key: str, losses: list[str]) -> ValueError:
  """Returns the error of an option that a loss would have ignored."""
  return ValueError(
    f"loss {name!r} does not honour loss.{key}; losses that do:"
    f" {', '.join(sorted(losses)) or 'none'}"
  )


def smoothed(z: Array, label_smoothing: Scalar) -> Array:
  """Returns the cross-entropy of s(z) to a label wrong with probability e."""
  return -(1 - label_smoothing) * jax.nn.log_sigmoid(
    z
  ) - label_smoothing * jax.nn.log_sigmoid(-z)

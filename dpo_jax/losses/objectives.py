"""What a run minimises: a loss, or a weighted sum of losses, with modifiers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int

from dpo_jax.losses import (
  labelled,  # noqa: F401, puts its losses in the table
  modifiers,
  preference,  # noqa: F401, puts its losses in the table
  reference_free,  # noqa: F401, puts its losses in the table
  registry,
  reward_model,  # noqa: F401, puts its losses in the table
  running,  # noqa: F401, puts its losses in the table
  scored,  # noqa: F401, puts its losses in the table
)
from dpo_jax.losses.registry import Logps, Loss, PairLogps, Range
from dpo_jax.types import Array, Rows

LOSSES: dict[str, Loss] = registry.LOSSES
# What losses read, the most demanding first. A list is no pair.
_DEMANDING = ("ranked", "scored_pairs", "pairs", "labelled", "demonstrations")


@dataclasses.dataclass(frozen=True)
class Term:
  """A loss with its hyper-parameters and its weight in the sum."""

  loss: Loss
  weight: float
  hyperparameters: tuple[tuple[str, float], ...]

  def call(
    self,
    fn: Callable[..., Any],
    pairs: PairLogps,
    state: Mapping[str, Array] | None,
  ) -> Any:
    """Returns `fn`, of this loss, of the pairs and of what it needs besides."""
    arguments = (pairs, state) if self.loss.state else (pairs,)
    return fn(*arguments, **dict(self.hyperparameters))


@dataclasses.dataclass(frozen=True)
class Objective:
  """Weighted losses and modifiers, checked."""

  terms: tuple[Term, ...]
  f_divergence: str
  f_alpha: float | None
  ld_alpha: float
  wpo: bool
  wpo_max_weight: float
  sft_weight: float
  prompt_nll: bool

  @property
  def name(self) -> str:
    """The name of the loss, or of those of a weighted sum."""
    return "+".join(term.loss.name for term in self.terms)

  @property
  def needs_reference(self) -> bool:
    """Whether reference log-probabilities are read."""
    return any(term.loss.needs_reference for term in self.terms)

  @property
  def looks_across_batch(self) -> bool:
    """Whether all pairs of a batch must be present at once."""
    return any(term.loss.looks_across_batch for term in self.terms)

  @property
  def inputs(self) -> str:
    """What the most demanding loss reads; beside pairs, `sft` sees chosen."""
    kinds = {term.loss.inputs for term in self.terms}
    return next(kind for kind in _DEMANDING if kind in kinds)

  @property
  def head(self) -> str:
    """The head of the model that is trained, `ModelConfig.head`."""
    return self.terms[0].loss.head

  @property
  def extra_columns(self) -> tuple[str, ...]:
    """What is scored beside the responses; see `data.loader.Loader`."""
    mismatched = any(term.loss.reads_mismatched for term in self.terms)
    return ("mismatched",) * mismatched + ("prompt",) * self.prompt_nll

  @property
  def needs_log_sum_squares(self) -> bool:
    """Whether `per_pair` must be given `modifiers.wpo_log_weights`."""
    return self.wpo

  @property
  def state(self) -> tuple[str, ...]:
    """Names of the scalars that the train state carries, 0 at first."""
    return tuple(name for term in self.terms for name in term.loss.state)

  @property
  def beta(self) -> float:
    """What scales log-ratios to rewards; 1 for losses without a beta."""
    return next(
      (
        value
        for term in self.terms
        for key, value in term.hyperparameters
        if key == "beta"
      ),
      1.0,
    )

  def token_weights(
    self, rows: Rows, lengths: Int[Array, "B C"]
  ) -> Float[Array, "R S"]:
    """Returns each token's weight in its response's sum, 0 at padding."""
    return modifiers.length_desensitised_weights(rows, lengths, self.ld_alpha)

  def per_pair(
    self,
    pairs: PairLogps,
    log_weights: Logps | None = None,
    state: Mapping[str, Array] | None = None,
  ) -> Logps:
    """Returns each pair's loss; the step takes the mean over valid pairs.

    Args:
      pairs: from sums under `token_weights`.
      log_weights: `modifiers.wpo_log_weights`, where these are needed.
      state: a scalar for each name of `state`, where there are any.
    """
    compared = pairs
    if self.f_divergence != "reverse_kl":
      compared = modifiers.with_scores(pairs, self.f_divergence, self.f_alpha)
    losses = sum(
      term.weight * term.call(term.loss.fn, compared, state)
      for term in self.terms
    )
    if self.wpo:
      losses = modifiers.weighted(losses, log_weights, self.wpo_max_weight)
    if self.sft_weight:
      losses += self.sft_weight * modifiers.chosen_nll(pairs)
    return losses

  def next_state(
    self, pairs: PairLogps, state: Mapping[str, Array] | None
  ) -> dict[str, Array] | None:
    """Returns what the next step is given as `state`; None without names."""
    if not self.state:
      return None
    found = {}
    for term in self.terms:
      if term.loss.next_state:
        found |= term.call(term.loss.next_state, pairs, state)
    return found


def make_objective(
  name: str,
  hyperparameters: Mapping[str, float],
  *,
  f_divergence: str = "reverse_kl",
  f_alpha: float | None = None,
  ld_alpha: float = 1.0,
  wpo: bool = False,
  wpo_max_weight: float = 1.0,
  sft_weight: float = 0.0,
  prompt_nll: bool = False,
) -> Objective:
  """Returns the loss `name` with its hyper-parameters and modifiers.

  Args:
    name: a key of `LOSSES`, or a weighted sum of them, written
      `dpo:0.8,bco_pair:0.2,sft:1`. The losses of a sum share their
      hyper-parameters, and each of them must honour the modifiers.
    hyperparameters: all of the losses', and no others.
    f_divergence: one of `modifiers.F_DIVERGENCES`.
    f_alpha: the alpha of `f_divergence="alpha"`, not 1.
    ld_alpha: weight, in [0, 1], of tokens past the shorter response's length.
    wpo: weight pairs by their probability under the policy.
    wpo_max_weight: bound, above 0, of that weight; inf: none.
    sft_weight: weight, at least 0, of the chosen responses' token-mean NLL.
    prompt_nll: whether the loss's own token-mean NLL covers prompts too.

  Raises:
    ValueError: a value is not allowed, or a loss does not honour it.
  """
  terms = _make_terms(name, hyperparameters)
  modifiers.check_f_divergence(f_divergence, f_alpha)
  registry.check("ld_alpha", ld_alpha, Range(0, 1, "[]"))
  registry.check("sft_weight", sft_weight, Range(0, math.inf, "[)"))
  if not wpo_max_weight > 0:
    raise ValueError(f"loss.wpo_max_weight={wpo_max_weight:g}: must be above 0")
  if wpo_max_weight != 1 and not wpo:
    raise ValueError(
      f"loss.wpo_max_weight={wpo_max_weight:g}: only with loss.wpo=True"
    )
  used = {
    "f_divergence": f_divergence != "reverse_kl",
    "ld_alpha": ld_alpha != 1,
    "wpo": wpo,
    "sft_weight": sft_weight != 0,
    "prompt_nll": prompt_nll,
  }
  for modifier, is_used in used.items():
    for term in terms:
      if is_used and modifier not in term.loss.honours:
        honouring = [n for n, x in LOSSES.items() if modifier in x.honours]
        raise registry.does_not_honour(term.loss.name, modifier, honouring)
  if used["ld_alpha"] and used["sft_weight"]:
    raise ValueError(
      f"loss.sft_weight={sft_weight:g}: must be 0 where loss.ld_alpha is"
      " below 1; its likelihood counts every token alike"
    )
  return Objective(
    terms=terms,
    f_divergence=f_divergence,
    f_alpha=None if f_alpha is None else float(f_alpha),
    ld_alpha=float(ld_alpha),
    wpo=bool(wpo),
    wpo_max_weight=float(wpo_max_weight),
    sft_weight=float(sft_weight),
    prompt_nll=bool(prompt_nll),
  )


def _make_terms(
  name: str, hyperparameters: Mapping[str, float]
) -> tuple[Term, ...]:
  """Returns the losses of a name, each with its own hyper-parameters."""
  weights = _parse(name)
  losses = [registry.find(member) for member in weights]
  for key in hyperparameters:
    if not any(key in loss.hyperparameters for loss in losses):
      honouring = [n for n, x in LOSSES.items() if key in x.hyperparameters]
      raise registry.does_not_honour(name, key, honouring)
  terms = []
  for loss in losses:
    registry.check_hyperparameters(loss, hyperparameters)
    values = [
      (key, float(hyperparameters[key])) for key in loss.hyperparameters
    ]
    terms.append(Term(loss, weights[loss.name], tuple(values)))
  kinds = {loss.inputs for loss in losses}
  if "ranked" in kinds and kinds - {"ranked", "demonstrations"}:
    raise ValueError(
      f"loss.name={name!r}: a loss of ranked lists can be summed with losses"
      " of demonstrations only"
    )
  if len({loss.head for loss in losses}) > 1:
    raise ValueError(
      f"loss.name={name!r}: a loss of scores cannot be summed with one of"
      " log-probabilities, or of other scores"
    )
  return tuple(terms)


def _parse(name: str) -> dict[str, float]:
  """Returns the weight of each loss that a name names.

  Raises:
    ValueError: a weight is missing or not above 0, or a loss stands twice.
  """
  if not isinstance(name, str) or not set(name) & set(":,"):
    return {name: 1.0}
  weights = {}
  for part in name.split(","):
    member, _, text = part.partition(":")
    member = member.strip()
    try:
      weight = float(text)
    except ValueError:
      weight = math.nan
    if not 0 < weight < math.inf:
      raise ValueError(
        f"loss.name={name!r}: {part!r} must be a loss and a weight above 0,"
        " as in dpo:0.8,sft:1"
      )
    if member in weights:
      raise ValueError(f"loss.name={name!r}: {member!r} stands twice")
    weights[member] = weight
  return weights

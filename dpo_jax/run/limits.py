"""What each number of a config may be, in one table.

An interval is written as in mathematics: `[0, 1)` holds 0 and not 1. `inf)` is
any number that float32 holds. Numbers that are bounded only to fit what counts
them end at `MOST`. What losses may have is theirs to say (`losses`).
"""

import math
from collections.abc import Mapping
from typing import Any

MOST = 2**31 - 1
INFINITE = 2.0**128  # float32 rounds this to infinity
# Rows of the embedding: sixteen times the largest vocabulary that is known.
MAX_VOCABULARY = 2**22
MAX_SEED = 2**63 - 1
_COUNT, _COUNT_OR_0 = f"[1, {MOST}]", f"[0, {MOST}]"
_AXIS = f"[1, {MOST}] or -1"

LIMITS = {
  "seed": f"[0, {MAX_SEED}]",
  "steps": _COUNT_OR_0,
  "epochs": _COUNT_OR_0,
  "batch_size": _COUNT,
  "microbatch_rows": _COUNT_OR_0,
  "data.max_length": _COUNT,
  "data.max_prompt_length": _COUNT,
  "data.row_length": _COUNT_OR_0,
  "model.vocab_size": f"[0, {MAX_VOCABULARY}]",
  "model.vocab_multiple": f"[1, {MAX_VOCABULARY}]",
  "model.router_loss": "[0, inf)",
  "model.logprob_chunk": _COUNT,
  "lora.rank": _COUNT_OR_0,
  "lora.alpha": "(0, inf)",
  "ppo.max_new_tokens": _COUNT,
  "ppo.temperature": "(0, inf)",
  "ppo.epochs": _COUNT,
  "ppo.minibatches": _COUNT,
  "ppo.clip": "(0, inf)",
  "ppo.value_coef": "[0, inf)",
  "ppo.value_clip": "[0, inf)",
  "ppo.gamma": "[0, 1]",
  "ppo.lam": "[0, 1]",
  "ppo.kl_coef": "[0, inf)",
  "ppo.target_kl": "(0, inf)",
  "ppo.horizon": "(0, inf)",
  "ppo.missing_eos_penalty": "[0, inf)",
  "reference.alpha": "(0, 1]",
  "reference.every": _COUNT,
  "optimizer.learning_rate": "(0, inf)",
  "optimizer.warmup_steps": _COUNT_OR_0,
  "optimizer.b1": "[0, 1)",
  "optimizer.b2": "[0, 1)",
  "optimizer.eps": "[0, inf)",
  "optimizer.weight_decay": "[0, inf)",
  "optimizer.clip": "[0, inf)",
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.tensor": _AXIS,
  "mesh.expert": _AXIS,
  "checkpoint.every": _COUNT_OR_0,
  "checkpoint.minutes": "[0, inf)",
  "checkpoint.keep": _COUNT,
  "eval.every": _COUNT_OR_0,
  "eval.pairs": _COUNT_OR_0,
  "log.every": _COUNT,
}


def check(values: Mapping[str, Any]) -> None:
  """Checks numbers by their dotted keys; None and what is no number pass.

  Raises:
    ValueError: one is outside of its interval, NaN, or is infinite in float32
      and not before.
  """
  for key, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    if key in LIMITS and not _is_in(value, LIMITS[key]):
      raise ValueError(f"{key}={value}: must be {_words(LIMITS[key])}")
    if math.isnan(value) or INFINITE <= abs(value) < math.inf:
      raise ValueError(f"{key}={value}: must be a number that float32 holds")


def _parse(interval: str) -> tuple[str, float, float, str, str]:
  """Returns `(`, its ends, `)` and what else is allowed."""
  interval, _, besides = interval.partition(" or ")
  low, high = interval[1:-1].split(", ")
  to_number = lambda x: INFINITE if x == "inf" else int(x)
  return interval[0], to_number(low), to_number(high), interval[-1], besides


def _is_in(value: float, interval: str) -> bool:
  begin, low, high, end, besides = _parse(interval)
  is_above = value > low if begin == "(" else value >= low
  is_below = value < high if end == ")" else value <= high
  return is_above and is_below or str(value) == besides


def _words(interval: str) -> str:
  """Returns an interval as a sentence has it."""
  begin, low, high, end, besides = _parse(interval)
  besides = besides and f", or {besides}"
  if high in (0, 1):
    return f"in {interval}"
  least = f"{'above' if begin == '(' else 'at least'} {low}"
  most = "finite" if high == INFINITE else f"at most {high}"
  return f"{least} and {most}{besides}"

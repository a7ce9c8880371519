"""Optimizers and learning-rate schedules, by name, from optax."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

# What each optimizer honours, with the values it takes where none is given.
# RMSprop's are those of Rafailov et al.'s code (decay 0.99, eps 1e-8).
DEFAULTS: Mapping[str, Mapping[str, float]] = {
  "rmsprop": dict(b2=0.99, eps=1e-8),
  "adamw": dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
  "adafactor": dict(weight_decay=0.0),
  "lion": dict(b1=0.9, b2=0.99, weight_decay=0.0),
}
SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
  learning_rate: float,
  *,
  schedule: str,
  warmup_steps: int,
  total_steps: int,
) -> Callable[[jax.Array], jax.Array]:
  """Returns the learning rate as a function of the updates done before.

  Warm-up rises linearly and reaches the full rate at update
  `warmup_steps + 1`; its first update is not at rate 0 (Rafailov et al.'s
  code does the same). Decay then goes to 0 at `total_steps`.

  Raises:
    ValueError: an unknown schedule, or a rate that is not above 0.
  """
  if schedule not in SCHEDULES:
    raise ValueError(
      f"unknown optimizer.schedule '{schedule}'; known: {', '.join(SCHEDULES)}"
    )
  if not learning_rate > 0:
    raise ValueError(
      f"optimizer.learning_rate={learning_rate}: must be above 0"
    )
  if warmup_steps < 0:
    raise ValueError(f"optimizer.warmup_steps={warmup_steps}: at least 0")
  decay_steps = max(total_steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(learning_rate),
    "linear": optax.linear_schedule(learning_rate, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(learning_rate, decay_steps),
  }[schedule]
  warmup = optax.linear_schedule(
    learning_rate / (warmup_steps + 1), learning_rate, warmup_steps
  )
  return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
  name: str,
  schedule: Callable[[jax.Array], jax.Array],
  *,
  clip: float,
  **options: float | None,
) -> optax.GradientTransformation:
  """Returns clipping by global norm followed by the named optimizer.

  Args:
    name: a key of `DEFAULTS`.
    schedule: the learning rate as a function of the updates done.
    clip: largest global gradient norm; 0 clips nothing.
    **options: `b1 b2 eps weight_decay`; None takes the optimizer's default.

  Raises:
    ValueError: an unknown name, or an option that it does not honour.
  """
  if name not in DEFAULTS:
    raise ValueError(
      f"unknown optimizer.name '{name}'; known: {', '.join(sorted(DEFAULTS))}"
    )
  given = {key: value for key, value in options.items() if value is not None}
  for key, value in given.items():
    if key not in DEFAULTS[name]:
      raise ValueError(
        f"optimizer '{name}' does not honour optimizer.{key}={value}; it"
        f" honours: {', '.join(DEFAULTS[name])}"
      )
    if value < 0 or (key in ("b1", "b2") and value >= 1):
      raise ValueError(f"optimizer.{key}={value}: out of range")
  if clip < 0:
    raise ValueError(f"optimizer.clip={clip}: 0 (none) or above")
  settings = {**DEFAULTS[name], **given}
  update = _OPTIMIZERS[name](schedule, settings)
  if not clip:
    return update
  return optax.chain(optax.clip_by_global_norm(clip), update)


def is_decayed(params: Any) -> Any:
  """Returns True for each matrix; norms and biases are not decayed."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("scale", "bias"), params
  )


def _rmsprop(schedule, settings):
  return optax.rmsprop(
    schedule,
    decay=settings["b2"],
    eps=settings["eps"],
    eps_in_sqrt=False,
  )


def _adamw(schedule, settings):
  return optax.adamw(schedule, **settings, mask=is_decayed)


def _adafactor(schedule, settings):
  # Preference learning rates are absolute, not relative to the parameters.
  return optax.adafactor(
    schedule,
    multiply_by_parameter_scale=False,
    weight_decay_rate=settings["weight_decay"] or None,
    weight_decay_mask=is_decayed,
  )


def _lion(schedule, settings):
  return optax.lion(schedule, **settings, mask=is_decayed)


_OPTIMIZERS = dict(
  rmsprop=_rmsprop, adamw=_adamw, adafactor=_adafactor, lion=_lion
)

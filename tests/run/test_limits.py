"""Every number of a config has its limits, which are checked in one place."""

import math

import pytest

from configs import base
from dpo_jax.checkpoints import run_folder
from dpo_jax.run import experiment, limits
from dpo_jax.run import ppo as ppo_run

DEFAULTS = run_folder.flatten(base.get_config().to_dict())


def test_every_number_of_a_config_has_its_limits():
  # What is None by default is a number too, but for names.
  known = {
    key
    for key, value in DEFAULTS.items()
    if not isinstance(value, bool | str) and not key.startswith("loss.")
  }
  assert known == limits.LIMITS.keys()


def test_the_defaults_are_within_the_limits():
  limits.check(DEFAULTS)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("optimizer.learning_rate", math.inf, "=inf: must be above 0 and finite"),
    ("optimizer.learning_rate", math.nan, "=nan: must be above 0 and finite"),
    ("optimizer.learning_rate", 0.0, "=0.0: must be above 0"),
    ("optimizer.learning_rate", 1e39, "=1e.39: must be above 0 and finite"),
    ("optimizer.b1", 1.0, r"=1.0: must be in \[0, 1\)"),
    ("reference.alpha", 0.0, r"=0.0: must be in \(0, 1\]"),
    ("batch_size", 0, "=0: must be at least 1 and at most 2147483647"),
    ("batch_size", 2**31, "=2147483648: must be at least 1 and at most 2147"),
    ("eval.every", -1, "=-1: must be at least 0"),
    ("seed", 2**63, "=9223372036854775808: must be at least 0 and at most"),
    ("seed", -1, "=-1: must be at least 0"),
    (
      "model.vocab_size",
      10**7,
      "=10000000: must be at least 0 and at most 4194304",
    ),
    ("mesh.fsdp", -2, "=-2: must be at least 1 and at most .*, or -1"),
    ("mesh.fsdp", 0, "=0: must be at least 1"),
    ("loss.beta", math.nan, "=nan: must be a number that float32 holds"),
    ("loss.beta", 1e300, "=1e.300: must be a number that float32 holds"),
  ],
)
def test_a_number_outside_of_its_limits_is_refused(key, value, message):
  with pytest.raises(ValueError, match=f"^{key}{message}"):
    limits.check({key: value})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("mesh.fsdp", -1),
    ("reference.alpha", 1.0),
    ("optimizer.b2", 0.0),
    ("lora.alpha", None),
    ("ppo.whiten", False),
    ("seed", 2**63 - 1),
  ],
)
def test_the_ends_of_the_limits_are_allowed(key, value):
  limits.check({key: value})


@pytest.mark.parametrize("key", sorted(limits.LIMITS))
def test_a_config_is_checked_before_anything_is_read(key):
  config = base.get_config()
  config.loss.beta = 0.1
  is_float = isinstance(DEFAULTS[key], float) or (
    DEFAULTS[key] is None and key != "reference.every"
  )
  config.update_from_flattened_dict({key: -math.inf if is_float else -3})
  for function in (experiment.check, experiment.build):
    with pytest.raises(ValueError, match=f"^{key}=-.*: must be "):
      function(config)


def test_options_of_ppo_are_refused_for_other_losses():
  config = base.get_config()
  assert ppo_run.DEFAULTS == config.ppo.to_dict()
  config.loss.beta = 0.1
  experiment.check(config)
  changes = {key: 0.5 for key in ppo_run.DEFAULTS}
  changes |= {"reward": "synthetic", "whiten": False}
  changes |= dict.fromkeys(("max_new_tokens", "epochs", "minibatches"), 7)
  for key, value in changes.items():
    config = base.get_config()
    config.loss.beta, config.ppo[key] = 0.1, value
    with pytest.raises(ValueError, match=f"^ppo.{key}=.*: loss 'dpo' does not"):
      experiment.check(config)

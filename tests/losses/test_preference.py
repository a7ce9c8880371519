import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from configs import losses as loss_configs
from dpo_jax.losses import preference

NAMES = sorted(preference.LOSSES)
HYPERPARAMETERS = dict(beta=0.3, tau=0.5, label_smoothing=0.2, alpha=0.4)
WITH_REFERENCE = [n for n in NAMES if preference.LOSSES[n].needs_reference]
PAIRWISE = [n for n in NAMES if "ld_alpha" in preference.LOSSES[n].honours]


def hyperparameters(name):
  keys = preference.LOSSES[name].hyperparameters
  return {key: HYPERPARAMETERS[key] for key in keys}


def objective(name, **modifiers):
  return preference.make_objective(name, hyperparameters(name), **modifiers)


def make_pairs(num_pairs=5, seed=0, dtype="float32"):
  rng = np.random.default_rng(seed)
  return preference.PairLogps(
    *(jnp.asarray(-rng.uniform(4, 6, num_pairs), dtype) for _ in range(4)),
    chosen_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
    rejected_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
  )


def pairs_of(u, v):
  """Returns pairs with these log-ratios, of 2 and 4 tokens."""
  u, v = jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32)
  zeros = jnp.zeros_like(u)
  return preference.PairLogps(u, v, zeros, zeros, zeros + 2, zeros + 4)


def swapped(pairs):
  return preference.PairLogps(
    pairs.policy_rejected,
    pairs.policy_chosen,
    pairs.reference_rejected,
    pairs.reference_chosen,
    pairs.rejected_lengths,
    pairs.chosen_lengths,
  )


def s(x):
  return 1 / (1 + math.exp(-x))


def ls(x):
  return math.log(s(x))


# One pair: u = 2, v = -1, so d = 3; nw = 2, nl = 4; beta 0.3, so z = 0.9.
BY_HAND = {
  "dpo": -ls(0.9),
  "cdpo": -0.8 * ls(0.9) - 0.2 * ls(-0.9),
  "robust": (-0.8 * ls(0.9) + 0.2 * ls(-0.9)) / 0.6,
  "ipo": (1 + 0.25 - 1 / 0.6) ** 2,
  "ipo_sum": (3 - 1 / 0.6) ** 2,
  "hinge": 0.1,
  "dpo_norm": -ls(0.3 * 1.25),
  "apo_zero": 1 - s(0.6) + s(-0.3),
  "apo_down": s(0.6) + 1 - s(0.9),
  "nca": -ls(0.6) - ls(-0.6) / 2 - ls(0.3) / 2,
  "bco_pair": -ls(0.6) - ls(0.3),
  "sppo_hard": (2 - 1 / 0.6) ** 2 + (-1 + 1 / 0.6) ** 2,
  "exo": s(0.9) * (ls(0.9) - math.log(0.8))
  + s(-0.9) * (ls(-0.9) - math.log(0.2)),
  "discopop": s(-1.8) * -ls(0.9) + s(1.8) * math.exp(-0.9),
  "aot": -0.8 * ls(0.9) - 0.2 * ls(-0.9),
  "aot_unpaired": -0.8 * ls(0.9) - 0.2 * ls(-0.9),
  "sft": -2 / 2,
  "sft_sum": -2,
  "preferred_ft": -2 / 2,
  "unlikelihood": -2 + 0.4 * -1,
}

LOG2 = math.log(2)
AT_REFERENCE = {
  "dpo": LOG2,
  "cdpo": LOG2,
  "robust": LOG2,
  "ipo": (1 / 0.6) ** 2,
  "ipo_sum": (1 / 0.6) ** 2,
  "hinge": 1,
  "dpo_norm": LOG2,
  "apo_zero": 1,
  "apo_down": 1,
  "nca": 2 * LOG2,
  "bco_pair": 2 * LOG2,
  "sppo_hard": 2 * (1 / 0.6) ** 2,
  "exo": -LOG2 - math.log(0.8 * 0.2) / 2,
  "discopop": (LOG2 + 1) / 2,
  "aot": LOG2,
  "aot_unpaired": LOG2,
}


def test_every_loss_has_a_value_by_hand():
  assert set(BY_HAND) == set(NAMES)
  assert set(AT_REFERENCE) == set(WITH_REFERENCE)


@pytest.mark.parametrize("name", NAMES)
def test_value_by_hand(name):
  losses = objective(name).per_pair(pairs_of([2.0], [-1.0]))
  np.testing.assert_allclose(losses, [BY_HAND[name]], rtol=1e-5)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_value_when_policy_equals_reference(name):
  pairs = make_pairs()
  pairs = dataclasses.replace(
    pairs,
    policy_chosen=pairs.reference_chosen,
    policy_rejected=pairs.reference_rejected,
  )
  losses = objective(name).per_pair(pairs)
  np.testing.assert_allclose(losses, [AT_REFERENCE[name]] * 5, rtol=1e-5)


def of_policy(name, pairs, **modifiers):
  """Returns the mean loss as a function of the policy's f[B] and f[B]."""

  def fn(chosen, rejected):
    moved = dataclasses.replace(
      pairs, policy_chosen=chosen, policy_rejected=rejected
    )
    return objective(name, **modifiers).per_pair(moved).mean()

  return fn


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name):
  with jax.enable_x64(True):
    pairs = make_pairs(dtype="float64")
    check_grads(
      of_policy(name, pairs),
      (pairs.policy_chosen, pairs.policy_rejected),
      order=1,
    )


@pytest.mark.parametrize("name", NAMES)
def test_jit_equals_no_jit(name):
  per_pair = objective(name).per_pair
  pairs = make_pairs()
  np.testing.assert_allclose(
    jax.jit(per_pair)(pairs), per_pair(pairs), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(order=st.permutations(range(5)), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=5, deadline=None)
def test_pairs_in_another_order_keep_their_losses(name, order, seed):
  pairs = make_pairs(seed=seed)
  order = np.array(order)
  per_pair = objective(name).per_pair
  np.testing.assert_allclose(
    per_pair(jax.tree.map(lambda x: x[order], pairs)),
    per_pair(pairs)[order],
    rtol=1e-6,
  )


@pytest.mark.parametrize("name", NAMES)
def test_slots_without_a_pair_disturb_no_other(name):
  pairs = make_pairs(4)
  insert = lambda x: jnp.insert(x, jnp.array([0, 2, 4]), 0.0)
  losses = objective(name).per_pair(jax.tree.map(insert, pairs))
  kept = losses[jnp.array([1, 2, 4, 5])]
  np.testing.assert_allclose(kept, objective(name).per_pair(pairs), rtol=1e-5)
  assert jnp.isfinite(losses).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_losses_that_look_across_the_batch_do(name):
  pairs = make_pairs(6)
  moved = jax.tree.map(lambda x: x.at[0].add(-7.0), pairs)
  moved = dataclasses.replace(
    moved,
    reference_chosen=pairs.reference_chosen,
    chosen_lengths=pairs.chosen_lengths,
    rejected_lengths=pairs.rejected_lengths,
  )
  per_pair = objective(name).per_pair
  others_kept = np.allclose(per_pair(pairs)[1:], per_pair(moved)[1:])
  assert others_kept != preference.LOSSES[name].looks_across_batch


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("logratio", [-1e4, -300.0, 300.0, 1e4])
def test_gradients_are_finite_at_extreme_logratios(name, logratio):
  pairs = pairs_of([logratio, logratio, 0.0], [0.0, -logratio, logratio])
  value, grads = jax.value_and_grad(of_policy(name, pairs), (0, 1))(
    pairs.policy_chosen, pairs.policy_rejected
  )
  assert all(jnp.isfinite(x).all() for x in (value, *grads))


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_swapping_chosen_and_rejected_negates_the_margin(seed):
  pairs = make_pairs(seed=seed)
  np.testing.assert_array_equal(swapped(pairs).margin, -pairs.margin)
  chosen, rejected = preference.implicit_rewards(pairs, 0.3)
  np.testing.assert_allclose(
    chosen - rejected, 0.3 * pairs.margin, rtol=1e-4, atol=1e-6
  )
  np.testing.assert_array_equal(
    preference.implicit_rewards(swapped(pairs), 0.3)[0], rejected
  )


def test_label_smoothing_zero_is_dpo_and_swapping_labels_is_its_complement():
  pairs = make_pairs()
  dpo = preference.dpo(pairs, beta=0.3)
  for loss in (preference.cdpo, preference.robust):
    np.testing.assert_allclose(
      loss(pairs, beta=0.3, label_smoothing=0.0), dpo, rtol=1e-6
    )
  # robust is unbiased: its mean over flips with probability e is dpo.
  robust = lambda p: preference.robust(p, beta=0.3, label_smoothing=0.2)
  np.testing.assert_allclose(
    0.8 * robust(pairs) + 0.2 * robust(swapped(pairs)), dpo, rtol=1e-5
  )


def test_aot_pairs_quantiles():
  # Policy margins (3, 1) and reference margins (0, 2) sort to (1, 3), (0, 2).
  pairs = preference.PairLogps(
    *(jnp.array(x) for x in ([3.0, 1.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0])),
    chosen_lengths=jnp.ones(2),
    rejected_lengths=jnp.ones(2),
  )
  losses = preference.aot(pairs, beta=0.3, label_smoothing=0.0)
  np.testing.assert_allclose(losses, [-ls(0.3), -ls(0.3)], rtol=1e-6)


def test_sft_mean_over_pairs_is_the_token_mean_however_pairs_are_split():
  pairs = make_pairs(6)
  pairs = dataclasses.replace(
    pairs, chosen_lengths=pairs.chosen_lengths.at[5].set(0)
  )
  tokens = pairs.chosen_lengths.sum()
  expected = -pairs.policy_chosen[:5].sum() / tokens
  here = jnp.arange(6) < 2
  total = 0
  for present in (here, ~here):
    part = dataclasses.replace(
      pairs,
      policy_chosen=jnp.where(present, pairs.policy_chosen, 0).at[5].set(0),
    )
    total += objective("sft").per_pair(part).sum() / 5
  np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_losses_without_a_reference_take_none():
  pairs = dataclasses.replace(
    make_pairs(), reference_chosen=None, reference_rejected=None
  )
  for name in set(NAMES) - set(WITH_REFERENCE):
    assert jnp.isfinite(objective(name).per_pair(pairs)).all()


def test_configs_name_every_loss_with_values_it_allows():
  assert set(loss_configs.LOSSES) == set(NAMES)
  for name in NAMES:
    settings = loss_configs.get(name)
    assert settings.pop("name") == name
    assert preference.make_objective(name, settings).loss.name == name


def test_configs_name_the_nearest_loss():
  with pytest.raises(
    ValueError, match="unknown loss 'ip0'.*did you mean 'ipo'"
  ):
    loss_configs.get("ip0")


def test_an_objective_says_what_the_step_must_know():
  aot, sft = objective("aot"), objective("sft")
  assert aot.looks_across_batch and aot.needs_reference
  assert aot.inputs == "pairs" and not aot.needs_log_sum_squares
  assert not sft.looks_across_batch and not sft.needs_reference
  assert sft.inputs == "demonstrations"
  assert objective("dpo", wpo=True).needs_log_sum_squares
  assert objective("dpo") == objective("dpo") and hash(objective("dpo"))


def _line(name, values, **modifiers):
  with pytest.raises(ValueError) as error:
    preference.make_objective(name, values, **modifiers)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_an_unknown_loss_is_refused_with_the_nearest():
  message = _line("dpoo", {})
  assert message.startswith("unknown loss 'dpoo'; known: aot, ")
  assert message.endswith("did you mean 'dpo'?")


@pytest.mark.parametrize("value", [0, -1, -0.5])
def test_beta_is_above_zero(value):
  message = f"loss.beta={value:g}: must be above 0"
  assert _line("dpo", {"beta": value}) == message


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_beta_is_finite(value):
  message = f"loss.beta={value:g}: must be finite"
  assert _line("dpo", {"beta": value}) == message


@pytest.mark.parametrize("value", ["0.1", True, None])
def test_a_hyperparameter_is_a_number(value):
  assert _line("dpo", {"beta": value}) == (
    f"loss.beta={value!r}: must be a number"
  )


@pytest.mark.parametrize(
  "name,key,value,allowed",
  [
    ("cdpo", "label_smoothing", 0.5, "in [0, 0.5)"),
    ("cdpo", "label_smoothing", -0.1, "in [0, 0.5)"),
    ("robust", "label_smoothing", 0.7, "in [0, 0.5)"),
    ("exo", "label_smoothing", 0, "in (0, 0.5)"),
    ("discopop", "tau", 0, "above 0"),
    ("unlikelihood", "alpha", 1.5, "in [0, 1]"),
    ("unlikelihood", "alpha", -0.1, "in [0, 1]"),
  ],
)
def test_a_hyperparameter_out_of_range_is_refused(name, key, value, allowed):
  values = hyperparameters(name) | {key: value}
  assert _line(name, values) == f"loss.{key}={value:g}: must be {allowed}"


@pytest.mark.parametrize("value", [0, 1])
def test_the_ends_of_the_range_are_allowed(value):
  preference.make_objective("unlikelihood", {"alpha": value})


@pytest.mark.parametrize("name", NAMES)
def test_each_missing_hyperparameter_is_named(name):
  for key in preference.LOSSES[name].hyperparameters:
    values = hyperparameters(name)
    del values[key]
    assert _line(name, values) == f"loss {name!r} needs loss.{key}"


def test_a_hyperparameter_of_another_loss_is_refused():
  assert _line("dpo", {"beta": 0.1, "label_smoothing": 0.1}) == (
    "loss 'dpo' does not honour loss.label_smoothing; losses that do: aot,"
    " aot_unpaired, cdpo, exo, robust"
  )
  assert _line("dpo", {"beta": 0.1, "bta": 0.1}).endswith("do: none")


MODIFIERS = {
  "f_divergence": dict(f_divergence="js"),
  "ld_alpha": dict(ld_alpha=0.5),
  "wpo": dict(wpo=True),
  "sft_weight": dict(sft_weight=0.1),
}


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_modifier_is_honoured_or_refused(name, modifier):
  if modifier in preference.LOSSES[name].honours:
    changed = objective(name, **MODIFIERS[modifier])
    assert changed != objective(name)
    return
  message = _line(name, hyperparameters(name), **MODIFIERS[modifier])
  prefix = f"loss {name!r} does not honour loss.{modifier}; losses that do: "
  assert message.startswith(prefix)


def test_the_table_of_what_is_honoured():
  honouring = lambda m: {n for n in NAMES if m in preference.LOSSES[n].honours}
  demonstrations = {"sft", "sft_sum", "preferred_ft"}
  assert honouring("f_divergence") == set(
    "dpo cdpo robust hinge ipo exo discopop dpo_norm".split()
  )
  assert honouring("ld_alpha") == set(NAMES) - demonstrations
  assert honouring("sft_weight") == set(NAMES) - demonstrations
  assert honouring("wpo") == set(NAMES) - demonstrations - {
    "aot",
    "aot_unpaired",
  }


@pytest.mark.parametrize(
  "modifiers,message",
  [
    (dict(f_divergence="kl"), "loss.f_divergence='kl': must be one of"),
    (
      dict(f_divergence="alpha"),
      "loss.f_divergence='alpha' needs loss.f_alpha",
    ),
    (
      dict(f_divergence="alpha", f_alpha=1.0),
      "loss.f_alpha=1.0: must not be 1",
    ),
    (
      dict(f_divergence="alpha", f_alpha=math.inf),
      "loss.f_alpha=inf: must be finite",
    ),
    (dict(f_alpha=0.5), "loss.f_alpha=0.5: loss.f_divergence='reverse_kl'"),
    (dict(ld_alpha=1.1), "loss.ld_alpha=1.1: must be in [0, 1]"),
    (dict(ld_alpha=-0.1), "loss.ld_alpha=-0.1: must be in [0, 1]"),
    (dict(sft_weight=-1), "loss.sft_weight=-1: must be at least 0"),
    (dict(sft_weight=math.inf), "loss.sft_weight=inf: must be finite"),
    (dict(sft_weight=1, ld_alpha=0.5), "loss.sft_weight=1: must be 0 where"),
  ],
)
def test_a_modifier_out_of_range_is_refused(modifiers, message):
  assert _line("dpo", {"beta": 0.1}, **modifiers).startswith(message)

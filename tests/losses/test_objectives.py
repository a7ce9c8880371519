import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from configs import losses as loss_configs
from dpo_jax.losses import modifiers, objectives, preference

NAMES = sorted(objectives.LOSSES)
MPO = "dpo:0.8,bco_pair:0.2,sft:1"


def hyperparameters(name):
  return {key: 0.3 for key in objectives.LOSSES[name].hyperparameters}


def objective(name, **modifiers):
  return objectives.make_objective(name, hyperparameters(name), **modifiers)


def make_pairs(num_pairs=4, dtype="float32"):
  rng = np.random.default_rng(0)
  return preference.PairLogps(
    *(jnp.asarray(-rng.uniform(4, 6, num_pairs), dtype) for _ in range(4)),
    chosen_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
    rejected_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
  )


def test_a_weighted_sum_is_the_sum_of_its_losses():
  pairs = make_pairs()
  expected = (
    0.8 * preference.dpo(pairs, beta=0.3)
    + 0.2 * preference.bco_pair(pairs, beta=0.3)
    + modifiers.chosen_nll(pairs)
  )
  mpo = objectives.make_objective(MPO, {"beta": 0.3})
  np.testing.assert_allclose(mpo.per_pair(pairs), expected, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(mpo.per_pair)(pairs), expected, rtol=1e-6)
  with jax.enable_x64(True):
    check_grads(
      lambda p: mpo.per_pair(p).mean(), (make_pairs(dtype="float64"),), order=1
    )


def test_a_sum_of_one_loss_is_that_loss_times_its_weight():
  pairs = make_pairs()
  half = objectives.make_objective("dpo:0.5", {"beta": 0.3})
  np.testing.assert_allclose(
    half.per_pair(pairs), preference.dpo(pairs, beta=0.3) / 2, rtol=1e-6
  )


def test_a_sum_needs_what_any_of_its_losses_needs():
  mpo = objectives.make_objective(MPO, {"beta": 0.3})
  assert mpo.needs_reference and not mpo.looks_across_batch
  assert mpo.inputs == "pairs" and mpo.beta == 0.3
  assert mpo == objectives.make_objective(MPO, {"beta": 0.3}) and hash(mpo)
  free = objectives.make_objective("sft:1,unlikelihood:0.1", {"alpha": 0.5})
  assert not free.needs_reference and free.inputs == "pairs"
  assert free.beta == 1
  assert not free.state and free.next_state(make_pairs(), None) is None
  assert objectives.make_objective("sft:2", {}).inputs == "demonstrations"
  across = {"beta": 0.3, "label_smoothing": 0.0}
  assert objectives.make_objective("dpo:1,aot:1", across).looks_across_batch


def test_every_loss_of_a_sum_must_honour_a_modifier():
  made = objectives.make_objective(
    "dpo:1,hinge:1", {"beta": 0.3}, f_divergence="js"
  )
  pairs = make_pairs()
  expected = sum(
    objective(name, f_divergence="js").per_pair(pairs)
    for name in ("dpo", "hinge")
  )
  np.testing.assert_allclose(made.per_pair(pairs), expected, rtol=1e-6)
  message = _line(MPO, {"beta": 0.3}, wpo=True)
  assert message.startswith("loss 'sft' does not honour loss.wpo; losses")


@pytest.mark.parametrize(
  "name,values,message",
  [
    ("dpo:0.8,sft", {"beta": 0.3}, "loss.name='dpo:0.8,sft': 'sft' must be"),
    ("dpo:0.8,", {"beta": 0.3}, "loss.name='dpo:0.8,': '' must be"),
    ("dpo:x", {"beta": 0.3}, "loss.name='dpo:x': 'dpo:x' must be"),
    ("dpo:0", {"beta": 0.3}, "loss.name='dpo:0': 'dpo:0' must be"),
    ("dpo:-1", {"beta": 0.3}, "loss.name='dpo:-1': 'dpo:-1' must be"),
    ("dpo:inf", {"beta": 0.3}, "loss.name='dpo:inf': 'dpo:inf' must be"),
    ("dpo:1,dpo:1", {"beta": 0.3}, "loss.name='dpo:1,dpo:1': 'dpo' stands"),
    ("dpo:1,stf:1", {"beta": 0.3}, "unknown loss 'stf'; known: "),
    ("dpo:1,sft:1", {}, "loss 'dpo' needs loss.beta"),
    ("dpo:1,sft:1", {"beta": -1}, "loss.beta=-1: must be above 0"),
    (
      "dpo:1,sft:1",
      {"beta": 0.3, "tau": 1.0},
      "loss 'dpo:1,sft:1' does not honour loss.tau; losses that do: discopop",
    ),
  ],
)
def test_a_sum_that_cannot_be_is_refused(name, values, message):
  assert _line(name, values).startswith(message)


def test_configs_name_every_loss_with_values_it_allows():
  assert set(loss_configs.LOSSES) == {*NAMES, "mpo"}
  for name in loss_configs.LOSSES:
    settings = loss_configs.get(name)
    made = objectives.make_objective(settings.pop("name"), settings)
    assert name == "mpo" or [t.loss.name for t in made.terms] == [name]


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
    objectives.make_objective(name, values, **modifiers)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_an_unknown_loss_is_refused_with_the_nearest():
  message = _line("dpoo", {})
  assert message.startswith("unknown loss 'dpoo'; known: alpha_po, ")
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
    ("rdpo", "alpha", -0.1, "at least 0"),
    ("dpop", "lambda_", -0.1, "at least 0"),
    ("cal_dpo", "beta", 0, "above 0"),
    ("chi_po", "r_max", 0, "above 0"),
    ("beta_dpo", "alpha", -0.1, "at least 0"),
    ("beta_dpo", "momentum", 1, "in [0, 1)"),
    ("bco", "desirable_weight", 0, "above 0"),
    ("bco", "undesirable_weight", -1, "above 0"),
    ("simpo", "gamma", -0.1, "at least 0"),
    ("simpo", "label_smoothing", 0.5, "in [0, 0.5)"),
    ("orpo", "lambda_", -0.1, "at least 0"),
    ("cpo", "alpha", -0.1, "at least 0"),
    ("slic", "delta", 0, "above 0"),
    ("slic", "lambda_", -0.1, "at least 0"),
    ("unlikelihood", "alpha", 1.5, "in [0, 1]"),
    ("unlikelihood", "alpha", -0.1, "in [0, 1]"),
  ],
)
def test_a_hyperparameter_out_of_range_is_refused(name, key, value, allowed):
  values = hyperparameters(name) | {key: value}
  assert _line(name, values) == f"loss.{key}={value:g}: must be {allowed}"


def test_a_list_is_no_pair():
  ranked = objectives.make_objective("plackett_luce:1,sft:0.1", {"beta": 0.3})
  assert ranked.inputs == "ranked"
  message = _line("plackett_luce:1,dpo:1", {"beta": 0.3})
  assert message == (
    "loss.name='plackett_luce:1,dpo:1': a loss of ranked lists can be summed"
    " with losses of demonstrations only"
  )
  labelled = {"beta": 0.3, "desirable_weight": 1, "undesirable_weight": 1}
  both = objectives.make_objective("kto:1,dpo:1", labelled)
  assert both.inputs == "pairs" and both.extra_columns == ("mismatched",)


@pytest.mark.parametrize("value", [0, 1])
def test_the_ends_of_the_range_are_allowed(value):
  objectives.make_objective("unlikelihood", {"alpha": value})


@pytest.mark.parametrize("name", NAMES)
def test_each_missing_hyperparameter_is_named(name):
  for key in objectives.LOSSES[name].hyperparameters:
    values = hyperparameters(name)
    del values[key]
    assert _line(name, values) == f"loss {name!r} needs loss.{key}"


def test_a_hyperparameter_of_another_loss_is_refused():
  assert _line("dpo", {"beta": 0.1, "label_smoothing": 0.1}) == (
    "loss 'dpo' does not honour loss.label_smoothing; losses that do: aot,"
    " aot_unpaired, cdpo, classifier, exo, reward_model, robust, simpo"
  )
  assert _line("dpo", {"beta": 0.1, "bta": 0.1}).endswith("do: none")


MODIFIERS = {
  "f_divergence": dict(f_divergence="js"),
  "ld_alpha": dict(ld_alpha=0.5),
  "wpo": dict(wpo=True),
  "sft_weight": dict(sft_weight=0.1),
  "prompt_nll": dict(prompt_nll=True),
}


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_modifier_is_honoured_or_refused(name, modifier):
  if modifier in objectives.LOSSES[name].honours:
    changed = objective(name, **MODIFIERS[modifier])
    assert changed != objective(name)
    return
  message = _line(name, hyperparameters(name), **MODIFIERS[modifier])
  prefix = f"loss {name!r} does not honour loss.{modifier}; losses that do: "
  assert message.startswith(prefix)


def test_the_table_of_what_is_honoured():
  honouring = lambda m: {n for n in NAMES if m in objectives.LOSSES[n].honours}
  # Losses with a likelihood, which counts every token and pair alike.
  likelihoods = {"sft", "sft_sum", "preferred_ft", "orpo", "cpo", "slic"}
  scores = {"reward_model", "classifier"}
  assert honouring("f_divergence") == set(
    "dpo cdpo robust hinge ipo exo discopop dpo_norm".split()
  )
  assert honouring("sft_weight") == set(NAMES) - likelihoods - scores
  assert honouring("prompt_nll") == {"sft", "preferred_ft", "orpo"}
  # These need two responses behind one prompt.
  others = {"kto", "bco", "apo_zero_unpaired", "plackett_luce"}
  of_pairs = set(NAMES) - likelihoods - scores - others
  assert honouring("ld_alpha") == of_pairs
  assert honouring("wpo") == of_pairs - {"aot", "aot_unpaired"}


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
    (dict(wpo=True, wpo_max_weight=0), "loss.wpo_max_weight=0: must be abo"),
    (dict(wpo=True, wpo_max_weight=math.nan), "loss.wpo_max_weight=nan: mus"),
    (dict(wpo_max_weight=2), "loss.wpo_max_weight=2: only with loss.wpo=Tr"),
    (dict(sft_weight=1, ld_alpha=0.5), "loss.sft_weight=1: must be 0 where"),
  ],
)
def test_a_modifier_out_of_range_is_refused(modifiers, message):
  assert _line("dpo", {"beta": 0.1}, **modifiers).startswith(message)

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax.losses import objectives, preference

# Those that read a scalar head's scores have tests of their own.
NAMES = sorted(
  name for name, loss in objectives.LOSSES.items() if loss.head == "vocabulary"
)
HYPERPARAMETERS = dict(
  beta=0.3,
  tau=0.5,
  label_smoothing=0.2,
  alpha=0.4,
  gamma=0.5,
  delta=3.5,
  lambda_=0.7,
  eta=0.2,
  shift=0.75,
  r_max=5.0,
  momentum=0.5,
  desirable_weight=1.5,
  undesirable_weight=0.5,
)
WITH_REFERENCE = [n for n in NAMES if objectives.LOSSES[n].needs_reference]


def hyperparameters(name):
  keys = objectives.LOSSES[name].hyperparameters
  return {key: HYPERPARAMETERS[key] for key in keys}


def objective(name, **modifiers):
  return objectives.make_objective(name, hyperparameters(name), **modifiers)


def per_pair_of(name, **modifiers):
  """Returns the losses as a function of pairs, at the start of training."""
  made = objective(name, **modifiers)
  state = {key: jnp.zeros(()) for key in made.state}
  return lambda pairs: made.per_pair(pairs, state=state)


def make_pairs(num_pairs=5, seed=0, dtype="float32"):
  rng = np.random.default_rng(seed)
  return preference.PairLogps(
    *(jnp.asarray(-rng.uniform(4, 6, num_pairs), dtype) for _ in range(4)),
    chosen_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
    rejected_lengths=jnp.asarray(rng.integers(1, 9, num_pairs), dtype),
    score_gaps=jnp.linspace(0.1, 4.0, num_pairs, dtype=dtype),
    mismatched_logratio=jnp.linspace(-0.2, 1.0, num_pairs, dtype=dtype),
  )


def pairs_of(u, v, reference=0.0):
  """Returns pairs with these log-ratios, of 2 and 4 tokens."""
  u, v = jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32)
  reference = jnp.full_like(u, reference)
  return preference.PairLogps(
    u + reference,
    v + reference,
    reference,
    reference,
    jnp.full_like(u, 2),
    jnp.full_like(u, 4),
    score_gaps=jnp.full_like(u, 2),
    mismatched_logratio=jnp.full_like(u, 0.5),
  )


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


def log_odds(a):
  return a - math.log(1 - math.exp(a))


# One pair: u = 2, v = -1, so d = 3; nw = 2, nl = 4; beta 0.3, so z = 0.9. The
# reference is at -10, so lw = -8, ll = -11 and aw = -4, al = -2.75. Mismatched
# responses have a log-ratio of 0.5.
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
  "rdpo": -ls(0.9 - 0.4 * 2),
  "dpop": -ls(0.9),
  "odpo": -ls(0.9 - 0.4 * math.log(2)),
  "dpo_shift": -ls(0.6 + 0.75 * 0.3),
  "rpo_sq": (0.9 - 0.4) ** 2,
  "rpo_bwd_kl": s(0.4) * math.log(s(0.4) / s(0.9))
  + s(-0.4) * math.log(s(-0.4) / s(-0.9)),
  "rebel": (3 - 0.4) ** 2,
  "cal_dpo": -ls(3) + (2 - 1 / 0.6) ** 2 + (-1 + 1 / 0.6) ** 2,
  "chi_po": -ls(0.3 * (math.exp(2) + 2 - math.exp(-1) + 1)),
  "beta_dpo": -ls(0.9 * (1 + 0.4 * 0.9)),
  "bco": (-1.5 * ls(0.6 - 0.15) - 0.5 * ls(0.15 + 0.3)) / 2,
  "kto": (1.5 * s(-0.45) + 0.5 * s(-0.45)) / 2,
  "apo_zero_unpaired": (1.5 * s(-0.6) + 0.5 * s(-0.3)) / 2,
  "plackett_luce": -ls(0.9),
  "sft": 4,
  "sft_sum": 8,
  "preferred_ft": 4,
  "unlikelihood": 8 + 0.4 * -11,
  "simpo": -0.8 * ls(-0.3 * 1.25 - 0.5) - 0.2 * ls(0.3 * 1.25 + 0.5),
  "alpha_po": -ls(
    0.3 * ((1 - math.exp(1.6)) / 0.4 - (1 - math.exp(1.1)) / 0.4) - 0.5
  ),
  "simper": math.exp(-2.75) - math.exp(-4),
  "repo": 0.5 + 1.25,
  "orpo": 4 - 0.7 * ls(log_odds(-4) - log_odds(-2.75)),
  "cpo": -ls(0.9) + 0.4 * 4,
  "slic": 3.5 - 3 + 0.7 * 4,
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
  "dpop": LOG2,
  "cal_dpo": LOG2 + 2 * (1 / 0.6) ** 2,
  "chi_po": LOG2,
  "beta_dpo": LOG2,
  "bco": LOG2,
  "kto": 0.5,
  "dpo_shift": LOG2,
  "apo_zero_unpaired": 0.5,
  "plackett_luce": LOG2,
}


def test_every_loss_has_a_value_by_hand():
  assert set(BY_HAND) == set(NAMES)
  # These look at lengths and scores as well: they have tests of their own.
  others = {"rdpo", "odpo", "rpo_sq", "rpo_bwd_kl", "rebel"}
  assert set(AT_REFERENCE) == set(WITH_REFERENCE) - others


@pytest.mark.parametrize("name", NAMES)
def test_value_by_hand(name):
  losses = per_pair_of(name)(pairs_of([2.0], [-1.0], -10.0))
  np.testing.assert_allclose(losses, [BY_HAND[name]], rtol=1e-5)


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_when_policy_equals_reference(name):
  pairs = make_pairs()
  pairs = dataclasses.replace(
    pairs,
    policy_chosen=pairs.reference_chosen,
    policy_rejected=pairs.reference_rejected,
    mismatched_logratio=jnp.zeros(5),
  )
  losses = per_pair_of(name)(pairs)
  np.testing.assert_allclose(losses, [AT_REFERENCE[name]] * 5, rtol=1e-5)


def of_policy(name, pairs, **modifiers):
  """Returns the mean loss as a function of the policy's f[B] and f[B]."""

  def fn(chosen, rejected):
    moved = dataclasses.replace(
      pairs, policy_chosen=chosen, policy_rejected=rejected
    )
    return per_pair_of(name, **modifiers)(moved).mean()

  return fn


# A running mean passes no gradient: test_running checks these.
@pytest.mark.parametrize(
  "name", [n for n in NAMES if not objectives.LOSSES[n].state]
)
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
  per_pair = per_pair_of(name)
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
  per_pair = per_pair_of(name)
  np.testing.assert_allclose(
    per_pair(jax.tree.map(lambda x: x[order], pairs)),
    per_pair(pairs)[order],
    rtol=1e-6,
  )


@pytest.mark.parametrize("name", NAMES)
def test_slots_without_a_pair_disturb_no_other(name):
  pairs = make_pairs(4)
  insert = lambda x: jnp.insert(x, jnp.array([0, 2, 4]), 0.0)
  losses = per_pair_of(name)(jax.tree.map(insert, pairs))
  kept = losses[jnp.array([1, 2, 4, 5])]
  np.testing.assert_allclose(kept, per_pair_of(name)(pairs), rtol=1e-5)
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
    score_gaps=pairs.score_gaps,
    mismatched_logratio=pairs.mismatched_logratio,
  )
  per_pair = per_pair_of(name)
  others_kept = np.allclose(per_pair(pairs)[1:], per_pair(moved)[1:])
  assert others_kept != objectives.LOSSES[name].looks_across_batch


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
    pairs,
    chosen_lengths=pairs.chosen_lengths.at[5].set(0),
    rejected_lengths=pairs.rejected_lengths.at[5].set(0),
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
    total += per_pair_of("sft")(part).sum() / 5
  np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_rdpo_discounts_a_longer_chosen():
  # Policy at its reference; chosen 4 tokens longer: its length explains it.
  pairs = preference.PairLogps(
    *(jnp.array([-5.0, -5.0]) for _ in range(4)),
    chosen_lengths=jnp.array([6.0, 2.0]),
    rejected_lengths=jnp.array([2.0, 6.0]),
  )
  losses = preference.rdpo(pairs, beta=0.3, alpha=0.1)
  np.testing.assert_allclose(losses, [-ls(0.4), -ls(-0.4)], rtol=1e-6)
  slopes = jax.grad(
    lambda x: preference.rdpo(
      dataclasses.replace(pairs, policy_chosen=x), beta=0.3, alpha=0.1
    ).sum()
  )(pairs.policy_chosen)
  assert abs(slopes[0]) < abs(slopes[1])
  np.testing.assert_allclose(
    preference.rdpo(pairs, beta=0.3, alpha=0.0),
    preference.dpo(pairs, beta=0.3),
    rtol=1e-6,
  )


def test_rdpo_reads_rewards_off_the_best_policy_under_a_price_on_length():
  # Of three responses, the policy with the largest mean of
  # reward - 0.1 length - 0.3 log-ratio.
  rewards, lengths = jnp.array([2.0, -1.0, 0.5]), jnp.array([6.0, 2.0, 3.0])
  reference = jnp.log(jnp.array([0.2, 0.5, 0.3]))
  policy = jax.nn.log_softmax(reference + (rewards - 0.1 * lengths) / 0.3)
  chosen, rejected = jnp.array([0, 2, 1]), jnp.array([1, 0, 2])
  pairs = preference.PairLogps(
    *(x[i] for x in (policy, reference) for i in (chosen, rejected)),
    chosen_lengths=lengths[chosen],
    rejected_lengths=lengths[rejected],
  )
  losses = preference.rdpo(pairs, beta=0.3, alpha=0.1)
  np.testing.assert_allclose(losses, [-ls(3), -ls(-1.5), -ls(-1.5)], rtol=1e-5)


def test_discopop_begins_on_the_wrong_side_of_a_hill():
  slope = lambda z, tau: jax.grad(
    lambda u: preference.discopop(
      dataclasses.replace(pairs_of([0.0], [0.0]), policy_chosen=u[None]),
      beta=1.0,
      tau=tau,
    )[0]
  )(jnp.asarray(z))
  # As its docstring says: from the reference, first the wrong way.
  for z, sign in ((-0.12, -1), (-0.118, 1), (0.0, 1), (0.071, 1), (0.073, -1)):
    assert jnp.sign(slope(z, 0.05)) == sign
  assert slope(0.0, 0.101) > 0 > slope(0.0, 0.104)


def test_dpo_shift_weighs_the_rejected_less():
  pairs = make_pairs()
  half = lambda p: preference.dpo_shift(p, beta=0.3, shift=0.5)
  grads = jax.grad(lambda p: half(p).sum())(pairs)
  np.testing.assert_allclose(
    grads.policy_rejected, -grads.policy_chosen / 2, rtol=1e-6
  )
  np.testing.assert_allclose(
    preference.dpo_shift(pairs, beta=0.3, shift=1.0),
    preference.dpo(pairs, beta=0.3),
    rtol=1e-6,
  )


def test_dpop_penalises_a_chosen_that_fell_below_its_reference():
  # u = -1, v = -3: d = 2, and the fall is 1.
  pairs = pairs_of([-1.0], [-3.0])
  losses = preference.dpop(pairs, beta=0.3, lambda_=5.0)
  np.testing.assert_allclose(losses, [-ls(0.3 * (2 - 5))], rtol=1e-6)
  risen = pairs_of([1.0], [-3.0])
  np.testing.assert_allclose(
    preference.dpop(risen, beta=0.3, lambda_=5.0),
    preference.dpo(risen, beta=0.3),
    rtol=1e-6,
  )


def test_chi_po_clips_the_margin_and_then_has_no_gradient():
  pairs = pairs_of([9.0, -9.0], [-9.0, 9.0])
  per_pair = lambda p: preference.chi_po(p, beta=0.3, r_max=1.5)
  np.testing.assert_allclose(per_pair(pairs), [-ls(3), -ls(-3)], rtol=1e-5)
  grads = jax.grad(lambda p: per_pair(p).sum())(pairs)
  np.testing.assert_array_equal(grads.policy_chosen, [0, 0])


def test_losses_without_a_reference_take_none():
  pairs = dataclasses.replace(
    make_pairs(), reference_chosen=None, reference_rejected=None
  )
  for name in set(NAMES) - set(WITH_REFERENCE):
    assert jnp.isfinite(per_pair_of(name)(pairs)).all()

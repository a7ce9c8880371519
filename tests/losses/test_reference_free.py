import contextlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_jax.losses import modifiers, objectives, reference_free, registry

GOLDEN = json.loads(
  (
    pathlib.Path(__file__).parents[1] / "golden" / "trl_reference_free.json"
  ).read_text()
)
RENEW = "golden numbers of TRL: tests/golden/make_trl_losses.py renews them"


def pairs_of(chosen, rejected, num_tokens=1.0, dtype="float32"):
  """Returns pairs with these mean token log-probabilities."""
  chosen, rejected = jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype)
  lengths = jnp.full_like(chosen, num_tokens)
  return registry.PairLogps(
    chosen * num_tokens, rejected * num_tokens, None, None, lengths, lengths
  )


def test_orpo_is_the_ratio_of_odds():
  # Probabilities of 1/2 and 1/5 have odds of 1 and 1/4, the ratio is 4.
  pairs = pairs_of([math.log(1 / 2)], [math.log(1 / 5)], 3.0)
  losses = reference_free.orpo(pairs, lambda_=0.5)
  expected = math.log(2) - 0.5 * math.log(4 / 5)
  np.testing.assert_allclose(losses, [expected], rtol=1e-6)
  np.testing.assert_allclose(
    reference_free.orpo(pairs, lambda_=0.0),
    modifiers.chosen_nll(pairs),
    rtol=1e-6,
  )


@pytest.mark.parametrize("mean", [-1e-3, -0.6931, -0.6932, -5.0])
def test_orpo_gradient_equals_finite_differences_on_both_branches(mean):
  with jax.enable_x64(True):
    lengths = jnp.ones(1)

    def fn(chosen, rejected):
      pairs = registry.PairLogps(chosen, rejected, None, None, lengths, lengths)
      return reference_free.orpo(pairs, lambda_=0.5).sum()

    values = jnp.array([mean]), jnp.array([2 * mean])
    check_grads(fn, values, order=1, modes=["rev"], eps=1e-7)


@pytest.mark.parametrize("mean", [-1e4, -90.0, -1e-3, -1e-6, -1e-9, 0.0])
def test_orpo_is_finite_up_to_certainty(mean):
  def fn(chosen, rejected):
    pairs = registry.PairLogps(
      chosen, rejected, None, None, jnp.ones(2), jnp.ones(2)
    )
    return reference_free.orpo(pairs, lambda_=0.5).sum()

  other = -1.0
  value, grads = jax.value_and_grad(fn, (0, 1))(
    jnp.array([mean, other]), jnp.array([other, mean])
  )
  assert all(jnp.isfinite(x).all() for x in (value, *grads))


def test_orpo_keeps_small_probabilities_of_error():
  # 1 - exp(-1e-5) is 1e-5, which 1 - exp in float32 has to two digits only.
  pairs = pairs_of([-1e-5], [-20.0])
  log_odds = (
    -1e-5 - math.log(-math.expm1(-1e-5)) + 20 + math.log1p(-math.exp(-20))
  )
  swapped = pairs_of([-20.0], [-1e-5])
  loss = reference_free.orpo(swapped, lambda_=1.0) - 20
  np.testing.assert_allclose(loss, [log_odds], rtol=1e-5)
  assert reference_free.orpo(pairs, lambda_=1.0) < 2e-5


def test_simpo_gamma_is_the_margin_at_which_a_pair_is_undecided():
  # beta (aw - al) = gamma: undecided, whatever the lengths.
  for num_tokens in (1.0, 7.0):
    pairs = pairs_of([-1.0], [-1.5], num_tokens)
    losses = reference_free.simpo(
      pairs, beta=2.0, gamma=1.0, label_smoothing=0.1
    )
    np.testing.assert_allclose(losses, [math.log(2)], rtol=1e-6)


def test_alpha_po_bends_the_reward_of_simpo():
  pairs = pairs_of([-1.0, -0.2], [-1.5, -3.0], 3.0)
  of = lambda alpha: reference_free.alpha_po(
    pairs, beta=2.0, gamma=1.0, alpha=alpha
  )
  simpo = reference_free.simpo(pairs, beta=2.0, gamma=1.0, label_smoothing=0.0)
  for alpha in (0.0, 1e-7, -1e-7):
    np.testing.assert_allclose(of(alpha), simpo, rtol=1e-5)
  # At alpha 1 the reward is 1 - 1 / p, at -1 it is p - 1.
  for alpha, chosen, rejected in (
    (1.0, -math.exp(1.0), -math.exp(1.5)),
    (-1.0, math.exp(-1.0), math.exp(-1.5)),
  ):
    expected = math.log1p(math.exp(1 - 2 * (chosen - rejected)))
    np.testing.assert_allclose(of(alpha)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 0.25, 3.0])
@pytest.mark.parametrize("mean", [-1e4, -90.0, -1e-3, 0.0])
def test_alpha_po_and_simper_are_finite_at_any_likelihood(mean, alpha):
  for loss in (
    lambda p: reference_free.alpha_po(p, beta=2.0, gamma=1.0, alpha=alpha),
    reference_free.simper,
  ):
    pairs = pairs_of([mean, -1.0], [-1.0, mean], 3.0)
    value, grads = jax.value_and_grad(lambda p, f=loss: f(p).sum())(pairs)
    assert jnp.isfinite(value) and jnp.isfinite(grads.policy_chosen).all()


def test_repo_leaves_a_pair_alone_whose_margin_is_gamma():
  pairs = pairs_of([-1.0, -1.0], [-1.6, -1.2], 4.0)
  losses = reference_free.repo(pairs, gamma=0.5)
  np.testing.assert_allclose(losses, [0, 0.3], rtol=1e-6)
  grads = jax.grad(lambda p: reference_free.repo(p, gamma=0.5).sum())(pairs)
  np.testing.assert_array_equal(grads.policy_chosen, [0, -0.25])


def test_cpo_and_slic_see_sums_and_a_mean_of_tokens():
  pairs = pairs_of([-1.0, -2.0], [-1.5, -1.0], 4.0)
  np.testing.assert_allclose(
    reference_free.cpo(pairs, beta=0.5, alpha=2.0).mean(),
    (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2 + 2 * 1.5,
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    reference_free.slic(pairs, delta=1.0, lambda_=2.0).mean(),
    (0 + 5) / 2 + 2 * 1.5,
    rtol=1e-6,
  )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_trl_is_met(number, dtype):
  case = dict(GOLDEN["cases"][number])
  loss_key, *sides = ("loss", "chosen", "rejected")
  prompt_nll = case.pop("prompt_nll", False)
  sides += ["prompt"] * prompt_nll
  expected = [case.pop(loss_key), *(case.pop(f"grad_{side}") for side in sides)]
  objective = objectives.make_objective(
    case.pop("name"), case, prompt_nll=prompt_nll
  )
  x64 = dtype == "float64"
  rtol = 1e-6 if x64 else 1e-4
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    policy = [
      [jnp.asarray(tokens, dtype) for tokens in GOLDEN[f"policy_{side}"]]
      for side in sides
    ]

    def loss_fn(chosen, rejected, prompt=None):
      sums = lambda side: jnp.stack([tokens.sum() for tokens in side])
      lengths = lambda side: jnp.asarray([len(x) for x in side], dtype)
      pairs = registry.PairLogps(
        sums(chosen),
        sums(rejected),
        None,
        None,
        lengths(chosen),
        lengths(rejected),
        policy_prompt=prompt and sums(prompt),
        prompt_lengths=prompt and lengths(prompt),
      )
      return objective.per_pair(pairs).mean()

    loss, grads = jax.value_and_grad(loss_fn, tuple(range(len(sides))))(*policy)
    assert loss.dtype == dtype
  np.testing.assert_allclose(loss, expected[0], rtol=rtol, err_msg=RENEW)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, rtol=rtol, err_msg=RENEW
    ),
    list(grads),
    [[np.array(tokens) for tokens in side] for side in expected[1:]],
  )

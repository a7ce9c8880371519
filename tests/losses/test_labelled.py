"""Lone responses (KTO, BCO, APO), pairs as two of them, parity with TRL."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import labelled, objectives, registry

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / "golden" / "trl_kto.json").read_text()
)
RENEW = "golden numbers of TRL: tests/golden/make_trl_losses.py renews them"
WEIGHTS = dict(desirable_weight=1.5, undesirable_weight=0.5)
STATE = {"mean_reward": jnp.zeros(()), "num_responses": jnp.zeros(())}


def lone(logratios, labels, mismatched):
  """Returns lone responses of 3 tokens, labelled one by one."""
  logratios, mismatched = jnp.asarray(logratios), jnp.asarray(mismatched)
  labels = jnp.asarray(labels)
  zeros = jnp.zeros_like(logratios)
  return registry.PairLogps(
    jnp.where(labels, logratios, 0),
    jnp.where(labels, 0, logratios),
    zeros,
    zeros,
    jnp.where(labels, 3, zeros),
    jnp.where(labels, zeros, 3),
    mismatched_logratio=mismatched,
  )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("number", range(len(GOLDEN["cases"])))
def test_trl_is_met(number, dtype):
  case = GOLDEN["cases"][number]
  keys = ("beta", "desirable_weight", "undesirable_weight")
  name = case.get("name", "kto")
  objective = objectives.make_objective(name, {key: case[key] for key in keys})
  x64 = dtype == "float64"
  rtol = 1e-6 if x64 else 1e-4
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    read = lambda values: jnp.asarray(values, dtype)
    reference = read(GOLDEN["reference"])
    mismatched = read(case["mismatched"]) - read(GOLDEN["reference_mismatched"])

    def loss_fn(policy):
      pairs = lone(policy - reference, GOLDEN["labels"], mismatched)
      return objective.per_pair(pairs).mean()

    loss, grads = jax.value_and_grad(loss_fn)(read(GOLDEN["policy"]))
    assert loss.dtype == dtype
  np.testing.assert_allclose(loss, case["loss"], rtol=rtol, err_msg=RENEW)
  np.testing.assert_allclose(grads, case["grad"], rtol=rtol, err_msg=RENEW)
  if name != "kto":  # no estimate is made
    return
  estimate = max(0, np.mean(np.asarray(mismatched)))
  np.testing.assert_allclose(estimate, case["kl"], rtol=rtol, atol=1e-6)


def test_pairs_are_lone_responses_taken_together():
  u, v = jnp.array([2.0, -1.0]), jnp.array([0.5, -3.0])
  mismatched = jnp.array([1.0, 0.2])
  pairs = dataclasses.replace(
    lone(u, [True, True], mismatched),
    policy_rejected=v,
    rejected_lengths=jnp.full(2, 4.0),
  )
  apart = lone(
    jnp.concatenate([u, v]),
    [True, True, False, False],
    jnp.concatenate([mismatched, mismatched]),
  )
  for loss in (
    lambda p: labelled.kto(p, beta=0.3, **WEIGHTS),
    lambda p: labelled.apo_zero_unpaired(p, beta=0.3, **WEIGHTS),
    lambda p: labelled.bco(p, STATE, beta=0.3, **WEIGHTS),
  ):
    np.testing.assert_allclose(
      loss(pairs), loss(apart).reshape(2, 2).mean(0), rtol=1e-6
    )
    np.testing.assert_allclose(loss(pairs).mean(), loss(apart).mean())


def test_no_gradient_passes_through_the_estimate_of_kl():
  pairs = lone(jnp.array([2.0, -1.0]), [True, False], jnp.array([1.0, 0.5]))
  grads = jax.grad(lambda p: labelled.kto(p, beta=0.3, **WEIGHTS).sum())(pairs)
  assert not grads.mismatched_logratio.any()
  assert grads.policy_chosen[0] < 0 < grads.policy_rejected[1]
  assert grads.policy_chosen[1] == grads.policy_rejected[0] == 0


def test_a_class_weighs_as_much_as_its_weight():
  pairs = lone(jnp.array([2.0, -1.0]), [True, False], jnp.zeros(2))
  of = lambda a, b: labelled.kto(
    pairs, beta=0.3, desirable_weight=a, undesirable_weight=b
  )
  np.testing.assert_allclose(of(2.0, 3.0), of(1.0, 1.0) * jnp.array([2, 3]))

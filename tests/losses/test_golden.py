"""Parity with TRL: token log-probabilities in, loss, gradients, metrics out."""

import contextlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import logprobs, modifiers, objectives, preference
from dpo_jax.types import Rows

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_losses.json"
RENEW = "golden numbers of TRL: tests/golden/README.md says how to renew them"
CASES = json.loads(GOLDEN.read_text())["cases"]

OUR_NAMES = {
  "sigmoid": "dpo",
  "sigmoid_norm": "dpo_norm",
  "exo_pair": "exo",
  "nca_pair": "nca",
}
OUR_DIVERGENCES = {"js_divergence": "js"}


def _case_id(case):
  options = sorted(
    set(case) & {"f_divergence", "ld_alpha", "use_weighting", "label_smoothing"}
  )
  values = [f"{o}={case[o]}" for o in options]
  return "-".join([*case["loss_types"], f"beta={case['beta']}", *values])


def _rows(case):
  """Returns rows that hold one pair each, chosen tokens first."""
  lengths = np.array(
    [
      (len(c), len(r))
      for c, r in zip(case["policy_chosen"], case["policy_rejected"])
    ],
    np.int32,
  )
  shape = (len(lengths), int(lengths.sum(1).max()))
  response, rank = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
  for pair, (chosen, rejected) in enumerate(lengths):
    both = slice(chosen + rejected)
    response[pair, both] = [2 * pair] * chosen + [2 * pair + 1] * rejected
    rank[pair, both] = [*range(chosen), *range(rejected)]
  empty = np.zeros(shape, np.int32)
  rows = Rows(empty, empty, empty, empty, empty, empty, response, rank)
  return rows, lengths


def _values(case, key, rows, dtype):
  """Returns f[R,S] from a case's lists per chosen and per rejected."""
  values = np.zeros(rows.response.shape, dtype)
  for pair in range(len(values)):
    tokens = case[f"{key}_chosen"][pair] + case[f"{key}_rejected"][pair]
    values[pair, : len(tokens)] = tokens
  return jnp.asarray(values)


def _objective(case):
  names = [OUR_NAMES.get(name, name) for name in case["loss_types"]]
  name = names[0]
  if len(names) > 1:
    parts = zip(names, case["loss_weights"])
    name = ",".join(f"{member}:{weight}" for member, weight in parts)
  options = {"tau": 0.05, "label_smoothing": 0.0, **case}
  keys = {k for n in names for k in objectives.LOSSES[n].hyperparameters}
  divergence = case.get("f_divergence", "reverse_kl")
  return objectives.make_objective(
    name,
    {key: options[key] for key in keys},
    f_divergence=OUR_DIVERGENCES.get(divergence, divergence),
    ld_alpha=case.get("ld_alpha", 1.0),
    # TRL 1.16 leaves WPO's weights unbounded.
    wpo=case.get("use_weighting", False),
    wpo_max_weight=math.inf if case.get("use_weighting") else 1.0,
  )


def _evaluate(case, dtype):
  """Returns the loss, its gradient f[R,S] and the metrics."""
  rows, lengths = _rows(case)
  policy, reference, log_sum_squares = (
    _values(case, key, rows, dtype)
    for key in ("policy", "reference", "log_sum_sq")
  )
  objective = _objective(case)
  weights = objective.token_weights(rows, lengths)
  sums = lambda x: logprobs.response_sums(x * weights, rows, lengths.shape)

  def loss_fn(policy):
    chosen, rejected = sums(policy).T
    reference_chosen, reference_rejected = sums(reference).T
    pairs = preference.PairLogps(
      policy_chosen=chosen,
      policy_rejected=rejected,
      reference_chosen=reference_chosen,
      reference_rejected=reference_rejected,
      chosen_lengths=lengths[:, 0].astype(dtype),
      rejected_lengths=lengths[:, 1].astype(dtype),
    )
    log_weights = modifiers.wpo_log_weights(
      logprobs.TokenLogps(policy, log_sum_squares=log_sum_squares),
      rows,
      lengths,
    )
    loss = objective.per_pair(pairs, log_weights).mean()
    rewards = preference.implicit_rewards(pairs, case["beta"])
    return loss, _metrics(pairs, *rewards)

  (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(policy)
  return loss, grads, metrics


def _metrics(pairs, chosen, rejected):
  return {
    "rewards/chosen": chosen.mean(),
    "rewards/rejected": rejected.mean(),
    "rewards/accuracies": (chosen > rejected).mean(),
    "rewards/margins": (chosen - rejected).mean(),
    "logps/chosen": pairs.policy_chosen.mean(),
    "logps/rejected": pairs.policy_rejected.mean(),
  }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_trl_is_met(case, dtype):
  x64 = dtype == "float64"
  rtol = 1e-6 if x64 else 1e-4
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    loss, grads, metrics = _evaluate(case, dtype)
    assert loss.dtype == grads.dtype == dtype
    expected_grads = _values(case, "grad_policy", _rows(case)[0], dtype)
  np.testing.assert_allclose(loss, case["loss"], rtol=rtol, err_msg=RENEW)
  # apo_down's chosen gradient is s'(beta u) - s'(z), which nearly cancels: in
  # float32 it is good to the rounding of its two terms.
  atol = 0 if x64 else 1e-6 * jnp.abs(expected_grads).max()
  np.testing.assert_allclose(
    grads, expected_grads, rtol=rtol, atol=atol, err_msg=RENEW
  )
  assert metrics.keys() == case["metrics"].keys()
  # A mean reward is a small difference of large sums: in float32 it is good
  # to the rounding of log-probabilities near 30 nats.
  atol = 1e-12 if x64 else 4e-6
  for key, value in metrics.items():
    np.testing.assert_allclose(
      value, case["metrics"][key], rtol=rtol, atol=atol, err_msg=key + RENEW
    )


def test_all_cases_are_there():
  assert len(CASES) == 48
  assert {len(case["loss_types"]) for case in CASES} == {1, 3}

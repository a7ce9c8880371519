"""The frontier against closed forms, the estimates by hand, and the files."""

import json
import math

import numpy as np
import pytest

from dpo_jax.evaluation import frontier

POINTS = [
  frontier.Point("SFT", 0.0, 0.0, 0.5, 0.01, 100),
  frontier.Point("dpo beta=0.1", 0.4, 0.05, 0.7, 0.02, 100),
  frontier.Point("dpo beta=0.01", 40.0, 0.5, 0.9, 0.02, 100),
]


@pytest.fixture
def rewards():
  return np.random.default_rng(0).uniform(size=(20, 64))


def test_two_point_rewards_have_their_closed_form():
  # A quarter of the samples is worth 1, the others 0.
  rewards = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
  beta = 0.5
  share = 0.25 * math.exp(1 / beta) / (0.25 * math.exp(1 / beta) + 0.75)
  kl = share * math.log(share / 0.25) + (1 - share) * math.log(
    (1 - share) / 0.75
  )
  result = frontier.optimal_frontier(rewards, np.array([beta]))
  np.testing.assert_allclose(result.reward, share, rtol=1e-12)
  np.testing.assert_allclose(result.kl, kl, rtol=1e-12)


def test_a_large_beta_gives_the_mean_reward_at_kl_0(rewards):
  result = frontier.optimal_frontier(rewards, np.array([1e6]))
  np.testing.assert_allclose(result.reward, rewards.mean(), atol=1e-6)
  np.testing.assert_allclose(result.kl, 0.0, atol=1e-9)


def test_a_small_beta_gives_the_largest_reward_at_kl_log_n(rewards):
  result = frontier.optimal_frontier(rewards, np.array([1e-6]))
  np.testing.assert_allclose(result.reward, rewards.max(axis=1).mean())
  np.testing.assert_allclose(result.kl, math.log(64))


def test_reward_rises_with_kl_and_kl_falls_with_beta(rewards):
  result = frontier.optimal_frontier(rewards, np.geomspace(0.01, 10, 50))
  assert (np.diff(result.kl) < 0).all()
  assert (np.diff(result.reward) < 0).all()


def test_adding_a_constant_moves_the_reward_and_not_the_kl(rewards):
  betas = np.geomspace(0.01, 10, 20)
  before = frontier.optimal_frontier(rewards, betas)
  after = frontier.optimal_frontier(rewards + 1000.0, betas)
  np.testing.assert_allclose(after.reward, before.reward + 1000.0)
  np.testing.assert_allclose(after.kl, before.kl, atol=1e-9)


def test_the_slope_of_the_frontier_is_beta(rewards):
  # The best policy maximises reward - beta * KL.
  betas = np.geomspace(0.1, 1, 400)
  result = frontier.optimal_frontier(rewards, betas)
  slope = np.diff(result.reward) / np.diff(result.kl)
  np.testing.assert_allclose(slope, np.sqrt(betas[1:] * betas[:-1]), rtol=1e-3)


def test_no_other_weights_do_better(rewards):
  result = frontier.optimal_frontier(rewards, np.array([0.2]))
  best = result.reward[0] - 0.2 * result.kl[0]
  noise = np.random.default_rng(1).normal(size=(100, *rewards.shape))
  logits = rewards / 0.2 + 0.3 * noise
  weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  kl = (weights * np.log(64 * weights)).sum(axis=-1)
  values = ((weights * rewards).sum(axis=-1) - 0.2 * kl).mean(axis=-1)
  assert (values < best).all()


def test_the_trusted_range_ends_at_half_of_log_n(rewards):
  result = frontier.optimal_frontier(rewards, np.geomspace(0.001, 10, 50))
  np.testing.assert_array_equal(
    result.is_trusted, result.kl <= 0.5 * math.log(64)
  )
  assert 0 < result.is_trusted.sum() < 50


def test_reward_at_reads_the_line_and_only_where_it_is_trusted(rewards):
  result = frontier.optimal_frontier(rewards, np.geomspace(0.001, 100, 99))
  k = int(np.argmin(abs(result.kl - 1.0)))
  assert result.reward_at(result.kl[k]) == pytest.approx(result.reward[k])
  assert result.reward_at(-0.01) == pytest.approx(rewards.mean(), abs=1e-3)
  assert result.reward_at(3.0) is None


@pytest.mark.parametrize(
  ("shape", "betas", "message"),
  [
    ((3, 1), [1.0], "at least 2 samples a prompt, got 1"),
    ((3, 4), [1.0, 0.0], r"betas=\[1.0, 0.0\]: must be above 0"),
  ],
)
def test_a_frontier_that_cannot_be_estimated_is_refused(shape, betas, message):
  with pytest.raises(ValueError, match=message):
    frontier.optimal_frontier(np.zeros(shape), np.array(betas))


def test_mean_and_error_by_hand():
  mean, error = frontier.mean_and_error(np.array([1.0, 2.0, 6.0]))
  assert mean == pytest.approx(3.0)
  assert error == pytest.approx(math.sqrt(7.0) / math.sqrt(3))


def test_samples_of_one_prompt_count_once_in_the_error():
  values = np.array([1.0, 2.0, 6.0])
  repeated = np.repeat(values[:, None], 5, axis=1)
  assert frontier.mean_and_error(repeated) == pytest.approx(
    frontier.mean_and_error(values)
  )


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan]])
def test_a_mean_without_an_error_is_refused(values):
  with pytest.raises(ValueError, match="at least 2 prompts|not finite"):
    frontier.mean_and_error(np.array(values))


def test_a_point_holds_the_mean_logratio_of_its_samples():
  point = frontier.make_point(
    "dpo",
    policy_logps=np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32),
    reference_logps=np.array([[-2.0, -2.0], [-5.0, -6.0]], np.float32),
    rewards=np.array([[0.5, 0.7], [0.9, 0.9]]),
  )
  assert point.kl == pytest.approx((0.5 + 2.0) / 2)
  assert point.kl_error == pytest.approx(0.75)
  assert point.reward == pytest.approx(0.75)
  assert point.reward_error == pytest.approx(0.15)
  assert point.num_samples == 4


def test_the_kl_of_a_known_pair_of_policies_is_recovered():
  rng = np.random.default_rng(0)
  policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
  samples = rng.choice(3, size=20_000, p=policy)
  mean, error = frontier.mean_and_error(
    frontier.sequence_kl(np.log(policy)[samples], np.log(reference)[samples])
  )
  exact = float((policy * np.log(policy / reference)).sum())
  assert abs(mean - exact) < 3 * error < 0.03


def test_the_files_hold_what_was_measured(tmp_path, rewards):
  line = frontier.optimal_frontier(rewards, np.geomspace(0.01, 100, 99))
  text = frontier.write(tmp_path / "run", POINTS, line)
  record = json.loads((tmp_path / "run" / "frontier.json").read_text())
  assert [frontier.Point(**point) for point in record["points"]] == POINTS
  np.testing.assert_array_equal(record["frontier"]["kl"], line.kl)
  assert sum(record["frontier"]["is_trusted"]) == line.is_trusted.sum()
  image = (tmp_path / "run" / "frontier.png").read_bytes()
  assert image.startswith(b"\x89PNG") and len(image) > 10_000
  rows = text.splitlines()
  assert len({len(row) for row in rows}) == 1
  assert f"{line.reward_at(0.4):.4f}" in rows[2]
  assert rows[3].split()[-1] == "-"


def test_files_are_written_without_a_frontier(tmp_path):
  text = frontier.write(tmp_path, POINTS[:2])
  record = json.loads((tmp_path / "frontier.json").read_text())
  assert record["frontier"] is None
  assert [row.split()[-1] for row in text.splitlines()[1:]] == ["-", "-"]

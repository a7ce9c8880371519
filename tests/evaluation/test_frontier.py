"""The frontier against closed forms, the estimates by hand, and the files."""

import json
import math

import numpy as np
import pytest
from matplotlib import figure

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


def _gain(line, kl):
  """Returns the gain over the mean reward at this KL, trusted or not."""
  order = np.argsort(line.kl)
  return np.interp(kl, line.kl[order], line.reward[order]) - line.start


def _rare(share, num_samples):
  """Returns the line of rewards of 1 or 0, and what is known of it.

  That is: how much of the gain it has lost below its trusted KL.
  """
  rng = np.random.default_rng(1)
  rewards = (rng.random((300, num_samples)) < share).astype(float)
  betas = np.geomspace(0.1, 100, 200)
  line = frontier.optimal_frontier(rewards, betas)
  p = share / (share + (1 - share) * np.exp(-1 / betas))
  kl = p * np.log(p / share) + (1 - p) * np.log((1 - p) / (1 - share))
  lost = 1 - _gain(line, kl) / (p - share)
  return line, lost[kl < line.max_trusted_kl].max()


@pytest.mark.parametrize("share", [0.02, 0.2])
@pytest.mark.parametrize("num_samples", [16, 64, 256])
def test_little_of_the_gain_is_lost_where_the_line_is_trusted(
  share, num_samples
):
  _, lost = _rare(share, num_samples)
  assert lost < 2 * frontier.MAX_LOSS


def test_the_trusted_range_is_the_datas():
  # 64 samples hold one of 50 three times of four, and one of 5 always.
  rare, common = (_rare(share, 64)[0].max_trusted_kl for share in (0.02, 0.2))
  assert rare < 1 and common == pytest.approx(-np.log(0.2), abs=0.1)


def test_the_line_is_below_what_is_possible_and_nearer_with_more_samples():
  rewards = np.random.default_rng(2).normal(size=(2_000, 64))
  betas = np.geomspace(0.1, 100, 100)
  # Of normal rewards, sqrt(2 KL) is the best gain.
  kl = np.array([0.5, 1.0, 1.5])
  gains = [
    _gain(frontier.optimal_frontier(rewards[:, :n], betas), kl)
    for n in (8, 16, 32, 64)
  ]
  assert (np.diff([*gains, np.sqrt(2 * kl)], axis=0) > 0).all()


def test_the_line_starts_at_the_mean_reward(rewards):
  line = frontier.optimal_frontier(rewards, np.geomspace(0.01, 1e4, 50))
  assert line.start == rewards.mean()
  assert line.reward_at(0.0) == pytest.approx(line.start, abs=1e-4)


def test_few_samples_are_trusted_nowhere():
  line = frontier.optimal_frontier(
    np.random.default_rng(0).uniform(size=(50, 4)), np.geomspace(0.01, 100, 50)
  )
  assert line.max_trusted_kl == 0 and line.reward_at(0.01) is None


def test_rewards_that_are_all_alike_are_trusted():
  line = frontier.optimal_frontier(np.full((3, 4), 0.3), np.array([0.1, 1.0]))
  assert line.reward_at(0.0) == pytest.approx(0.3)


def test_the_legend_says_at_least(rewards):
  line = frontier.optimal_frontier(rewards, np.geomspace(0.01, 100, 50))
  ax = figure.Figure().subplots()
  frontier.draw(ax, POINTS, line, reference_label="SFT", reward_name="reward")
  labels = [text.get_text() for text in ax.get_legend().get_texts()]
  assert "best possible, at least" in labels


def test_reward_at_reads_the_line_and_only_where_it_is_trusted(rewards):
  result = frontier.optimal_frontier(rewards, np.geomspace(0.001, 100, 99))
  k = int(np.argmin(abs(result.kl - 1.0)))
  assert result.reward_at(result.kl[k]) == pytest.approx(result.reward[k])
  assert result.reward_at(-0.01) == pytest.approx(rewards.mean(), abs=1e-3)
  assert result.reward_at(result.max_trusted_kl + 0.1) is None


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

"""PPO runs: what they leave, that they go on bit for bit, that they learn."""

import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax.data import tokenize
from dpo_jax.data.sources import synthetic
from dpo_jax.inference import model as model_lib
from dpo_jax.rewards import registry
from dpo_jax.run import experiment, trainer
from dpo_jax.sampling import decode
from dpo_jax.training import ppo
from tests import test_end_to_end as end_to_end


def _config(folder, *, steps=1):
  config = quickstart.get_config("ppo")
  config.data.path, config.data.eval_path = "reviews:40", ""
  config.data.cache_dir = str(folder / "cache")
  config.data.row_length, config.data.max_length = 128, 32
  config.batch_size, config.microbatch_rows, config.steps = 16, 8, steps
  config.ppo.max_new_tokens, config.ppo.epochs = 8, 2
  config.ppo.target_kl = 0.5
  config.checkpoint.keep = 9
  config.mesh.data, config.mesh.fsdp = 2, 4
  return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a run of four iterations, saved every second."""
  folder = tmp_path_factory.mktemp("ppo")
  config = _config(folder, steps=4)
  config.checkpoint.every = 2
  assert trainer.train(config, str(folder / "run"))
  return folder / "run"


def test_a_run_leaves_metrics_and_a_decoder(whole):
  lines = end_to_end.metrics(whole)
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  keys = (
    "loss policy_loss value_loss objective/kl objective/reward score/mean"
    " score/std clip_fraction approx_kl explained_variance entropy"
    " response_length kl_coef grad_norm learning_rate pairs_per_second"
  ).split()
  for line in lines:
    assert set(keys) <= line.keys()
    assert np.isfinite([line[key] for key in keys]).all()
    assert 1 <= line["response_length"] <= 8
  # The policy is its reference before the first update.
  assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
  assert lines[1]["objective/kl"] != lines[2]["objective/kl"]
  assert lines[1]["kl_coef"] < lines[0]["kl_coef"] == pytest.approx(0.05)
  assert ppo.VALUE_HEAD not in end_to_end.params(whole)
  end_to_end.check_explained(lines)


@pytest.mark.slow
def test_a_run_lost_after_two_iterations_goes_on_bit_for_bit(whole, tmp_path):
  parted = tmp_path / "run"
  shutil.copytree(whole, parted)
  shutil.rmtree(parted / "checkpoints" / "4")
  assert trainer.train(_config(whole.parent, steps=4), str(parted))
  without = end_to_end.without_timings
  assert without(end_to_end.metrics(parted)) == without(
    end_to_end.metrics(whole)
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    end_to_end.params(parted),
    end_to_end.params(whole),
  )


def test_settings_that_cannot_be_are_refused(tmp_path):
  def build(**changes):
    config = _config(tmp_path)
    for key, value in changes.items():
      section, _, name = key.partition("__")
      config[section][name] = value
    return experiment.build(config)

  with pytest.raises(ValueError, match="ppo.reward='': loss 'ppo' needs one"):
    build(ppo__reward="")
  with pytest.raises(ValueError, match="minibatches=3: must divide batch_size"):
    build(ppo__minibatches=3)
  with pytest.raises(ValueError, match="truncate_prompts='never': loss 'ppo'"):
    build(data__truncate_prompts="never")
  with pytest.raises(ValueError, match="data.max_length=20: must hold"):
    build(data__max_length=20)
  with pytest.raises(ValueError, match="loss 'ppo' allows 'live' only"):
    build(reference__mode="ema")
  with pytest.raises(ValueError, match="loss.beta=0.1: 'ppo' has its own"):
    build(loss__beta=0.1)
  with pytest.raises(
    ValueError, match="loss 'sft' does not honour it; 'ppo' does"
  ):
    build(loss__name="sft")
  with pytest.raises(ValueError, match="unknown reward 'true'; known: run"):
    registry.load("true")


def test_the_reward_reads_prompt_and_response_as_one_review():
  tokenizer = synthetic.make_tokenizer()
  encode = lambda text: tokenizer(text).input_ids
  prompts = [encode("the plot was not"), encode("a film")]
  responses = [encode("good .") + [tokenizer.eos_token_id], encode("was dull")]
  texts = tokenize.decode(tokenizer, prompts, responses)
  assert texts == (["the plot was not", "a film"], [" good .", " was dull"])
  expected = [
    synthetic.true_reward("the plot was not good ."),
    synthetic.true_reward("a film was dull"),
  ]
  found = registry.load("synthetic")(*texts)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_ppo_raises_the_true_reward_of_a_language_model(tmp_path):
  config = quickstart.get_config("sft")
  config.steps, config.data.eval_path = 200, ""
  config.data.path = "reviews:20000"
  config.data.cache_dir = str(tmp_path / "cache")
  config.mesh.fsdp, config.mesh.data = -1, 1
  assert trainer.train(config, str(tmp_path / "sft"))
  config = quickstart.get_config("ppo")
  config.model.preset, config.model.path = "", str(tmp_path / "sft")
  config.data.cache_dir = str(tmp_path / "cache")
  config.steps, config.optimizer.learning_rate = 15, 1e-3
  assert trainer.train(config, str(tmp_path / "ppo"))
  trained = model_lib.Policy(str(tmp_path / "ppo"))
  ((sample,),) = trained.sample([[5, 6]], decode.Settings(4), seed=0)
  assert 1 <= len(sample.tokens) <= 4
  lines = end_to_end.metrics(tmp_path / "ppo")
  train = [line for line in lines if line["split"] == "train"]
  scores = [line["score/mean"] for line in train]
  assert scores[-1] > scores[0] + 0.15
  held_out = [line for line in lines if line["split"] == "eval"]
  assert held_out[-1]["score/mean"] > scores[0] + 0.15
  assert 0.5 < held_out[-1]["objective/kl"] < 20

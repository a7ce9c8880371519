"""Every loss on synthetic reviews, each kind on real dialogues: 30 updates."""

import itertools
import json
import lzma

import numpy as np
import pytest

from configs import hh_dialogue, quickstart
from configs import losses as loss_configs
from dpo_jax.run import trainer

NUM_STEPS, BATCH_SIZE, NUM_PAIRS = 30, 16, 64
EPOCH = NUM_PAIRS // BATCH_SIZE
LOSSES = sorted(loss_configs.LOSSES)
# One of each kind of what a loss reads of the data and of the batch.
ON_DIALOGUES = (
  *("dpo", "simpo", "aot", "beta_dpo", "kto", "bco", "plackett_luce"),
  *("sft", "reward_model"),
)


def assert_falls(config, folder):
  """Trains, and compares the first with the last pass over the pairs."""
  config.steps = NUM_STEPS
  config.batch_size = BATCH_SIZE
  config.microbatch_rows = 8
  config.data.row_length = 0
  config.data.eval_path = ""
  config.data.cache_dir = str(folder / "cache")
  config.data.max_length, config.data.max_prompt_length = 96, 48
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 0
  config.log.every = 1
  assert trainer.train(config, str(folder / "run"))
  lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert len(losses) == NUM_STEPS and np.isfinite(losses).all()
  assert np.mean(losses[-EPOCH:]) < np.mean(losses[:EPOCH])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_synthetic_reviews(loss, tmp_path):
  config = quickstart.get_config(loss)
  kind = config.data.path.partition(":")[0]
  config.data.path = f"{kind}:{NUM_PAIRS}"
  assert_falls(config, tmp_path)


def _dialogues(loss, shared_dir, folder):
  """Returns a run of a small pretrained model on the first dialogues."""
  path = folder / "hh.jsonl"
  with lzma.open(shared_dir / "data/hh/train.jsonl.xz", "rt") as file:
    path.write_text("".join(itertools.islice(file, NUM_PAIRS)))
  config = hh_dialogue.get_config(loss)
  config.model.preset = config.model.tokenizer = ""
  config.model.path = str(shared_dir / "data/models/stories260K")
  config.data.path = str(path)
  return config


@pytest.mark.slow
@pytest.mark.parametrize("loss", ON_DIALOGUES)
def test_dialogues(loss, shared_dir, tmp_path):
  assert_falls(_dialogues(loss, shared_dir, tmp_path), tmp_path)


def test_dialogues_have_no_scores(shared_dir, tmp_path):
  with pytest.raises(ValueError, match="line 1: no column 'chosen_score'"):
    assert_falls(_dialogues("odpo", shared_dir, tmp_path), tmp_path)

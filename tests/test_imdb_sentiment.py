"""The stages of controlled sentiment, on the first real reviews."""

import itertools
import json
import lzma

import pytest

from configs import imdb_sentiment
from dpo_jax.data import bpe
from dpo_jax.run import experiment


@pytest.fixture
def reviews(shared_dir, tmp_path):
  """A file of 32 reviews, and beside it a tokenizer of their text."""
  path = tmp_path / "reviews.jsonl"
  with lzma.open(shared_dir / "data/imdb/train.jsonl.xz", "rt") as file:
    path.write_text("".join(itertools.islice(file, 32)))
  bpe.train(bpe.texts("imdb", [str(path)], ""), 400).save_pretrained(
    tmp_path / "tokenizer"
  )
  return path


@pytest.mark.parametrize(
  ("loss", "head", "num_steps"),
  [
    ("sft", "vocabulary", 8),
    ("pretraining", "vocabulary", 380),
    ("classifier", "classifier", 8),
  ],
)
def test_a_stage_reads_reviews(loss, head, num_steps, reviews, tmp_path):
  config = imdb_sentiment.get_config(f"{loss},cpu")
  config.data.path = config.data.eval_path = str(reviews)
  config.data.cache_dir = str(tmp_path / "cache")
  config.model.path, config.model.preset = "", "tiny"
  config.model.tokenizer = str(tmp_path / "tokenizer")
  config.batch_size = config.microbatch_rows = 8
  built = experiment.build(config)
  assert built.scorer.policy.head == head
  assert built.scorer.policy.vocab_size == 400
  assert built.schedule.last_step == num_steps
  labels = [json.loads(line)["label"] for line in reviews.open()]
  is_positive = (built.loader.dataset.lengths[:, 1] > 0).tolist()
  assert is_positive == [head == "vocabulary" or x == 1 for x in labels]


def test_only_the_small_scale_pretrains_on_half_of_the_reviews():
  small, whole = (
    imdb_sentiment.get_config(f"pretraining{scale}") for scale in (",cpu", "")
  )
  assert (small.steps, whole.steps, whole.epochs) == (380, 0, 1)


def test_the_reward_model_has_three_epochs_and_its_best_accuracy():
  config = imdb_sentiment.get_config("reward_model")
  assert config.epochs == 3
  assert config.checkpoint.metric == "rewards/accuracies"
  assert config.checkpoint.every == config.eval.every > 0
  assert imdb_sentiment.get_config("dpo").optimizer.name == "rmsprop"

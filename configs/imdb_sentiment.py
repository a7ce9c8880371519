"""Controlled sentiment on IMDb reviews, after Rafailov et al. 2023, sec 6.1.

  python -m launch.tokenizer --data=imdb/train.jsonl.xz --data_source=imdb \\
    --output=runs/imdb_tokenizer
  python -m launch.train --config=configs/imdb_sentiment.py:classifier \\
    --workdir=runs/imdb_classifier --config.data.path=imdb/train.jsonl.xz \\
    --config.data.eval_path=imdb/test.jsonl.xz
  python -m launch.train --config=configs/imdb_sentiment.py:sft \\
    --workdir=runs/imdb_sft --config.data.path=imdb/unsup.jsonl.xz
  python -m launch.train --config=configs/imdb_sentiment.py:reward_model \\
    --workdir=runs/imdb_rm --config.model.path=runs/imdb_sft \\
    --config.data.path=pairs.jsonl --config.data.eval_path=held_out.jsonl

`classifier` is the ground-truth reward: a small decoder from random weights,
minutes on two CPU cores; docs/results/imdb_classifier.md has its accuracy.
`sft` is the language model that samples, its prompts the first words of
reviews (one epoch, as in the paper; not yet run to its end). `reward_model`
learns pairs of samples for 3 epochs and is read at its best held-out accuracy;
all other losses (`dpo`, ...) learn pairs too, at the paper's settings; these
start from the sft run and are not yet run.
"""

from configs import base, losses

DEMONSTRATIONS = ("sft", "sft_sum")


def get_config(loss: str = "dpo"):
  """Returns the settings of the given loss."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  is_sft = loss in DEMONSTRATIONS
  if is_sft or loss in ("classifier", "reward_model"):
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.clip = 1.0
  if is_sft or loss == "classifier":
    config.data.source = "imdb"
    config.data.max_prompt_length = 16
    config.data.row_length = 512
    config.microbatch_rows = 8
    config.model.preset = "small" if is_sft else "mini"
    config.model.tokenizer = "runs/imdb_tokenizer"
  if loss == "classifier":
    config.epochs = 2
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.1
    config.checkpoint.metric = "rewards/accuracies"
  if loss == "reward_model":
    config.epochs = 3
    config.optimizer.learning_rate = 1e-4
    config.eval.every = config.checkpoint.every = 200
    config.checkpoint.metric = "rewards/accuracies"
  return config

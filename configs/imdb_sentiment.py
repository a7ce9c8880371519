"""Controlled sentiment on IMDb reviews, after Rafailov et al. 2023, sec 6.1.

  python -m launch.reproduce imdb --scale=cpu --data=imdb --workdir=runs/imdb

runs all of it; docs/results/imdb_cpu.md has its figure. Its stages alone:

  python -m launch.tokenizer --data=imdb/unsup.jsonl.xz --data_source=imdb \\
    --output=runs/imdb_tokenizer
  python -m launch.train --config=configs/imdb_sentiment.py:pretraining \\
    --workdir=runs/imdb_pretraining --config.data.path=imdb/unsup.jsonl.xz
  python -m launch.train --config=configs/imdb_sentiment.py:classifier \\
    --workdir=runs/imdb_classifier --config.data.path=imdb/train.jsonl.xz \\
    --config.data.eval_path=imdb/test.jsonl.xz \\
    --config.model.path=runs/imdb_pretraining
  python -m launch.train --config=configs/imdb_sentiment.py:sft \\
    --workdir=runs/imdb_sft --config.data.path=imdb/unsup.jsonl.xz
  python -m launch.train --config=configs/imdb_sentiment.py:reward_model \\
    --workdir=runs/imdb_rm --config.model.path=runs/imdb_sft \\
    --config.data.path=pairs.jsonl --config.data.eval_path=held_out.jsonl
  python -m launch.train --config=configs/imdb_sentiment.py:dpo \\
    --workdir=runs/imdb_dpo --config.model.path=runs/imdb_sft \\
    --config.data.path=pairs.jsonl

The argument is a loss and, behind a comma, a scale: `dpo,cpu`. `paper`, the
default, is GPT-2 large at the paper's settings, `gpu` GPT-2 at the same; both
are not yet run. `cpu` is a small model from random weights. `classifier` is
the ground-truth reward, at every scale a small decoder whose body has learnt
whole reviews in `pretraining`: docs/results/imdb_classifier.md has its
accuracy.
"""

from configs import base, losses

DEMONSTRATIONS = ("sft", "sft_sum")
WHOLE_REVIEWS = ("pretraining", "classifier")
MODELS = {
  "paper": "openai-community/gpt2-large",
  "gpu": "openai-community/gpt2",
}
# Label, loss and what is changed of it: the paper's runs, and IPO's.
DPO_BETAS = (0.05, 0.1, 1.0, 5.0)  # the paper's


def _grid(dpo_betas=DPO_BETAS):
  """Returns label, loss and what is changed of it: the paper's runs, and IPO's.

  How many seeds the paper's Preferred-FT had is not known.
  """
  targets = (3.0, 6.0, 9.0, 12.0)
  return (
    *(("DPO", "dpo", {"loss.beta": x}) for x in dpo_betas),
    *(("IPO", "ipo_sum", {"loss.beta": x}) for x in (0.05, 0.1, 0.5)),
    *(
      ("Unlikelihood", "unlikelihood", {"loss.alpha": x})
      for x in (0.05, 0.1, 0.5, 1.0)
    ),
    *(("Preferred-FT", "preferred_ft", {"seed": x}) for x in (0, 1, 2)),
    *(("PPO", "ppo", {"ppo.target_kl": x}) for x in targets),
    # Its scores are log-odds: at the default coefficient KL runs away.
    *(
      ("PPO", "ppo", {"ppo.target_kl": x, "ppo.kl_coef": 0.4})
      for x in targets[:2]
    ),
    *(("PPO-GT", "ppo", {"ppo.target_kl": x}) for x in targets),
  )


# Four times the iterations of the others at the scale `cpu`.
LONG_PPO = {"ppo.target_kl": 6.0, "steps": 160, "checkpoint.every": 20}

PLANS = {
  # The paper's counts of prefixes and samples; what is not known of the
  # evaluation is ours.
  "paper": dict(
    num_prefixes=25_000,
    num_test_prefixes=512,
    test_samples=4,
    frontier_samples=256,
    max_new_tokens=64,
    grid=_grid(),
  ),
  "cpu": dict(
    num_prefixes=8_000,
    num_test_prefixes=256,
    test_samples=2,
    frontier_samples=512,
    max_new_tokens=32,
    vocab_size=4096,
    grid=(
      *_grid((*DPO_BETAS, 0.2)),
      ("PPO", "ppo", LONG_PPO | {"ppo.kl_coef": 0.4}),
      ("PPO-GT", "ppo", LONG_PPO),
    ),
  ),
}
PLANS["gpu"] = PLANS["paper"]


def get_config(argument: str = "dpo"):
  """Returns the settings of a loss at a scale.

  Raises:
    ValueError: an unknown loss or scale.
  """
  name, _, scale = argument.partition(",")
  scale = scale or "paper"
  if scale not in PLANS:
    raise ValueError(f"unknown scale {scale!r}; known: {', '.join(PLANS)}")
  loss = "sft" if name == "pretraining" else name
  config = base.get_config()
  config.loss.update(losses.get(loss))
  config.model.path = MODELS.get(scale, "")
  config.log.every = 10
  if loss in (*DEMONSTRATIONS, "classifier", "ppo"):
    config.data.source = "imdb"
    config.data.max_prompt_length = 16
  if name in WHOLE_REVIEWS:
    _set_whole_reviews(config, name, scale)
  elif loss == "reward_model":
    config.epochs = 3
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.clip = 1.0
    config.eval.every = config.checkpoint.every = 200
    config.checkpoint.metric = "rewards/accuracies"
  elif loss not in DEMONSTRATIONS:
    # Each checkpoint is a dot of the figure.
    config.checkpoint.every, config.checkpoint.keep = 100, 1000
    config.checkpoint.minutes = 0.0
  if loss == "ppo":
    config.steps, config.batch_size = 400, 256
    config.ppo.minibatches = 4
    config.ppo.max_new_tokens = PLANS[scale]["max_new_tokens"]
    config.ppo.horizon = 2_000.0
  if scale == "cpu" and name not in WHOLE_REVIEWS:
    _set_cpu(config, loss)
  return config


def _set_whole_reviews(config, name, scale):
  """Sets the classifier, and how its body begins: minutes on two cores."""
  config.data.row_length = 512
  config.microbatch_rows = 8
  config.optimizer.name = "adamw"
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.clip = 1.0
  if name == "pretraining":
    config.model.path, config.model.preset = "", "mini"
    config.model.tokenizer = "runs/imdb_tokenizer"
    config.optimizer.learning_rate = 2e-3
    if scale == "cpu":  # half of the reviews
      config.steps, config.optimizer.learning_rate = 380, 4e-3
  else:
    config.epochs = 2
    config.model.path = "runs/imdb_pretraining"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.checkpoint.metric = "rewards/accuracies"


def _set_cpu(config, loss):
  """Sets what fits a model of 1 M parameters and an hour of two cores."""
  config.data.max_prompt_length = 16
  config.data.max_length = 48  # tokens: the first lines of a review
  config.data.row_length = 512
  config.microbatch_rows = 4
  config.optimizer.name = "adamw"
  config.optimizer.warmup_steps = 20
  config.optimizer.clip = 1.0
  config.optimizer.learning_rate = 2e-4
  config.optimizer.schedule = "linear"
  if loss in DEMONSTRATIONS:
    config.epochs = 2
    config.model.preset = "nano"
    config.model.tokenizer = "runs/imdb_tokenizer"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
  elif loss == "reward_model":
    config.eval.every = config.checkpoint.every = 300
  elif loss == "ppo":
    config.steps, config.batch_size = 40, 128
    config.checkpoint.every = 10
    config.ppo.epochs, config.ppo.minibatches = 2, 2
    config.ppo.horizon = 500.0
    config.optimizer.learning_rate = 3e-4
  elif loss == "dpo":
    config.steps = 700  # once over the pairs
    config.reference.mode = "cached"
  elif loss == "ipo_sum":
    config.steps = 350
    config.reference.mode = "cached"
  else:
    config.steps = 200

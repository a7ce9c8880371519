"""Controlled sentiment in miniature: no download, minutes on a laptop CPU.

  make quickstart                                      the whole experiment
  python -m launch.train --config=configs/quickstart.py:dpo --workdir=runs/x

A small grammar writes film reviews whose true reward is known exactly (see
dpo_jax/data/sources/synthetic.py). `sft` learns the reviews from random
weights; other losses learn pairs of reviews, from random weights too unless
`model.path` names a run. `ppo` samples reviews and learns from their true
reward:

  python -m launch.train --config=configs/quickstart.py:ppo \\
    --workdir=runs/ppo --config.model.preset= \\
    --config.model.path=runs/quickstart/sft
"""

from configs import base, losses


def get_config(loss: str = "dpo"):
  """Returns the settings of one stage."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  is_sft = loss in ("sft", "sft_sum")
  config.steps = 600 if is_sft else 300
  config.batch_size = 128 if is_sft else 64
  config.data.source = "synthetic"
  config.data.path = "reviews:40000" if is_sft else "pairs:10000"
  config.data.eval_path = "reviews:500" if is_sft else "pairs:500"
  config.data.max_length = 64
  config.data.max_prompt_length = 16
  config.data.row_length = 512
  config.microbatch_rows = 8
  config.model.preset = "tiny"
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 3e-3 if is_sft else 3e-4
  config.optimizer.warmup_steps = 20
  config.optimizer.schedule = "cosine"
  config.optimizer.clip = 1.0
  config.log.every = 20
  if loss == "ppo":
    _set_ppo(config)
  return config


def _set_ppo(config):
  """Sets what PPO needs besides."""
  config.steps = 60
  config.batch_size = 128
  config.data.path, config.data.eval_path = "reviews:40000", "reviews:150"
  config.ppo.reward = "synthetic"
  config.ppo.max_new_tokens = 32
  config.ppo.minibatches = 2
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule = "constant"
  config.eval.every = 10
  config.log.every = 1

"""Single-turn dialogue on Anthropic HH, after Rafailov et al. 2023, sec 6.3.

  python -m launch.train --config=configs/hh_dialogue.py:sft \\
    --workdir=runs/hh_sft --config.data.path=hh/train.jsonl.xz \\
    --config.data.eval_path=hh/test.jsonl.xz
  python -m launch.train --config=configs/hh_dialogue.py:dpo \\
    --workdir=runs/hh_dpo --config.model.path=runs/hh_sft \\
    --config.data.path=hh/train.jsonl.xz \\
    --config.data.eval_path=hh/test.jsonl.xz --config.loss.ld_alpha=0

`sft` trains a 10 M model on the chosen responses from random weights, with
GPT-2's tokenizer (`model.tokenizer`: a hub name, a folder or a file); the
other losses start from the run that it leaves. Each response is seen once: a
reference that knows the chosen ones by heart leaves little to learn from. At
this size tokens past the shorter response say more of its length than of its
worth, so they are left out (`ld_alpha=0`; the paper counts them). On two CPU
cores each takes minutes; docs/results/hh_cpu.md has the figures.

`,paper` after the loss's name gives the paper's settings instead, for the
Pythia-2.8B that `model.path` names (not yet run; the paper says nothing of the
optimizer of `sft` and `reward_model`: here these have AdamW at 1e-5):

  python -m launch.train --config=configs/hh_dialogue.py:sft,paper \\
    --workdir=runs/hh_sft --config.data.path=hh/train.jsonl.xz \\
    --config.model.path=EleutherAI/pythia-2.8b
  python -m launch.train --config=configs/hh_dialogue.py:dpo,paper \\
    --workdir=runs/hh_dpo --config.data.path=hh/train.jsonl.xz \\
    --config.model.path=runs/hh_sft

The whole experiment, to the win rates, in minutes with a model from scratch:

  python -m launch.reproduce hh --data=hh --workdir=runs/hh

docs/results/hh_reproduced_cpu.md has its figures.
"""

from configs import base, losses

DEMONSTRATIONS = ("sft", "sft_sum", "preferred_ft")


def get_config(loss: str = "dpo"):
  """Returns the settings of the given loss, or of `LOSS,paper`."""
  loss, comma, size = loss.partition(",")
  if comma and size != "paper":
    raise ValueError(f"unknown size {size!r}; known: paper, or none")
  config = base.get_config()
  config.loss.update(losses.get(loss))
  config.data.source = "hh"
  is_sft = loss in DEMONSTRATIONS
  if comma:
    config.eval.every = 200
    if is_sft or loss == "reward_model":
      config.optimizer.name = "adamw"
      config.optimizer.learning_rate = 1e-5
      config.optimizer.schedule = "cosine"
      config.optimizer.clip = 1.0
  else:
    config.batch_size = 16 if is_sft else 64
    if is_sft:
      config.model.preset = "small"
      config.model.tokenizer = "openai-community/gpt2"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3 if is_sft else 5e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50 if is_sft else 20
    config.optimizer.clip = 1.0
    config.eval.every = 40
  if loss == "reward_model":
    config.checkpoint.metric = "rewards/accuracies"
    config.checkpoint.every = config.eval.every
  return config

"""Summaries of Reddit posts, after Rafailov et al. 2023, sec 6.2.

  python -m launch.reproduce tldr --data=tldr --workdir=runs/tldr

is the whole experiment, in minutes with a model from scratch (not this file's
settings); docs/results/tldr_cpu.md has the figures. Stage by stage, at the
paper's settings, with GPT-J (not yet run):

  python -m launch.train --config=configs/tldr_summarization.py:sft \\
    --workdir=runs/tldr_sft --config.data.path=tldr/posts.jsonl.xz \\
    --config.model.path=EleutherAI/gpt-j-6b
  python -m launch.train --config=configs/tldr_summarization.py:reward_model \\
    --workdir=runs/tldr_rm --config.data.path=pairs.jsonl \\
    --config.data.eval_path=held_out.jsonl --config.model.path=runs/tldr_sft
  python -m launch.train --config=configs/tldr_summarization.py:dpo \\
    --workdir=runs/tldr_dpo --config.data.path=pairs.jsonl \\
    --config.data.eval_path=held_out.jsonl --config.model.path=runs/tldr_sft

`sft` learns the authors' own summaries; the other losses start from the run
that it leaves and learn pairs. Differs: the paper starts from an SFT model of
others, and says nothing of its or the reward model's optimizer; here these
have AdamW at 1e-5.
"""

from configs import base, losses

DEMONSTRATIONS = ("sft", "sft_sum", "preferred_ft")


def get_config(loss: str = "dpo"):
  """Returns the settings of the given loss."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  if loss == "dpo":
    config.loss.beta = 0.5
  config.data.max_prompt_length = 448  # leaves room for a summary
  if loss in DEMONSTRATIONS:
    config.data.source = "tldr"
  if loss in (*DEMONSTRATIONS, "reward_model"):
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.clip = 1.0
  if loss == "reward_model":
    config.checkpoint.metric = "rewards/accuracies"
    config.checkpoint.every = config.eval.every = 200
  return config

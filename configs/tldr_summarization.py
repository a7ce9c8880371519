"""Summaries of Reddit posts, after Rafailov et al. 2023, sec 6.2.

  python -m launch.reproduce tldr --data=tldr --workdir=runs/tldr

is the whole experiment at the scale `cpu`, minutes with a small model from
random weights; docs/results/tldr_cpu.md has the figures. Stage by stage, at the
paper's settings, from GPT-J (not yet run):

  python -m launch.train --config=configs/tldr_summarization.py:sft \\
    --workdir=runs/tldr_sft --config.data.path=tldr/posts.jsonl.xz
  python -m launch.train --config=configs/tldr_summarization.py:reward_model \\
    --workdir=runs/tldr_rm --config.data.path=pairs.jsonl \\
    --config.data.eval_path=held_out.jsonl --config.model.path=runs/tldr_sft
  python -m launch.train --config=configs/tldr_summarization.py:dpo \\
    --workdir=runs/tldr_dpo --config.data.path=pairs.jsonl \\
    --config.data.eval_path=held_out.jsonl --config.model.path=runs/tldr_sft

and likewise `preferred_ft`, `unlikelihood`, and, on tldr/posts.jsonl.xz, `ppo`
with `--config.ppo.reward=run:runs/tldr_rm`. `sft` learns the authors' own
summaries; the other losses start from the run that it leaves. `LOSS,gpu`, the
same from a small Pythia, is not yet run either. Articles of CNN/DailyMail
(table 1) are any file of `prompt, response` for `launch.sample` and
`launch.evaluate win_rate`.

Differs: the paper starts from an SFT model of others, and says nothing of its
or the reward model's optimizer, here AdamW at 1e-5, nor of how PPO was set.
"""

from configs import base, losses, scales

DEMONSTRATIONS = ("sft", "sft_sum", "preferred_ft")
MODELS = {
  "paper": "EleutherAI/gpt-j-6b",
  "gpu": "EleutherAI/pythia-410m",
}
# See `pipelines.preference_tasks.Scale`.
SCALES = {
  "cpu": dict(
    train_rows=1500,
    test_prompts=128,
    max_new_tokens=64,
    best_of=16,
    prompt_characters=700,
    response_characters=200,
    vocab_size=4096,
  ),
  "gpu": dict(
    train_rows=20_000, test_prompts=256, max_new_tokens=64, best_of=64
  ),
  "paper": dict(max_new_tokens=64, best_of=128),
}


def get_config(argument: str = "dpo"):
  """Returns the settings of a loss at a scale.

  Args:
    argument: `LOSS`, as `LOSS,paper`, or `LOSS,SCALE`. `LOSS,cpu,pretrained` is
      for a model that is given.

  Raises:
    ValueError: an unknown loss or scale.
  """
  loss, scale, start = scales.parse(argument, SCALES)
  scale = scale or "paper"
  config = base.get_config()
  config.loss.update(losses.get(loss))
  config.data.max_prompt_length = 448  # leaves room for a summary
  if loss in (*DEMONSTRATIONS, "ppo"):
    config.data.source = "tldr"
  if loss == "sft":
    config.model.path = MODELS.get(scale, "")
  if loss in (*DEMONSTRATIONS, "reward_model"):
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.clip = 1.0
  if loss == "reward_model":
    config.checkpoint.metric = "rewards/accuracies"
    config.checkpoint.every = config.eval.every = 200
  elif loss == "dpo":
    config.loss.beta = 0.5
    config.checkpoint.every, config.checkpoint.keep = 100, 100
    config.checkpoint.minutes = 0.0
  elif loss == "ppo":
    config.ppo.max_new_tokens = SCALES[scale]["max_new_tokens"]
  if scale == "cpu":
    scales.set_small(config, loss, 288, start)
  return config

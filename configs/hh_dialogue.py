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

`,paper` after the loss's name gives the paper's settings instead, from
Pythia-2.8B (not yet run; the paper says nothing of the optimizer of `sft` and
`reward_model`, here AdamW at 1e-5, nor of how PPO was set):

  python -m launch.train --config=configs/hh_dialogue.py:sft,paper \\
    --workdir=runs/hh_sft --config.data.path=hh/train.jsonl.xz
  python -m launch.train --config=configs/hh_dialogue.py:dpo,paper \\
    --workdir=runs/hh_dpo --config.data.path=hh/train.jsonl.xz \\
    --config.model.path=runs/hh_sft

and likewise `reward_model`, `unlikelihood`, and `ppo` with
`--config.ppo.reward=run:runs/hh_rm`. The whole experiment, to the win rates:

  python -m launch.reproduce hh --data=hh --workdir=runs/hh

which is `,cpu`, minutes with a small model from random weights
(docs/results/hh_reproduced_cpu.md has its figures); `--scale=gpu`, the paper's
settings on a smaller Pythia, and `paper` are not yet run.
"""

from configs import base, losses, scales

DEMONSTRATIONS = ("sft", "sft_sum", "preferred_ft")
MODELS = {
  "paper": "EleutherAI/pythia-2.8b",
  "gpu": "EleutherAI/pythia-410m",
}
# See `pipelines.preference_tasks.Scale`.
SCALES = {
  "cpu": dict(
    train_rows=2000,
    test_prompts=128,
    max_new_tokens=96,
    best_of=16,
    prompt_characters=800,
    response_characters=500,
    vocab_size=4096,
  ),
  "gpu": dict(test_prompts=256, max_new_tokens=256, best_of=64),
  "paper": dict(max_new_tokens=256, best_of=128),
}


def get_config(argument: str = "dpo"):
  """Returns the settings of a loss, at a scale if one is named.

  Args:
    argument: `LOSS`, of the 10 M model; or `LOSS,SCALE`. `LOSS,cpu,pretrained`
      is for a model that is given.

  Raises:
    ValueError: an unknown loss or scale.
  """
  loss, scale, start = scales.parse(argument, SCALES)
  config = base.get_config()
  config.loss.update(losses.get(loss))
  config.data.source = "hh"
  is_sft = loss in DEMONSTRATIONS
  if scale:
    config.model.path = MODELS.get(scale, "") if is_sft else ""
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
  elif loss == "dpo" and scale:  # judged over training
    config.checkpoint.every, config.checkpoint.keep = 400, 100
    config.checkpoint.minutes = 0.0
  elif loss == "ppo" and scale:
    config.ppo.max_new_tokens = SCALES[scale]["max_new_tokens"]
  if scale == "cpu":
    scales.set_small(config, loss, 256, start)
  return config

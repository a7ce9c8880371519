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

For a pretrained model, give `sft` a `model.path` and `--config.model.preset=`,
and the paper's optimizer: `--config.optimizer.name=rmsprop
--config.optimizer.learning_rate=1e-6 --config.optimizer.warmup_steps=150` (not
yet run).
"""

from configs import base, losses

DEMONSTRATIONS = ("sft", "sft_sum", "preferred_ft")


def get_config(loss: str = "dpo"):
  """Returns the settings of the given loss."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  is_sft = loss in DEMONSTRATIONS
  config.batch_size = 16 if is_sft else 64
  config.data.source = "hh"
  if is_sft:
    config.model.preset = "small"
    config.model.tokenizer = "openai-community/gpt2"
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 2e-3 if is_sft else 5e-5
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50 if is_sft else 20
  config.optimizer.clip = 1.0
  config.eval.every = 40
  return config

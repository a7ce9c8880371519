"""Speed of the train step on your pairs; no run folder is written.

  python -m launch.benchmark --config=configs/benchmark.py \\
    --config.data.path=pairs.jsonl --config.model.tokenizer=tokenizer

By default a 58 M Llama of random weights, AdamW, 8 pairs a step, cut to 512
tokens, a live reference. Numbers: docs/results/speed.md.
"""

from configs import base, losses


def get_config(loss: str = "dpo"):
  """Returns the settings of the work that is timed."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  config.batch_size = 8
  config.data.max_length = 512
  config.data.max_prompt_length = 512
  config.model.preset = "bench-58m"
  config.model.vocab_size = 32_000
  config.optimizer.name = "adamw"
  config.optimizer.warmup_steps = 0
  config.data.shuffle = False
  return config

"""Your own preference pairs and your own model.

  python -m launch.train --config=configs/pairs.py:dpo --workdir=runs/mine \\
    --config.data.path=pairs.jsonl --config.model.path=my_model

`data.path` is a jsonl(.gz, .xz) or parquet file with `prompt, chosen,
rejected` (strings or chat messages), or with `chosen, rejected` alone. The
argument after the colon is a loss of configs/losses.py.
"""

from configs import base, losses


def get_config(loss: str = "dpo"):
  """Returns the paper's settings for the given loss."""
  config = base.get_config()
  config.loss.update(losses.get(loss))
  return config

"""Times the train step: variants in turns, against the machine's matmul rate.

  python -m launch.benchmark --config=configs/benchmark.py \\
    --config.data.path=pairs.jsonl --config.model.tokenizer=tokenizer

Prints one line per turn and a table: pairs and tokens per second, padding,
the share of the measured matmul rate that the needed operations are done at,
memory of the program, and speed against the first variant. With
`--references=live,cached` it says what a cached reference gains. The machine
should be idle; compare ratios within one run.
"""

import json

from absl import flags
from ml_collections import config_flags

from launch import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment, as configs/NAME.py:ARGUMENT."
)
ROUNDS = flags.DEFINE_integer(
  "rounds", 3, "Turns of each variant.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 4, "Steps in a turn.", lower_bound=1)
LAYOUTS = flags.DEFINE_list(
  "layouts", ["mirrored", "padded"], "Values of data.layout to compare."
)
REFERENCES = flags.DEFINE_list(
  "references", [], "Values of reference.mode to compare; else the config's."
)
OUTPUT = flags.DEFINE_string("output", None, "File to write as JSON.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  from dpo_jax import benchmark

  results = benchmark.run(
    CONFIG.value,
    layouts=LAYOUTS.value,
    references=REFERENCES.value,
    num_rounds=ROUNDS.value,
    num_steps=STEPS.value,
  )
  print(benchmark.table(results))
  if OUTPUT.value:
    with open(OUTPUT.value, "w") as file:
      json.dump(results, file, indent=2)
  return 0


if __name__ == "__main__":
  cli.run(main)

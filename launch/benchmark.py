"""Times the train step, or sampling: variants in turns, beside the machine.

  python -m launch.benchmark --config=configs/benchmark.py \\
    --config.data.path=pairs.jsonl --config.model.tokenizer=tokenizer
  python -m launch.benchmark sample --config=configs/benchmark.py \\
    --config.model.preset=small --rows=1,64

Prints one line per turn and a table: pairs and tokens per second, padding,
the share of the measured matmul rate that the needed operations are done at,
memory of the program, and speed against the first variant. With
`--references=live,cached` it says what a cached reference gains. `sample` says
at which share of what memory and matmuls allow tokens are drawn. The machine
should be idle; compare ratios within one run.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax.host import files
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
ROWS = flags.DEFINE_list(
  "rows", ["1", "64"], "sample: responses that grow at once, compared."
)
PROMPT_LENGTH = flags.DEFINE_integer(
  "prompt_length", 16, "sample: tokens of each prompt.", lower_bound=1
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "sample: of each response.", lower_bound=2
)
OUTPUT = flags.DEFINE_string("output", None, "File to write as JSON.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  if argv[1:] not in ([], ["sample"]):
    raise ValueError(f"unknown benchmark {argv[1]!r}; known: sample, or none")
  if argv[1:]:
    results, table = _sample()
  else:
    results, table = _train()
  print(table)
  if OUTPUT.value:
    files.write_json(OUTPUT.value, results)
  return 0


def _train():
  from dpo_jax.benchmarks import train_step as benchmark

  results = benchmark.run(
    CONFIG.value,
    layouts=LAYOUTS.value,
    references=REFERENCES.value,
    num_rounds=ROUNDS.value,
    num_steps=STEPS.value,
  )
  return results, benchmark.table(results)


def _sample():
  from dpo_jax.benchmarks import sampling as benchmark_sampling

  if not all(count.isdigit() and int(count) for count in ROWS.value):
    raise ValueError(f"rows={','.join(ROWS.value)}: numbers, at least 1")
  results = benchmark_sampling.run(
    CONFIG.value,
    rows=[int(count) for count in ROWS.value],
    prompt_length=PROMPT_LENGTH.value,
    max_new_tokens=MAX_NEW_TOKENS.value,
    num_rounds=ROUNDS.value,
  )
  return results, benchmark_sampling.table(results)


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

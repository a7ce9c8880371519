"""Evaluates a trained model.

  python -m launch.evaluate preferences --source=runs/mine \\
    --data=heldout.jsonl --output=runs/mine/heldout

`preferences`: held-out accuracy, margins, log-ratios and calibration of any
run, Hugging Face folder or hub name, against a reference that is as free. A
run says itself what its reference, beta and lengths were. Writes `pairs.jsonl`
(a line a pair), `summary.jsonl` (a line for all pairs, then one for each value
of the column `subset`, where rows have it) and `preferences.png`. `--data` may
be given several times.
"""

from absl import flags

from launch import cli

SOURCE = flags.DEFINE_string(
  "source", None, "Run folder, Hugging Face folder or hub name."
)
REFERENCE = flags.DEFINE_string(
  "reference", None, "The same of the reference; else the run's own."
)
DATA = flags.DEFINE_multi_string("data", None, "File of pairs.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
BETA = flags.DEFINE_float("beta", None, "Of rewards; else the run's own.")
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Tokens of prompt and one response; else the run's own."
)
MAX_PROMPT_LENGTH = flags.DEFINE_integer(
  "max_prompt_length", None, "Tokens; else the run's own."
)
DATA_SOURCE = flags.DEFINE_string(
  "data_source", "jsonl", "What reads the data: hh, jsonl, hub, synthetic."
)
SPLIT = flags.DEFINE_string("split", "test", "Of a hub dataset.")
DTYPE = flags.DEFINE_enum(
  "dtype", "auto", ["auto", "float32", "bfloat16"], "Of matmuls."
)
flags.mark_flags_as_required(["source", "data", "output"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  if argv[1:] != ["preferences"]:
    raise ValueError(
      f"unknown evaluation {' '.join(argv[1:])!r}; known: preferences"
    )
  from dpo_jax.evaluation import held_out

  settings = held_out.make_settings(
    SOURCE.value,
    dtype=DTYPE.value,
    reference=REFERENCE.value,
    beta=BETA.value,
    max_length=MAX_LENGTH.value,
    max_prompt_length=MAX_PROMPT_LENGTH.value,
  )
  print(f"policy: {settings.source}; reference: {settings.reference}")
  print(
    held_out.evaluate(
      settings,
      DATA.value,
      OUTPUT.value,
      data_source=DATA_SOURCE.value,
      split=SPLIT.value,
    )
  )
  print(f"figure: {OUTPUT.value}/preferences.png")
  return 0


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

"""Samples responses from a model into a file of JSON lines.

  python -m launch.sample --source=runs/mine --data=prompts.jsonl \\
    --output=samples.jsonl --samples=4 --temperature=0.7

`--data` holds rows with a prompt, alone or with responses; each distinct
prompt is sampled. The same command started again goes on where it was
stopped, to the same samples: they depend on the seed, the prompt's place and
the sample's number alone.
"""

from absl import flags

from launch import cli

SOURCE = flags.DEFINE_string(
  "source", None, "Run folder, Hugging Face folder or hub name."
)
STEP = flags.DEFINE_integer("step", None, "Of a run; else its newest.", 0)
DATA = flags.DEFINE_string("data", None, "File of prompts.")
DATA_SOURCE = flags.DEFINE_string(
  "data_source",
  "jsonl",
  "What reads the data: hh, tldr, jsonl, hub, synthetic.",
)
SPLIT = flags.DEFINE_string("split", "test", "Of a hub dataset, or of posts.")
OUTPUT = flags.DEFINE_string("output", None, "File to write.")
PROMPTS = flags.DEFINE_integer(
  "prompts", None, "How many are sampled; else all.", lower_bound=1
)
SAMPLES = flags.DEFINE_integer("samples", 1, "Of each prompt.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 256, "At which length a response is cut.", lower_bound=1
)
MAX_PROMPT_LENGTH = flags.DEFINE_integer(
  "max_prompt_length", 256, "Tokens.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 1.0, "0 takes the most likely token."
)
TOP_K = flags.DEFINE_integer("top_k", 0, "0: all tokens.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "1: all tokens.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", 0, 2**63 - 1)
BATCH_ROWS = flags.DEFINE_integer(
  "batch_rows", 256, "Responses that grow at once.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
  "dtype", "auto", ["auto", "float32", "bfloat16"], "Of matmuls."
)
flags.mark_flags_as_required(["source", "data", "output"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  from dpo_jax.inference import model as model_lib
  from dpo_jax.sampling import decode

  settings = decode.Settings(
    max_new_tokens=MAX_NEW_TOKENS.value,
    temperature=TEMPERATURE.value,
    top_k=TOP_K.value,
    top_p=TOP_P.value,
  )
  model_lib.write_samples(
    SOURCE.value,
    model_lib.read_prompts(
      DATA_SOURCE.value, DATA.value, split=SPLIT.value, limit=PROMPTS.value
    ),
    settings,
    OUTPUT.value,
    seed=SEED.value,
    samples_per_prompt=SAMPLES.value,
    max_prompt_length=MAX_PROMPT_LENGTH.value,
    step=STEP.value,
    dtype=DTYPE.value,
    batch_rows=BATCH_ROWS.value,
  )
  print(f"samples: {OUTPUT.value}")
  return 0


if __name__ == "__main__":
  cli.run(main)

"""Writes a run, or any model that can be read, as a Hugging Face folder.

  python -m launch.convert --source=runs/hh_dpo --target=exported

The target holds config.json, safetensors and the tokenizer; `transformers`
loads it. Adapters are merged into their base, or with --adapter written alone,
as `peft` loads them.
"""

from absl import flags

from launch import cli

SOURCE = flags.DEFINE_string(
  "source", None, "Run folder, Hugging Face folder or hub name."
)
TARGET = flags.DEFINE_string("target", None, "Folder to write.")
STEP = flags.DEFINE_integer(
  "step",
  None,
  "Checkpoint of a run; the newest, of a reward model the best.",
  0,
)
DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of the weights written."
)
MAX_SHARD_GB = flags.DEFINE_float(
  "max_shard_gb", 5.0, "Several files are written above this size.", 1e-6
)
ADAPTER = flags.DEFINE_bool(
  "adapter", False, "Whether to write the adapters of a LoRA run alone."
)
flags.mark_flags_as_required(["source", "target"])


def main(argv: list[str]) -> int:
  """Returns 0."""
  from dpo_jax.inference import export

  export.write(
    SOURCE.value,
    TARGET.value,
    step=STEP.value,
    dtype=DTYPE.value,
    max_shard_bytes=MAX_SHARD_GB.value * 1e9,
    adapter=ADAPTER.value,
  )
  return 0


if __name__ == "__main__":
  cli.run(main)

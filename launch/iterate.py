"""Trains a policy on pairs of its own samples, round after round.

  python -m launch.iterate --config=configs/quickstart.py:dpo \\
    --workdir=runs/iterative --policy=runs/quickstart/sft --reward=synthetic \\
    --data=reviews:2000 --data_source=synthetic --max_new_tokens=32 \\
    --config.loss.beta=1 --config.steps=60

A round samples the policy, scores the samples with a reward, pairs them and
trains the config's loss on the pairs. With --min_margin above 0 it is as Direct
Nash Optimization (arXiv 2404.03715) with a reward in place of its judge and
without its stronger model. The same command started again goes on where it was;
--rounds may grow.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax.host import supervisor
from launch import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Of each round, as configs/NAME.py:ARGUMENT."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the rounds.")
POLICY = flags.DEFINE_string(
  "policy", None, "The first: run folder, Hugging Face folder or hub name."
)
REWARD = flags.DEFINE_string(
  "reward", None, "synthetic, or run:FOLDER of a reward model or classifier."
)
DATA = flags.DEFINE_string("data", None, "File of prompts.")
DATA_SOURCE = flags.DEFINE_string(
  "data_source", "jsonl", "What reads the data: hh, jsonl, hub, synthetic."
)
SPLIT = flags.DEFINE_string("split", "train", "Of a hub dataset.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How many.", lower_bound=1)
PROMPTS = flags.DEFINE_integer(
  "prompts", None, "Of a round, the next ones each; else all.", lower_bound=2
)
SAMPLES = flags.DEFINE_integer("samples", 4, "Of each prompt.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 256, "At which length a response is cut.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
  "temperature", 1.0, "The KL that is shown is of what is sampled at it."
)
TOP_P = flags.DEFINE_float("top_p", 1.0, "1: all tokens.")
PAIRS = flags.DEFINE_enum(
  "pairs",
  "best_worst",
  ["best_worst", "all"],
  "Of a prompt's samples, ties and equal texts left out.",
)
MIN_MARGIN = flags.DEFINE_float(
  "min_margin", 0.0, "Rewards of a pair are further apart than this."
)
REFERENCE = flags.DEFINE_enum(
  "reference",
  "round",
  ["round", "first"],
  "Of a round's loss: the policy that it starts from, or the first one.",
)
MULTIHOST = flags.DEFINE_bool(
  "multihost", False, "Whether this is one of several processes."
)
flags.mark_flags_as_required(["config", "workdir", "policy", "reward", "data"])


def main(argv: list[str]) -> int:
  """Returns 0 when the rounds finished, 128 + n when signal n stopped them."""
  if MULTIHOST.value:
    supervisor.start()
  from dpo_jax.host import endings, processes
  from dpo_jax.pipelines import iterative
  from dpo_jax.sampling import decode

  with processes.joined(MULTIHOST.value):
    settings = iterative.Settings(
      policy=POLICY.value,
      reward=REWARD.value,
      data=DATA.value,
      data_source=DATA_SOURCE.value,
      split=SPLIT.value,
      prompts=PROMPTS.value,
      samples=SAMPLES.value,
      sampling=decode.Settings(
        MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_p=TOP_P.value
      ),
      pairs=PAIRS.value,
      min_margin=MIN_MARGIN.value,
      reference=REFERENCE.value,
    )
    finished = iterative.run(
      CONFIG.value, WORKDIR.value, settings, rounds=ROUNDS.value
    )
  return 0 if finished else endings.status()


if __name__ == "__main__":
  cli.run(main)

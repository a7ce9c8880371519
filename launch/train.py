"""Trains a policy.

  python -m launch.train --config=configs/pairs.py:dpo --workdir=runs/mine \\
    --config.data.path=pairs.jsonl --config.model.path=my_model

The same command started again goes on where the run was. A second process in
the folder is refused as long as the first one lives. On several hosts start
it on each with --multihost (TPU pods and Slurm are recognised; elsewhere set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). They compare
config, data, tokenizer and models first; where one fails or is killed, all
end, at the latest after a minute. All must see the run folder and the cache.
"""

from absl import flags
from ml_collections import config_flags

from dpo_jax.host import supervisor
from launch import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment, as configs/NAME.py:ARGUMENT."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MULTIHOST = flags.DEFINE_bool(
  "multihost", False, "Whether this is one of several processes."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
  """Returns 0 when the run finished, 128 + n when signal n stopped it."""
  if MULTIHOST.value:
    supervisor.start()
  from dpo_jax.host import endings, processes
  from dpo_jax.run import trainer

  with processes.joined(MULTIHOST.value):
    finished = trainer.train(CONFIG.value, WORKDIR.value)
  return 0 if finished else endings.status()


if __name__ == "__main__":
  cli.run(main)

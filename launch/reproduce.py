"""Runs a whole experiment, stage by stage; a stage that is done is skipped.

  python -m launch.reproduce quickstart --workdir=runs/quickstart
  python -m launch.reproduce imdb --scale=cpu --data=imdb --workdir=runs/imdb

`quickstart`: controlled sentiment in miniature, minutes on a laptop CPU.
`imdb`: the same on real reviews, with every method of Rafailov et al. 2023
(arXiv 2305.18290, sec 6.1); `--data` is a folder with train, test and unsup
.jsonl(.xz, .gz). Both end with a table and `frontier.png`.
"""

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment.")
SCALE = flags.DEFINE_enum(
  "scale", "cpu", ["cpu", "gpu", "paper"], "Sizes of models and data."
)
DATA = flags.DEFINE_string("data", "", "Folder of the data.")
MODEL = flags.DEFINE_string(
  "model", "", "Pretrained folder or hub name; else the scale's own."
)
flags.mark_flags_as_required(["workdir"])


def _quickstart() -> bool:
  from configs import quickstart
  from dpo_jax.pipelines import quickstart as pipeline

  return pipeline.run(WORKDIR.value, quickstart.get_config)


def _imdb() -> bool:
  from configs import imdb_sentiment
  from dpo_jax.pipelines import sentiment

  def make_config(loss):
    return imdb_sentiment.get_config(f"{loss},{SCALE.value}")

  return sentiment.run(
    WORKDIR.value,
    DATA.value,
    make_config,
    sentiment.Plan(**imdb_sentiment.PLANS[SCALE.value]),
    model=MODEL.value,
  )


RECIPES = {"quickstart": _quickstart, "imdb": _imdb}


def main(argv: list[str]) -> int:
  """Returns 0 when the experiment finished, 143 when told to stop."""
  if len(argv) != 2 or argv[1] not in RECIPES:
    raise ValueError(
      f"unknown experiment {' '.join(argv[1:])!r}; known: {', '.join(RECIPES)}"
    )
  return 0 if RECIPES[argv[1]]() else 143


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

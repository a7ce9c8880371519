"""Runs a whole experiment, stage by stage; a stage that is done is skipped.

  python -m launch.reproduce quickstart --workdir=runs/quickstart

`quickstart`: controlled sentiment in miniature, minutes on a laptop CPU. It
ends with a table and `frontier.png`.
"""

from absl import flags

from launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment.")
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> int:
  """Returns 0 when the experiment finished, 143 when told to stop."""
  from configs import quickstart
  from dpo_jax.pipelines import quickstart as pipeline

  recipes = {"quickstart": (pipeline.run, quickstart.get_config)}
  if len(argv) != 2 or argv[1] not in recipes:
    raise ValueError(
      f"unknown experiment {' '.join(argv[1:])!r}; known: {', '.join(recipes)}"
    )
  recipe, make_config = recipes[argv[1]]
  return 0 if recipe(WORKDIR.value, make_config) else 143


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

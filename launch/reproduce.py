"""Runs a whole experiment, stage by stage; a stage that is done is skipped.

  python -m launch.reproduce quickstart --workdir=runs/quickstart
  python -m launch.reproduce imdb --data=imdb --workdir=runs/imdb
  python -m launch.reproduce hh --data=hh --workdir=runs/hh
  python -m launch.reproduce tldr --data=tldr --workdir=runs/tldr

`quickstart`: controlled sentiment in miniature, minutes on a laptop CPU. It
ends with a table and `frontier.png`.

`imdb`: the same on real reviews, with every method of Rafailov et al. 2023
(arXiv 2305.18290, sec 6.1); `--data` with train, test and unsup .jsonl.xz. It
ends with `report.md` and `frontier.png`.

`hh`: single-turn dialogue, `--data` with train.jsonl.xz and test.jsonl.xz.
`tldr`: summaries, `--data` with posts.jsonl.xz and
ppo_vs_human_judged.csv.xz. Both end with `report.md` and `wins/win_rate.png`,
win rates by temperature that a reward model judges.

`--scale=cpu` takes minutes with a model from random weights, `imdb` more than
an hour; `gpu` and `paper`, not yet run, start from the pretrained models that
configs/imdb_sentiment.py, hh_dialogue.py and tldr_summarization.py name, or
from `--model`. There stands also what a scale is.
"""

from absl import flags

from dpo_jax.host import files
from launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment.")
DATA = flags.DEFINE_string("data", None, "Folder of its data.")
SCALE = flags.DEFINE_enum(
  "scale", "cpu", ["cpu", "gpu", "paper"], "How large it is."
)
MODEL = flags.DEFINE_string(
  "model", None, "Folder or hub name to start from; else what the scale says."
)


def main(argv: list[str]) -> int:
  """Returns 0 when the experiment finished, 128 + n stopped by signal n."""
  from dpo_jax.host import endings

  name = " ".join(argv[1:])
  if name not in RECIPES:
    raise ValueError(
      f"unknown experiment {name!r}; known: {', '.join(RECIPES)}"
    )
  needed = {x: needs for x, (_, needs, _) in RECIPES.items()}
  optional = {x: takes for x, (_, _, takes) in RECIPES.items()}
  cli.check_flags(name, needed, optional)
  recipe, *_ = RECIPES[name]
  with files.owned_folder(WORKDIR.value, "works in"):
    return 0 if recipe(WORKDIR.value) else endings.status()


def _quickstart(workdir: str) -> bool:
  from configs import quickstart
  from dpo_jax.pipelines import quickstart as pipeline

  return pipeline.run(workdir, quickstart.get_config)


def _imdb(workdir: str) -> bool:
  from configs import imdb_sentiment
  from dpo_jax.pipelines import sentiment

  scale = SCALE.value
  return sentiment.run(
    workdir,
    DATA.value,
    lambda loss: imdb_sentiment.get_config(f"{loss},{scale}"),
    sentiment.Plan(**imdb_sentiment.PLANS[scale]),
    model=MODEL.value or "",
  )


def _hh(workdir: str) -> bool:
  from configs import hh_dialogue
  from dpo_jax.pipelines.win_rates import tasks as win_rate_tasks

  return _preferences(workdir, hh_dialogue, win_rate_tasks.HH)


def _tldr(workdir: str) -> bool:
  from configs import tldr_summarization
  from dpo_jax.pipelines.win_rates import tasks as win_rate_tasks

  return _preferences(workdir, tldr_summarization, win_rate_tasks.TLDR)


def _preferences(workdir, configs, task):
  from dpo_jax.pipelines.win_rates import experiment as win_rates
  from dpo_jax.pipelines.win_rates import tasks as win_rate_tasks

  start = f"{SCALE.value},pretrained" if MODEL.value else SCALE.value
  return win_rates.run(
    workdir,
    DATA.value,
    lambda loss: configs.get_config(f"{loss},{start}"),
    task,
    win_rate_tasks.Scale(**configs.SCALES[SCALE.value]),
    model=MODEL.value or "",
  )


# Name -> what runs it, the flags that it needs, those that it takes.
RECIPES = {
  "quickstart": (_quickstart, (WORKDIR,), ()),
  "imdb": (_imdb, (WORKDIR, DATA), (SCALE, MODEL)),
  "hh": (_hh, (WORKDIR, DATA), (SCALE, MODEL)),
  "tldr": (_tldr, (WORKDIR, DATA), (SCALE, MODEL)),
}


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

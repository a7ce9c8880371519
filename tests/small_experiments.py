"""`launch.reproduce` with experiments of seconds: python -m tests.small_..."""

import dataclasses

from configs import imdb_sentiment
from dpo_jax.pipelines import preference_tasks, preferences
from launch import cli, reproduce
from tests.pipelines import test_preferences, test_sentiment


def _shrink():
  for name in ("HH", "TLDR"):
    task = getattr(preference_tasks, name)
    scales = {"cpu": test_preferences.SCALE}
    setattr(preference_tasks, name, dataclasses.replace(task, scales=scales))
  preferences.TEMPERATURES = (0.0, 1.0)
  imdb_sentiment.PLANS["cpu"] = vars(test_sentiment.PLAN)
  imdb_sentiment.get_config = test_sentiment.make_config


if __name__ == "__main__":
  _shrink()
  cli.run(reproduce.main, num_arguments=1)

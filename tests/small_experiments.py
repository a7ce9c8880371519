"""`launch.reproduce` with experiments of seconds: python -m tests.small_..."""

from configs import imdb_sentiment
from dpo_jax.pipelines.win_rates import experiment as win_rates
from launch import cli, reproduce
from tests.pipelines import test_sentiment
from tests.pipelines.win_rates import test_experiment


def _shrink():
  for module in test_experiment.CONFIGS.values():
    module.SCALES["cpu"] = vars(test_experiment.SCALE)
    module.get_config = test_experiment.shrunk(module.get_config)
  win_rates.TEMPERATURES = (0.0, 1.0)
  imdb_sentiment.PLANS["cpu"] = vars(test_sentiment.PLAN)
  imdb_sentiment.get_config = test_sentiment.make_config


if __name__ == "__main__":
  _shrink()
  cli.run(reproduce.main, num_arguments=1)

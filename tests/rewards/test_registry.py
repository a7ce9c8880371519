"""Rewards by name: a trained head as what PPO and a judge go by."""

import itertools
import json

import numpy as np
import pytest

from configs import quickstart
from dpo_jax.data.sources import synthetic
from dpo_jax.inference import export
from dpo_jax.judges import judge as judges
from dpo_jax.judges import kinds as judge_kinds
from dpo_jax.models import config as model_config
from dpo_jax.models import presets
from dpo_jax.rewards import learned, registry
from dpo_jax.run import trainer

SMALL = model_config.llama(
  vocab_size=len(synthetic.make_tokenizer()),
  num_layers=2,
  d_model=32,
  d_mlp=48,
  num_heads=4,
  max_positions=128,
)
PROMPTS = ["the plot was", "we", "the music"]
RESPONSES = [" good .", " hated this mess .", " was dull ."]
OUTPUTS = {"reward_model": "logit", "classifier": "probability"}


@pytest.fixture(autouse=True, scope="module")
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.PRESETS, "tiny", SMALL)
    yield


def _train(folder, loss, **ppo):
  config = quickstart.get_config(loss)
  config.data.path, config.data.eval_path = "pairs:64", ""
  config.data.cache_dir = str(folder.parent / "cache")
  config.data.row_length, config.data.max_length = 128, 40
  config.steps, config.batch_size, config.log.every = 2, 16, 1
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-2, 0
  config.ppo.update(ppo)
  assert trainer.train(config, str(folder))
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Returns run folders by their losses."""
  root = tmp_path_factory.mktemp("rewards")
  for loss in OUTPUTS:
    _train(root / loss, loss)
  return {loss: str(root / loss) for loss in OUTPUTS}


@pytest.mark.parametrize("loss", OUTPUTS)
def test_a_run_and_its_export_score_as_their_head_says(runs, loss, tmp_path):
  expected = learned.load(runs[loss], output=OUTPUTS[loss])(PROMPTS, RESPONSES)
  found = registry.load(f"run:{runs[loss]}")(PROMPTS, RESPONSES)
  np.testing.assert_array_equal(found, expected)
  assert len({*found}) == 3
  export.write(runs[loss], str(tmp_path / "exported"))
  found = registry.load(f"run:{tmp_path / 'exported'}")(PROMPTS, RESPONSES)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", OUTPUTS)
def test_ppo_learns_from_a_run(runs, loss, tmp_path):
  lines = _train(
    tmp_path / "ppo",
    "ppo",
    reward=f"run:{runs[loss]}",
    max_new_tokens=16,
    epochs=1,
  )
  assert [line["step"] for line in lines] == [1, 2]
  scores = np.array([line["score/mean"] for line in lines])
  spread = np.array([line["score/std"] for line in lines])
  assert np.isfinite(scores).all() and (spread > 0).all()
  if loss == "classifier":
    assert ((scores > 0) & (scores < 1)).all()


def test_a_judge_prefers_what_a_run_scores_higher(runs):
  pairs = list(itertools.product(PROMPTS, itertools.permutations(RESPONSES, 2)))
  pairs = [judges.Comparison(prompt, *both) for prompt, both in pairs]
  prompts, firsts, seconds = zip(*(x.texts for x in pairs), strict=True)
  reward_fn = registry.load(f"run:{runs['reward_model']}")
  is_first = reward_fn(prompts, firsts) > reward_fn(prompts, seconds)
  judge = judge_kinds.make_judge(f"reward:{runs['reward_model']}")
  found = [decision.preferred for decision in judge.compare(pairs)]
  assert found == ["first" if x else "second" for x in is_first]


def test_a_name_without_a_folder_is_refused():
  with pytest.raises(ValueError, match="'run:'; known: run:FOLDER of a reward"):
    registry.load("run:")

"""Texts to scores: whose they are, in which order, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from dpo_jax.checkpoints import manager, source
from dpo_jax.data.sources import synthetic
from dpo_jax.inference import export
from dpo_jax.models import config as model_config
from dpo_jax.models import presets, transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.rewards import learned
from dpo_jax.run import trainer

TOKENIZER = synthetic.make_tokenizer()
SMALL = model_config.llama(
  vocab_size=len(TOKENIZER),
  num_layers=2,
  d_model=32,
  d_mlp=48,
  num_heads=4,
  max_positions=128,
)
PROMPTS = ["the plot was", "we", "the music", "", "the plot was"]
RESPONSES = [" good .", " hated this mess .", "", " a gem .", " dull ."]


_init = jax.jit(transformer.init_params, static_argnums=0)
_states = jax.jit(transformer.hidden_states, static_argnums=0)


@functools.cache
def _params(head):
  config = dataclasses.replace(SMALL, head=head)
  return config, _init(config, jax.random.key(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Folders in Hugging Face format, by their heads."""
  root = tmp_path_factory.mktemp("models")
  for head in ("reward", "classifier", "vocabulary"):
    huggingface.save_model(str(root / head), *_params(head))
    TOKENIZER.save_pretrained(root / head)
  return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def reward_fn(folders):
  return learned.load(folders["reward"])


def _alone(prompt, response, head="reward", eos=True):
  """Returns the score of the last state of one sequence."""
  config, params = _params(head)
  ids = TOKENIZER(prompt).input_ids or [TOKENIZER.eos_token_id]
  ids = ids + TOKENIZER(response).input_ids + [TOKENIZER.eos_token_id] * eos
  tokens = np.zeros((1, 16), np.int32)
  tokens[0, : len(ids)] = ids
  index = jnp.arange(16)[None]
  states = _states(config, params, tokens, index, 0 * index, index + 1)
  return float(states[0, len(ids) - 1] @ params["score"][0])


def test_scores_are_those_of_the_sequences_in_order(reward_fn):
  expected = [_alone(*pair) for pair in zip(PROMPTS, RESPONSES)]
  found = reward_fn(PROMPTS, RESPONSES)
  assert found.dtype == np.float32 and found.shape == (5,)
  assert len({*np.round(found, 4)}) == 5
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_neighbours_change_a_score_by_rounding_at_most(reward_fn):
  once = reward_fn(PROMPTS, RESPONSES)
  np.testing.assert_array_equal(reward_fn(PROMPTS, RESPONSES), once)
  reverse = reward_fn(PROMPTS[::-1], RESPONSES[::-1])[::-1]
  np.testing.assert_allclose(reverse, once, atol=1e-5)
  many = reward_fn(PROMPTS * 40, RESPONSES * 40).reshape(40, 5)
  np.testing.assert_allclose(many, np.tile(once, (40, 1)), atol=1e-5)
  assert reward_fn([], []).shape == (0,)


def test_a_classifier_gives_log_odds_or_the_probability(folders):
  logits, probabilities, auto = (
    learned.load(folders["classifier"], output=output)(PROMPTS, RESPONSES)
    for output in learned.OUTPUTS
  )
  np.testing.assert_array_equal(auto, probabilities)
  np.testing.assert_allclose(
    logits[0], _alone(PROMPTS[0], RESPONSES[0], "classifier"), atol=1e-5
  )
  expected = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(probabilities, expected, rtol=1e-6)


def test_without_eos_the_last_token_itself_is_read(folders):
  reward_fn = learned.load(folders["reward"], with_eos=False)
  expected = _alone("we", " liked it", eos=False)
  np.testing.assert_allclose(
    reward_fn(["we"], [" liked it"]), [expected], atol=1e-5
  )
  with pytest.raises(ValueError, match="response 1 is empty"):
    reward_fn(["we", "we"], [" liked it", ""])


def test_a_response_that_was_cut_has_no_eos_before_its_score(reward_fn):
  ended = [True, False, False, True, False]
  found = reward_fn(PROMPTS, RESPONSES, ended=ended)
  # Of the third nothing but its EOS could be read.
  expected = [
    _alone(*pair, eos=has_end or not pair[1])
    for *pair, has_end in zip(PROMPTS, RESPONSES, ended)
  ]
  np.testing.assert_allclose(found, expected, atol=1e-5)
  whole = reward_fn(PROMPTS, RESPONSES)
  assert abs(whole - found)[[1, 4]].min() > 1e-3
  with pytest.raises(ValueError, match="of 5 responses 1 say whether they"):
    reward_fn(PROMPTS, RESPONSES, ended=[True])


def test_texts_are_cut_as_in_training(folders):
  reward_fn = learned.load(folders["reward"], max_length=4, max_prompt_length=2)
  found = reward_fn(["it was not very good"], [" but we liked it"])
  expected = _alone("very good", " but we", eos=False)
  np.testing.assert_allclose(found, [expected], atol=1e-5)


def test_a_prompt_is_cut_by_the_rule_of_the_run(folders, monkeypatch):
  lengths = {"max_length": 7, "max_prompt_length": 2}
  lengths["truncate_prompts"] = "if_needed"
  monkeypatch.setattr(learned, "_run_lengths", lambda path: lengths)
  texts = ["it was not very good"], [" good"]  # 5 tokens, and 2 with EOS
  whole, short = (
    _alone(x, " good") for x in ("it was not very good", "very good")
  )
  found = learned.load(folders["reward"])(*texts)
  np.testing.assert_allclose(found, [whole], atol=1e-5)
  lengths["truncate_prompts"] = "always"
  found = learned.load(folders["reward"])(*texts)
  np.testing.assert_allclose(found, [short], atol=1e-5)
  lengths |= {"truncate_prompts": "never", "max_length": 5}
  with pytest.raises(ValueError, match="prompt 0 has 5 tokens: must leave"):
    learned.load(folders["reward"])(*texts)


def test_mistakes_end_in_one_line(folders, reward_fn, tmp_path):
  def refuses(message, path=folders["reward"], **options):
    with pytest.raises(ValueError, match=message) as caught:
      learned.load(path, **options)
    assert "\n" not in str(caught.value)

  refuses("is a language model; allowed: a run of", folders["vocabulary"])
  refuses(
    "unknown output 'odds'; known: logit, probability, auto", output="odds"
  )
  refuses("is a reward model, of whose scores only", output="probability")
  refuses("max_length=1, max_prompt_length=256: must be", max_length=1)
  values = {"model_type": "bert", "architectures": ["BertForSequenceClassific"]}
  (tmp_path / "config.json").write_text(json.dumps(values))
  refuses("unknown architecture 'bert'; known: llama, gpt2", str(tmp_path))
  with pytest.raises(ValueError, match="2 prompts and 1 responses: must be"):
    reward_fn(["a", "b"], ["c"])


def _train(workdir, loss, monkeypatch, **changes):
  monkeypatch.setitem(presets.PRESETS, "tiny", SMALL)
  config = quickstart.get_config(loss)
  config.data.path, config.data.eval_path = "pairs:64", "pairs:40"
  config.data.cache_dir = str(workdir.parent / "cache")
  config.data.row_length = 128
  config.data.max_length = 40
  config.steps, config.batch_size = 4, 16
  config.checkpoint.every = config.eval.every = 1
  config.checkpoint.keep = 1
  config.optimizer.learning_rate = 3e-2
  config.checkpoint.metric = "rewards/accuracies"
  config.update(changes)
  assert trainer.train(config, str(workdir))
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_run_is_read_at_its_best_and_exported(tmp_path, monkeypatch):
  run = tmp_path / "run"
  lines = _train(run, "reward_model", monkeypatch)
  evals = [line for line in lines if line["split"] == "eval"]
  keys = {"loss", "num_pairs", "rewards/mean", "rewards/accuracies_stderr"}
  assert keys <= evals[0].keys() and evals[0]["num_pairs"] == 40
  accuracies = [line["rewards/accuracies"] for line in evals]
  best = manager.best_step(run, "rewards/accuracies")
  assert accuracies[best - 1] == max(accuracies)
  assert manager.saved_steps(run) == sorted({best, 4})
  # A later checkpoint that was not evaluated, or worse, is not read.
  assert source.open_model(str(run)).config.head == "reward"
  reward_fn = learned.load(str(run))
  scores = reward_fn(PROMPTS, RESPONSES)
  at_best = learned.load(str(run), step=best)(PROMPTS, RESPONSES)
  np.testing.assert_array_equal(scores, at_best)
  rows = list(synthetic.read("pairs:40", "test"))
  chosen, rejected = (
    reward_fn([row["prompt"] for row in rows], [row[name] for row in rows])
    for name in ("chosen", "rejected")
  )
  assert np.mean(chosen > rejected) == pytest.approx(max(accuracies))
  exported = str(tmp_path / "exported")
  export.write(str(run), exported)
  again = learned.load(exported, max_length=40)(PROMPTS, RESPONSES)
  np.testing.assert_array_equal(again, scores)


@pytest.mark.slow
def test_a_classifier_learns_the_sentiment_of_reviews(tmp_path, monkeypatch):
  path = tmp_path / "reviews.jsonl"
  rows = list(synthetic.read("reviews:8000", "train"))
  reward = lambda row: synthetic.true_reward(row["prompt"] + row["response"])
  lines = [json.dumps(row | {"label": reward(row) > 0.5}) for row in rows]
  path.write_text("".join(line + "\n" for line in lines))
  synthetic.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
  lines = _train(
    tmp_path / "run",
    "classifier",
    monkeypatch,
    steps=800,
    batch_size=64,
    data={"source": "jsonl", "path": str(path), "eval_path": str(path)},
    model={"tokenizer": str(tmp_path / "tokenizer")},
    eval={"every": 0},
    checkpoint={"every": 0},
    optimizer={"learning_rate": 3e-3},
  )
  assert lines[-1]["rewards/accuracies"] > 0.9
  reward_fn = learned.load(str(tmp_path / "run"), output="probability")
  found = reward_fn(["the plot was"] * 2, [" superb .", " terrible ."])
  assert found[0] > 0.9 and found[1] < 0.1

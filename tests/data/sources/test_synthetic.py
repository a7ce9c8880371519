"""The grammar's reward by hand, its rows, and its tokenizer."""

import itertools
import math

import numpy as np
import pytest
import transformers

from dpo_jax.data.sources import synthetic


def _reward(total_strength):
  return 1 / (1 + math.exp(-0.75 * total_strength))


def _reviews(rows):
  return [row["prompt"] + row["response"] for row in rows]


@pytest.mark.parametrize(
  ("text", "total_strength"),
  [
    ("", 0.0),
    ("the plot was long .", 0.0),
    ("the plot was good .", 1.0),
    ("the plot was very good .", 1.5),
    ("the plot was not good .", -1.0),
    ("the plot was not very good .", -1.5),
    ("the plot was hardly superb .", -1.0),
    ("it was not a gem .", -1.5),
    ("i never hated this film .", 1.5),
    ("the cast is not good and funny .", -1.0 + 1.0),
    ("the music felt slightly dull , but we loved the ending .", -0.5 + 1.5),
    ("not the plot , good", 1.0),
    ("banana good <eos> <unk>", 1.0),
  ],
)
def test_reward_by_hand(text, total_strength):
  assert synthetic.true_reward(text) == pytest.approx(
    _reward(total_strength), abs=1e-12
  )


def test_a_run_of_modifiers_multiplies_by_at_most_3():
  text = "extremely " * 2000 + "good"
  assert synthetic.true_reward(text) == pytest.approx(_reward(3.0))
  assert synthetic.true_reward("not " + text) == pytest.approx(_reward(-3.0))


def test_reward_stays_inside_0_and_1_for_any_words():
  rng = np.random.default_rng(0)
  words = np.array(synthetic.vocabulary())
  texts = [" ".join(rng.choice(words, 60)) for _ in range(300)]
  texts += ["superb " * 100, "awful " * 100]
  rewards = [synthetic.true_reward(text) for text in texts]
  assert min(rewards) == pytest.approx(1 / (1 + math.exp(6)))
  assert max(rewards) == pytest.approx(1 / (1 + math.exp(-6)))


def test_swapping_each_word_for_its_opposite_mirrors_the_reward():
  text = "the plot was very good , but i never tolerated the cast ."
  opposite = "the plot was very bad , but i never liked the cast ."
  assert synthetic.true_reward(text) + synthetic.true_reward(
    opposite
  ) == pytest.approx(1.0)


def test_rewards_of_reviews_spread_over_the_unit_interval():
  rows = list(synthetic.read("reviews:3000", "train"))
  rewards = np.array([synthetic.true_reward(r) for r in _reviews(rows)])
  assert abs(rewards.mean() - 0.5) < 0.03
  assert rewards.std() > 0.2
  assert np.histogram(rewards, 5, (0, 1))[0].min() > 100


def test_reviews_have_8_to_24_words_and_prompts_2_to_4():
  rows = list(synthetic.read("reviews:2000", "train"))
  words = [len(review.split()) for review in _reviews(rows)]
  prompts = {len(row["prompt"].split()) for row in rows}
  assert 8 <= min(words) and max(words) <= 24
  assert prompts == {2, 3, 4}


def test_the_chosen_review_has_the_higher_reward():
  for row in synthetic.read("pairs:1000", "train"):
    chosen, rejected = (
      synthetic.true_reward(row["prompt"] + row[side])
      for side in ("chosen", "rejected")
    )
    assert chosen > rejected
    assert row["chosen_score"] == chosen
    assert row["rejected_score"] == rejected


def test_rows_are_the_same_every_time_and_a_smaller_number_is_a_beginning():
  rows = list(synthetic.read("", "test"))
  assert len(rows) == 1_000
  assert rows[:50] == list(synthetic.read("pairs:50", "test"))
  assert rows[:50] == list(synthetic.read(":50", "test"))


def test_train_and_test_share_no_review():
  reviews = {}
  for split in ("train", "test"):
    rows = list(synthetic.read("reviews:8000", split))
    pairs = list(synthetic.read("pairs:2000", split))
    reviews[split] = set(_reviews(rows)) | {
      row["prompt"] + row[side]
      for row in pairs
      for side in ("chosen", "rejected")
    }
  assert not reviews["train"] & reviews["test"]


def test_a_number_above_the_default_gives_that_many_rows():
  rows = synthetic.read("pairs:10500", "train")
  assert sum(1 for _ in rows) == 10_500


@pytest.mark.parametrize("path", ["pair", "pairs:0", "pairs:-4", "reviews:x"])
def test_a_bad_path_is_refused_at_once(path):
  with pytest.raises(ValueError, match=f"data.path='{path}'.*'pairs:4000'"):
    synthetic.read(path, "train")


def test_an_unknown_split_is_refused_at_once():
  with pytest.raises(ValueError, match="split 'dev'.*known: test, train"):
    synthetic.read("", "dev")


def test_text_survives_the_saved_tokenizer(tmp_path):
  synthetic.make_tokenizer().save_pretrained(tmp_path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(tokenizer) == len(synthetic.vocabulary()) + 3
  assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
  for row in itertools.islice(synthetic.read("reviews", "train"), 200):
    prompt, response = (tokenizer(row[k])["input_ids"] for k in row)
    review = row["prompt"] + row["response"]
    assert len(prompt + response) == len(review.split())
    assert tokenizer.unk_token_id not in prompt + response
    assert tokenizer.decode(prompt + response) == review
    ended = [*prompt, *response, tokenizer.eos_token_id]
    assert tokenizer.decode(ended, skip_special_tokens=True) == review


def test_every_word_of_the_grammar_can_be_sampled():
  rows = synthetic.read("reviews:4000", "train")
  words = {word for review in _reviews(rows) for word in review.split()}
  assert words == set(synthetic.vocabulary())

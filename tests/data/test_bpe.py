"""A tokenizer of one's own text: bytes, merges, EOS, the same every time."""

import pytest

from dpo_jax.data import bpe, tokenizer_files

LINES = ["the film was good", "the film was bad", "the film was not the film"]


def test_every_text_comes_back_and_frequent_words_are_one_token():
  tokenizer = bpe.train(LINES, 300)
  for text in (*LINES, "Ünlike ☃\n  any ", ""):
    assert tokenizer.decode(tokenizer(text).input_ids) == text
  assert len(tokenizer(" film").input_ids) == 1
  assert len(tokenizer("the film").input_ids) == 2
  assert tokenizer.eos_token_id == 0 and 257 < len(tokenizer) <= 300


def test_the_same_lines_give_the_same_tokenizer(tmp_path):
  trained = bpe.train(LINES, 300)
  again = bpe.train(iter(LINES), 300)
  assert tokenizer_files.fingerprint(trained) == tokenizer_files.fingerprint(
    again
  )
  other = bpe.train(LINES[:2], 300)
  assert tokenizer_files.fingerprint(trained) != tokenizer_files.fingerprint(
    other
  )
  trained.save_pretrained(tmp_path)
  read = tokenizer_files.load_tokenizer(str(tmp_path))
  assert read(LINES[0]).input_ids == trained(LINES[0]).input_ids
  assert read.eos_token == bpe.EOS


def test_a_vocabulary_without_room_for_bytes_is_refused():
  with pytest.raises(ValueError, match="vocab_size=256: must be above 256"):
    bpe.train(LINES, 256)


def test_texts_are_prompts_and_responses_of_strings(write_lines):
  row = {"prompt": "a", "response": " b"}
  path = write_lines(row, row | {"response": " c"})
  assert list(bpe.texts("jsonl", [path, path], "")) == ["a b", "a c"] * 2
  chat = [{"role": "user", "content": "a"}]
  path = write_lines(row | {"prompt": chat}, name="chat.jsonl")
  with pytest.raises(ValueError, match="holds chat messages; allowed: strings"):
    list(bpe.texts("jsonl", [path], ""))

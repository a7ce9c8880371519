"""The highest id of a tokenizer counts, not how many tokens it has."""

import os

import pytest
import tokenizers
import transformers

from dpo_jax.data import token_ids, tokenizer_files


@pytest.fixture
def holes(tmp_path):
  """A folder of a tokenizer of three tokens, whose ids go up to 9."""
  words = {"a": 0, "b": 4, "</s>": 9}
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(
      tokenizers.models.WordLevel(words, unk_token="a")
    ),
    eos_token="</s>",
  ).save_pretrained(tmp_path)
  return str(tmp_path)


def test_ids_with_holes_count_to_the_highest(holes):
  tokenizer = tokenizer_files.load_tokenizer(holes)
  assert len(tokenizer) == 3 and token_ids.size(tokenizer) == 10
  token_ids.check(tokenizer, 10)


def test_a_token_that_a_model_has_no_row_for_is_named(holes):
  tokenizer_files.load_tokenizer(holes, 10)
  with pytest.raises(ValueError) as error:
    tokenizer_files.load_tokenizer(holes, 9)
  for part in (holes, "'</s>' with id 9", "the model has 9 tokens"):
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_file_is_refused_unopened(holes, name):
  path = os.path.join(holes, name)
  os.unlink(path)
  os.mkfifo(path)
  for given in (holes, path):
    with pytest.raises(ValueError, match=f"{path} is not a regular file"):
      tokenizer_files.load_tokenizer(given)

"""A review is a prefix and the rest, with its label where it has one."""

import itertools

import pytest

from dpo_jax.data import examples
from dpo_jax.data.sources import imdb

TEXT = "I waited weeks for this.<br /><br />It was not worth <br> it."


def test_line_breaks_replace_the_markup():
  assert imdb.clean(" a <br /><br />b<br>c\n<br/> ") == "a\nb\nc"


@pytest.mark.parametrize("number", range(20))
def test_the_prompt_is_the_first_2_to_8_words(number):
  text = f"{number} one two\nthree four five six seven eight nine"
  prompt, response = imdb.split_review(text)
  assert prompt + response == text
  assert 2 <= len(prompt.split()) <= 8
  assert response[0].isspace() and not prompt[-1].isspace()
  assert imdb.split_review(text) == (prompt, response)


def test_a_response_is_left_of_a_short_review():
  assert imdb.split_review("Just awful") == ("Just", " awful")


def test_rows_are_demonstrations_and_labelled_responses(write_lines):
  row = {"id": 7, "label": 0, "rating": 2, "text": TEXT}
  path = write_lines(row, row | {"label": 1})
  read = lambda inputs: [*examples.read("imdb", path, split="", inputs=inputs)]
  labelled, demonstrations = read("labelled"), read("demonstrations")
  assert [row["label"] for row in labelled] == [False, True]
  for row in labelled + demonstrations:
    assert row["prompt"] + row["response"] == imdb.clean(TEXT)
  assert all("label" not in row for row in demonstrations)


def test_unlabelled_reviews_have_no_label(write_lines):
  path = write_lines({"label": -1, "text": TEXT})
  with pytest.raises(ValueError, match="line 1: no column 'label'"):
    list(examples.read("imdb", path, split="", inputs="labelled"))
  assert len(list(imdb.read(path, ""))) == 1


@pytest.mark.parametrize("row", [{"label": 1}, {"text": "one"}, {"text": 3}])
def test_a_row_without_a_text_of_two_words_is_refused(row, write_lines):
  with pytest.raises(ValueError, match="row 1: column 'text' is"):
    list(imdb.read(write_lines(row), ""))


def test_real_reviews_are_read_whole(shared_dir):
  path = str(shared_dir / "data/imdb/train.jsonl.xz")
  for row in itertools.islice(imdb.read(path, ""), 200):
    assert row["label"] in (0, 1) and "<br" not in row["response"]
    assert 2 <= len(row["prompt"].split()) <= 8 and row["response"].strip()

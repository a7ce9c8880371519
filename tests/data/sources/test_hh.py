"""Transcripts are split after the last turn of the assistant."""

import pytest

from dpo_jax.data import examples
from dpo_jax.data.sources import hh

TURN = "\n\nHuman: Hi\n\nAssistant: Yes?"
ASK = "\n\nHuman: Why\n\nAssistant:"


def test_prompt_ends_with_the_last_assistant():
  parts = hh.split_transcripts(TURN + ASK + " So.", TURN + ASK + " No.\n")
  assert parts == (TURN + ASK, " So.", " No.\n")


def test_prompts_that_differ_give_no_pair():
  assert hh.split_transcripts(ASK + " So.", TURN + ASK + " So.") is None
  assert hh.split_transcripts(ASK + " a", ASK + " a" + ASK + " b") is None


def test_rows_hold_the_transcripts_and_their_subset_only(write_lines):
  row = {"chosen": ASK + " a", "rejected": ASK + " b", "subset": "x"}
  path = write_lines(row | {"prompt": "no"})
  assert list(hh.read(path, "")) == [row]


def test_missing_transcript_is_named(write_lines):
  path = write_lines({"chosen": ASK + " a", "prompt": "p"})
  with pytest.raises(ValueError, match="line 1: no column 'rejected'; columns"):
    list(examples.read("hh", path, split="", inputs="pairs"))


def test_real_dialogues_split(shared_dir):
  path = str(shared_dir / "data/hh/test.jsonl.xz")
  rows = list(examples.read("hh", path, split="", inputs="pairs"))
  assert len(rows) == 1200
  kept = [row for row in rows if "dropped" not in row]
  assert len(kept) > 1190
  assert {row["subset"] for row in kept} == {"helpful-base", "harmless-base"}
  assert all(row["prompt"].endswith("\n\nAssistant:") for row in kept)
  assert not any("\n\nAssistant:" in row["chosen"] for row in kept)

"""Datasets by name; a folder stands for the hub."""

import datasets
import pytest

from dpo_jax.data import hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_of_the_split_are_read(write_lines, tmp_path):
  write_lines({"text": "a"}, name="train.jsonl")
  write_lines({"text": "b"}, {"text": "c"}, name="test.jsonl")
  assert list(hub.read(str(tmp_path), "test")) == [{"text": "b"}, {"text": "c"}]


def test_what_cannot_be_had_is_one_line(write_lines, tmp_path):
  write_lines({"text": "a"}, name="train.jsonl")
  for path, split in ((str(tmp_path), "dev"), ("no/such-dataset", "train")):
    with pytest.raises(ValueError, match="cannot be had") as error:
      list(hub.read(path, split))
    line = str(error.value)
    assert path in line and split in line and "\n" not in line
  with pytest.raises(ValueError, match="needs a split"):
    list(hub.read("no/such-dataset", ""))

"""Datasets by name; a folder stands for the hub."""

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.data.sources import hub


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


def test_a_row_that_is_no_text_is_named(tmp_path):
  values = pa.array([b"good", b"\xff"], pa.binary())
  text = pa.Array.from_buffers(pa.string(), 2, values.buffers())
  parquet.write_table(pa.table({"text": text}), tmp_path / "train.parquet")
  (tmp_path / "lines").mkdir()
  path = tmp_path / "lines" / "train.jsonl"
  path.write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
  for path, message in (
    (tmp_path, "cannot be had from row 2 on: UnicodeDecodeError: "),
    (tmp_path / "lines", "cannot be had: .*surrogate"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      list(hub.read(str(path), "train"))
    assert "\n" not in str(error.value)


def test_no_code_of_a_dataset_is_run(tmp_path, monkeypatch):
  (tmp_path / "mine").mkdir()
  marker = tmp_path / "marker"
  code = f"open({str(marker)!r}, 'w')\n"
  (tmp_path / "mine" / "mine.py").write_text(code)
  with pytest.raises(ValueError, match="cannot be had"):
    list(hub.read(str(tmp_path / "mine"), "train"))
  assert not marker.exists()
  asked = []
  monkeypatch.setattr(
    datasets, "load_dataset", lambda *_, **options: asked.append(options) or []
  )
  assert list(hub.read("no/such", "train")) == []
  assert asked == [{"split": "train", "trust_remote_code": False}]

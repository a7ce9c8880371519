"""Rows of local files, and the line that names what is wrong with one."""

import gzip
import json
import lzma
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.data import jsonl

ROW = b"{}\n"
ROWS = [{"prompt": "a", "n": 1}, {"prompt": "ü\u2028", "n": 2}]


@pytest.mark.parametrize(
  "extension, opener",
  [(".jsonl", open), (".jsonl.gz", gzip.open), (".jsonl.xz", lzma.open)],
)
def test_lines_are_read_in_order_from(extension, opener, tmp_path):
  path = str(tmp_path / f"rows{extension}")
  with opener(path, "wt", encoding="utf-8") as file:
    for row in ROWS:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.write("\n")
  assert list(jsonl.read(path, "")) == ROWS


def test_parquet_gives_lists_of_messages(tmp_path):
  rows = [{"chosen": [{"role": "user", "content": "a"}]}] * 3
  path = str(tmp_path / "rows.parquet")
  parquet.write_table(pa.Table.from_pylist(rows), path)
  assert list(jsonl.read(path, "")) == rows


@pytest.mark.parametrize(
  "lines, message",
  [
    (["{}", '{"a": 1'], "line 2: not JSON .* character 8"),
    (["{}", "[1]"], "line 2: '\\[1\\]'; allowed: a JSON object"),
    (["{}", "", "{}"], "line 2: empty"),
  ],
)
def test_broken_line_is_named(lines, message, write_lines):
  path = write_lines(*lines)
  with pytest.raises(ValueError, match=f"{path}, {message}") as error:
    list(jsonl.read(path, ""))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("rows.csv", b"", r"allowed: a file \*.jsonl, .jsonl.gz, .jsonl.xz, .par"),
    ("rows.jsonl", b"\xff\xfe", "cannot be read"),
    ("rows.jsonl.gz", b"no gzip", "cannot be read"),
    ("rows.jsonl.gz", gzip.compress(ROW * 99, mtime=0)[:-9], "cannot be read"),
    ("rows.jsonl.xz", b"no xz", "cannot be read"),
    ("rows.parquet", b"no parquet", "cannot be read"),
  ],
  ids=["csv", "utf-16", "no gzip", "cut gzip", "no xz", "no parquet"],
)
def test_unreadable_file_is_named(name, content, message, tmp_path):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"{name}' .*{message}") as error:
    list(jsonl.read(str(path), ""))
  assert "\n" not in str(error.value)


def test_missing_file_and_folder_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no such file: '.*none.jsonl'"):
    list(jsonl.read(str(tmp_path / "none.jsonl"), ""))
  (tmp_path / "folder.jsonl").mkdir()
  with pytest.raises(ValueError, match="folder.jsonl' cannot be read"):
    list(jsonl.read(str(tmp_path / "folder.jsonl"), ""))


@pytest.mark.parametrize("extension", jsonl.EXTENSIONS)
def test_what_is_no_file_is_refused_unopened(extension, tmp_path):
  path = str(tmp_path / f"rows{extension}")
  os.mkfifo(path)
  with pytest.raises(ValueError, match=f"{path} is not a regular file"):
    list(jsonl.read(path, ""))

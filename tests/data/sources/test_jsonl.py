"""Rows of local files, and the line that names what is wrong with one."""

import gzip
import json
import lzma
import os
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_jax.data.sources import jsonl

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
  with pytest.raises(ValueError, match=f"{name}.*{message}") as error:
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


def refusal(path):
  """Returns the one line in which a file is refused."""
  with pytest.raises(ValueError) as error:
    list(jsonl.read(str(path), ""))
  line = str(error.value)
  assert str(path) in line and "\n" not in line
  line.encode()  # which can be printed
  return line


DEEP = 2 * jsonl.MAX_DEPTH


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"a": "x \\ud83d"}', r"character 3 of 'x \\ud83d' is '\\ud83d', half of"),
    ('{"a": [{"b": "\\uDC00"}]}', "half of a surrogate pair"),
    ('{"\\ud83d": 1}', "half of a surrogate pair"),
    ('{"a": ' + "[" * DEEP + "]" * DEEP + "}", "more than 100 lists or obj"),
    ('{"a": ' * 99_999 + "1" + "}" * 99_999, "more than 100 lists or objects"),
    ('{"a": 1' + "0" * 5000 + "}", "Exceeds the limit .4300 digits."),
    ('{"a": "\0"}', "not JSON .Invalid control character at"),
    ("\0" * 20, "not JSON .Expecting value at character 1"),
    ("\ufeff{}", "not JSON .Unexpected UTF-8 BOM"),
  ],
  ids="half inner key deep deeper integer nul zeros mark".split(),
)
def test_a_row_that_is_no_text_or_too_deep_is_named(line, message, tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("{}\n" + line + "\n")
  assert re.search(f"rows.jsonl, line 2: .*{message}", refusal(path))


def test_text_that_looks_odd_is_read(write_lines):
  rows = [
    {"a": "\0 \u2028 \U0001f600", "b": 10**40, "c": "[{" * 999},
    {"a": {"b": [[[{"c": None}]]] * 99}},
  ]
  assert list(jsonl.read(write_lines(*rows), "")) == rows
  path = write_lines('{"a": "\\ud83d\\ude00"}\r')  # both halves
  assert list(jsonl.read(path, "")) == [{"a": "\U0001f600"}]


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"a": "\xc3\xbc"}\n' * 3 + b'{"a": "\xc3"}\n{}\n')
  message = "line 4: cannot be read: byte 0xc3 behind character 7 is not UTF-8"
  assert refusal(path).endswith(message)


GZIP, XZ = gzip.compress(b"{}\n" * 5, mtime=0), lzma.compress(b"{}\n" * 5)


@pytest.mark.parametrize(
  "name, content, line",
  [
    ("rows.jsonl.gz", GZIP + b"garbage", 6),
    ("rows.jsonl.gz", GZIP + GZIP[:-9], 11),
    ("rows.jsonl.xz", XZ + b"garbage", 6),
    ("rows.jsonl.xz", XZ + b"\0" * 8 + b"garbage", 6),
    ("rows.jsonl.xz", XZ + XZ[:-9], 11),
    ("rows.jsonl.xz", XZ + b"?" + XZ[1:], 6),
  ],
  ids="gz gz-cut xz xz-padding xz-cut xz-header".split(),
)
def test_garbage_behind_a_compressed_stream_is_not_passed_over(
  name, content, line, tmp_path
):
  (tmp_path / name).write_bytes(content)
  found = refusal(tmp_path / name)
  assert f"{name}' cannot be read from line {line} on: " in found


@pytest.mark.parametrize("gap", [b"", b"\0" * 8], ids=["none", "zeros"])
def test_streams_one_behind_the_other_are_one_file(gap, tmp_path):
  for name, stream, rows in (
    ("rows.jsonl.gz", GZIP, [{}] * 10),
    ("rows.jsonl.xz", XZ, [{}] * 10),
    ("long.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 9999), [{"a": 1}] * 19998),
  ):
    (tmp_path / name).write_bytes(stream + gap + stream + gap)
    assert list(jsonl.read(str(tmp_path / name), "")) == rows


def test_a_value_of_parquet_that_cannot_be_is_named_by_row(tmp_path):
  path = tmp_path / "rows.parquet"
  values = [b"good"] * 1500 + [b"\xff"]
  text = pa.array(values, pa.binary()).cast(pa.large_binary())
  text = pa.Array.from_buffers(pa.large_string(), 1501, text.buffers())
  parquet.write_table(pa.table({"text": text}), path)
  assert re.search("from row 1501 on: 'utf-?8' codec can't", refusal(path))
  moment = pa.array([0, 2**62], pa.timestamp("us"))
  parquet.write_table(pa.table({"moment": moment}), path)
  assert "from row 2 on: " in refusal(path)


def test_a_page_of_parquet_that_is_not_as_written_is_refused(tmp_path):
  path = tmp_path / "rows.parquet"
  table = pa.table({"text": ["a story"] * 9})
  options = {
    "use_dictionary": False,
    "compression": "none",
    "write_statistics": False,
  }
  parquet.write_table(table, path, write_page_checksum=True, **options)
  path.write_bytes(path.read_bytes().replace(b"a story", b"a storm", 1))
  assert "could not verify page integrity" in refusal(path)

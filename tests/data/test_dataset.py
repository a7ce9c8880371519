"""The Arrow cache: found again, keyed by content, rebuilt when damaged."""

import concurrent.futures
import dataclasses
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest

from dpo_jax.data import dataset, tokenize

PAIRS = [
  {"prompt": "p" * (n + 1), "chosen": "c" * n, "rejected": "r" * (5 - n)}
  for n in range(5)
]


@pytest.fixture
def load(tmp_path, write_lines, tokenizer):
  """Returns a function that loads `PAIRS` through a cache."""

  def load_pairs(rows=PAIRS, **kwargs):
    settings = {
      "source": "jsonl",
      "path": write_lines(*rows),
      "split": "",
      "tokenizer": tokenizer,
      "inputs": "pairs",
      "max_length": 99,
      "max_prompt_length": 50,
    }
    return dataset.load(tmp_path / "cache", **(settings | kwargs))

  return load_pairs


@pytest.fixture
def count_builds(monkeypatch):
  """Returns the list of calls to tokenise, as it grows."""
  calls, tokenize_rows = [], tokenize.tokenize

  def counted(*args, **kwargs):
    calls.append(kwargs)
    return tokenize_rows(*args, **kwargs)

  monkeypatch.setattr(tokenize, "tokenize", counted)
  return calls


def folders(tmp_path):
  return sorted(p for p in (tmp_path / "cache").iterdir() if p.is_dir())


def as_lists(tokens):
  return [
    [c.values[a:b].tolist() for a, b in zip(c.offsets, c.offsets[1:])]
    for c in (tokens.prompt, *tokens.responses)
  ]


def test_take_gives_the_pairs_asked_for_in_order(load):
  tokens = load()
  everything = as_lists(tokens.take(np.arange(5)))
  assert as_lists(tokens.take(np.array([3, 0, 3]))) == [
    [column[i] for i in (3, 0, 3)] for column in everything
  ]
  assert as_lists(tokens.take(np.zeros(0, int))) == [[], [], []]
  lengths = [[len(x) for x in column] for column in everything]
  np.testing.assert_array_equal(tokens.lengths.T, lengths)
  assert tokens.lengths.dtype == np.int32


def test_an_error_of_the_tokens_names_file_and_line(load, tmp_path):
  chat = [{"role": "assistant", "content": "a"}]
  row = {"prompt": chat, "chosen": chat, "rejected": chat}
  place = f"^{tmp_path}/pairs.jsonl, line 6: the data holds chat messages"
  with pytest.raises(ValueError, match=place):
    load([*PAIRS, row])


def test_tables_of_several_sliced_chunks_read_as_one():
  lists = [[[10 * i + j] * (j + i % 3) for i in range(9)] for j in (1, 2, 3)]
  whole = dataset.TokenDataset.from_lists(*lists)
  kind = pa.list_(pa.int32())
  columns = [pa.array(x, kind) for x in lists]
  table = pa.table(columns, names=["prompt", "chosen", "rejected"])
  parts = [table.slice(0, 2), table.slice(2, 4), table.slice(6)]
  tokens = dataset.TokenDataset(pa.concat_tables(parts), whole.report)
  order = np.array([8, 1, 4, 2, 6])
  assert as_lists(tokens.take(order)) == as_lists(whole.take(order))
  np.testing.assert_array_equal(tokens.lengths, whole.lengths)


def test_tokens_are_read_in_place():
  values = np.arange(6, dtype=np.int32)
  lists = pa.ListArray.from_arrays(pa.array([0, 2, 6], pa.int32()), values)
  table = pa.table([lists] * 3, names=["prompt", "chosen", "rejected"])
  tokens = dataset.TokenDataset(table, tokenize.Report())
  values[3] = 77
  assert tokens.take(np.array([1])).prompt.values.tolist() == [2, 77, 4, 5]


def test_second_load_reads_the_cache(load, count_builds):
  first, second = load(), load()
  assert len(count_builds) == 1
  every = np.arange(5)
  assert as_lists(first.take(every)) == as_lists(second.take(every))
  assert first.report == second.report
  assert second.report.kept == 5


def test_cached_tokens_are_memory_mapped(load):
  before = pa.total_allocated_bytes()
  tokens = load([PAIRS[1] | {"chosen": "c" * 80}] * 5000)
  assert tokens.lengths.sum() > 400_000
  assert pa.total_allocated_bytes() - before < 100_000


@pytest.mark.parametrize(
  "change",
  [
    {"rows": PAIRS[:4]},
    {"max_length": 98},
    {"max_prompt_length": 49},
    {"truncate_prompts": "always"},
    {"inputs": "demonstrations"},
    {"source": "hub"},
  ],
  ids=lambda change: next(iter(change)),
)
def test_what_matters_makes_another_cache(load, change, tmp_path, monkeypatch):
  monkeypatch.setattr(dataset.examples.hub, "read", lambda *_: iter(PAIRS))
  load()
  load(**change)
  assert len(folders(tmp_path)) == 2


def test_another_tokenizer_makes_another_cache(load, make_tokenizer, tmp_path):
  load()
  load(tokenizer=make_tokenizer(bos=True))
  assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "lost", "report", "empty"])
def test_damaged_cache_is_rebuilt_and_said(
  damage, load, tmp_path, count_builds, caplog
):
  tokens = load().take(np.arange(5))
  expected = as_lists(tokens)
  (folder,) = folders(tmp_path)
  (arrow,) = folder.glob("*.arrow")
  content = bytearray(arrow.read_bytes())
  if damage == "cut":
    arrow.write_bytes(content[: len(content) // 2])
  elif damage == "flip":
    content[content.index(tokens.responses[0].values.tobytes())] ^= 1
    arrow.write_bytes(content)
  elif damage == "lost":
    arrow.unlink()
  elif damage == "report":
    (folder / "report.json").write_text("{")
  else:
    for path in folder.iterdir():
      path.unlink()
  with caplog.at_level("WARNING"):
    assert as_lists(load().take(np.arange(5))) == expected
  assert len(count_builds) == 2
  assert "is damaged" in caplog.text
  assert folders(tmp_path) == [folder]


def _replace(folder, table, report):
  """Puts another dataset at the place of a cache, with a report that fits."""
  shutil.rmtree(folder)
  table.save_to_disk(folder)
  has_parts = isinstance(table, dict)  # of which there is no checksum
  written = report | {"sha256": "" if has_parts else dataset._checksum(folder)}
  (folder / "report.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
  "kind", ["file", "fifo", "link", "dict", "column", "dtype", "null", "report"]
)
def test_whatever_else_is_at_a_cache_s_place_is_replaced(
  kind, load, tmp_path, count_builds, caplog
):
  first = load()
  expected = as_lists(first.take(np.arange(5)))
  (folder,) = folders(tmp_path)
  report = dataclasses.asdict(first.report)
  columns = {x: [[1]] * 5 for x in ("prompt", "chosen", "rejected")}
  if kind in ("file", "link"):
    folder.rename(tmp_path / "moved")
    if kind == "file":
      folder.write_text("x")
    else:
      folder.symlink_to(tmp_path / "absent")
  elif kind == "fifo":
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
  elif kind == "dict":
    table = datasets.Dataset.from_dict(columns)
    _replace(folder, datasets.DatasetDict(train=table), report)
  elif kind == "column":
    table = datasets.Dataset.from_dict(columns | {"other": [1] * 5})
    _replace(folder, table, report)
  elif kind == "dtype":
    columns["chosen"] = ["text"] * 5
    _replace(folder, datasets.Dataset.from_dict(columns), report)
  else:
    arrays = [pa.array([[1]] * 5, pa.list_(pa.int32()))] * 3
    if kind == "null":
      arrays[1] = pa.array([[1], None] + [[2]] * 3, pa.list_(pa.int32()))
    else:
      report["dropped"] = [3]
    table = pa.table(arrays, names=list(columns))
    _replace(folder, datasets.Dataset(table), report)
  with caplog.at_level("WARNING"):
    assert as_lists(load().take(np.arange(5))) == expected
  assert "is damaged" in caplog.text and len(count_builds) == 2
  assert folders(tmp_path) == [folder]
  load()
  assert len(count_builds) == 2


def test_a_build_sweeps_what_killed_builds_left(load, tmp_path):
  left = tmp_path / "cache" / f".{'0' * 32}.part"
  left.mkdir(parents=True)
  load()
  assert not left.exists()


def test_failed_write_leaves_nothing(load, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(dataset, "_checksum", fail)
  with pytest.raises(OSError, match="disk full"):
    load()
  assert folders(tmp_path) == []


def test_others_wait_for_the_builder(load, tmp_path):
  """Where a process that does not build waits, the builder builds."""
  builds = iter([None, load])
  tokens = load(is_builder=False, agree=lambda _: (next(builds) or str)())
  assert len(tokens.lengths) == 5


def test_a_builder_that_left_nothing_is_said(load):
  with pytest.raises(ValueError, match="left no cache"):
    load(is_builder=False)


def test_processes_compare_data_and_tokenizer_before_they_build(
  load, count_builds
):
  said = []
  load(agree=lambda values: said.append(dict(values)))
  first, last = said
  assert len(first) == 2 and len(last) == 1
  said.clear()
  load(PAIRS[:4], agree=lambda values: said.append(dict(values)))
  changed = {key for key in first if said[0][key] != first[key]}
  (key,) = changed
  assert key.startswith("content of ") and key.endswith("pairs.jsonl")

  def differ(values):
    raise ValueError(f"differ: {', '.join(values)}")

  count_builds.clear()
  with pytest.raises(ValueError, match=r"differ: content of .*, tokenizer"):
    load(PAIRS[:3], agree=differ)
  assert not count_builds


def test_no_row_kept_is_refused_with_the_reasons(load, tmp_path):
  with pytest.raises(ValueError, match=r"none of 5 rows .*: no room .*\(5\)"):
    load(max_length=1)


def test_a_run_waits_for_another_that_builds(load, monkeypatch, count_builds):
  """The second starts while the first is about to put its cache in place."""
  checksum, second = dataset._checksum, []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:

    def start_beside(folder):
      if not second:
        second.append(pool.submit(load))
        with pytest.raises(concurrent.futures.TimeoutError):
          second[0].result(timeout=0.5)
      return checksum(folder)

    monkeypatch.setattr(dataset, "_checksum", start_beside)
    tokens = load()
    waited = second[0].result(timeout=20)
  np.testing.assert_array_equal(tokens.lengths, waited.lengths)
  assert len(count_builds) == 1


def test_score_gaps_stay_with_their_pairs(load):
  rows = [
    PAIRS[n] | {"chosen_score": gap, "rejected_score": 0.0}
    for n, gap in enumerate((0.5, 0.0, 2.0, 3.5, 1.5))  # the second is dropped
  ]
  for _ in range(2):  # built, then from the cache
    tokens = load(rows, inputs="scored_pairs")
    np.testing.assert_array_equal(tokens.score_gaps, [0.5, 2.0, 3.5, 1.5])
    assert tokens.score_gaps.dtype == np.float32
    np.testing.assert_array_equal(tokens.lengths[:, 0], [1, 3, 4, 5])
  np.testing.assert_array_equal(tokens.head(2).score_gaps, [0.5, 2.0])
  assert load(rows).score_gaps is None

"""Tokens of pairs in an Arrow cache, memory-mapped.

A cache is a folder `<hash>` of a Hugging Face `Dataset` and a `report.json`.
The hash covers the content of the data, the tokenizer, the lengths and
`CACHE_VERSION`, so a cache never goes stale; it may be deleted at any time.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from absl import logging

from dpo_jax.data import examples, tokenize, tokenizer_files, truncation
from dpo_jax.data.packing import PairTokens, Ragged
from dpo_jax.host import caches, endings, files, schema

# To be raised with any change of what a row is tokenised to.
CACHE_VERSION = 2
SCORE_GAPS = "score_gaps"
REPORT = "report.json"
# What a report says: counts, and counts by name.
_REPORT = {"sha256": schema.STRING} | {
  field.name: schema.COUNT
  if field.type is int
  else schema.object_of(schema.COUNT)
  for field in dataclasses.fields(tokenize.Report)
}


class TokenDataset:
  """Token ids of n pairs or ranked lists, read in place from an Arrow table.

  `lengths` is i32[n,1+C], the tokens of the prompt and of C responses: chosen
  and rejected, or the best first. A response that is absent, as `rejected` of
  a demonstration, has none. `score_gaps` is f32[n] of scored pairs, else None.
  `report` says what became of the rows that these come from.
  """

  def __init__(self, table: pa.Table, report: tokenize.Report):
    """Takes a table of int32 lists, the prompt first; copies no token.

    A column `SCORE_GAPS` of float32 may stand beside them.
    """
    self.report = report
    self._table = table
    names = [name for name in table.column_names if name != SCORE_GAPS]
    self._columns = [_Column(table.column(name)) for name in names]
    lengths = [column.lengths for column in self._columns]
    self.lengths = np.stack(lengths, 1).astype(np.int32)
    self.score_gaps = None
    if SCORE_GAPS in table.column_names:
      self.score_gaps = table.column(SCORE_GAPS).to_numpy()

  @classmethod
  def from_lists(
    cls,
    prompt: Sequence[Sequence[int]],
    *responses: Sequence[Sequence[int]],
  ) -> "TokenDataset":
    """Returns the dataset of lists of token ids, one list a pair."""
    kind = pa.list_(pa.int32())
    columns = [pa.array(x, kind) for x in (prompt, *responses)]
    table = pa.table(columns, names=_names(len(responses)))
    return cls(table, tokenize.Report(len(prompt), len(prompt)))

  def head(self, count: int) -> "TokenDataset":
    """Returns the first pairs only; the report stays that of all rows."""
    return TokenDataset(self._table.slice(0, count), self.report)

  def take(self, indices: np.ndarray) -> PairTokens:
    """Returns the tokens of some pairs, in the order asked for."""
    prompt, *responses = (column.take(indices) for column in self._columns)
    return PairTokens(prompt, tuple(responses))


def _names(num_responses: int) -> list[str]:
  """Returns the columns of a table: a prompt, then its responses."""
  more = [f"response_{k}" for k in range(3, num_responses + 1)]
  return ["prompt", "chosen", "rejected"][: 1 + num_responses] + more


class _Column:
  """One column of token lists: views of its chunks, and where lists start."""

  def __init__(self, column: pa.ChunkedArray):
    self._values, chunks, starts, lengths = [], [], [], []
    for number, chunk in enumerate(column.chunks):
      # `values` is not cut to a sliced chunk; `offsets` is, and points into it.
      offsets = chunk.offsets.to_numpy().astype(np.int64)
      self._values.append(chunk.values.to_numpy(zero_copy_only=True))
      chunks.append(np.full(len(chunk), number, np.int32))
      starts.append(offsets[:-1])
      lengths.append(np.diff(offsets))
    self._chunk = np.concatenate([np.zeros(0, np.int32), *chunks])
    self._start = np.concatenate([np.zeros(0, np.int64), *starts])
    self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])

  def take(self, indices: np.ndarray) -> Ragged:
    start, lengths = self._start[indices], self.lengths[indices]
    lists = [
      self._values[chunk][first : first + length]
      for chunk, first, length in zip(
        self._chunk[indices], start, lengths, strict=True
      )
    ]
    values = np.concatenate([np.zeros(0, np.int32), *lists])
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))


def load(
  cache_dir: str | os.PathLike,
  *,
  source: str,
  path: str,
  split: str,
  tokenizer: tokenizer_files.Tokenizer,
  inputs: str,
  is_builder: bool = True,
  agree: Callable[[Mapping[str, str]], None] = lambda values: None,
  **lengths: Any,
) -> TokenDataset:
  """Returns the tokens of a data set, from its cache, built where missing.

  Args:
    cache_dir: folder of all caches, seen by every process.
    source: a name of `examples.SOURCES`.
    path: what the source reads.
    split: which part of it.
    tokenizer: of `tokenizer_files.load_tokenizer`.
    inputs: one of `examples.INPUTS`.
    is_builder: whether this process of the run builds; exactly one must.
      Of several runs one builds, and the others wait for it.
    agree: called twice by every process, with hashes of what the tokens are
      of, and when they are in the cache; returns when all have called it.
    **lengths: the fields of `truncation.Limits`.

  Raises:
    ValueError: a length is out of range, the data cannot be read, no row of it
      is kept, or another process has other data or another tokenizer.
  """
  limits = truncation.Limits(**lengths)
  settings = {"inputs": inputs} | dataclasses.asdict(limits)
  dataset = None
  data = examples.fingerprint(source, path, split)
  tokens = tokenizer_files.fingerprint(tokenizer)
  key = [CACHE_VERSION, data, tokens, settings]
  text_hash = lambda text: hashlib.sha256(text.encode()).hexdigest()
  agree({f"content of {path}": data, "tokenizer": text_hash(tokens)})
  folder = pathlib.Path(cache_dir) / text_hash(json.dumps(key))[:32]
  if is_builder:
    dataset = _open(folder)
  if is_builder and dataset is None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    caches.sweep(folder.parent)
    with caches.lock(folder):
      dataset = _open(folder)  # another run may have built it meanwhile
      if dataset is None:
        caches.remove(folder)
        rows = examples.read(source, path, split=split, inputs=inputs)
        tokenized = _tokenize(rows, path, tokenizer, settings)
        with endings.writing(folder):
          _write(folder, *tokenized)
  agree({f"cache of {path}": folder.name})
  dataset = dataset or _open(folder)
  if dataset is None:
    raise ValueError(
      f"{path!r}: the building process left no cache at {folder}"
    )
  return dataset


def _tokenize(
  rows: Iterator[dict],
  path: str,
  tokenizer: tokenizer_files.Tokenizer,
  settings: dict[str, Any],
) -> tuple[PairTokens, tokenize.Report]:
  """Returns tokens and report; at least one row is kept."""
  tokens, report = tokenize.tokenize(
    rows,
    tokenizer,
    where=functools.partial(examples.where, path),
    **settings,
  )
  if report.kept == 0:
    reasons = (f"{reason} ({n})" for reason, n in report.dropped.items())
    raise ValueError(
      f"{path!r}: none of {report.read} rows is kept: {', '.join(reasons)}"
    )
  return tokens, report


def _write(
  folder: pathlib.Path, tokens: PairTokens, report: tokenize.Report
) -> None:
  """Writes a cache, whole or not at all."""
  with files.folder(folder, marker=REPORT) as part:
    ragged = (tokens.prompt, *tokens.responses)
    arrays = [
      pa.LargeListArray.from_arrays(pa.array(x.offsets), pa.array(x.values))
      for x in ragged
    ]
    table = pa.table(arrays, names=_names(len(tokens.responses)))
    if tokens.score_gaps is not None:
      table = table.append_column(SCORE_GAPS, pa.array(tokens.score_gaps))
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(part)
    written = dataclasses.asdict(report) | {"sha256": _checksum(part)}
    (part / REPORT).write_text(json.dumps(written, indent=2) + "\n")


def _open(folder: pathlib.Path) -> TokenDataset | None:
  """Returns the dataset of a cache; None where there is none, or no whole one.

  A cache can always be made again, so whatever is wrong with it is not an
  error but said.
  """
  if not os.path.lexists(folder):
    return None
  try:
    written = schema.read(folder / REPORT, _REPORT, required=_REPORT)
    if written.pop("sha256") != _checksum(folder):
      raise ValueError("its content has changed")
    table = datasets.load_from_disk(folder).data.table
    report = tokenize.Report(**written)
    _check_table(table, report)
    return TokenDataset(table, report)
  except Exception as error:  # Whatever `datasets` makes of other folders.
    reason = " ".join(str(error).split()) or type(error).__name__
    logging.warning("Token cache %s is damaged: %s", folder, reason)
    return None


def _check_table(table: pa.Table, report: tokenize.Report) -> None:
  """Raises ValueError unless a table is as `_write` writes them."""
  names = [name for name in table.column_names if name != SCORE_GAPS]
  is_named = len(names) >= 3 and names == _names(len(names) - 1)
  if not is_named or len(table) != report.kept:
    raise ValueError(f"it has {len(table)} rows of {', '.join(names)}")
  for name, kind in zip(table.column_names, table.schema.types, strict=True):
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_right = is_list and kind.value_type == pa.int32()
    if name == SCORE_GAPS:
      is_right = kind == pa.float32()
    if not is_right or table[name].null_count:
      raise ValueError(f"its column {name} is {kind}")


def _checksum(folder: pathlib.Path) -> str:
  """Returns a hash of all files of a cache but its report."""
  digest = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    if path.name != REPORT:
      schema.check_file(path)
      with path.open("rb") as file:
        digest.update(path.name.encode())
        digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()

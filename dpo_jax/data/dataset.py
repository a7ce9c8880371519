"""Tokens of pairs in an Arrow cache, memory-mapped.

A cache is a folder `<hash>` of a Hugging Face `Dataset` and a `report.json`.
The hash covers the content of the data, the tokenizer, the lengths and
`CACHE_VERSION`, so a cache never goes stale; it may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import filelock
import numpy as np
import pyarrow as pa
from absl import logging

from dpo_jax.data import examples, tokenize
from dpo_jax.data.packing import PairTokens, Ragged

# To be raised with any change of what a row is tokenised to.
CACHE_VERSION = 1
SCORE_GAPS = "score_gaps"
REPORT = "report.json"


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
  tokenizer: tokenize.Tokenizer,
  inputs: str,
  max_length: int,
  max_prompt_length: int,
  max_response_length: int = 0,
  is_builder: bool = True,
  agree: Callable[[Mapping[str, str]], None] = lambda values: None,
) -> TokenDataset:
  """Returns the tokens of a data set, from its cache, built where missing.

  Args:
    cache_dir: folder of all caches, seen by every process.
    source: a name of `examples.SOURCES`.
    path: what the source reads.
    split: which part of it.
    tokenizer: of `tokenize.load_tokenizer`.
    inputs: one of `examples.INPUTS`.
    max_length: tokens in prompt and response together.
    max_prompt_length: tokens in a prompt.
    max_response_length: tokens in a response; 0: no bound.
    is_builder: whether this process of the run builds; exactly one must.
      Of several runs one builds, and the others wait for it.
    agree: called twice by every process, with hashes of what the tokens are
      of, and when they are in the cache; returns when all have called it.

  Raises:
    ValueError: the data cannot be read, no row of it is kept, or another
      process has other data or another tokenizer.
  """
  settings = {
    "inputs": inputs,
    "max_length": max_length,
    "max_prompt_length": max_prompt_length,
    "max_response_length": max_response_length,
  }
  dataset = None
  data = examples.fingerprint(source, path, split)
  tokens = tokenize.fingerprint(tokenizer)
  key = [CACHE_VERSION, data, tokens, settings]
  text_hash = lambda text: hashlib.sha256(text.encode()).hexdigest()
  agree({f"content of {path}": data, "tokenizer": text_hash(tokens)})
  folder = pathlib.Path(cache_dir) / text_hash(json.dumps(key))[:32]
  if is_builder:
    dataset = _open(folder)
  if is_builder and dataset is None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
      dataset = _open(folder)  # another run may have built it meanwhile
      if dataset is None:
        shutil.rmtree(folder, ignore_errors=True)
        rows = examples.read(source, path, split=split, inputs=inputs)
        _write(folder, *_tokenize(rows, path, tokenizer, settings))
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
  tokenizer: tokenize.Tokenizer,
  settings: dict[str, Any],
) -> tuple[PairTokens, tokenize.Report]:
  """Returns tokens and report; at least one row is kept."""
  tokens, report = tokenize.tokenize(rows, tokenizer, **settings)
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
  partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
  partial.mkdir(parents=True)
  try:
    ragged = (tokens.prompt, *tokens.responses)
    arrays = [
      pa.LargeListArray.from_arrays(pa.array(x.offsets), pa.array(x.values))
      for x in ragged
    ]
    table = pa.table(arrays, names=_names(len(tokens.responses)))
    if tokens.score_gaps is not None:
      table = table.append_column(SCORE_GAPS, pa.array(tokens.score_gaps))
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(partial)
    written = dataclasses.asdict(report) | {"sha256": _checksum(partial)}
    (partial / REPORT).write_text(json.dumps(written, indent=2) + "\n")
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _open(folder: pathlib.Path) -> TokenDataset | None:
  """Returns the dataset of a cache; None where it is missing or damaged."""
  if not folder.exists():
    return None
  try:
    written = json.loads((folder / REPORT).read_text())
    if written.pop("sha256") != _checksum(folder):
      raise ValueError("its content has changed")
    table = datasets.load_from_disk(folder).data.table
    return TokenDataset(table, tokenize.Report(**written))
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning("Token cache %s is damaged: %s", folder, error)
    return None


def _checksum(folder: pathlib.Path) -> str:
  """Returns a hash of all files of a cache but its report."""
  digest = hashlib.sha256()
  for path in sorted(folder.iterdir()):
    if path.name != REPORT:
      with path.open("rb") as file:
        digest.update(path.name.encode())
        digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()

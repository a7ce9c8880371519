"""Any trained model against any reference on files of held-out pairs."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import sharding
from dpo_jax.checkpoints import run_folder, source
from dpo_jax.data import (
  dataset,
  examples,
  tokenize,
  tokenizer_files,
  truncation,
)
from dpo_jax.evaluation import preference_report
from dpo_jax.inference import logps


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an evaluation is of.

  Attributes:
    source: the policy: a run folder, Hugging Face folder or hub name.
    reference: the same of what it is compared with.
    beta: scales log-ratios to rewards, above 0.
    max_length: tokens of prompt and one response.
    max_prompt_length: tokens of a prompt that is cut.
    truncate_prompts: when it is; one of `truncation.RULES`.
    dtype: of matmuls.
  """

  source: str
  reference: str
  beta: float
  max_length: int
  max_prompt_length: int
  truncate_prompts: str
  dtype: str


def make_settings(path: str, *, dtype: str = "auto", **given: Any) -> Settings:
  """Returns what is given, filled up from the config of a run.

  Of a run come its beta, its lengths, and its reference: `reference.path`, or
  the model that it started from. Of other models beta and reference must be
  given; lengths are then 512 and 256 tokens.

  Args:
    path: the policy: a run folder, Hugging Face folder or hub name.
    dtype: of matmuls; auto is bfloat16, float32 on CPU.
    **given: other fields of `Settings`; None is not given.

  Raises:
    ValueError: beta or reference is missing, or out of range.
  """
  defaults: dict[str, Any] = {
    "max_length": 512,
    "max_prompt_length": 256,
    "truncate_prompts": "if_needed",
  }
  run, _ = source.split_step(path)
  file = pathlib.Path(run) / "config.json"
  if source.is_run(run) and file.exists():
    config = run_folder.read_config(run, truncation.NEEDED)
    defaults = {
      "reference": _reference_of(config),
      "beta": config.get("loss.beta"),
    } | truncation.of_run(config)
  settings = defaults | {k: v for k, v in given.items() if v is not None}
  for name in ("reference", "beta"):
    if not settings.get(name):
      raise ValueError(
        f"{path!r} does not say its {name}: give --{name} (a run says its own,"
        " unless it started from random weights or its loss has none)"
      )
  if not 0 < settings["beta"] < np.inf:
    raise ValueError(f"beta={settings['beta']:g}: must be above 0")
  dtype = sharding.matmul_dtype(dtype)
  return Settings(source=path, dtype=dtype, **settings)


def _reference_of(config):
  """Returns the path of a run's reference; empty where it has none."""
  base = config.get("model.path")
  if config.get("reference.mode") == "adapter_off":
    return base
  return config.get("reference.path") or config.get("lora.path") or base


def evaluate(
  settings: Settings,
  data: Sequence[str],
  output: str,
  *,
  data_source: str,
  split: str,
) -> str:
  """Returns a table of accuracy and calibration, and writes what it is from.

  Log-probabilities are plain sums over response tokens: no modifier of the
  run's loss enters. One model is in memory at a time.

  Args:
    settings: models, beta and lengths.
    data: the files, or what else the data source reads.
    output: folder; see `preference_report.write`.
    data_source: a name of `examples.SOURCES`.
    split: of a hub dataset.

  Raises:
    ValueError: a model or a file cannot be read, or no pair is kept.
  """
  opened = source.open_model(settings.source)
  tokenizer = tokenizer_files.load_tokenizer(
    opened.tokenizer, opened.config.vocab_size
  )
  pairs, lists = [], []
  for path in data:
    rows = examples.read(data_source, path, split=split, inputs="pairs")
    for pair, tokens in _tokenize(rows, path, tokenizer, settings):
      pairs.append(pair)
      lists.append(tokens)
  tokens = dataset.TokenDataset.from_lists(*zip(*lists, strict=True))
  lengths = {"dtype": settings.dtype, "max_length": settings.max_length}
  policy = logps.model_logps(opened, tokens, **lengths)
  against = source.open_model(settings.reference)
  if against.config.vocab_size != opened.config.vocab_size:
    raise ValueError(
      f"reference {settings.reference!r}: its vocabulary has"
      f" {against.config.vocab_size} tokens and the policy's"
      f" {opened.config.vocab_size}"
    )
  reference = logps.model_logps(against, tokens, **lengths)
  pairs = [
    dataclasses.replace(
      pair,
      policy=tuple(map(float, ours)),
      reference=tuple(map(float, theirs)),
    )
    for pair, ours, theirs in zip(pairs, policy, reference, strict=True)
  ]
  return preference_report.write(output, pairs, settings.beta)


def _tokenize(rows, path, tokenizer, settings):
  """Yields the pair, without log-probabilities, and the tokens of each row.

  Row by row, as a row that is dropped leaves no trace in tokens alone. Raises
  ValueError where none is kept.
  """
  number, kept, dropped = 0, 0, collections.Counter()
  for number, row in enumerate(rows, 1):
    tokens, report = tokenize.tokenize(
      [row],
      tokenizer,
      inputs="pairs",
      max_length=settings.max_length,
      max_prompt_length=settings.max_prompt_length,
      truncate_prompts=settings.truncate_prompts,
      where=lambda _, number=number: examples.where(path, number),
    )
    dropped.update(report.dropped)
    kept += report.kept
    if report.kept:
      lists = [
        column.values.tolist() for column in (tokens.prompt, *tokens.responses)
      ]
      yield (
        preference_report.Pair(
          data=path,
          row=number,
          subset=row.get("subset", ""),
          policy=(0.0, 0.0),
          reference=(0.0, 0.0),
          lengths=(len(lists[1]), len(lists[2])),
          prompt=str(row["prompt"]),
        ),
        lists,
      )
  reasons = "".join(f"; {n} dropped: {why}" for why, n in dropped.items())
  if not kept:
    raise ValueError(f"{path!r}: none of {number} rows is kept{reasons}")
  print(f"data: {path}: {kept} of {number} rows kept{reasons}", flush=True)

"""A trained model at work: it samples, and says how likely responses are."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from dpo_jax import sharding
from dpo_jax.checkpoints import source, stop_tokens
from dpo_jax.data import (
  chat,
  dataset,
  examples,
  loader,
  placement,
  tokenize,
  tokenizer_files,
)
from dpo_jax.host import files
from dpo_jax.losses import objectives
from dpo_jax.models import transformer
from dpo_jax.sampling import decode
from dpo_jax.training import scoring

SHARD_ROWS = 8  # packed rows that a device scores at once
CHUNK_LENGTH = 128  # scored positions of a row that meet the vocabulary at once
BATCH_ROWS = 256  # responses that grow, or are scored, at once


class Policy:
  """A model on all devices, with its tokenizer."""

  def __init__(
    self, path: str, *, step: int | None = None, dtype: str = "auto"
  ):
    """Loads a model.

    Args:
      path: run folder, Hugging Face folder or hub name.
      step: which checkpoint of a run; the newest by default.
      dtype: of matmuls; auto is bfloat16, float32 on CPU.

    Raises:
      ValueError: there is no such model.
    """
    opened = source.open_model(path, step=step)
    self.tokenizer = tokenizer_files.load_tokenizer(
      opened.tokenizer, opened.config.vocab_size
    )
    self.stop_ids = stop_tokens.find(self.tokenizer, opened)
    self.config = dataclasses.replace(
      opened.config, dtype=sharding.matmul_dtype(dtype)
    )
    self.mesh = sharding.make_mesh()
    layouts = transformer.layouts(self.mesh, self.config)
    self.params = opened.load(self.config, layouts)

  @functools.cached_property
  def _sampler(self) -> decode.Sampler:
    with jax.set_mesh(self.mesh):
      return decode.Sampler(self.config, self.params)

  def sample(
    self,
    prompts: Sequence[Sequence[int]],
    settings: decode.Settings,
    **options: Any,
  ) -> list[list[decode.Sample]]:
    """Returns samples of each prompt; options as for `decode.Sampler`."""
    with jax.set_mesh(self.mesh):
      return self._sampler.sample(
        prompts, settings, stop_ids=self.stop_ids, **options
      )

  def responses(
    self, prompt: Sequence[int], samples: Sequence[decode.Sample]
  ) -> list[str]:
    """Returns the texts of samples of a prompt; see `tokenize.decode`.

    A stop token is not of them, special or not.
    """
    tokens = [sample.content for sample in samples]
    return tokenize.decode(self.tokenizer, [prompt] * len(samples), tokens)[1]

  def logps(
    self,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
  ) -> np.ndarray:
    """Returns f32[n], the log-probability of each response, nats.

    Args:
      prompts: token ids, one for each response.
      responses: token ids, scored as they are: EOS where they hold it.
    """
    tokens = dataset.TokenDataset.from_lists(
      prompts, responses, [[] for _ in prompts]
    )
    batches = loader.Loader(
      tokens,
      batch_size=BATCH_ROWS,
      microbatch_rows=SHARD_ROWS * sharding.num_row_shards(self.mesh),
      layout=placement.layout_for_window(
        tokens.lengths, "mirrored", self.config.window
      ),
    )
    with jax.set_mesh(self.mesh):
      return scoring.response_logps(
        self.config,
        self.params,
        objectives.make_objective("sft", {}),
        batches,
        self.mesh,
        chunk_length=CHUNK_LENGTH,
      )[:, 0]


def read_prompts(
  data_source: str, path: str, *, split: str, limit: int | None = None
) -> list[examples.Text]:
  """Returns the first distinct prompts of a file, in order.

  Raises:
    ValueError: it cannot be read, or no row has a prompt.
  """
  found = {}
  for row in examples.read(data_source, path, split=split, inputs="prompts"):
    if "dropped" in row:
      continue
    key = json.dumps(row["prompt"])
    found.setdefault(key, row["prompt"])
    if len(found) == limit:
      break
  if not found:
    raise ValueError(f"{path!r}: no row has a prompt")
  return list(found.values())


def _by_one_process(write: Callable[..., None]) -> Callable[..., None]:
  """Returns a writer of `output` that holds its lock while it writes."""

  @functools.wraps(write)
  def write_owned(path, prompts, settings, output, **options):
    is_first = jax.process_index() == 0
    owned = files.owned_file(output) if is_first else contextlib.nullcontext()
    with owned:
      write(path, prompts, settings, output, **options)

  return write_owned


@_by_one_process
def write_samples(
  path: str,
  prompts: Sequence[examples.Text],
  settings: decode.Settings,
  output: str,
  *,
  seed: int,
  samples_per_prompt: int,
  max_prompt_length: int,
  step: int | None = None,
  dtype: str = "auto",
  batch_rows: int = BATCH_ROWS,
  show: Callable[[str], None] = print,
) -> None:
  """Samples a model into a file of JSON lines, in the order of the prompts.

  A line has `index` (of the prompt), `sample`, `prompt`, `response`,
  `temperature`, `step` (where it is given), `num_tokens`, `ended` (whether a
  stop token was reached) and `logp` (of the response under the model itself,
  nats). What is done stands in `output`.part, from which the same call goes on,
  to the same samples.

  Args:
    path: run folder, Hugging Face folder or hub name.
    prompts: texts, or messages for the chat template.
    settings: how tokens are drawn.
    output: the file.
    seed: of the draws.
    samples_per_prompt: at least 1.
    max_prompt_length: tokens; longer prompts lose theirs from the left.
    step: which checkpoint of a run; the newest by default.
    dtype: of matmuls; auto is bfloat16, float32 on CPU.
    batch_rows: responses that grow at once.
    show: gets a line of what was truncated.

  Raises:
    ValueError: no such model, an argument out of range, or a file of other
      samples or that another process writes.
  """
  if max_prompt_length < 1:
    raise ValueError(f"max_prompt_length={max_prompt_length}: at least 1")
  target = pathlib.Path(output)
  part = target.with_name(target.name + ".part")
  header = {
    "source": os.path.realpath(path) if os.path.isdir(path) else path,
    "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    "settings": vars(settings),
    "seed": seed,
    "samples_per_prompt": samples_per_prompt,
    "max_prompt_length": max_prompt_length,
    "step": step,
    "dtype": dtype,
  }
  done = _read_part(part, header)
  policy = Policy(path, step=step, dtype=dtype)
  tokens = tokenize.encode_prompts(policy.tokenizer, list(prompts))
  num_long = sum(len(prompt) > max_prompt_length for prompt in tokens)
  show(f"{len(prompts):,} prompts, {num_long:,} of them truncated")
  shown = {"temperature": settings.temperature}
  if step is not None:
    shown["step"] = step
  left = [index for index in range(len(prompts)) if index not in done]
  is_first = jax.process_index() == 0
  target.parent.mkdir(parents=True, exist_ok=True)
  with (
    open(part if is_first else os.devnull, "a") as file,
    tqdm.tqdm(
      total=len(prompts), initial=len(done), unit="prompt", disable=not is_first
    ) as bar,
  ):
    if not file.tell():
      file.write(json.dumps(header) + "\n")

    def keep(batch):
      for place, samples in batch.items():
        index = left[place]
        done[index] = [
          {"index": index, "sample": number, "prompt": prompts[index]} | line
          for number, line in enumerate(
            _lines(policy, prompts[index], tokens[index], samples, shown)
          )
        ]
        file.write(json.dumps({"index": index, "lines": done[index]}) + "\n")
      file.flush()
      bar.update(len(batch))

    policy.sample(
      [tokens[index][-max_prompt_length:] for index in left],
      settings,
      seed=seed,
      samples_per_prompt=samples_per_prompt,
      batch_rows=batch_rows,
      indices=left,
      on_batch=keep,
    )
  if is_first:
    files.write_lines(
      target, (line for index in range(len(prompts)) for line in done[index])
    )
    part.unlink()


def _lines(policy, prompt, ids, samples, shown):
  """Returns what the file says of the samples of a prompt."""
  return [
    {"response": chat.content(policy.tokenizer, prompt, text)}
    | shown
    | {
      "num_tokens": len(sample.tokens),
      "ended": sample.ended,
      "logp": float(sample.logps.sum(dtype=np.float64)),
    }
    for sample, text in zip(samples, policy.responses(ids, samples))
  ]


def _read_part(part: pathlib.Path, header: dict) -> dict[int, list[dict]]:
  """Returns the lines of each prompt that is done; drops a half-written one."""
  if not part.exists():
    return {}
  text = part.read_text()
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    with part.open("r+") as file:
      file.truncate(len(whole.encode()))
  rows = [json.loads(line) for line in whole.splitlines()]
  if rows and rows[0] != header:
    changed = [key for key in header if rows[0].get(key) != header[key]]
    raise ValueError(
      f"{part} holds samples of another {', '.join(changed)}: delete it, or"
      " give another --output"
    )
  return {row["index"]: row["lines"] for row in rows[1:]}

"""A model folder as a judge: how likely it finds each answer to a question."""

from collections.abc import Callable

import numpy as np

from dpo_jax import sharding
from dpo_jax.checkpoints import source
from dpo_jax.data import dataset, tokenize, tokenizer_files
from dpo_jax.inference import logps as logps_lib

MAX_LENGTH = 2_048  # tokens of question and answer


def make_logps_fn(
  path: str, *, max_length: int | None = None
) -> Callable[[list[str], list[str]], np.ndarray]:
  """Returns (prompts, answers) -> f64[n], log-probability of each answer, nats.

  Where the tokenizer has a chat template the prompt is the user's message and
  the answer the assistant's; else an empty line stands between them. What ends
  the answer does not count. NaN where prompt and answer are too long: a
  question without its beginning is another one.

  Args:
    path: a run folder, a folder in Hugging Face format or a hub name.
    max_length: tokens of prompt and answer; by default `MAX_LENGTH`, or the
      positions that the model has if they are fewer.

  Raises:
    ValueError: there is no such model, or a length out of range.
  """
  opened = source.open_model(path)
  tokenizer = tokenizer_files.load_tokenizer(
    opened.tokenizer, opened.config.vocab_size
  )
  if max_length is None:
    is_bounded = opened.config.positions == "learned"
    bound = opened.config.max_positions if is_bounded else MAX_LENGTH
    max_length = min(MAX_LENGTH, bound)
  if max_length < 1:
    raise ValueError(f"max_length={max_length}: must be at least 1")

  def logps_fn(prompts: list[str], answers: list[str]) -> np.ndarray:
    heads, tails = _encode(tokenizer, prompts, answers)
    fits = [
      len(head) + len(tail) <= max_length
      for head, tail in zip(heads, tails, strict=True)
    ]
    logps = np.full(len(prompts), np.nan)
    if any(fits):
      logps[fits] = _scores(
        opened,
        [head for head, is_kept in zip(heads, fits, strict=True) if is_kept],
        [tail for tail, is_kept in zip(tails, fits, strict=True) if is_kept],
        max_length,
      )
    return logps

  return logps_fn


def _encode(tokenizer, prompts, answers):
  """Returns the token ids of prompts and of answers, without their ends."""
  if tokenizer.chat_template is None:
    prompts = [prompt + "\n\n" for prompt in prompts]
  else:
    prompts = [[{"role": "user", "content": x}] for x in prompts]
    answers = [[{"role": "assistant", "content": x}] for x in answers]
  heads = tokenize.encode_prompts(tokenizer, prompts)
  has_end = [False] * len(answers)
  return heads, tokenize.encode_responses(tokenizer, prompts, answers, has_end)


def _scores(opened, heads, tails, max_length) -> np.ndarray:
  """Returns f64[n]; two answers to one prompt share a span.

  A prompt's further answers have spans of their own.
  """
  spans, places, half_filled = [], [], {}
  for head, tail in zip(heads, tails, strict=True):
    span = half_filled.pop(tuple(head), None)
    if span is None:
      half_filled[tuple(head)] = len(spans)
      places.append((len(spans), 0))
      spans.append((head, tail, []))
    else:
      spans[span] = (head, spans[span][1], tail)
      places.append((span, 1))
  tokens = dataset.TokenDataset.from_lists(*zip(*spans, strict=True))
  logps = logps_lib.model_logps(
    opened,
    tokens,
    dtype=sharding.matmul_dtype("auto"),
    max_length=max_length,
  )
  return np.array([logps[place] for place in places], np.float64)

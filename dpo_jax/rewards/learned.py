"""Rewards of a trained reward model or classifier: texts to scores."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax import sharding
from dpo_jax.checkpoints import run_folder, source
from dpo_jax.data import (
  dataset,
  loader,
  placement,
  tokenize,
  tokenizer_files,
  truncation,
)
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.training import scorer as scorer_lib
from dpo_jax.training import scoring

OUTPUTS = ("logit", "probability", "auto")
BATCH_SIZE = 64  # responses that are scored before the host looks at them
SHARD_ROWS = 8  # rows that a device computes at once
# Of a model that no run says them of.
MAX_LENGTH, MAX_PROMPT_LENGTH = 512, 256

# Each loss of a head reads the same scores of it.
_LOSSES = {
  "reward": ("reward_model", {"label_smoothing": 0.0, "center_weight": 0.0}),
  "classifier": ("classifier", {"label_smoothing": 0.0}),
}


def load(
  path: str,
  *,
  output: str = "logit",
  step: int | None = None,
  max_length: int | None = None,
  max_prompt_length: int | None = None,
  with_eos: bool = True,
  dtype: str = "auto",
) -> "Learned":
  """Returns `reward_fn(prompts, responses, ended) -> f32[n]` of a model.

  Args:
    path: a run folder of `reward_model` or `classifier`; or a folder or hub
      name of a `...ForSequenceClassification` of a family that we know: of one
      label its score, of two score_1 - score_0.
    output: `logit`, the score as it is: of a classifier the log-odds of label
      1. Or `probability` of label 1, in (0, 1), of a classifier only. `auto` is
      the probability of a classifier and the score of a reward model.
    step: which checkpoint of a run; by default the best that was evaluated.
    max_length: tokens of prompt and response, above 1; by default the run's
      own, else 512.
    max_prompt_length: tokens; by default the run's own, else 256.
    with_eos: whether the score of a response that ended is read at an EOS after
      it, as in our runs; or at its own last token, for models that never saw
      an EOS. What was cut is read at its last token either way.
    dtype: of matmuls; auto is bfloat16, float32 on CPU.

  Raises:
    ValueError: no such model, one without a scalar head or of an architecture
      that is not known, or an option out of range.
  """
  if output not in OUTPUTS:
    raise ValueError(f"unknown output {output!r}; known: {', '.join(OUTPUTS)}")
  opened = source.open_model(path, step=step)
  if opened.config.head == "vocabulary":
    raise ValueError(
      f"{path!r} is a language model; allowed: a run of reward_model or"
      " classifier, or a ForSequenceClassification folder"
    )
  if output == "auto":
    output = "probability" if opened.config.head == "classifier" else "logit"
  if output == "probability" and opened.config.head != "classifier":
    raise ValueError(
      f"output='probability': {path!r} is a reward model, of whose scores only"
      " differences count; allowed: logit, or a classifier"
    )
  lengths = _run_lengths(path)
  max_length = max_length or lengths["max_length"]
  max_prompt_length = max_prompt_length or lengths["max_prompt_length"]
  if max_length < 2 or max_prompt_length < 1:
    raise ValueError(
      f"max_length={max_length}, max_prompt_length={max_prompt_length}: must be"
      " at least 2 and 1"
    )
  config = dataclasses.replace(
    opened.config, dtype=sharding.matmul_dtype(dtype)
  )
  is_bounded = config.positions == "learned"
  if is_bounded and max_length > config.max_positions:
    raise ValueError(
      f"max_length={max_length}: the model has {config.max_positions} positions"
    )
  return Learned(
    opened,
    config,
    output=output,
    limits=truncation.Limits(
      max_length,
      min(max_prompt_length, max_length - 1),
      lengths["truncate_prompts"],
    ),
    with_eos=with_eos,
  )


def _run_lengths(path: str) -> dict[str, Any]:
  """Returns the fields of `truncation.Limits` of a run's data, or defaults."""
  if not source.is_run(path):
    limits = truncation.Limits(MAX_LENGTH, MAX_PROMPT_LENGTH)
    return dataclasses.asdict(limits)
  return truncation.of_run(run_folder.read_config(path, truncation.NEEDED))


class Learned:
  """A reward function; holds the model's parameters on all devices."""

  def __init__(
    self,
    opened: source.ModelSource,
    config: model_config.ModelConfig,
    *,
    output: str,
    limits: truncation.Limits,
    with_eos: bool,
  ):
    """Reads the weights; see `load`, which checks the arguments."""
    self.config = config
    self._output = output
    self._limits = limits
    self._with_eos = with_eos
    self._tokenizer = tokenizer_files.load_tokenizer(
      opened.tokenizer, opened.config.vocab_size
    )
    self._mesh = sharding.make_mesh()
    layouts = transformer.layouts(self._mesh, config)
    self._params = opened.load(config, layouts)
    scorer = scorer_lib.Scorer(
      policy=config,
      reference=None,
      objective=objectives.make_objective(*_LOSSES[config.head]),
      chunk_length=1,
    )
    self._score = scoring.make_score_fn(scorer, self._mesh)

  def __call__(
    self,
    prompts: Sequence[str],
    responses: Sequence[str],
    ended: Sequence[bool] | None = None,
  ) -> np.ndarray:
    """Returns f32[n], the score of each response behind its prompt.

    Where `ended` says that a response was cut, no EOS follows it, unless it has
    no token else. By default all ended. Tokens are those of training, cut to
    its lengths. What else is asked for in the same call changes a score by
    rounding at most.

    Raises:
      ValueError: lists of different lengths, or a response without a token.
    """
    ended = [True] * len(responses) if ended is None else list(ended)
    if len(prompts) != len(responses):
      raise ValueError(
        f"{len(prompts)} prompts and {len(responses)} responses: must be as"
        " many"
      )
    if len(ended) != len(responses):
      raise ValueError(
        f"of {len(responses)} responses {len(ended)} say whether they ended:"
        " must be all"
      )
    if not len(prompts):
      return np.zeros(0, np.float32)
    batches = self._batches(*self._tokens(prompts, responses, ended))
    with jax.set_mesh(self._mesh):
      scores = scoring.collect(self._score, self._params, batches, self._mesh)
    scores = scores[:, 0]
    if self._output == "probability":
      scores = np.asarray(jax.nn.sigmoid(scores))
    return scores

  def _tokens(self, prompts, responses, ended):
    """Returns the token lists, cut to length."""
    prompts, responses = list(prompts), list(responses)
    encoded = tokenize.encode_prompts(self._tokenizer, prompts)
    has_eos = [self._with_eos and x for x in ended]
    answers = tokenize.encode_responses(
      self._tokenizer, prompts, responses, has_eos
    )
    if self._with_eos:
      answers = [ids or [self._tokenizer.eos_token_id] for ids in answers]
    if not all(answers):
      raise ValueError(
        f"response {answers.index([])} is empty: must hold a token or more, as"
        " it is read without an EOS"
      )
    rows = [
      self._limits.cut(prompt, [ids])
      for prompt, ids in zip(encoded, answers, strict=True)
    ]
    if None in rows:
      place = rows.index(None)
      raise ValueError(
        f"prompt {place} has {len(encoded[place])} tokens: must leave room for"
        f" a response in max_length={self._limits.max_length}, as the model's"
        " run cut no prompts"
      )
    return [prompt for prompt, _ in rows], [ids for _, (ids,) in rows]

  def _batches(self, prompts, responses) -> loader.Loader:
    tokens = dataset.TokenDataset.from_lists(
      prompts, responses, [[] for _ in prompts]
    )
    layout = placement.layout_for_window(
      tokens.lengths, "mirrored", self.config.window
    )
    return loader.Loader(
      tokens,
      batch_size=BATCH_SIZE,
      # Always the same, so that few shapes are compiled.
      row_length=128 * math.ceil(self._limits.max_length / 128),
      microbatch_rows=SHARD_ROWS * sharding.num_row_shards(self._mesh),
      layout=layout,
      scored="ends",
    )

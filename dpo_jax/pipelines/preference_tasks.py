"""What the experiments of `preferences` are, and how large each may be."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much of everything is done.

  Attributes:
    train_rows: rows that are trained on or held out; None: all.
    test_prompts: None: all.
    prompt_characters: longer prompts are left out.
    response_characters: rows with a longer response are.
    max_new_tokens: at which length a sample is cut.
    best_of: samples of a prompt, of which the best is kept.
    preset: the model from random weights; None: one must be given.
    vocab_size: tokens of its tokenizer.
    settings: keys of the configs by run (`all`, `sft`, `reward_model`, a
      method).
    scratch: more of them, where no model is given.
  """

  train_rows: int | None
  test_prompts: int | None
  max_new_tokens: int
  best_of: int
  prompt_characters: float = math.inf
  response_characters: float = math.inf
  preset: str | None = None
  vocab_size: int = 4096
  settings: Settings = dataclasses.field(default_factory=dict)
  scratch: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
  """An experiment.

  Attributes:
    title: of its report.
    source: a name of `examples.SOURCES`.
    train, test: files in the data folder.
    judged: a file of pairs that the reward model is checked on.
    has_pairs: whether the data are pairs; else its responses are paired with
      samples of the sft model.
    baseline: what responses are compared with, in words.
    pairs: what is trained on, in words.
    judged_by: who chose in `judged`, in words.
    methods: losses whose runs start from the sft model, `dpo` among them.
    paper: what the paper found, in words.
    scales: by name.
    stop: what ends a sampled response besides EOS; empty: nothing.
    is_test: whether a test row's prompt is sampled.
  """

  title: str
  source: str
  train: str
  test: str
  judged: str
  has_pairs: bool
  baseline: str
  pairs: str
  judged_by: str
  methods: tuple[str, ...]
  paper: str
  scales: Mapping[str, Scale]
  stop: str = ""
  is_test: Callable[[dict], bool] = lambda row: True

  @property
  def files(self) -> list[str]:
    """Returns the names of its files."""
    return list(dict.fromkeys([self.train, self.test, self.judged]))


# Minutes are enough for these.
_SMALL = {
  "all": {"microbatch_rows": 8, "log.every": 10},
  "sft": {"epochs": 4, "batch_size": 16},
  "reward_model": {
    "epochs": 2,
    "batch_size": 32,
    "eval.every": 20,
    "checkpoint.every": 20,
  },
  "preferred_ft": {"batch_size": 32},
  "unlikelihood": {"batch_size": 32},
  "dpo": {
    "batch_size": 32,
    "reference.mode": "cached",
    "eval.every": 20,
    "checkpoint.every": 10,
    "checkpoint.keep": 100,
  },
  "ppo": {
    "steps": 20,
    "batch_size": 64,
    "ppo.epochs": 2,
    "ppo.minibatches": 2,
    "ppo.horizon": 500.0,
  },
}
_SCRATCH = {
  "all": {
    "optimizer.name": "adamw",
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 10,
    "optimizer.clip": 1.0,
  },
  "sft": {
    "loss.prompt_nll": True,  # prompts are most of the text
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 50,
  },
  "reward_model": {"optimizer.learning_rate": 5e-4},
  "preferred_ft": {"optimizer.learning_rate": 3e-4},
  "unlikelihood": {"optimizer.learning_rate": 3e-4},
  "dpo": {"optimizer.learning_rate": 3e-4},
  "ppo": {"optimizer.learning_rate": 3e-4},
}


def _small(max_length: int, max_prompt_length: int) -> dict:
  lengths = {
    "data.max_length": max_length,
    "data.max_prompt_length": max_prompt_length,
  }
  return _SMALL | {"all": _SMALL["all"] | lengths}


def _large(every: int) -> dict:
  """Returns settings that keep a checkpoint of DPO every so many updates."""
  return {"dpo": {"checkpoint.every": every, "checkpoint.keep": 100}}


HUMAN = "\n\nHuman:"
HH = Task(
  title="Single-turn dialogue on Anthropic HH",
  source="hh",
  train="train.jsonl.xz",
  test="test.jsonl.xz",
  judged="test.jsonl.xz",
  has_pairs=True,
  baseline="the data's chosen responses",
  pairs="the data's own pairs, of which people chose",
  judged_by="people",
  # Its sft model has learnt the chosen responses: it is Preferred-FT.
  methods=("unlikelihood", "dpo", "ppo"),
  paper=(
    "DPO alone, of the methods that take one sample, wins more than 50%"
    " against the chosen responses, about as often as best of 128 (figure 3;"
    " Pythia-2.8B, judged by GPT-4)"
  ),
  scales={
    "cpu": Scale(
      train_rows=2000,
      test_prompts=128,
      max_new_tokens=96,
      best_of=16,
      prompt_characters=800,
      response_characters=500,
      preset="mini",
      settings=_small(384, 256),
      scratch=_SCRATCH,
    ),
    "gpu": Scale(
      None, 256, max_new_tokens=256, best_of=64, settings=_large(512)
    ),
    "paper": Scale(
      None, None, max_new_tokens=256, best_of=128, settings=_large(2000)
    ),
  },
  stop=HUMAN,
  is_test=lambda row: row["prompt"].count(HUMAN) == 1,
)

TLDR = Task(
  title="Summaries of Reddit posts",
  source="tldr",
  train="posts.jsonl.xz",
  test="posts.jsonl.xz",
  judged="ppo_vs_human_judged.csv.xz",
  has_pairs=False,
  baseline="the authors' summaries",
  pairs=(
    "the author's summary (chosen) against a sample of the sft model"
    " (rejected): no person compared them, unlike the paper's"
  ),
  judged_by="a language model",
  methods=("preferred_ft", "unlikelihood", "dpo", "ppo"),
  paper=(
    "DPO wins about 61% against the reference summaries at temperature 0, PPO"
    " 57% at its best, also 0 (figure 2 right; GPT-J, judged by GPT-4)"
  ),
  scales={
    "cpu": Scale(
      train_rows=1500,
      test_prompts=128,
      max_new_tokens=64,
      best_of=16,
      prompt_characters=700,
      response_characters=200,
      preset="mini",
      settings=_small(384, 288),
      scratch=_SCRATCH,
    ),
    "gpu": Scale(
      20_000, 256, max_new_tokens=64, best_of=64, settings=_large(100)
    ),
    "paper": Scale(
      None, None, max_new_tokens=64, best_of=128, settings=_large(500)
    ),
  },
)

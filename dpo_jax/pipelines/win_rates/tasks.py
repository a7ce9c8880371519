"""What the experiments of `preferences` are made of."""

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much of everything is done.

  Attributes:
    max_new_tokens: at which length a sample is cut.
    best_of: samples of a prompt, of which the best is kept.
    train_rows: rows that are trained on or held out; None: all.
    test_prompts: None: all.
    prompt_characters: longer prompts are left out.
    response_characters: rows with a longer response are.
    vocab_size: of the tokenizer, where no model is given.
  """

  max_new_tokens: int
  best_of: int
  train_rows: int | None = None
  test_prompts: int | None = None
  prompt_characters: float = math.inf
  response_characters: float = math.inf
  vocab_size: int = 4096


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
    num_shots: examples before a prompt that the given model is shown as it is.
    paper: what the paper found, in words.
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
  num_shots: int
  paper: str
  stop: str = ""
  is_test: Callable[[dict], bool] = lambda row: True

  @property
  def files(self) -> list[str]:
    """Returns the names of its files."""
    return list(dict.fromkeys([self.train, self.test, self.judged]))


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
  num_shots=2,
  paper=(
    "DPO alone, of the methods that take one sample, wins more than 50%"
    " against the chosen responses, about as often as best of 128 (figure 3;"
    " Pythia-2.8B, judged by GPT-4)"
  ),
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
  num_shots=0,
  paper=(
    "DPO wins about 61% against the reference summaries at temperature 0, PPO"
    " 57% at its best, also 0 (figure 2 right; GPT-J, judged by GPT-4)"
  ),
)

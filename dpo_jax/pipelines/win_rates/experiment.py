"""Dialogue and summaries, from text to win rates (Rafailov et al. 2023).

Sections 6.2 and 6.3 of arXiv 2305.18290: a language model, pairs, a reward
model and the methods of them, samples at several temperatures, and how often a
judge prefers them to the data's own responses. Differs: the judge is the reward
model, which also chooses the best of N and is PPO's reward; nothing but a model
is needed. A stage whose output is there is skipped.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.checkpoints import manager
from dpo_jax.data import examples
from dpo_jax.evaluation import intervals, win_rate_report
from dpo_jax.host import files
from dpo_jax.inference import model as model_lib
from dpo_jax.judges import judge
from dpo_jax.pipelines import stages
from dpo_jax.pipelines.win_rates import data as win_rate_data
from dpo_jax.pipelines.win_rates import report as preferences_report
from dpo_jax.pipelines.win_rates.tasks import Scale, Task
from dpo_jax.rewards import learned
from dpo_jax.sampling import best_of_n, decode

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
# The run that is also judged over its training, as in figure 3 right.
CURVE, CURVE_TEMPERATURES = "dpo", (0.7, 1.0)
SHOT_CHARACTERS = 600  # of an example at most


def run(
  workdir: str,
  data: str,
  make_config: Callable[[str], ConfigDict],
  task: Task,
  scale: Scale,
  *,
  model: str = "",
) -> bool:
  """Returns whether the experiment came to its end.

  Args:
    workdir: gets `data/`, a folder for each run (`sft`, `reward_model` and
      the methods), `samples/`, `responses/`, `wins/`, `curve/` and `report.md`.
    data: folder of the task's files.
    make_config: returns the config of a stage, given the name of its loss.
    task: what is done on which data.
    scale: how much of it.
    model: what `sft` starts from; by default what its config says, and where
      that says none a model of random weights, with a tokenizer of its text.

  Raises:
    ValueError: a file that is not there or cannot be read.
  """
  for name in task.files:
    if not os.path.exists(os.path.join(data, name)):
      raise ValueError(
        f"no file {name!r} in the data folder {data!r}; allowed: a folder with"
        f" {', '.join(task.files)}"
      )
  folder = pathlib.Path(workdir)
  model = model or make_config("sft").model.path
  return _Experiment(
    folder, pathlib.Path(data), make_config, task, scale, model
  ).run()


@dataclasses.dataclass(frozen=True)
class _Experiment:
  folder: pathlib.Path
  data: pathlib.Path
  make_config: Callable[[str], ConfigDict]
  task: Task
  scale: Scale
  model: str

  @functools.cached_property
  def reward_fn(self) -> learned.Learned:
    return learned.load(str(self.folder / "reward_model"))

  @property
  def policies(self) -> list[str]:
    """Returns the runs that are sampled, and the given model as it is."""
    prompted = [f"{self.task.num_shots}_shot"] if self.model else []
    return ["sft", *self.task.methods, *prompted]

  def run(self) -> bool:
    """Runs the stages that are not done; returns whether all are."""
    self._check()
    return stages.run_all(self.folder, self.all_stages())

  def all_stages(self) -> list[stages.Stage]:
    """Returns all of the experiment, in order."""
    write = lambda title, output, function: stages.writing(
      title, self.folder / output, function
    )
    train = lambda name: stages.training(
      name, self._config(name), self.folder / name
    )
    first = [write("data", "data.json", self._write_data)]
    if not self.model:
      first.append(write("tokenizer", "tokenizer", self._write_tokenizer))
    first.append(train("sft"))
    if not self.task.has_pairs:
      first.append(write("pairs", "pairs/train.jsonl", self._write_pairs))
    samples = [
      write(
        f"samples of {name} at temperature {temperature:g}",
        f"samples/{name}_{temperature:g}.jsonl",
        functools.partial(self._sample, name, temperature),
      )
      for name in self.policies
      for temperature in TEMPERATURES
    ]
    return [
      *first,
      train("reward_model"),
      write("judge", "judge.json", self._write_agreement),
      *map(train, self.task.methods),
      *samples,
      write("responses", "responses/baseline.jsonl", self._write_responses),
      write("win rates", "wins/win_rate.png", self._write_win_rates),
      write(f"{CURVE} over training", "curve/win_rate.png", self._write_curve),
      stages.Stage("report", self._report),
    ]

  def _check(self) -> None:
    """Checks that the folder is new, or of this experiment."""
    path = self.folder / "experiment.json"
    settings = {"task": self.task.title, "data": str(self.data)}
    settings |= {"model": self.model, "methods": list(self.task.methods)}
    settings |= {key: str(x) for key, x in vars(self.scale).items()}
    if not path.exists():
      files.write_json(path, settings)
    before = json.loads(path.read_text())
    for key, value in settings.items():
      if before.get(key) != value:
        raise ValueError(
          f"{self.folder} holds an experiment of {key} {before.get(key)!r}, not"
          f" {value!r}; give another --workdir"
        )

  def _config(self, name: str) -> ConfigDict:
    """Returns the config of a run, on the experiment's own files."""
    config = self.make_config(name)
    is_sft, is_ppo = name == "sft", name == "ppo"
    kind = "data" if is_sft or is_ppo or self.task.has_pairs else "pairs"
    config.data.source = "jsonl"
    config.data.path = str(self.folder / kind / "train.jsonl")
    config.data.eval_path = str(self.folder / kind / "held_out.jsonl")
    config.data.cache_dir = str(self.folder / "cache")
    if kind == "pairs":  # half of their responses are sampled so
      config.data.truncate_prompts = "always"
    if not is_sft:
      config.model.path = str(self.folder / "sft")
    elif self.model:
      config.model.path, config.model.preset = self.model, ""
    else:
      config.model.tokenizer = str(self.folder / "tokenizer")
    if is_ppo:  # It takes the prompts, and its own samples.
      config.data.eval_path = ""
      config.ppo.reward = f"run:{self.folder / 'reward_model'}"
    return config

  def _write_data(self, path: pathlib.Path) -> None:
    win_rate_data.write(path, self.data, self.task, self.scale)

  def _write_tokenizer(self, path: pathlib.Path) -> None:
    data = str(self.folder / "data/train.jsonl")
    stages.write_tokenizer(path, "jsonl", data, self.scale.vocab_size)

  def _write_pairs(self, path: pathlib.Path) -> None:
    """Writes the data's responses against samples of the sft model."""
    for part in ("held_out", "train"):
      rows = _read_rows(self.folder / f"data/{part}.jsonl")
      output = self.folder / f"samples/pairs_{part}.jsonl"
      if not output.exists():
        prompts = [x["prompt"] for x in rows]
        self._write_samples("sft", prompts, 1.0, output, seed=1)
      pairs = (
        {
          "prompt": x["prompt"],
          "chosen": x["response"],
          "rejected": y["response"],
          "rejected_ended": y["ended"],
        }
        for x, y in zip(
          rows, map(self._trimmed, _read_rows(output)), strict=True
        )
      )
      files.write_lines(path.with_name(f"{part}.jsonl"), pairs)

  def _sample(
    self, name: str, temperature: float, output: pathlib.Path
  ) -> None:
    """Samples a run on the test prompts: N times where the best is chosen."""
    is_many = name == "sft" and temperature > 0
    before = self._shots() if name.endswith("_shot") else ""
    test = _read_rows(self.folder / "data/test.jsonl")
    self._write_samples(
      name,
      [before + x["prompt"] for x in test],
      temperature,
      output,
      seed=2,
      count=self.scale.best_of if is_many else 1,
    )

  def _shots(self) -> str:
    """Returns the first short examples, as prompts follow them."""
    count = self.task.num_shots
    rows = _read_rows(self.folder / "data/train.jsonl")
    texts = (
      x["prompt"] + win_rate_data.response(x)
      for x in rows
      if self.task.is_test(x)
    )
    short = (x for x in texts if len(x) <= SHOT_CHARACTERS)
    found = list(itertools.islice(short, count))
    if len(found) < count:
      raise ValueError(
        f"{self.folder}: only {len(found)} examples of at most"
        f" {SHOT_CHARACTERS} characters for {count} shots"
      )
    return "".join(found)

  def _write_samples(
    self, name, prompts, temperature, output, *, seed, count=1, step=None
  ) -> None:
    length = self._config("sft").data.max_prompt_length
    source = str(self.folder / name)
    if name.endswith("_shot"):
      source, length = self.model, length * (1 + self.task.num_shots)
    model_lib.write_samples(
      source,
      prompts,
      decode.Settings(self.scale.max_new_tokens, temperature=temperature),
      str(output),
      seed=seed,
      samples_per_prompt=count,
      max_prompt_length=length,
      step=step,
    )

  def _write_responses(self, path: pathlib.Path) -> None:
    """Writes what is judged, a file a method, and last the baseline's."""
    rows, test = [], _read_rows(self.folder / "data/test.jsonl")
    for temperature in TEMPERATURES:
      for name in self.policies:
        samples = self.folder / f"samples/{name}_{temperature:g}.jsonl"
        found = [
          self._trimmed(x) | {"prompt": test[x["index"]]["prompt"]}
          for x in _read_rows(samples)
        ]
        rows += [x | {"method": name} for x in found if x["sample"] == 0]
        if name == "sft" and temperature > 0:
          rows += self._best(found)
    for method in dict.fromkeys(x["method"] for x in rows):
      mine = (x for x in rows if x["method"] == method)
      files.write_lines(path.with_name(f"{method}.jsonl"), mine)
    files.write_lines(path, test)

  def _trimmed(self, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sample whose response is as the data writes responses.

    It ended where the task says that a response ends, too.
    """
    text, ended = sample["response"], sample["ended"]
    if self.task.stop:
      text, stop, _ = text.partition(self.task.stop)
      ended = ended or bool(stop)
    return {**sample, "response": " " + text.strip(), "ended": ended}

  def _best(self, samples: Sequence[dict]) -> Iterator[dict]:
    """Yields the sample of each prompt that the reward model prefers."""
    count = self.scale.best_of
    prompts = [x["prompt"] for x in samples]
    responses = [x["response"] for x in samples]
    ended = [x["ended"] for x in samples]
    scores = self.reward_fn(prompts, responses, ended=ended)
    kept = best_of_n.choose(np.asarray(scores, np.float64).reshape(-1, count))
    for prompt, place in enumerate(kept):
      row = samples[prompt * count + place]
      yield row | {"method": f"best_of_{count}"}

  def _write_agreement(self, path: pathlib.Path) -> None:
    """Writes how often the reward model prefers what was chosen."""
    name, split = self.task.judged, "test"
    read = examples.read(
      self.task.source, str(self.data / name), split=split, inputs="pairs"
    )
    rows = [x for x in read if "dropped" not in x]
    score = lambda column: self.reward_fn(
      [x["prompt"] for x in rows],
      [x[column] for x in rows],
      ended=[x.get(f"{column}_ended", True) for x in rows],
    )
    gaps = score("chosen") - score("rejected")
    points = (1 + np.sign(gaps)) / 2
    record = {"file": name, "subsets": {}}
    kinds = np.array([x.get("subset", "all") for x in rows])
    for kind in ("all", *sorted(set(kinds) - {"all"})):
      here = np.flatnonzero((kinds == kind) | (kind == "all"))
      prompts = [rows[n]["prompt"] for n in here]
      found = intervals.share(points[here].tolist(), prompts, by_group=False)
      record["subsets"][kind] = {"pairs": len(here)} | found
    files.write_json(path, record)

  def _write_win_rates(self, path: pathlib.Path) -> None:
    sft, *others = self.policies
    methods = (sft, f"best_of_{self.scale.best_of}", *others)
    files = [self.folder / f"responses/{method}.jsonl" for method in methods]
    self._judge(files, path.parent)

  def _write_curve(self, path: pathlib.Path) -> None:
    """Judges samples of the checkpoints of a run."""
    prompts = [x["prompt"] for x in _read_rows(self.folder / "data/test.jsonl")]
    rows = []
    for step in (0, *manager.saved_steps(self.folder / CURVE)):
      for temperature in CURVE_TEMPERATURES:
        name = CURVE if step else "sft"
        output = path.parent / f"samples/{step}_{temperature:g}.jsonl"
        if not output.exists():
          self._write_samples(
            *(name, prompts, temperature, output),
            seed=2,
            step=step or None,
          )
        rows += [
          self._trimmed(x) | {"step": step, "method": CURVE}
          for x in _read_rows(output)
        ]
    responses = path.parent / "responses.jsonl"
    files.write_lines(responses, rows)
    self._judge([responses], path.parent)

  def _judge(self, files: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    win_rate_report.evaluate(
      judge.score_judge("reward model", self.reward_fn),
      list(map(str, files)),
      str(self.folder / "responses/baseline.jsonl"),
      str(output),
      order="both",
      seed=0,
    )

  def _report(self) -> bool:
    start = f"random weights ({self._config('sft').model.preset})"
    if self.model:
      start = f"{self.model}, which is {self.policies[-1]} as it is"
    text = preferences_report.make(
      self.folder, self.task, self.scale.max_new_tokens, start
    )
    files.write_text(self.folder / "report.md", text)
    print(text, flush=True)
    return True


def _read_rows(path: pathlib.Path) -> list[dict]:
  with path.open() as file:
    return [json.loads(line) for line in file]

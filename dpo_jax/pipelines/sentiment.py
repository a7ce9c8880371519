"""Controlled sentiment on IMDb: every method, and the best there could be.

Rafailov et al. 2023 (arXiv 2305.18290), section 6.1 and figure 2 left. The
true reward is a classifier's probability that a review is positive. A language
model of reviews is sampled, the samples are paired and labelled by the true
reward, and each method learns from the pairs; PPO from a reward model of
them, PPO-GT from the true reward itself. Every checkpoint of every run is a
dot of reward against KL to the language model.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.checkpoints import manager
from dpo_jax.evaluation import frontier, matched_kl
from dpo_jax.host import files
from dpo_jax.inference import model as model_lib
from dpo_jax.inference.model import Policy
from dpo_jax.pipelines import measure, stages
from dpo_jax.rewards import learned
from dpo_jax.sampling import best_of_n, decode

HELD_OUT_SHARE = 0.05  # of the prefixes, whose pairs choose the reward model
BEST_OF = (2, 4, 8, 16, 32, 64, 128)
BETAS = np.geomspace(0.005, 100, 300)
KLS = (1.0, 2.0, 5.0, 10.0)  # nats at which methods are compared
FILES = ("train", "test", "unsup")


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of the experiment.

  Attributes:
    num_prefixes: that samples are drawn for, to be paired.
    num_test_prefixes: that policies are measured on.
    test_samples: of each test prefix, of each policy.
    frontier_samples: of each test prefix, of the reference: for Best-of-N and
      for the best possible frontier.
    max_new_tokens: at which a sample is cut.
    grid: label, loss and changed keys of each run.
    samples_per_prefix: of which all pairs are made.
    vocab_size: of the tokenizer, where the model has none.
    steps: of each run, where not the config's; for tests.
  """

  num_prefixes: int
  num_test_prefixes: int
  test_samples: int
  frontier_samples: int
  max_new_tokens: int
  grid: Sequence[tuple[str, str, Mapping[str, Any]]]
  samples_per_prefix: int = 4
  vocab_size: int = 0


def run(
  workdir: str,
  data: str,
  make_config: Callable[[str], ConfigDict],
  plan: Plan,
  *,
  model: str = "",
) -> bool:
  """Returns whether the experiment came to its end.

  Args:
    workdir: gets a folder for each run, the samples and pairs, and at the end
      `frontier.png`, `frontier.json` and `report.md`.
    data: folder of the reviews: train, test and unsup, as `.jsonl` or `.xz`.
    make_config: returns the config of a stage, given the name of its loss.
    plan: the sizes.
    model: what `sft` starts from; by default what its config says.

  Raises:
    ValueError: a file that is not there, or a config that is not right.
  """
  files = {name: stages.find_file(data, name) for name in FILES}
  folder = pathlib.Path(workdir)
  experiment = _Experiment(folder, files, make_config, plan, model)
  return stages.run_all(folder, experiment.all_stages())


class _Experiment:
  """What the stages read and write."""

  def __init__(self, folder, files, make_config, plan, model):
    self._folder, self._files, self._plan = folder, files, plan
    self._make_config = make_config
    self._model = model or make_config("sft").model.path
    self._tokenizer = self._model or str(folder / "tokenizer")
    self._runs = {
      name: folder / name
      for name in ("pretraining", "classifier", "sft", "reward_model")
    }
    self._samples = folder / "samples.jsonl"
    self._pairs = folder / "pairs.jsonl"
    self._held_out = folder / "held_out_pairs.jsonl"
    self._points = folder / "points.jsonl"
    self._frontier_samples = folder / "frontier_samples.npz"

  def all_stages(self) -> list[stages.Stage]:
    """Returns all of the experiment, in order."""
    tokenizer = pathlib.Path(self._tokenizer)
    first = stages.writing("tokenizer", tokenizer, self._write_tokenizer)
    train = lambda name, title: stages.training(
      title, self._config(name), self._runs[name]
    )
    return [
      *([] if self._model else [first]),
      train("pretraining", "pretraining of the classifier's body"),
      train("classifier", "classifier: the true reward"),
      train("sft", "sft: a language model of reviews"),
      stages.writing("samples", self._samples, self._write_samples),
      stages.writing(
        "pairs, labelled by the true reward", self._pairs, self._write_pairs
      ),
      train("reward_model", "reward model of the pairs"),
      stages.writing(
        "samples for Best-of-N and the limit",
        self._frontier_samples,
        self._write_frontier_samples,
      ),
      *map(self._method, self._plan.grid),
      stages.Stage("figure and report", self._report),
    ]

  def _config(self, name: str) -> ConfigDict:
    """Returns the config of what comes before the methods."""
    config = self._make_config(name)
    config.data.cache_dir = str(self._folder / "cache")
    if name == "pretraining":
      config.model.tokenizer = self._tokenizer
      config.data.path = self._files["unsup"]
    elif name == "classifier":
      config.model.path = str(self._runs["pretraining"])
      config.data.path = self._files["train"]
      config.data.eval_path = self._files["test"]
    elif name == "sft":
      config.data.path = self._files["unsup"]
      if self._model:
        config.model.path, config.model.preset = self._model, ""
      else:
        config.model.tokenizer = self._tokenizer
    else:
      self._set_pairs(config)
      config.data.eval_path = str(self._held_out)
    return config

  def _method(self, point) -> stages.Stage:
    """Returns the stage of a run of the grid and its dots."""
    label, loss, changes = point
    config, path = self._make_config(loss), self._path(point)
    config.data.cache_dir = str(self._folder / "cache")
    if loss == "ppo":
      config.data.path = self._files["train"]
      reward = "classifier" if label == "PPO-GT" else "reward_model"
      config.ppo.reward = f"run:{self._runs[reward]}"
      config.model.path, config.model.preset = str(self._runs["sft"]), ""
    else:
      self._set_pairs(config)
    config.update_from_flattened_dict(dict(changes))
    name = f"{label}, {_changes(changes)}"
    run = stages.training(name, config, path)
    return stages.Stage(
      name,
      lambda: run.run() and self._measure(label, path),
      lambda: run.is_done() and not self._unmeasured(path),
    )

  def _set_pairs(self, config):
    config.model.path, config.model.preset = str(self._runs["sft"]), ""
    config.data.source, config.data.path = "jsonl", str(self._pairs)

  def _write_tokenizer(self, path):
    text, vocab_size = self._files["unsup"], self._plan.vocab_size
    stages.write_tokenizer(path, "imdb", text, vocab_size)

  def _write_samples(self, path):
    model_lib.write_samples(
      str(self._runs["sft"]),
      self._prefixes("train", self._plan.num_prefixes),
      decode.Settings(self._plan.max_new_tokens),
      str(path),
      seed=1,
      samples_per_prompt=self._plan.samples_per_prefix,
      max_prompt_length=self._make_config("sft").data.max_prompt_length,
      batch_rows=measure.BATCH_ROWS,
    )

  def _write_pairs(self, path):
    rows = [json.loads(line) for line in self._samples.open()]
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    ended = [row["ended"] for row in rows]
    rewards = self._true_reward()(prompts, responses, ended=ended)
    n = self._plan.samples_per_prefix
    groups = [slice(i, i + n) for i in range(0, len(rows), n)]
    num_held_out = max(round(HELD_OUT_SHARE * len(groups)), 1)
    for output, part in (
      (self._held_out, groups[:num_held_out]),
      (path, groups[num_held_out:]),
    ):
      num_ties = measure.write_pairs(
        output,
        [prompts[group.start] for group in part],
        [responses[group] for group in part],
        [rewards[group] for group in part],
        [ended[group] for group in part],
      )
      print(f"{output.name}: {len(part)} prefixes, {num_ties} ties dropped")

  def _write_frontier_samples(self, path):
    """Samples the reference, of which this measures the dot as well."""
    reference, prompts = self._reference()
    if ("sft", 0) not in self._read_points():
      self._add_point("sft", 0, self._point("SFT", reference, prompts))
    count = self._plan.frontier_samples
    samples = prompts.sample(reference, count, seed=3)
    learned_fn = learned.load(str(self._runs["reward_model"]))
    true = prompts.scores(reference, samples)
    found = prompts.scores(reference, samples, learned_fn)
    with files.replacing(path) as part, part.open("wb") as file:
      np.savez(file, true=true, learned=found)

  def _unmeasured(self, path) -> list[int]:
    """Returns the checkpoints of a run that are no dots yet."""
    done = self._read_points()
    return [x for x in manager.saved_steps(path) if (path.name, x) not in done]

  def _measure(self, label, path) -> bool:
    """Adds the dots of a run, and keeps only its last checkpoint."""
    _, prompts = self._reference()
    for step in self._unmeasured(path):
      policy = Policy(str(path), step=step)
      self._add_point(path.name, step, self._point(label, policy, prompts))
    for step in manager.saved_steps(path)[:-1]:
      shutil.rmtree(path / "checkpoints" / str(step))
    return True

  def _reference(self) -> tuple[Policy, measure.Prompts]:
    """Returns the reference, and what policies are measured on."""
    reference = Policy(str(self._runs["sft"]))
    prompts = measure.Prompts(
      reference,
      self._prefixes("test", self._plan.num_test_prefixes),
      max_new_tokens=self._plan.max_new_tokens,
      reward_fn=self._true_reward(),
    )
    return reference, prompts

  def _point(self, label, policy, prompts) -> frontier.Point:
    return prompts.point(label, policy, self._plan.test_samples, seed=2)

  def _add_point(self, run, step, point):
    record = {"run": run, "step": step} | dataclasses.asdict(point)
    with self._points.open("a") as file:
      file.write(json.dumps(record) + "\n")
    print(f"{run} {step}: {frontier.table([point]).splitlines()[1]}")

  def _report(self) -> bool:
    """Writes the figure and the report, and prints it."""
    limit, best = self._limits()
    points = [*self._read_points().values(), *best]
    table = frontier.write(
      self._folder, points, limit, reward_name="probability of positive"
    )
    report = "\n\n".join(
      [
        "# Reward against KL",
        _indented(table),
        "## At the same KL",
        matched_kl.compare(points, limit, KLS, max_reward=1.0),
        "## Seconds of each stage",
        _indented(stages.read_seconds(self._folder)),
      ]
    )
    files.write_text(self._folder / "report.md", report + "\n")
    print(report, flush=True)
    return True

  def _limits(self):
    """Returns the best possible frontier, and the points of Best-of-N."""
    found = np.load(self._frontier_samples)
    points = []
    for n in BEST_OF:
      if n <= found["true"].shape[1]:
        values = best_of_n.expected(found["learned"], n, found["true"])
        reward, error = frontier.mean_and_error(values)
        points.append(
          frontier.Point(
            "Best-of-N", best_of_n.kl(n), 0.0, reward, error, values.size * n
          )
        )
    return frontier.optimal_frontier(found["true"], BETAS), points

  def _read_points(self) -> dict[tuple[str, int], frontier.Point]:
    if not self._points.exists():
      return {}
    found = {}
    lines = self._points.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # killed while it was written
      files.write_text(self._points, "".join(lines[:-1]))
      lines.pop()
    for line in lines:
      row = json.loads(line)
      key = row.pop("run"), row.pop("step")
      found[key] = frontier.Point(**row)
    return found

  def _path(self, point) -> pathlib.Path:
    label, _, changes = point
    name = label.lower().replace("-", "_")
    return self._folder / f"{name}_{_changes(changes)}"

  def _prefixes(self, split, count) -> list[str]:
    return model_lib.read_prompts(
      "imdb", self._files[split], split=split, limit=count
    )

  def _true_reward(self):
    path = str(self._runs["classifier"])
    return learned.load(path, output="probability")


def _changes(changes: Mapping[str, Any]) -> str:
  """Returns `beta_0.1` for {"loss.beta": 0.1}."""
  return "_".join(f"{k.split('.')[-1]}_{v:g}" for k, v in changes.items())


def _indented(text: str) -> str:
  return "\n".join("    " + line for line in text.splitlines())

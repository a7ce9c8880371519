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

from dpo_jax import policy as policy_lib
from dpo_jax import trainer
from dpo_jax.checkpoints import manager
from dpo_jax.evaluation import frontier, matched_kl
from dpo_jax.pipelines import measure, stages
from dpo_jax.policy import Policy
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
  experiment = _Experiment(
    pathlib.Path(workdir), files, make_config, plan, model
  )
  return stages.run_all(
    pathlib.Path(workdir),
    [
      ("tokenizer", experiment.train_tokenizer),
      ("classifier: the true reward", experiment.train_classifier),
      ("sft: a language model of reviews", experiment.train_sft),
      ("samples", experiment.write_samples),
      ("pairs, labelled by the true reward", experiment.write_pairs),
      ("reward model of the pairs", experiment.train_reward_model),
      *experiment.methods(),
      ("evaluation", experiment.evaluate),
      ("figure and report", experiment.report),
    ],
  )


class _Experiment:
  """The stages; each returns whether it came to its end."""

  def __init__(self, folder, files, make_config, plan, model):
    self._folder, self._files, self._plan = folder, files, plan
    self._make_config = make_config
    sft = make_config("sft")
    self._model = model or sft.model.path
    self._tokenizer = self._model or str(folder / "tokenizer")
    self._runs = {
      name: str(folder / name) for name in ("classifier", "sft", "reward_model")
    }
    self._samples = folder / "samples.jsonl"
    self._pairs = folder / "pairs.jsonl"
    self._held_out = folder / "held_out_pairs.jsonl"
    self._points = folder / "points.jsonl"
    self._frontier_samples = folder / "frontier_samples.npz"

  def train_tokenizer(self) -> bool:
    path = pathlib.Path(self._tokenizer)
    if not self._model and not path.exists():
      text, vocab_size = self._files["unsup"], self._plan.vocab_size
      stages.write_tokenizer(path, "imdb", text, vocab_size)
    return True

  def train_classifier(self) -> bool:
    config = self._make_config("classifier")
    config.model.tokenizer = self._tokenizer
    config.data.path = self._files["train"]
    config.data.eval_path = self._files["test"]
    return self._train(config, self._runs["classifier"])

  def train_sft(self) -> bool:
    config = self._make_config("sft")
    config.data.path = self._files["unsup"]
    if self._model:
      config.model.path, config.model.preset = self._model, ""
    else:
      config.model.tokenizer = self._tokenizer
    return self._train(config, self._runs["sft"])

  def write_samples(self) -> bool:
    if not self._samples.exists():
      policy_lib.write_samples(
        self._runs["sft"],
        self._prefixes("train", self._plan.num_prefixes),
        decode.Settings(self._plan.max_new_tokens),
        str(self._samples),
        seed=1,
        samples_per_prompt=self._plan.samples_per_prefix,
        max_prompt_length=self._make_config("sft").data.max_prompt_length,
        batch_rows=measure.BATCH_ROWS,
      )
    return True

  def write_pairs(self) -> bool:
    if self._pairs.exists():
      return True
    rows = [json.loads(line) for line in self._samples.open()]
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    rewards = self._true_reward()(prompts, responses)
    n = self._plan.samples_per_prefix
    groups = [slice(i, i + n) for i in range(0, len(rows), n)]
    num_held_out = max(round(HELD_OUT_SHARE * len(groups)), 1)
    for path, part in (
      (self._held_out, groups[:num_held_out]),
      (self._pairs, groups[num_held_out:]),
    ):
      num_ties = measure.write_pairs(
        path,
        [prompts[group.start] for group in part],
        [responses[group] for group in part],
        [rewards[group] for group in part],
      )
      print(f"{path.name}: {len(part)} prefixes, {num_ties} ties dropped")
    return True

  def train_reward_model(self) -> bool:
    config = self._make_config("reward_model")
    self._set_pairs(config)
    config.data.eval_path = str(self._held_out)
    return self._train(config, self._runs["reward_model"])

  def methods(self) -> list[tuple[str, Callable[[], bool]]]:
    """Returns a stage for each run of the grid."""
    return [
      (f"{label}, {_changes(changes)}", lambda point=point: self._method(point))
      for point in self._plan.grid
      for label, _, changes in [point]
    ]

  def _method(self, point) -> bool:
    label, loss, changes = point
    config = self._make_config(loss)
    if loss == "ppo":
      config.data.path = self._files["train"]
      reward = "classifier" if label == "PPO-GT" else "reward_model"
      config.ppo.reward = f"run:{self._runs[reward]}"
      config.model.path, config.model.preset = self._runs["sft"], ""
    else:
      self._set_pairs(config)
    config.update_from_flattened_dict(dict(changes))
    return self._train(config, self._path(point))

  def evaluate(self) -> bool:
    """Measures what is not yet measured."""
    reference = Policy(self._runs["sft"])
    prompts = measure.Prompts(
      reference,
      self._prefixes("test", self._plan.num_test_prefixes),
      max_new_tokens=self._plan.max_new_tokens,
      reward_fn=self._true_reward(),
    )
    done = self._read_points()
    with self._points.open("a") as file:

      def add(run, step, point):
        record = {"run": run, "step": step} | dataclasses.asdict(point)
        done[run, step] = point
        file.write(json.dumps(record) + "\n")
        file.flush()
        print(f"{run} {step}: {frontier.table([point]).splitlines()[1]}")

      measured = (prompts, self._plan.test_samples)
      if ("sft", 0) not in done:
        add("sft", 0, _point("SFT", reference, *measured))
      for point in self._plan.grid:
        path = self._path(point)
        steps = manager.saved_steps(path)
        for step in steps:
          if (path.name, step) not in done:
            policy = Policy(str(path), step=step)
            add(path.name, step, _point(point[0], policy, *measured))
        for step in steps[:-1]:  # Their dots are kept.
          shutil.rmtree(path / "checkpoints" / str(step))
    self._score_frontier_samples(reference, prompts)
    return True

  def report(self) -> bool:
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
    (self._folder / "report.md").write_text(report + "\n")
    print(report, flush=True)
    return True

  def _score_frontier_samples(self, reference, prompts):
    if not self._frontier_samples.exists():
      count = self._plan.frontier_samples
      samples = prompts.sample(reference, count, seed=3)
      learned_fn = learned.load(self._runs["reward_model"])
      part = self._folder / "part.npz"
      np.savez(
        part,
        true=prompts.scores(reference, samples),
        learned=prompts.scores(reference, samples, learned_fn),
      )
      part.replace(self._frontier_samples)

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
      stages.replace(self._points, "".join(lines[:-1]))
      lines.pop()
    for line in lines:
      row = json.loads(line)
      key = row.pop("run"), row.pop("step")
      found[key] = frontier.Point(**row)
    return found

  def _train(self, config, path) -> bool:
    config.data.cache_dir = str(self._folder / "cache")
    return trainer.train(config, str(path))

  def _set_pairs(self, config):
    config.model.path, config.model.preset = self._runs["sft"], ""
    config.data.source, config.data.path = "jsonl", str(self._pairs)
    # Samples that were cut have no EOS.
    config.data.max_response_length = self._plan.max_new_tokens

  def _path(self, point) -> pathlib.Path:
    label, _, changes = point
    name = label.lower().replace("-", "_")
    return self._folder / f"{name}_{_changes(changes)}"

  def _prefixes(self, split, count) -> list[str]:
    return policy_lib.read_prompts(
      "imdb", self._files[split], split=split, limit=count
    )

  def _true_reward(self):
    return learned.load(self._runs["classifier"], output="probability")


def _point(label, policy, prompts, num_samples):
  return prompts.point(label, policy, num_samples, seed=2)


def _changes(changes: Mapping[str, Any]) -> str:
  """Returns `beta_0.1` for {"loss.beta": 0.1}."""
  return "_".join(f"{k.split('.')[-1]}_{v:g}" for k, v in changes.items())


def _indented(text: str) -> str:
  return "\n".join("    " + line for line in text.splitlines())

"""The paper's first experiment in miniature: minutes on a laptop CPU.

Controlled sentiment (Rafailov et al. 2023, arXiv 2305.18290, sec 6.1): train a
language model with `sft`, sample it, pair and label the samples by a known
reward, train `dpo` at several betas, and draw reward against KL.
"""

import pathlib
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from dpo_jax.evaluation import frontier
from dpo_jax.inference import model as model_lib
from dpo_jax.inference.model import Policy
from dpo_jax.pipelines import measure, stages
from dpo_jax.rewards import registry

BETAS = (0.1, 1.0)
PREFIXES = 1_500  # that training samples are drawn for
SAMPLES_PER_PREFIX = 4  # six pairs a prefix, as in the paper
TEST_PREFIXES = 150
TEST_SAMPLES = 4  # per test prefix, of each policy
FRONTIER_SAMPLES = 64  # per test prefix, of the reference
MAX_NEW_TOKENS = 32


def run(workdir: str, make_config: Callable[[str], ConfigDict]) -> bool:
  """Returns whether the miniature sentiment experiment came to its end.

  Args:
    workdir: gets a folder for each run, `pairs.jsonl`, `frontier.json` and
      `frontier.png`.
    make_config: returns the config of a stage, given the name of its loss.
  """
  folder = pathlib.Path(workdir)
  sft, pairs = folder / "sft", folder / "pairs.jsonl"
  runs = {"SFT": sft}
  methods = []
  for beta in BETAS:
    config = make_config("dpo")
    config.loss.beta = beta
    config.model.preset, config.model.path = "", str(sft)
    config.data.source, config.data.path = "jsonl", str(pairs)
    config.data.eval_path = ""
    label = f"DPO, beta {beta:g}"
    runs[label] = folder / f"dpo_beta_{beta:g}"
    methods.append(stages.training(label, config, runs[label]))
  return stages.run_all(
    folder,
    [
      stages.training(
        "sft: a language model of the reviews", make_config("sft"), sft
      ),
      stages.writing(
        "samples, paired and labelled by the true reward",
        pairs,
        lambda path: _write_pairs(Policy(str(sft)), path),
      ),
      *methods,
      stages.Stage(
        "evaluation: reward and KL on held-out prefixes",
        lambda: _evaluate(folder, runs),
      ),
    ],
  )


def _prefixes(split: str, count: int) -> list[str]:
  """Returns distinct prompts of a split."""
  return model_lib.read_prompts(
    "synthetic", "reviews:20000", split=split, limit=count
  )


def _prompts(reference: Policy, texts: list[str]) -> measure.Prompts:
  return measure.Prompts(
    reference,
    texts,
    max_new_tokens=MAX_NEW_TOKENS,
    reward_fn=registry.load("synthetic"),
  )


def _write_pairs(policy: Policy, path: pathlib.Path) -> None:
  prompts = _prompts(policy, _prefixes("train", PREFIXES))
  samples = prompts.sample(policy, SAMPLES_PER_PREFIX, seed=1)
  responses = map(policy.responses, prompts.tokens, samples)
  rewards = prompts.scores(policy, samples)
  ended = [[sample.ended for sample in row] for row in samples]
  num_ties = measure.write_pairs(path, prompts.texts, responses, rewards, ended)
  print(f"{num_ties} pairs of equal reward are left out", flush=True)


def _evaluate(folder: pathlib.Path, runs: dict[str, pathlib.Path]) -> bool:
  """Writes and prints reward and KL of each run, and draws them."""
  reference = Policy(str(runs["SFT"]))
  prompts = _prompts(reference, _prefixes("test", TEST_PREFIXES))
  points = [
    prompts.point(label, Policy(str(run)), TEST_SAMPLES, seed=2)
    for label, run in runs.items()
  ]
  samples = prompts.sample(reference, FRONTIER_SAMPLES, seed=3)
  limit = frontier.optimal_frontier(
    prompts.scores(reference, samples), np.geomspace(0.01, 100, 200)
  )
  table = frontier.write(folder, points, limit, reward_name="mean true reward")
  print(f"{table}\nfigure: {folder / 'frontier.png'}", flush=True)
  return True

"""Whole experiments, stage by stage; a stage whose output is there is skipped.

Controlled sentiment (Rafailov et al. 2023, arXiv 2305.18290, sec 6.1): train a
language model with `sft`, sample it, pair and label the samples by a known
reward, train `dpo` at several betas, and draw reward against KL.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from dpo_jax import trainer
from dpo_jax.data import synthetic, tokenize
from dpo_jax.evaluation import frontier
from dpo_jax.policy import Policy
from dpo_jax.sampling import decode

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
  sft = str(folder / "sft")
  print("== sft: a language model of the reviews", flush=True)
  if not trainer.train(make_config("sft"), sft):
    return False
  pairs = folder / "pairs.jsonl"
  if not pairs.exists():
    print("== samples, paired and labelled by the true reward", flush=True)
    _write_pairs(Policy(sft), pairs)
  runs = {"SFT": sft}
  for beta in BETAS:
    config = make_config("dpo")
    config.loss.beta = beta
    config.model.preset, config.model.path = "", sft
    config.data.source, config.data.path = "jsonl", str(pairs)
    config.data.eval_path = ""
    label = f"DPO, beta {beta:g}"
    runs[label] = str(folder / f"dpo_beta_{beta:g}")
    print(f"== {label}", flush=True)
    if not trainer.train(config, runs[label]):
      return False
  print("== evaluation: reward and KL on held-out prefixes", flush=True)
  print(_evaluate(folder, runs), flush=True)
  print(f"figure: {folder / 'frontier.png'}", flush=True)
  return True


def _encode_prefixes(policy: Policy, split: str, count: int):
  """Returns the text and the tokens of distinct prompts of a split."""
  rows = synthetic.read("reviews:20000", split)
  prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:count]
  return prompts, tokenize.encode_prompts(policy.tokenizer, prompts)


def _write_pairs(policy: Policy, path: pathlib.Path) -> None:
  """Writes six pairs for each prefix: all pairs of four samples, less ties."""
  prompts, tokens = _encode_prefixes(policy, "train", PREFIXES)
  found = _sample(policy, tokens, SAMPLES_PER_PREFIX, seed=1)
  part = path.with_suffix(".part")
  with part.open("w") as file:
    for prompt, samples in zip(prompts, found, strict=True):
      for pair in itertools.combinations(_texts(policy, samples), 2):
        low, high = sorted(pair, key=lambda text: _reward(prompt, text))
        if _reward(prompt, low) < _reward(prompt, high):
          row = {"prompt": prompt, "chosen": high, "rejected": low}
          file.write(json.dumps(row) + "\n")
  os.replace(part, path)


def _evaluate(folder: pathlib.Path, runs: dict[str, str]) -> str:
  """Returns the table of reward and KL, and writes it and the figure."""
  reference = Policy(runs["SFT"])
  prompts, tokens = _encode_prefixes(reference, "test", TEST_PREFIXES)
  points = []
  for label, run in runs.items():
    policy = Policy(run)
    found = _sample(policy, tokens, TEST_SAMPLES, seed=2)
    samples = list(itertools.chain(*found))
    reference_logps = reference.logps(
      [prompt for prompt in tokens for _ in range(TEST_SAMPLES)],
      [sample.tokens for sample in samples],
    )
    policy_logps = np.array([sample.logps.sum() for sample in samples])
    shape = (len(prompts), TEST_SAMPLES)
    points.append(
      frontier.make_point(
        label,
        policy_logps=policy_logps.reshape(shape),
        reference_logps=reference_logps.reshape(shape),
        rewards=_rewards(policy, prompts, found),
      )
    )
  found = _sample(reference, tokens, FRONTIER_SAMPLES, seed=3)
  limit = frontier.optimal_frontier(
    _rewards(reference, prompts, found), np.geomspace(0.01, 100, 200)
  )
  return frontier.write(folder, points, limit, reward_name="mean true reward")


def _sample(policy, tokens, per_prompt, *, seed):
  settings = decode.Settings(MAX_NEW_TOKENS)
  return policy.sample(
    tokens, settings, seed=seed, samples_per_prompt=per_prompt, batch_rows=512
  )


def _rewards(policy, prompts, found) -> np.ndarray:
  """Returns the true rewards [prompts, samples]."""
  return np.array(
    [
      [_reward(prompt, text) for text in _texts(policy, samples)]
      for prompt, samples in zip(prompts, found, strict=True)
    ]
  )


def _texts(policy: Policy, samples: Sequence[decode.Sample]) -> list[str]:
  return [" " + text for text in policy.texts(samples)]


def _reward(prompt: str, response: str) -> float:
  return synthetic.true_reward(prompt + response)

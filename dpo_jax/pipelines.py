"""Whole experiments, stage by stage; a stage whose output is there is skipped.

Controlled sentiment (Rafailov et al. 2023, arXiv 2305.18290, sec 6.1): train a
language model with `sft`, sample it, pair and label the samples by a known
reward, train `dpo` at several betas, and draw reward against KL.
"""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from dpo_jax import sharding, trainer
from dpo_jax.checkpoints import source
from dpo_jax.data import dataset, loader, synthetic, tokenize
from dpo_jax.evaluation import frontier
from dpo_jax.losses import objectives
from dpo_jax.models import transformer
from dpo_jax.sampling import decode
from dpo_jax.training import scoring

BETAS = (0.1, 1.0)
PREFIXES = 1_500  # that training samples are drawn for
SAMPLES_PER_PREFIX = 4  # six pairs a prefix, as in the paper
TEST_PREFIXES = 150
TEST_SAMPLES = 4  # per test prefix, of each policy
FRONTIER_SAMPLES = 64  # per test prefix, of the reference
MAX_NEW_TOKENS = 32


def quickstart(workdir: str, make_config: Callable[[str], ConfigDict]) -> bool:
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


class Policy:
  """A trained run that samples responses and says how likely they are."""

  def __init__(self, run: str):
    """Loads the newest checkpoint of a run folder onto all devices."""
    opened = source.open_model(run)
    self.config = opened.config
    self.tokenizer = tokenize.load_tokenizer(opened.tokenizer)
    self.mesh = sharding.make_mesh()
    shapes = transformer.param_shapes(self.config)
    self.params = opened.load(
      self.config,
      sharding.array_shardings(
        self.mesh, transformer.logical_axes(self.config), shapes
      ),
    )
    self._hidden_fn = functools.partial(transformer.hidden_states, self.config)
    self._unembedding_fn = functools.partial(
      transformer.unembedding, self.config
    )

  def sample(
    self, prompts: Sequence[Sequence[int]], *, seed: int
  ) -> list[list[int]]:
    """Returns one response for each prompt, at temperature 1."""
    with jax.set_mesh(self.mesh):
      return decode.sample(
        self._hidden_fn,
        self._unembedding_fn,
        self.params,
        prompts,
        rng=jax.random.key(seed),
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        eos_id=self.tokenizer.eos_token_id,
        batch_rows=512,
      )

  def logps(
    self,
    reference: "Policy",
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities [n] under this policy and the reference."""
    tokens = dataset.TokenDataset.from_lists(
      prompts, responses, [[] for _ in prompts]
    )
    batches = loader.Loader(
      tokens,
      batch_size=256,
      row_length=512,
      microbatch_rows=8 * sharding.num_row_shards(self.mesh),
    )
    objective = objectives.make_objective("sft", {})
    with jax.set_mesh(self.mesh):
      policy_logps, reference_logps = (
        scoring.response_logps(
          model.config,
          model.params,
          objective,
          batches,
          self.mesh,
          chunk_length=128,
        )[:, 0]
        for model in (self, reference)
      )
    return policy_logps, reference_logps


def _encode_prefixes(policy: Policy, split: str, count: int):
  """Returns the text and the tokens of distinct prompts of a split."""
  rows = synthetic.read("reviews:20000", split)
  prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:count]
  return prompts, tokenize.encode_prompts(policy.tokenizer, prompts)


def _write_pairs(policy: Policy, path: pathlib.Path) -> None:
  """Writes six pairs for each prefix: all pairs of four samples, less ties."""
  prompts, tokens = _encode_prefixes(policy, "train", PREFIXES)
  prompts = [p for p in prompts for _ in range(SAMPLES_PER_PREFIX)]
  tokens = [t for t in tokens for _ in range(SAMPLES_PER_PREFIX)]
  texts = _texts(policy, policy.sample(tokens, seed=1))
  part = path.with_suffix(".part")
  with part.open("w") as file:
    for start in range(0, len(prompts), SAMPLES_PER_PREFIX):
      prompt = prompts[start]
      samples = texts[start : start + SAMPLES_PER_PREFIX]
      for pair in itertools.combinations(samples, 2):
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
    repeated = [t for t in tokens for _ in range(TEST_SAMPLES)]
    responses = policy.sample(repeated, seed=2)
    policy_logps, reference_logps = policy.logps(reference, repeated, responses)
    shape = (len(prompts), TEST_SAMPLES)
    points.append(
      frontier.make_point(
        label,
        policy_logps=policy_logps.reshape(shape),
        reference_logps=reference_logps.reshape(shape),
        rewards=_rewards(policy, prompts, responses, TEST_SAMPLES),
      )
    )
  repeated = [t for t in tokens for _ in range(FRONTIER_SAMPLES)]
  responses = reference.sample(repeated, seed=3)
  limit = frontier.optimal_frontier(
    _rewards(reference, prompts, responses, FRONTIER_SAMPLES),
    np.geomspace(0.01, 100, 200),
  )
  return frontier.write(folder, points, limit, reward_name="mean true reward")


def _rewards(policy, prompts, responses, per_prompt) -> np.ndarray:
  """Returns the true rewards [prompts, per_prompt]."""
  texts = _texts(policy, responses)
  rewards = [
    _reward(prompts[i // per_prompt], text) for i, text in enumerate(texts)
  ]
  return np.array(rewards).reshape(len(prompts), per_prompt)


def _texts(policy: Policy, responses: Sequence[Sequence[int]]) -> list[str]:
  decoded = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
  return [" " + text for text in decoded]


def _reward(prompt: str, response: str) -> float:
  return synthetic.true_reward(prompt + response)

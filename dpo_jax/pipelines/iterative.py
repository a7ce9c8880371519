"""Iterative preference learning: sample, score, pair, train, and again.

A round samples K responses a prompt from the policy of the round before,
scores them with a reward, pairs them, and trains a preference loss on these
pairs. With `pairs="best_worst"`, a `min_margin` and `reference="round"` it has
the loss of Direct Nash Optimization in its practical form (DNO-Prct, Rosset et
al. 2024, arXiv 2404.03715, algorithm 2), whose policy of round t+1 maximises

  E log sigmoid(beta log(pi(c) / pi_t(c)) - beta log(pi(r) / pi_t(r)))

Differs: a reward says which response is better, no judge of pairs, so that its
rounds climb that reward and approach no Nash equilibrium of preferences; there
are no responses of a stronger model, and every round has pairs of its own only.

  samples_K.jsonl  of the policy before round K: prompt, response, whether it
                   ended, reward, and in nats logp, drawn_logp (under what it
                   was drawn from: the policy at the temperature and top_p of
                   sampling) and reference_logp (of the first policy as it is)
  pairs_K.jsonl    what round K is trained on
  round_K/         the run
  rounds.jsonl     a line for each policy: reward of its samples, KL to the
                   first policy of what they were drawn from, and how many
                   pairs they make
  config.json      of the rounds, and the settings under `iterative`

A stage whose file is there, or whose run is finished, is skipped.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dpo_jax.checkpoints import run_folder
from dpo_jax.data import chat, tokenize
from dpo_jax.evaluation import frontier, markdown
from dpo_jax.host import files, processes
from dpo_jax.inference import model as model_lib
from dpo_jax.losses import objectives
from dpo_jax.rewards import registry
from dpo_jax.run import experiment, trainer
from dpo_jax.sampling import decode
from dpo_jax.training import reference as reference_lib

PAIRS = ("best_worst", "all")
REFERENCES = ("round", "first")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the rounds do.

  Attributes:
    policy: the first one: run folder, Hugging Face folder or hub name.
    reward: a name of `rewards.registry`.
    data: of the prompts: a file, or what the source takes.
    data_source: a name of `examples.SOURCES`.
    split: of a hub dataset.
    prompts: of a round, each of which takes the next ones; None takes all.
    samples: of a prompt, at least 2.
    sampling: how tokens are drawn.
    pairs: `best_worst`, one pair a prompt at most; or `all` pairs of samples.
    min_margin: only pairs of rewards further apart are kept, at least 0.
    reference: what a round's loss compares to: `round`, the policy that it
      starts from, or `first`, the first one.
  """

  policy: str
  reward: str
  data: str
  data_source: str = "jsonl"
  split: str = "train"
  prompts: int | None = None
  samples: int = 4
  sampling: decode.Settings = decode.Settings(256)
  pairs: str = "best_worst"
  min_margin: float = 0.0
  reference: str = "round"

  def __post_init__(self):
    for name, known in (("pairs", PAIRS), ("reference", REFERENCES)):
      if (value := getattr(self, name)) not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    if self.samples < 2:
      raise ValueError(f"samples={self.samples}: a pair needs at least 2")
    if not 0 <= self.min_margin < float("inf"):
      raise ValueError(f"min_margin={self.min_margin:g}: must be at least 0")


def run(
  config: ConfigDict, workdir: str, settings: Settings, *, rounds: int
) -> bool:
  """Returns whether the rounds came to their end; False when told to stop.

  Args:
    config: of each round, but `model.path`, `model.preset`, `reference.path`,
      `data.source`, `data.path` and `data.eval_path`, which are set here.
    workdir: the folder; rounds that are in it are not done again.
    settings: see `Settings`.
    rounds: at least 1; more may be asked for later.

  Raises:
    ValueError: something in the config, the settings, the data or the folder
      is not right, or no pair of a round is kept.
  """
  plain = experiment.to_plain(config)
  experiment.check(config)
  _check(plain, experiment.make_objective(config), settings)
  # Rounds of other lengths would follow samples that are there already.
  lengths = {key: plain[key] for key in run_folder.LENGTH_KEYS}
  plain["iterative"] = dataclasses.asdict(settings) | lengths
  processes.agree(
    run_folder.flatten({"config": plain})
    | {"--workdir": os.path.abspath(workdir), "--rounds": rounds}
  )
  prompts = model_lib.read_prompts(
    settings.data_source, settings.data, split=settings.split
  )
  digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
  processes.agree({f"prompts of {settings.data}": digest})
  with run_folder.owned(workdir, "works in"):
    return _run(config, workdir, settings, rounds, plain, prompts)


def _run(config, workdir, settings, rounds, plain, prompts) -> bool:
  run_folder.check_config(workdir, plain)
  folder = pathlib.Path(workdir)
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(workdir, plain)
  policy, lines = settings.policy, []
  for number in itertools.count(1):
    samples = folder / f"samples_{number}.jsonl"
    if not samples.exists():
      processes.say(f"== samples of {policy}")
      rows = _sample(policy, prompts, settings, plain, number)
      _write(samples, rows)
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    pairs = _pair_rows(rows, settings)
    line = {"rounds": number - 1, "policy": policy, "num_pairs": len(pairs)}
    lines.append(line | _summary(rows))
    _write(folder / "rounds.jsonl", lines)
    if number > rounds:
      processes.say(table(lines, settings.sampling))
      return True
    if not pairs:
      raise ValueError(
        f"round {number}: no pair of samples has rewards more than"
        f" min_margin={settings.min_margin:g} apart"
      )
    path = folder / f"pairs_{number}.jsonl"
    if not path.exists():
      _write(path, pairs)
    changed = _round_config(config, settings, policy, str(path))
    policy = str(folder / f"round_{number}")
    if not run_folder.is_finished(policy, experiment.to_plain(changed)):
      processes.say(f"== round {number} of {rounds}")
      if not trainer.train(changed, policy):
        return False


def make_pairs(
  responses: Sequence[Any],
  rewards: Sequence[float],
  *,
  pairs: str,
  min_margin: float,
) -> list[tuple[int, int]]:
  """Returns which samples of a prompt are chosen and rejected, the best first.

  Args:
    responses: texts, or what they are known by; equal ones make no pair,
      whatever rounding says.
    rewards: one for each.
    pairs: one of `PAIRS`.
    min_margin: rewards are further apart than this.
  """
  order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
  ends = [(order[0], order[-1])]
  made = ends if pairs == "best_worst" else itertools.combinations(order, 2)
  return [
    (high, low)
    for high, low in made
    if rewards[high] - rewards[low] > min_margin
    and responses[high] != responses[low]
  ]


def table(lines: Sequence[dict[str, Any]], sampling: decode.Settings) -> str:
  """Returns the lines of rounds.jsonl as a Markdown table.

  Its KL is of what was sampled to the first policy as it is; the head says so
  where sampling changes the policy.
  """
  kl = "KL"
  if (sampling.temperature, sampling.top_p) != (1, 1):
    kl += f" at temperature {sampling.temperature:g}, top_p {sampling.top_p:g}"
  head = ["rounds", "reward", f"{kl} to the first, nats", "tokens", "samples"]
  rows = [
    [
      x["rounds"],
      f"{x['reward']:.4f} +- {x['reward_error']:.4f}",
      f"{x['kl']:.3f} +- {x['kl_error']:.3f}",
      f"{x['response_length']:.1f}",
      x["num_samples"],
      x["num_pairs"],
    ]
    for x in lines
  ]
  return markdown.table([*head, "pairs"], rows, num_left=0)


def _check(
  plain: dict[str, Any], objective: objectives.Objective, settings: Settings
) -> None:
  """Raises ValueError where no round could be run."""
  loss, data, reference = plain["loss"], plain["data"], plain["reference"]
  if loss["name"] == "ppo" or objective.head != "vocabulary":
    raise ValueError(
      f"loss '{loss['name']}': rounds train a language model on pairs"
    )
  for group, flag in (("model", "policy"), ("reference", "reference")):
    if plain[group]["path"]:
      raise ValueError(
        f"{group}.path='{plain[group]['path']}': rounds set it; allowed:"
        f" --{flag}"
      )
  reference_lib.check_mode(
    reference["mode"],
    settings.policy if settings.reference == "first" else "",
    loss["name"],
    has_reference=objective.needs_reference,
    has_adapters=plain["lora"]["rank"] > 0,
  )
  needed = data["max_prompt_length"] + settings.sampling.max_new_tokens
  if data["max_length"] < needed:
    raise ValueError(
      f"data.max_length={data['max_length']}: must hold"
      f" data.max_prompt_length={data['max_prompt_length']} and"
      f" max_new_tokens={settings.sampling.max_new_tokens}"
    )


def _round_config(config, settings, policy, pairs) -> ConfigDict:
  config = copy.deepcopy(config)
  config.model.preset, config.model.path = "", policy
  config.data.source, config.data.path = "jsonl", pairs
  config.data.eval_path = ""
  # As they were when sampled from.
  config.data.truncate_prompts = "always"
  if settings.reference == "first":
    config.reference.path = settings.policy
  return config


def _sample(path, prompts, settings, plain, number) -> list[dict[str, Any]]:
  """Returns the rows of the samples before round `number`.

  A prompt is sampled under its place among the prompts of all rounds.
  """
  reward_fn = registry.load(settings.reward)
  count = settings.prompts or len(prompts)
  places = range((number - 1) * count, number * count)
  prompts = [prompts[place % len(prompts)] for place in places]
  dtype = plain["model"]["dtype"]
  model = model_lib.Policy(path, dtype=dtype)
  tokens = [
    ids[-plain["data"]["max_prompt_length"] :]
    for ids in tokenize.encode_prompts(model.tokenizer, prompts)
  ]
  found = model.sample(
    tokens,
    settings.sampling,
    seed=plain["seed"],
    samples_per_prompt=settings.samples,
    indices=places,
  )
  samples = list(itertools.chain(*found))
  repeat = lambda values: [x for x in values for _ in range(settings.samples)]
  prompts, tokens, places = map(repeat, (prompts, tokens, places))
  responses = [sample.tokens for sample in samples]
  content = [sample.content for sample in samples]
  _, texts = tokenize.decode(model.tokenizer, tokens, content)
  texts = [
    chat.content(model.tokenizer, prompt, text)
    for prompt, text in zip(prompts, texts, strict=True)
  ]
  if path != settings.policy:
    del model  # its room is for the first policy
    model = model_lib.Policy(settings.policy, dtype=dtype)
  reference_logps = model.logps(tokens, responses)
  rewards = reward_fn(
    prompts,
    [
      text if isinstance(prompt, str) else [_message(text)]
      for prompt, text in zip(prompts, texts, strict=True)
    ],
    ended=[sample.ended for sample in samples],
  )
  return [
    {
      "index": place,
      "prompt": prompt,
      "response": text,
      "reward": float(reward),
      "num_tokens": len(sample.tokens),
      "ended": sample.ended,
      "logp": float(sample.logps.sum(dtype=np.float64)),
      "drawn_logp": float(sample.drawn_logps.sum(dtype=np.float64)),
      "reference_logp": float(logp),
    }
    for place, prompt, text, reward, sample, logp in zip(
      *(places, prompts, texts, rewards, samples, reference_logps), strict=True
    )
  ]


def _message(text: str) -> dict[str, str]:
  return {"role": "assistant", "content": text}


def _pair_rows(rows, settings) -> list[dict[str, Any]]:
  """Returns the pairs of a round in the order of their prompts."""
  found = []
  for _, same in itertools.groupby(rows, key=lambda row: row["index"]):
    same = list(same)
    for high, low in make_pairs(
      [(row["response"], row["ended"]) for row in same],
      [row["reward"] for row in same],
      pairs=settings.pairs,
      min_margin=settings.min_margin,
    ):
      found.append(
        {
          "prompt": same[high]["prompt"],
          "chosen": same[high]["response"],
          "rejected": same[low]["response"],
          "chosen_score": same[high]["reward"],
          "rejected_score": same[low]["reward"],
          "chosen_ended": same[high]["ended"],
          "rejected_ended": same[low]["ended"],
        }
      )
  return found


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Returns what the samples of a policy say of it."""
  num_prompts = len({row["index"] for row in rows})
  column = lambda key: np.array([row[key] for row in rows], np.float64).reshape(
    num_prompts, -1
  )
  point = frontier.make_point(
    "",
    policy_logps=column("drawn_logp"),
    reference_logps=column("reference_logp"),
    rewards=column("reward"),
  )
  found = dataclasses.asdict(point) | {
    "num_prompts": num_prompts,
    "response_length": float(column("num_tokens").mean()),
  }
  del found["label"]
  return found


def _write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
  """Writes JSON lines, all or nothing, for all processes."""
  if jax.process_index() == 0:
    files.write_lines(path, rows)
  multihost_utils.sync_global_devices(f"{path.name} written")

"""A judge from what a user types: KIND, or KIND:NAME."""

import dataclasses
import json
import pathlib
from typing import Any

from dpo_jax.judges import answer_cache
from dpo_jax.judges import endpoint as chat_endpoint
from dpo_jax.judges import judge as judges
from dpo_jax.judges import prompts as judge_prompts

# Kind -> the options that it honours.
KINDS = {
  "endpoint": ("prompt", "asks", "cache", "sampling", "threads", "prices"),
  "reward": (),
  "local": ("prompt", "max_length"),
  "length": (),
}
USAGE = "endpoint:MODEL, reward:FOLDER, local:FOLDER, length"
DEFAULT_PROMPT = "dialogue"
DEFAULT_CACHE = "~/.cache/dpo_jax/judge_answers.sqlite"


def make_judge(spec: str, **options: Any) -> judges.Judge:
  """Returns a judge.

  Args:
    spec: one of `USAGE`. `endpoint` asks a chat endpoint, `reward` prefers
      what a reward model scores higher, `local` the letter that a model finds
      likelier, `length` the longer response.
    **options: None is the default.
      prompt: a name of `judge_prompts.TEMPLATES`; `dialogue` by default, which
        is then not asked of summaries (`win_rate.compare`).
      asks: how often a comparison is asked while answers are malformed.
      cache: file of answers.
      sampling: JSON object, keys of a request beside or instead of
        `chat_endpoint.SAMPLING`; null leaves a key out.
      threads: requests under way at once.
      prices: of a million tokens of prompts and of completions.
      max_length: tokens of question and answer.

  Raises:
    ValueError: an unknown judge, one that cannot be had, or an option that it
      does not honour.
  """
  kind, _, name = spec.partition(":")
  if kind not in KINDS or bool(name) != (kind != "length"):
    raise ValueError(f"unknown judge {spec!r}; allowed: {USAGE}")
  given = {key: value for key, value in options.items() if value is not None}
  for key in given:
    if key not in KINDS[kind]:
      honoured = [x for x in KINDS if key in KINDS[x]]
      raise ValueError(
        f"judge {spec!r} does not honour {key}={given[key]!r}; judges that do:"
        f" {', '.join(honoured)}"
      )
  if kind == "length":
    return judges.length_judge()
  if kind == "reward":
    return judges.score_judge(spec, _load_reward(name))
  is_named = "prompt" in given
  template = judge_prompts.find(given.pop("prompt", DEFAULT_PROMPT))
  if kind == "local":
    logps_fn = _load_local(name, **given)
    judge = judges.likelihood_judge(spec, logps_fn, template)
  else:
    judge = _make_endpoint_judge(spec, name, template, **given)
  return dataclasses.replace(judge, assumes_dialogue=not is_named)


# Models are imported where they are asked for: other judges start at once.
def _load_local(path: str, **options: Any):
  from dpo_jax.judges import local as local_judge

  return local_judge.make_logps_fn(path, **options)


def _load_reward(path: str):
  from dpo_jax.rewards import learned

  return learned.load(path)


def _make_endpoint_judge(
  spec: str,
  model: str,
  template: judge_prompts.Template,
  *,
  asks: int = 3,
  cache: str | pathlib.Path = DEFAULT_CACHE,
  sampling: str = "{}",
  threads: int = 8,
  prices: list[float] | None = None,
) -> judges.Judge:
  try:
    keys = json.loads(sampling)
  except json.JSONDecodeError as error:
    raise ValueError(f"sampling={sampling!r}: not JSON ({error})") from error
  taken = {"model", "messages"}
  if not isinstance(keys, dict) or taken & keys.keys():
    raise ValueError(
      f"sampling={sampling!r}: must be a JSON object without model, messages"
    )
  endpoint = chat_endpoint.ChatEndpoint(
    model,
    answer_cache.AnswerCache(cache),
    sampling=keys,
    num_threads=threads,
    prices=prices,
  )
  return judges.chat_judge(
    spec, endpoint.answers, template, max_asks=asks, usage=endpoint.usage
  )

"""Evaluates a trained model, or what evaluates it.

  python -m launch.evaluate preferences --source=runs/mine \\
    --data=heldout.jsonl --output=runs/mine/heldout
  python -m launch.evaluate win_rate --judge=endpoint:MODEL \\
    --policy=responses.jsonl --baseline=chosen.jsonl --output=runs/mine/wins
  python -m launch.evaluate judge --judge=endpoint:MODEL \\
    --data=pandalm.json --output=runs/judge

`preferences`: held-out accuracy, margins, log-ratios and calibration of any
run, Hugging Face folder or hub name, against a reference that is as free. A
run says itself what its reference, beta and lengths were. Writes `pairs.jsonl`
(a line a pair), `summary.jsonl` (a line for all pairs, then one for each value
of the column `subset`, where rows have it) and `preferences.png`.

`win_rate`: how often a judge prefers the responses of `--policy` to those of
`--baseline`, files of `prompt, response [, temperature, method]` such as
`launch.sample` writes, or of pairs, whose chosen responses count. Writes
`comparisons.jsonl`, `win_rate.json`, `win_rate.md` and `win_rate.png`.

`judge`: how often a judge agrees with people, on rows of PandaLM or LLMBar.
Writes `comparisons.jsonl`, `summary.jsonl` and `summary.md`.

A judge is `endpoint:MODEL`, an OpenAI-compatible chat endpoint that the
environment names (OPENAI_BASE_URL, OPENAI_API_KEY); `reward:FOLDER`, a reward
model; `local:FOLDER`, any model; or `length`, the longer response. `--data`
and `--policy` may be given several times.
"""

from absl import flags

from dpo_jax.host import files
from launch import cli

DATA = flags.DEFINE_multi_string("data", None, "File of pairs, or of labels.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")

# Of preferences.
SOURCE = flags.DEFINE_string(
  "source", None, "Run folder, Hugging Face folder or hub name."
)
REFERENCE = flags.DEFINE_string(
  "reference", None, "The same of the reference; else the run's own."
)
BETA = flags.DEFINE_float("beta", None, "Of rewards; else the run's own.")
MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Tokens of prompt and one response; else the run's own. Of a judge"
  " local:FOLDER, those of question and answer; else 2,048.",
)
MAX_PROMPT_LENGTH = flags.DEFINE_integer(
  "max_prompt_length", None, "Tokens; else the run's own."
)
DATA_SOURCE = flags.DEFINE_string(
  "data_source",
  "jsonl",
  "What reads the data: hh, tldr, jsonl, hub, synthetic.",
)
SPLIT = flags.DEFINE_string("split", "test", "Of a hub dataset, or of posts.")
DTYPE = flags.DEFINE_enum(
  "dtype", "auto", ["auto", "float32", "bfloat16"], "Of matmuls."
)

# Of judge and win_rate.
POLICY = flags.DEFINE_multi_string(
  "policy", None, "File of responses, or METHOD=FILE."
)
BASELINE = flags.DEFINE_string(
  "baseline", None, "File of responses, or of pairs, whose chosen ones count."
)
JUDGE = flags.DEFINE_string(
  "judge", None, "endpoint:MODEL, reward:FOLDER, local:FOLDER or length."
)
ORDER = flags.DEFINE_string(
  "order", "both", "both: every comparison twice, swapped; or random: once."
)
SEED = flags.DEFINE_integer("seed", 0, "Of random orders.", 0)
PROMPT = flags.DEFINE_string(
  "judge_prompt",
  None,
  "dialogue, summary_simple or summary_concise; else dialogue, which is refused"
  " where prompts ask for a summary (they end in TL;DR: or Summary:).",
)
ASKS = flags.DEFINE_integer(
  "judge_asks", None, "Of a comparison whose answers are malformed; else 3."
)
CACHE = flags.DEFINE_string(
  "judge_cache", None, "Its answers; else ~/.cache/dpo_jax."
)
SAMPLING = flags.DEFINE_string(
  "judge_sampling",
  None,
  'JSON in requests; else {"temperature": 0, "max_tokens": 256}.',
)
THREADS = flags.DEFINE_integer(
  "judge_threads", None, "Requests under way at once; else 8."
)
PRICES = flags.DEFINE_multi_float(
  "judge_price",
  None,
  "Of a million tokens: of prompts, then, given once more, of completions.",
)

_OF_JUDGES = (PROMPT, ASKS, CACHE, SAMPLING, THREADS, PRICES, MAX_LENGTH)
_OPTIONAL = {
  "preferences": (
    REFERENCE,
    BETA,
    MAX_LENGTH,
    MAX_PROMPT_LENGTH,
    DATA_SOURCE,
    SPLIT,
    DTYPE,
  ),
  "win_rate": (ORDER, SEED, *_OF_JUDGES),
  "judge": (ORDER, SEED, *_OF_JUDGES),
}
_NEEDED = {
  "preferences": (SOURCE, DATA, OUTPUT),
  "win_rate": (JUDGE, POLICY, BASELINE, OUTPUT),
  "judge": (JUDGE, DATA, OUTPUT),
}


def main(argv: list[str]) -> int:
  """Returns 0."""
  evaluations = {
    "preferences": _preferences,
    "win_rate": _win_rate,
    "judge": _judge,
  }
  name = " ".join(argv[1:])
  if name not in evaluations:
    raise ValueError(
      f"unknown evaluation {name!r}; known: {', '.join(evaluations)}"
    )
  cli.check_flags(name, _NEEDED, _OPTIONAL)
  with files.owned_folder(OUTPUT.value, "writes"):
    evaluations[name]()
  return 0


def _preferences() -> None:
  from dpo_jax.evaluation import held_out

  settings = held_out.make_settings(
    SOURCE.value,
    dtype=DTYPE.value,
    reference=REFERENCE.value,
    beta=BETA.value,
    max_length=MAX_LENGTH.value,
    max_prompt_length=MAX_PROMPT_LENGTH.value,
  )
  print(f"policy: {settings.source}; reference: {settings.reference}")
  print(
    held_out.evaluate(
      settings,
      DATA.value,
      OUTPUT.value,
      data_source=DATA_SOURCE.value,
      split=SPLIT.value,
    )
  )
  print(f"figure: {OUTPUT.value}/preferences.png")


def _win_rate() -> None:
  from dpo_jax.evaluation import win_rate_report

  judge = _make_judge()
  settings = {"order": ORDER.value, "seed": SEED.value}
  paths = (POLICY.value, BASELINE.value, OUTPUT.value)
  print(win_rate_report.evaluate(judge, *paths, **settings))
  print(f"usage: {judge.usage()}" if judge.usage() else "usage: none")
  print(f"figure: {OUTPUT.value}/win_rate.png")


def _judge() -> None:
  from dpo_jax.evaluation import agreement

  judge = _make_judge()
  settings = {"order": ORDER.value, "seed": SEED.value}
  print(agreement.evaluate(judge, DATA.value, OUTPUT.value, **settings))
  print(f"usage: {judge.usage()}" if judge.usage() else "usage: none")


def _make_judge():
  from dpo_jax.judges import kinds as judge_kinds

  return judge_kinds.make_judge(
    JUDGE.value,
    prompt=PROMPT.value,
    asks=ASKS.value,
    cache=CACHE.value,
    sampling=SAMPLING.value,
    threads=THREADS.value,
    prices=PRICES.value,
    max_length=MAX_LENGTH.value,
  )


if __name__ == "__main__":
  cli.run(main, num_arguments=1)

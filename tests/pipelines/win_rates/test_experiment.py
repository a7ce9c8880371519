"""Dialogue and summaries, from made files to win rates."""

import csv
import json
import lzma

import pytest

from configs import hh_dialogue, tldr_summarization
from dpo_jax.host import files
from dpo_jax.pipelines.win_rates import experiment as win_rates
from dpo_jax.pipelines.win_rates import tasks as win_rate_tasks
from dpo_jax.run import experiment as checks
from tests import test_end_to_end

WORDS = "rice soup tea bread cheese apple salt pepper onion egg".split()
SCALE = win_rate_tasks.Scale(
  train_rows=48,
  test_prompts=4,
  max_new_tokens=4,
  best_of=2,
  prompt_characters=200,
  response_characters=40,
  vocab_size=300,
)
CONFIGS = {"hh": hh_dialogue, "tldr": tldr_summarization}


def shrunk(get_config):
  """Returns what gives configs of seconds."""

  def get_small(argument):
    config = get_config(argument)
    if config.model.preset:
      config.model.preset = "tiny"
    config.steps, config.batch_size, config.microbatch_rows = 2, 8, 8
    config.data.max_length, config.data.max_prompt_length = 128, 96
    if config.loss.name == "ppo":
      config.ppo.max_new_tokens = SCALE.max_new_tokens
    if config.checkpoint.every:
      config.checkpoint.every = config.eval.every = 1
    return config

  return get_small


TASKS = {"hh": win_rate_tasks.HH, "tldr": win_rate_tasks.TLDR}


def write_lines(path, rows):
  with lzma.open(path, "wt") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def write_dialogues(folder):
  def row(n):
    before = f"\n\nHuman: {WORDS[n % 10]} or {n}?\n\nAssistant:"
    good, bad = f" {WORDS[n % 7]}, please.", " no"
    pair = {"chosen": before + good, "rejected": before + bad}
    return pair | {"subset": "made"}

  write_lines(folder / "train.jsonl.xz", map(row, range(60)))
  write_lines(folder / "test.jsonl.xz", map(row, [0, *range(100, 110)]))


def write_posts(folder):
  def row(n):
    text, summary = f"I cooked {WORDS[n % 10]} {n} times.\n\n", WORDS[n % 7]
    span = [len(text), len(text) + 5]
    text += f"TL;DR: {summary}"
    return {"subreddit": "tifu", "title": f"Post {n}", "selftext": text} | {
      "summary": summary,
      "tldr_span": span,
      "tldr_position": "end",
    }

  write_lines(folder / "posts.jsonl.xz", map(row, range(200)))
  with lzma.open(
    folder / "ppo_vs_human_judged.csv.xz", "wt", newline=""
  ) as file:
    table = csv.writer(file)
    table.writerow(
      ["query", "postprocessed_response", "reference_responses", "preferred"]
    )
    table.writerows([["TL;DR:", " a", " b", "ours"], ["x", "a", "b", ""]] * 3)


WRITERS = {"hh": write_dialogues, "tldr": write_posts}


def make_config(name):
  get_config = shrunk(CONFIGS[name].get_config)
  return lambda loss: get_config(f"{loss},cpu")


def run(name, folder):
  return win_rates.run(
    str(folder / "run"), str(folder), make_config(name), TASKS[name], SCALE
  )


def experiment(name, folder, model=""):
  return win_rates._Experiment(
    folder / "run", folder, make_config(name), TASKS[name], SCALE, model
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "model"), [("hh", "stories260K"), ("tldr", None)]
)
def test_the_command_runs_its_stages_once(name, model, tmp_path, shared_dir):
  WRITERS[name](tmp_path)
  folder = tmp_path / "run"
  given = [f"--model={shared_dir}/data/models/{model}"] if model else []

  def stages():
    process = test_end_to_end.start(
      *(name, f"--data={tmp_path}", f"--workdir={folder}", *given),
      module="tests.small_experiments",
    )
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, out + err
    return [x for x in out.splitlines() if x.startswith("== ")]

  first = stages()
  record = json.loads((folder / "wins/win_rate.json").read_text())
  cells = [(x["method"], x["temperature"]) for x in record["cells"]]
  assert cells == [
    *(("sft", 0.0), ("sft", 1.0)),
    ("best_of_2", 1.0),
    *((x, t) for x in TASKS[name].methods for t in (0.0, 1.0)),
    *(("2_shot", t) for t in (0.0, 1.0) if model),
  ]
  assert {x["num_prompts"] for x in record["cells"]} == {4}
  rates = {cell: x["win_rate"] for cell, x in zip(cells, record["cells"])}
  assert rates["best_of_2", 1.0] >= rates["sft", 1.0]
  curve = json.loads((folder / "curve/win_rate.json").read_text())["cells"]
  assert [(x["temperature"], x["step"]) for x in curve] == [
    (t, step) for t in (0.7, 1.0) for step in (0, 1, 2)
  ]
  at_start = next(x for x in curve if x["temperature"] == 1.0)
  assert at_start["win_rate"] == rates["sft", 1.0]
  report = (folder / "report.md").read_text()
  assert "Judge and model differ from the paper's" in report
  assert ("no person compared them" in report) == (name == "tldr")
  assert "== ppo" in first and first[-1] == "== report"
  assert not any(x.endswith(", done") for x in first)

  files = lambda: {
    x: x.stat().st_mtime_ns
    for x in folder.rglob("*")
    if x.is_file() and x.name not in ("report.md", "seconds.json")
  }
  before = files()
  assert stages() == [*(f"{x}, done" for x in first[:-1]), "== report"]
  assert before == files()


def test_pairs_of_summaries_are_the_authors_against_samples(tmp_path):
  WRITERS["tldr"](tmp_path)
  folder, made = tmp_path / "run", experiment("tldr", tmp_path)
  made._write_data(folder / "data.json")
  rows = win_rates._read_rows(folder / "data/train.jsonl")
  held_out = win_rates._read_rows(folder / "data/held_out.jsonl")
  for part, kept in (("train", rows), ("held_out", held_out)):
    files.write_lines(
      folder / f"samples/pairs_{part}.jsonl",
      [
        {"response": f"sample {n} \n", "ended": n % 2 == 0}
        for n in range(len(kept))
      ],
    )
  made._write_pairs(folder / "pairs/train.jsonl")
  pairs = win_rates._read_rows(folder / "pairs/train.jsonl")
  assert [x["rejected"] for x in pairs] == [
    f" sample {n}" for n in range(len(rows))
  ]
  assert [x["rejected_ended"] for x in pairs] == [
    n % 2 == 0 for n in range(len(rows))
  ]
  assert [x["chosen"] for x in pairs] == [x["response"] for x in rows]
  assert len(rows) + len(held_out) == 48 and len(held_out) == 3


def test_prompts_of_the_test_were_not_trained_on(tmp_path):
  write_dialogues(tmp_path)
  folder = tmp_path / "run"
  experiment("hh", tmp_path)._write_data(folder / "data.json")
  read = lambda name: win_rates._read_rows(folder / f"data/{name}.jsonl")
  trained = {x["prompt"] for x in read("train") + read("held_out")}
  assert len(trained) == 48
  assert len(read("test")) == 4
  assert not trained & {x["prompt"] for x in read("test")}


def test_a_response_ends_where_the_human_would_speak(tmp_path):
  def trimmed(name, sample, *, ended=False):
    found = experiment(name, tmp_path)._trimmed(
      {"index": 3, "response": sample, "ended": ended}
    )
    assert found["index"] == 3
    return found["response"], found["ended"]

  sample = "Rice. \n\nHuman: Why?\n\nAssistant: Oh"
  assert trimmed("hh", sample) == (" Rice.", True)
  assert trimmed("hh", "Rice. \n\nHum") == (" Rice. \n\nHum", False)
  assert trimmed("hh", "Rice.", ended=True) == (" Rice.", True)
  assert trimmed("tldr", sample) == (" " + sample, False)


def test_a_given_model_is_shown_examples(tmp_path, monkeypatch):
  write_dialogues(tmp_path)
  folder, made = tmp_path / "run", experiment("hh", tmp_path, "a_model")
  made._write_data(folder / "data.json")
  calls = []
  monkeypatch.setattr(
    win_rates.model_lib,
    "write_samples",
    lambda source, prompts, *_, **options: calls.append(
      (source, prompts, options["max_prompt_length"])
    ),
  )
  made._sample("2_shot", 0.5, folder / "samples/2_shot_0.5.jsonl")
  ((source, prompts, length),) = calls
  assert (source, length) == ("a_model", 3 * 96)
  test = win_rates._read_rows(folder / "data/test.jsonl")
  first, second, *_ = win_rates._read_rows(folder / "data/train.jsonl")
  examples = "".join(x["prompt"] + x["chosen"] for x in (first, second))
  assert prompts == [examples + x["prompt"] for x in test]
  monkeypatch.setattr(win_rates, "SHOT_CHARACTERS", 1)
  with pytest.raises(ValueError, match="only 0 examples of at most 1 charac"):
    made._sample("2_shot", 0.5, folder / "samples/2_shot_0.5.jsonl")
  assert "2_shot" not in experiment("hh", tmp_path).policies


def test_runs_read_the_experiments_own_files(tmp_path):
  config = experiment("tldr", tmp_path)._config
  folder = tmp_path / "run"
  assert config("sft").model.tokenizer == str(folder / "tokenizer")
  assert config("sft").data.path == str(folder / "data/train.jsonl")
  assert config("dpo").data.path == str(folder / "pairs/train.jsonl")
  assert config("dpo").model.path == str(folder / "sft")
  ppo = config("ppo")
  assert ppo.data.path == str(folder / "data/train.jsonl")
  assert ppo.ppo.reward == f"run:{folder}/reward_model"
  given = experiment("tldr", tmp_path, "a_model")._config("sft").model
  assert (given.path, given.preset, given.tokenizer) == ("a_model", "", "")


@pytest.mark.parametrize("name", CONFIGS)
def test_only_a_model_from_random_weights_has_its_own_optimizer(name):
  get_config = CONFIGS[name].get_config
  scratch, given = get_config("sft,cpu"), get_config("sft,cpu,pretrained")
  assert (scratch.model.preset, given.model.preset) == ("mini", "")
  assert scratch.optimizer.learning_rate == 4e-3
  assert given.optimizer.learning_rate == 1e-5
  assert given.data == scratch.data and given.epochs == scratch.epochs
  for wrong in ("sft,tpu", "sft,cpu,given", "sft,gpu,pretrained,x"):
    with pytest.raises(ValueError, match="unknown (scale|start) '.*; known: "):
      get_config(wrong)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_the_config_of_every_run_is_right(name, scale, tmp_path):
  module = CONFIGS[name]
  for loss in ("sft", "reward_model", *TASKS[name].methods):
    config = module.get_config(f"{loss},{scale}")
    config.data.path = "x"
    config.model.path = config.model.path or "x"
    if loss == "ppo":
      config.ppo.reward = "run:x"
      length = module.SCALES[scale]["max_new_tokens"]
      assert config.ppo.max_new_tokens == length
    checks.check(config)


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match="no file 'train.jsonl.xz' in the data"):
    run("hh", tmp_path)
  assert not (tmp_path / "run").exists()


def test_a_folder_holds_one_experiment(tmp_path):
  write_dialogues(tmp_path)
  other = experiment("hh", tmp_path, "gpt2")
  other._check()
  with pytest.raises(ValueError, match="of model 'gpt2', not ''; give"):
    run("hh", tmp_path)


@pytest.mark.parametrize(
  ("arguments", "error"),
  [
    (["hh"], "hh needs --data"),
    (["quickstart", "--data=x"], "--data is not a flag of quickstart; those"),
    (["tldr", "--data=x"], "no file 'posts.jsonl.xz' in the data folder 'x'"),
  ],
)
def test_bad_flags_end_in_one_line(arguments, error, tmp_path):
  process = test_end_to_end.start(
    *arguments, f"--workdir={tmp_path}", module="launch.reproduce"
  )
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert err.startswith(f"error: {error}") and err.count("\n") == 1


def test_the_configs_have_the_papers_settings():
  for name, beta in (("hh", 0.1), ("tldr", 0.5)):
    get_config = CONFIGS[name].get_config
    config = get_config("dpo,paper")
    assert config.loss.beta == beta and config.batch_size == 64
    assert config.optimizer.name == "rmsprop"
    assert config.optimizer.learning_rate == 1e-6
    assert config.optimizer.warmup_steps == 150
    judge = get_config("reward_model,paper")
    assert judge.checkpoint.metric == "rewards/accuracies"
    assert judge.checkpoint.every == judge.eval.every > 0

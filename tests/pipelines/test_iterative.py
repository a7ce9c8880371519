"""Rounds of samples, pairs and training: in order, once, upwards."""

import dataclasses
import json
import shlex
import shutil

import pytest

from configs import quickstart
from dpo_jax.checkpoints import run_folder
from dpo_jax.data.sources import synthetic
from dpo_jax.models import config as model_config
from dpo_jax.models import presets
from dpo_jax.pipelines import iterative
from dpo_jax.run import trainer
from dpo_jax.sampling import decode
from tests import test_end_to_end as end_to_end

SMALL = model_config.llama(
  vocab_size=len(synthetic.make_tokenizer()),
  num_layers=2,
  d_model=32,
  d_mlp=48,
  num_heads=4,
  max_positions=128,
)


def _config(folder, loss="dpo"):
  config = quickstart.get_config(loss)
  config.steps, config.batch_size, config.log.every = 3, 4, 1
  config.data.path, config.data.eval_path = "reviews:64", ""
  config.data.cache_dir = str(folder / "cache")
  config.data.row_length = 128
  config.optimizer.warmup_steps, config.optimizer.learning_rate = 0, 3e-3
  if loss != "sft":
    config.model.preset = ""
  return config


def _settings(folder, **changes):
  settings = iterative.Settings(
    policy=str(folder / "sft"),
    reward="synthetic",
    data="reviews:60",
    data_source="synthetic",
    prompts=12,
    samples=4,
    sampling=decode.Settings(12),
    min_margin=0.01,
  )
  return dataclasses.replace(settings, **changes)


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder of a policy, `sft`, and of two rounds, `rounds`."""
  folder = tmp_path_factory.mktemp("iterative")
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.PRESETS, "tiny", SMALL)
    assert trainer.train(_config(folder, "sft"), str(folder / "sft"))
  rounds = str(folder / "rounds")
  assert iterative.run(_config(folder), rounds, _settings(folder), rounds=2)
  return folder


def _refuse(*args, **kwargs):
  raise AssertionError("called")


@pytest.mark.slow
def test_pairs_obey_the_reward(folder):
  for number in (1, 2):
    samples = _rows(folder / f"rounds/samples_{number}.jsonl")
    assert [row["index"] for row in samples] == [
      12 * (number - 1) + i // 4 for i in range(48)
    ]
    by_prompt = {}
    for row in samples:
      reward = synthetic.true_reward(row["prompt"] + row["response"])
      assert row["reward"] == pytest.approx(reward, rel=1e-6)
      by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = _rows(folder / f"rounds/pairs_{number}.jsonl")
    assert 4 <= len(pairs) <= 12 == len(by_prompt)
    for row in samples:
      assert row["ended"] or row["num_tokens"] == 12
    assert {row["ended"] for row in samples} == {True, False}
    for pair in pairs:
      for name in ("chosen", "rejected"):
        ended = (pair[name], pair[f"{name}_ended"])
        same = by_prompt[pair["prompt"]]
        assert ended in [(row["response"], row["ended"]) for row in same]
      chosen, rejected = (
        synthetic.true_reward(pair["prompt"] + pair[name])
        for name in ("chosen", "rejected")
      )
      assert chosen > rejected + 0.01
      rewards = [row["reward"] for row in by_prompt[pair["prompt"]]]
      assert pair["chosen_score"] == max(rewards)
      assert pair["rejected_score"] == min(rewards)


@pytest.mark.slow
def test_a_round_goes_on_from_the_one_before(folder):
  lines = _rows(folder / "rounds/rounds.jsonl")
  names = ["sft", "rounds/round_1", "rounds/round_2"]
  policies = [str(folder / name) for name in names]
  assert [line["policy"] for line in lines] == policies
  assert [line["rounds"] for line in lines] == [0, 1, 2]
  assert abs(lines[0]["kl"]) < 1e-4 < min(abs(x["kl"]) for x in lines[1:])
  for number in (1, 2):
    run = folder / f"rounds/round_{number}"
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["path"] == policies[number - 1]
    assert config["reference"]["path"] == ""
    assert config["data"]["truncate_prompts"] == "always"
    pairs = _rows(folder / f"rounds/pairs_{number}.jsonl")
    assert lines[number - 1]["num_pairs"] == len(pairs)
    # The reference is the policy that the round starts from.
    (first, *_) = end_to_end.metrics(run)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(folder, tmp_path, monkeypatch):
  rounds = tmp_path / "rounds"
  shutil.copytree(folder / "rounds", rounds)
  run = lambda number, **changes: iterative.run(
    _config(folder), str(rounds), _settings(folder, **changes), rounds=number
  )
  expected = (rounds / "rounds.jsonl").read_text()
  expected = expected.replace(str(folder / "rounds"), str(rounds))
  for number in (1, 2):  # the copy's path is another
    path = rounds / f"round_{number}/config.json"
    text = path.read_text().replace(str(folder / "rounds"), str(rounds))
    path.write_text(text)
  with monkeypatch.context() as patch:
    patch.setattr(trainer, "train", _refuse)
    patch.setattr(iterative.model_lib, "Policy", _refuse)
    assert run(2)
    assert (rounds / "rounds.jsonl").read_text() == expected
    with pytest.raises(ValueError, match="iterative.samples was 4 and is 3"):
      run(2, samples=3)
  with monkeypatch.context() as patch:
    begun = []
    patch.setattr(trainer, "train", lambda *args: begun.append(args))
    assert not run(3)
    ((config, workdir),) = begun
    assert workdir == str(rounds / "round_3")
    assert config.data.path == str(rounds / "pairs_3.jsonl")
  lost = rounds / "samples_1.jsonl"
  before = lost.read_bytes()
  lost.unlink()
  assert run(1)
  assert lost.read_bytes() == before


@pytest.mark.slow
def test_the_kl_is_of_what_is_sampled(folder, tmp_path, capsys):
  # At low temperatures one response holds all probability, so that its KL is
  # its surprise under the first policy, which is the policy itself here.
  sampling = decode.Settings(6, temperature=1e-4)
  settings = _settings(folder, sampling=sampling, min_margin=1)
  rounds = str(tmp_path / "rounds")
  with pytest.raises(ValueError, match="round 1: no pair of samples"):
    iterative.run(_config(folder), rounds, settings, rounds=1)
  rows = _rows(tmp_path / "rounds/samples_1.jsonl")
  surprise = sum(-row["reference_logp"] for row in rows) / len(rows)
  (line,) = _rows(tmp_path / "rounds/rounds.jsonl")
  assert surprise > 1 and line["kl"] == pytest.approx(surprise, abs=1e-2)
  head, *_ = iterative.table([line], sampling).splitlines()
  assert "KL at temperature 0.0001, top_p 1 to the first, nats" in head


@pytest.mark.slow
def test_the_first_policy_can_be_the_reference(folder, tmp_path, monkeypatch):
  rounds = tmp_path / "rounds"
  rounds.mkdir()
  shutil.copy(folder / "rounds/samples_1.jsonl", rounds)
  begun = []
  monkeypatch.setattr(trainer, "train", lambda *args: begun.append(args))
  settings = _settings(folder, reference="first", pairs="all")
  assert not iterative.run(_config(folder), str(rounds), settings, rounds=1)
  ((config, _),) = begun
  assert config.reference.path == config.model.path == settings.policy
  assert len(_rows(rounds / "pairs_1.jsonl")) > 12


def test_pairs_by_hand():
  rewards, texts = [0.1, 0.9, 0.5, 0.5], ["a", "b", "c", "d"]
  made = lambda **options: iterative.make_pairs(texts, rewards, **options)
  assert made(pairs="best_worst", min_margin=0) == [(1, 0)]
  assert made(pairs="best_worst", min_margin=0.8) == []
  expected = [(1, 2), (1, 3), (1, 0), (2, 0), (3, 0)]
  assert made(pairs="all", min_margin=0) == expected
  assert made(pairs="all", min_margin=0.45) == [(1, 0)]
  texts = ["a", "a", "c", "d"]
  assert made(pairs="all", min_margin=0.45) == []


# Changes of the settings, the loss, overrides of its config, the message.
MISTAKES = [
  ({"reward": "true"}, "dpo", {}, "unknown reward 'true'; known: run:FOLDER"),
  ({"samples": 1}, "dpo", {}, "samples=1: a pair needs at least 2"),
  ({"pairs": "worst"}, "dpo", {}, "unknown pairs 'worst'; known: best_worst"),
  ({"min_margin": -1}, "dpo", {}, "min_margin=-1: must be at least 0"),
  ({"min_margin": 1}, "dpo", {}, "round 1: no pair of samples has rewards"),
  ({"policy": "absent"}, "dpo", {}, "'absent'"),
  ({"data": "pears"}, "dpo", {}, "the synthetic source takes 'pairs'"),
  ({}, "reward_model", {}, "loss 'reward_model': rounds train a language"),
  ({}, "ppo", {}, "loss 'ppo': rounds train a language model on pairs"),
  ({}, "dpo", {"model.path": "x"}, "model.path='x': rounds set it; allowed"),
  ({}, "dpo", {"data.max_length": 20}, "data.max_length=20: must hold"),
  ({"reference": "first"}, "simpo", {}, "loss 'simpo' has no reference"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "loss", "overrides", "message"), MISTAKES)
def test_mistakes_are_refused_before_a_round(
  changes, loss, overrides, message, folder, tmp_path
):
  config = _config(folder, loss)
  config.update_from_flattened_dict(overrides)
  with pytest.raises(ValueError, match=message):
    settings = _settings(folder, **changes)
    iterative.run(config, str(tmp_path / "rounds"), settings, rounds=1)
  assert not (tmp_path / "rounds/round_1").exists()


def _readme_command(folder):
  """Returns the arguments of the README's command, its runs in a folder."""
  text = (end_to_end.REPOSITORY / "README.md").read_text()
  begin = "    python -m launch.iterate "
  lines = text.replace("\\\n", " ").splitlines()
  (line,) = (line for line in lines if line.startswith(begin))
  typed = shlex.split(line[len(begin) :], comments=True)
  return [argument.replace("=runs/", f"={folder}/runs/") for argument in typed]


def _start(*arguments):
  process = end_to_end.start(*arguments, module="launch.iterate")
  out, err = process.communicate(timeout=1500)
  return process.returncode, out, err


@pytest.mark.slow
def test_the_command_of_the_readme(folder, tmp_path):
  shutil.copytree(folder / "sft", tmp_path / "runs/quickstart/sft")
  typed = _readme_command(tmp_path)
  small = "--prompts=8 --rounds=1 --max_new_tokens=8 --config.steps=2"
  small += f" --config.batch_size=2 --config.data.cache_dir={folder}/cache"
  status, out, err = _start(*typed, "--config.model.preset=", *small.split())
  assert status == 0, out + err
  assert "| rounds | reward |" in out and "| 1 | 0." in out
  status, _, err = _start(*typed, "--config.model.preset=", "--rounds=1")
  assert status == 2 and err.count("\n") == 1
  assert "holds a run of another config: " in err


@pytest.mark.slow
def test_rounds_raise_the_true_reward_by_more_than_three_errors(tmp_path):
  runs = tmp_path / "runs"
  config = quickstart.get_config("sft")
  config.steps, config.data.eval_path = 300, ""
  config.data.cache_dir = str(tmp_path / "cache")
  assert trainer.train(config, str(runs / "quickstart/sft"))
  cache = f"--config.data.cache_dir={tmp_path}/cache"
  status, out, err = _start(*_readme_command(tmp_path), cache)
  assert status == 0, out + err
  lines = _rows(runs / "iterative/rounds.jsonl")
  assert len(lines) == 4
  for before, after in zip(lines, lines[1:]):
    error = (before["reward_error"] ** 2 + after["reward_error"] ** 2) ** 0.5
    assert after["reward"] > before["reward"] + 3 * error, out


@pytest.mark.slow
def test_one_process_works_in_the_folder(folder, tmp_path):
  with run_folder.owned(tmp_path, "works in"):
    with pytest.raises(ValueError, match="another process works in "):
      iterative.run(_config(folder), str(tmp_path), _settings(folder), rounds=1)
  assert not list(tmp_path.iterdir())

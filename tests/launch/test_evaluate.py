"""The commands with a judge, as the README prints them, and their mistakes."""

import concurrent.futures
import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from tests import chat_server

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = [f"question {i}" for i in range(6)]


def _readme_commands():
  """Returns the arguments of each command with a judge, by evaluation."""
  text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
  begin = "    python -m launch.evaluate "
  lines = [x for x in text.splitlines() if x.startswith(begin)]
  typed = [shlex.split(line[len(begin) :], comments=True) for line in lines]
  return {x[0]: x for x in typed if any("--judge=" in y for y in x)}


def _reply(messages):
  """Prefers the response with more characters, the first where none has."""
  question = messages[0]["content"]
  first, second = (
    question.split("\n\nResponse A:\n")[1]
    .split("\n\nFIRST")[0]
    .split("\n\nResponse B:\n")
  )
  letter = "A" if len(first) >= len(second) else "B"
  return f"Comparison: it is longer.\nMore helpful: {letter}"


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder of the files that commands name."""
  folder = tmp_path_factory.mktemp("evaluate")
  for name, text in (("dpo_0.7", "longer than it"), ("sft", ".")):
    rows = [{"prompt": x, "response": text} for x in PROMPTS]
    rows = [x | {"temperature": t} for t in (0.0, 1.0) for x in rows]
    _write(folder / f"{name}.jsonl", rows)
  rows = [{"prompt": x, "chosen": "ok", "rejected": ""} for x in PROMPTS]
  _write(folder / "chosen.jsonl", rows)
  _write(folder / "bad.jsonl", [{"prompt": "question 0"}])
  row = {"instruction": "Add.", "response1": "long", "response2": "x"}
  rows = [row | {"annotator1": 1, "annotator2": k} for k in (1, 1, 2)]
  (folder / "pandalm.json").write_text(json.dumps(rows))
  return folder


@pytest.fixture(scope="module")
def server():
  made = chat_server.ChatServer(_reply)
  with made.running():
    yield made


@pytest.fixture(scope="module")
def run(folder, server):
  """Returns a function that runs a command in the folder."""

  def run(arguments, **environment):
    # HOME: where answers are kept.
    environment = {
      "PYTHONPATH": str(REPOSITORY),
      "HOME": str(folder),
      "OPENAI_BASE_URL": server.url,
      "OPENAI_API_KEY": chat_server.KEY,
      "no_proxy": "*",
    } | environment
    return subprocess.run(
      [sys.executable, "-m", "launch.evaluate", *arguments],
      cwd=folder,
      env=os.environ | environment,
      capture_output=True,
      text=True,
      timeout=200,
    )

  return run


def test_win_rates_come_as_the_readme_says_and_once(run, folder, server):
  command = _readme_commands()["win_rate"]
  command += ["--judge_price=2", "--judge_price=10"]
  done = run(command)
  assert done.returncode == 0, done.stderr
  assert "| dpo | 1 | - | 6 | 6 | 6 | 0 | 0 | 0 | 1.0000 |" in done.stdout
  assert "| sft | 0 | - | 6 | 6 | 0 | 0 | 6 | 0 | 0.0000 |" in done.stdout
  asked = len(server.requests)
  assert asked == 24  # texts are the same at both temperatures
  record = json.loads((folder / "runs/mine/wins/win_rate.json").read_text())
  assert record["usage"]["cost"] == pytest.approx(24 * (200 + 70) / 1e6)
  done = run(command)
  assert done.returncode == 0 and len(server.requests) == asked
  record = json.loads((folder / "runs/mine/wins/win_rate.json").read_text())
  assert record["usage"]["cost"] == 0
  assert record["usage"]["cached_answers"] == 24
  assert (folder / "runs/mine/wins/win_rate.png").stat().st_size > 10_000


def test_a_judge_is_measured_as_the_readme_says(run, folder):
  done = run(_readme_commands()["judge"])
  assert done.returncode == 0, done.stderr
  assert "pandalm.json: 3 of 3 rows kept" in done.stdout
  found = json.loads((folder / "runs/judge/summary.jsonl").read_text())
  # The third row has no majority.
  assert found["ties_in"]["share"] == 1 and found["no_majority"] == 1
  assert found["annotator_annotator"]["ties_in"] == pytest.approx(2 / 3)
  lines = (folder / "runs/judge/comparisons.jsonl").read_text().splitlines()
  assert len(lines) == 3


WIN_RATE = "win_rate --judge=length --baseline=chosen.jsonl --output=runs/x"
MISTAKES = {
  "wins": "unknown evaluation 'wins'; known: preferences, win_rate, judge",
  "judge --judge=length --output=x": "judge needs --data",
  "preferences --data=a.jsonl --output=x": "preferences needs --source",
  f"{WIN_RATE} --policy=sft.jsonl --beta=0.1": (
    "--beta is not a flag of win_rate; those are: baseline, judge, judge_asks"
  ),
  f"{WIN_RATE} --policy=sft.jsonl --seed=-1": "flag --seed=-1: ",
  f"{WIN_RATE} --policy=bad.jsonl": (
    "bad.jsonl, line 1: no column 'response'; columns: prompt"
  ),
  "judge --judge=gpt --data=pandalm.json --output=x": (
    "unknown judge 'gpt'; allowed: endpoint:MODEL, reward:FOLDER"
  ),
}


@pytest.fixture(scope="module")
def mistakes(run):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    done = pool.map(lambda typed: run(typed.split()), MISTAKES)
    return dict(zip(MISTAKES, done, strict=True))


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_in_one_line_and_status_2(mistakes, typed):
  done = mistakes[typed]
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: {MISTAKES[typed]}")


def test_a_refused_key_ends_in_one_line_and_status_2(run):
  command = "judge --judge=endpoint:m --data=pandalm.json --output=runs/x"
  done = run(command.split(), OPENAI_API_KEY="the-wrong-key")
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert "401 Unauthorized" in line and "the-wrong-key" not in line

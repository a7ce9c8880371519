"""A user's mistake ends with status 2 and one line that names the thing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers
import transformers

from dpo_jax.data import synthetic

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PAIR = {"prompt": "the plot", "chosen": " was good .", "rejected": " was bad ."}

# What is typed, and what the one line must say. {} is the folder of the files
# that `inputs` writes; `RUN` is what all commands begin with.
RUN = (
  "--workdir={}/run --config.batch_size=2"
  " --config.data.path={}/good.jsonl --config.model.preset=tiny"
  " --config.model.tokenizer={}/tokenizer --config.data.cache_dir={}/cache"
)
GOOD = "--workdir={}/other --config.steps=1"
CASES = {
  "a broken json line": (
    "--config.data.path={}/broken.jsonl",
    "broken.jsonl, line 3: not JSON",
  ),
  "a missing column": (
    "--config.data.path={}/column.jsonl",
    "column.jsonl, line 2: no column 'rejected'; columns: prompt, chosen",
  ),
  "a wrong type": (
    "--config.data.path={}/type.jsonl",
    "type.jsonl, line 1: column 'chosen' is int (7); allowed: a string",
  ),
  "no such file": (
    "--config.data.path={}/absent.jsonl",
    "no such file: '{}/absent.jsonl'",
  ),
  "an empty file": (
    "--config.data.path={}/empty.jsonl",
    "empty.jsonl' is empty",
  ),
  "an unknown source": (
    "--config.data.source=jsonn",
    "unknown data source 'jsonn'; known: hh, hub, imdb, jsonl, synthetic",
  ),
  "no such model": (
    "--config.model.preset= --config.model.path={}/absent",
    "no such model '{}/absent'",
  ),
  "an unknown preset": (
    "--config.model.preset=tiney",
    "unknown model preset 'tiney'",
  ),
  "an unknown loss": (
    "--config=configs/pairs.py:dpoo",
    "unknown loss 'dpoo'; known: alpha_po",
  ),
  "an unknown loss by its key": (
    "--config.loss.name=dpoo",
    "did you mean 'dpo'?",
  ),
  "a misspelt key": (
    "--config.loss.betta=1",
    "unknown config key 'loss.betta'; did you mean 'loss.beta'?",
  ),
  "a value of another type": (
    "--config.batch_size=many",
    "config.batch_size",
  ),
  "beta at 0": ("--config.loss.beta=0", "loss.beta=0: must be above 0"),
  "a batch larger than the data": (
    "--config.batch_size=5",
    "batch_size=5: larger than the data (4 pairs in {}/good.jsonl); pass"
    " --config.batch_size=4 or less",
  ),
  "a mesh that does not fit": (
    "--config.mesh.fsdp=3",
    "mesh data=1, fsdp=3, tensor=1, expert=1 does not fit 1 devices",
  ),
  "rows that the mesh cannot split": (
    "--config.data.layout=padded --config.microbatch_rows=3",
    "microbatch_rows=3",
  ),
  "a modifier that the loss cannot honour": (
    "--config=configs/pairs.py:aot --config.loss.wpo=True",
    "loss 'aot' does not honour loss.wpo; losses that do: alpha_po",
  ),
  "an optimizer's option": (
    "--config.optimizer.b1=0.9",
    "optimizer 'rmsprop' does not honour optimizer.b1=0.9",
  ),
  "a reference for a loss without": (
    "--config=configs/pairs.py:sft --config.reference.path={}/absent",
    "reference.path='{}/absent': loss 'sft' has no reference",
  ),
  "no reference for a loss with one": (
    "--config.reference.mode=none",
    "reference.mode='none': loss 'dpo' needs a reference",
  ),
  "a run folder of another config": (
    "--workdir={}/other --config.loss.beta=0.2",
    "{}/other holds a run of another config: loss.beta was 0.1 and is 0.2",
  ),
  "a tokenizer without EOS": (
    "--config.model.tokenizer={}/endless",
    "endless' has no end-of-sequence token",
  ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """Returns a folder of good files and of files with one mistake each."""
  folder = tmp_path_factory.mktemp("inputs")
  write = lambda name, lines: (folder / name).write_text("\n".join(lines))
  good = [json.dumps(PAIR)] * 4
  write("good.jsonl", good)
  write("broken.jsonl", [*good[:2], good[0][:-5], good[0]])
  partial = {k: v for k, v in PAIR.items() if k != "rejected"}
  write("column.jsonl", [good[0], json.dumps(partial)])
  write("type.jsonl", [json.dumps(PAIR | {"chosen": 7})])
  write("empty.jsonl", [])
  synthetic.make_tokenizer().save_pretrained(folder / "tokenizer")
  words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words)
  ).save_pretrained(folder / "endless")
  return folder


# Imports once what every command imports, then runs each in a fork of its own.
COMMANDS = """
import json, os, runpy, sys
from dpo_jax import trainer
for line in sys.stdin:
  arguments, errors = json.loads(line)
  if (child := os.fork()) == 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["launch.train", *arguments]
    runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def results(inputs):
  """Returns (status, stderr) of every command."""
  commands = {}
  for name, (typed, _) in {"good": (GOOD, ""), **CASES}.items():
    config = "" if "--config=" in typed else "--config=configs/pairs.py:dpo"
    arguments = f"{config} {RUN} {typed}".replace("{}", str(inputs)).split()
    # Overrides are of the config before them.
    arguments.sort(key=lambda argument: not argument.startswith("--config="))
    commands[name] = arguments, str(inputs / f"{name}.err")
  done = subprocess.run(
    [sys.executable, "-c", COMMANDS],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": ""},
    input="".join(json.dumps(command) + "\n" for command in commands.values()),
    capture_output=True,
    text=True,
    check=True,
    timeout=500,
  )
  results = {
    name: (int(status), pathlib.Path(errors).read_text())
    for status, (name, (_, errors)) in zip(
      done.stdout.splitlines(), commands.items(), strict=True
    )
  }
  status, error = results.pop("good")
  assert status == 0, error
  return results


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_line_and_status_2(name, results, inputs):
  status, error = results[name]
  assert status == 2, error
  (line,) = error.splitlines()
  assert line.startswith("error: ")
  assert CASES[name][1].replace("{}", str(inputs)) in line

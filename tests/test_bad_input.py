"""A user's mistake ends with status 2 and one line that names the thing."""

import json
import lzma
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers
import transformers

from dpo_jax.data.sources import synthetic

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
  "half a character": (
    "--config.data.path={}/half.jsonl",
    "half.jsonl, line 2: character 3 of 'x \\ud83d' is '\\ud83d', half of a",
  ),
  "garbage behind a compressed stream": (
    "--config.data.path={}/garbage.jsonl.xz",
    "garbage.jsonl.xz' cannot be read from line 5 on: ",
  ),
  "a tokenizer without a backend in Rust": (
    "--config.model.tokenizer={}/bytes",
    "tokenizer '{}/bytes' is a ByT5Tokenizer, which has no tokenizer.json",
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
# One of each place that refuses; the others are slow.
QUICK = (
  "a broken json line",
  "no such model",
  "an unknown loss",
  "a misspelt key",
  "a mesh that does not fit",
  "a run folder of another config",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  """Returns a folder of good files and of files with one mistake each."""
  folder = tmp_path_factory.mktemp("inputs")
  write = lambda name, lines: (folder / name).write_text("\n".join(lines))
  good = [json.dumps(PAIR)] * 4
  write("good.jsonl", good)
  write("broken.jsonl", [*good[:2], good[0][:-5], good[0]])
  half = json.dumps(PAIR | {"chosen": "x \ud83d"})
  write("half.jsonl", [good[0], half])
  lines = "".join(row + "\n" for row in good).encode()
  (folder / "garbage.jsonl.xz").write_bytes(lzma.compress(lines) + b"garbage")
  partial = {k: v for k, v in PAIR.items() if k != "rejected"}
  write("column.jsonl", [good[0], json.dumps(partial)])
  write("type.jsonl", [json.dumps(PAIR | {"chosen": 7})])
  write("empty.jsonl", [])
  synthetic.make_tokenizer().save_pretrained(folder / "tokenizer")
  transformers.ByT5Tokenizer().save_pretrained(folder / "bytes")
  words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words)
  ).save_pretrained(folder / "endless")
  return folder


# Imports once what every command imports, then runs each in a fork of its own.
COMMANDS = """
import json, os, runpy, sys
from dpo_jax.run import trainer
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
def run(inputs):
  """Returns a function that runs what is typed: its (status, stderr)."""
  process = subprocess.Popen(
    [sys.executable, "-c", COMMANDS],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": ""},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def run_typed(typed):
    config = "" if "--config=" in typed else "--config=configs/pairs.py:dpo"
    arguments = f"{config} {RUN} {typed}".replace("{}", str(inputs)).split()
    # Overrides are of the config before them.
    arguments.sort(key=lambda argument: not argument.startswith("--config="))
    errors = inputs / "stderr"
    errors.unlink(missing_ok=True)
    process.stdin.write(json.dumps([arguments, str(errors)]) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline()), errors.read_text()

  status, error = run_typed(GOOD)
  assert status == 0, error
  yield run_typed
  process.stdin.close()
  process.wait()


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
  ],
)
def test_a_mistake_ends_in_one_line_and_status_2(name, run, inputs):
  status, error = run(CASES[name][0])
  assert status == 2, error
  (line,) = error.splitlines()
  assert line.startswith("error: ")
  assert CASES[name][1].replace("{}", str(inputs)) in line

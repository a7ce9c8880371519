"""A model that samples and scores; the command that writes samples."""

import json

import jax
import numpy as np
import pytest

from dpo_jax import files
from dpo_jax import policy as policy_lib
from dpo_jax.data import tokenize
from dpo_jax.sampling import decode
from tests import test_end_to_end

PROMPTS = ["Once upon a time", "One day, a big dog", "Tom"]
STORY = (
  ", there was a little girl named Lily. She loved to play outside in the"
  " park. One day, she saw a big, red ball. She wanted to play with it, but"
  " it was too high.\nLily's mom said, \"Lily, let's go to the park"
)


@pytest.fixture(scope="module")
def folder(shared_dir):
  return str(shared_dir / "data/models/stories260K")


@pytest.fixture(scope="module")
def policy(folder):
  return policy_lib.Policy(folder)


def test_greedy_of_a_pretrained_model_is_its_published_text(policy):
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS[:1])
  length = len(policy.tokenizer(STORY, add_special_tokens=False).input_ids)
  settings = decode.Settings(length + 5, temperature=0.0)
  ((sample,),) = policy.sample(prompts, settings, seed=0)
  whole = policy.tokenizer.decode(
    prompts[0] + sample.tokens, skip_special_tokens=True
  )
  assert whole.startswith(PROMPTS[0] + STORY)


def test_logps_of_samples_are_those_of_the_training_primitive(policy):
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS)
  settings = decode.Settings(40, temperature=0.8, top_p=0.9)
  found = policy.sample(prompts, settings, seed=0, samples_per_prompt=4)
  samples = [sample for samples in found for sample in samples]
  scored = policy.logps(
    [prompt for prompt in prompts for _ in range(4)],
    [sample.tokens for sample in samples],
  )
  sampled = [sample.logps.sum() for sample in samples]
  assert min(scored) < -10
  np.testing.assert_allclose(sampled, scored, atol=1e-4 * 40)


def _write(folder, output, **options):
  policy_lib.write_samples(
    folder,
    PROMPTS,
    decode.Settings(12, temperature=options.pop("temperature", 1.0)),
    str(output),
    seed=0,
    samples_per_prompt=2,
    max_prompt_length=6,
    batch_rows=16,
    **options,
  )


def test_sampling_that_was_killed_goes_on_to_the_same_file(
  folder, tmp_path, capsys, monkeypatch
):
  _write(folder, tmp_path / "whole.jsonl")
  assert "3 prompts, 1 of them truncated" in capsys.readouterr().out
  whole = (tmp_path / "whole.jsonl").read_text()
  lines = [json.loads(line) for line in whole.splitlines()]
  assert [(x["index"], x["sample"]) for x in lines] == [
    (i, j) for i in range(3) for j in range(2)
  ]
  assert [x["prompt"] for x in lines[::2]] == PROMPTS
  for line in lines:
    assert line["response"] and line["num_tokens"] <= 12 and line["logp"] < 0
    assert line["ended"] or line["num_tokens"] == 12
    assert line["temperature"] == 1
  killed = tmp_path / "killed.jsonl"
  with monkeypatch.context() as patch:
    patch.setattr(policy_lib.files, "write_lines", _fail)
    with pytest.raises(OSError, match="killed"):
      _write(folder, killed)
  part = tmp_path / "killed.jsonl.part"
  rows = part.read_text().splitlines(keepends=True)
  assert len(rows) == 4
  part.write_text("".join(rows[:2]) + rows[2][:30])
  drawn = []
  sample = decode.Sampler.sample

  def counted(self, prompts, *args, **kwargs):
    drawn.extend(prompts)
    return sample(self, prompts, *args, **kwargs)

  monkeypatch.setattr(decode.Sampler, "sample", counted)
  _write(folder, killed)
  assert len(drawn) == 2
  assert killed.read_text() == whole
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "killed.jsonl",
    "whole.jsonl",
  ]


def _fail(*_):
  raise OSError("killed")


def test_one_process_writes_a_file_of_samples(folder, tmp_path):
  output = tmp_path / "samples.jsonl"
  with files.owned_file(output):
    with pytest.raises(ValueError, match="another process writes .*s.jsonl$"):
      _write(folder, output)
  assert not list(tmp_path.iterdir())


def test_a_part_of_other_samples_is_refused(folder, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(policy_lib.files, "write_lines", _fail)
    with pytest.raises(OSError, match="killed"):
      _write(folder, tmp_path / "out.jsonl")
  with pytest.raises(ValueError, match="samples of another settings: delete"):
    _write(folder, tmp_path / "out.jsonl", temperature=0.5)


def test_the_command_samples_a_file_of_prompts(folder, tmp_path):
  data = tmp_path / "prompts.jsonl"
  rows = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "response": "."}]
  rows.append(rows[0])  # the same prompt once more
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  output = tmp_path / "samples.jsonl"

  def run(*more):
    process = test_end_to_end.start(
      *(f"--source={folder}", f"--data={data}", f"--output={output}"),
      *("--samples=4", "--temperature=0.7", "--max_new_tokens=8", *more),
      module="launch.sample",
    )
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err

  status, out, err = run()
  assert status == 0, err
  assert out.splitlines()[-1] == f"samples: {output}"
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["index"] for line in lines] == [0] * 4 + [1] * 4
  status, _, err = run("--temperature=-1")
  assert status == 2
  assert err.splitlines() == [
    "error: temperature=-1: must be finite, at least 0"
  ]


def test_a_policy_is_computed_in_the_dtype_asked_for(folder):
  policy = policy_lib.Policy(folder, dtype="bfloat16")
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS)
  found = policy.sample(prompts, decode.Settings(4), seed=0)
  dtypes = {x.dtype for x in jax.tree.leaves(policy._sampler.params["block_0"])}
  assert dtypes == {jax.numpy.dtype("bfloat16"), jax.numpy.dtype("float32")}
  assert all(np.isfinite(sample.logps).all() for (sample,) in found)

"""A model that samples and scores; the command that writes samples."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpo_jax.data import tokenize, tokenizer_files
from dpo_jax.host import files
from dpo_jax.inference import export
from dpo_jax.inference import model as model_lib
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
  return model_lib.Policy(folder)


def test_a_prompt_that_is_no_text_is_named(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "a"}\n{"prompt": "b \\ud83d"}\n')
  with pytest.raises(ValueError, match="prompts.jsonl, line 2: character 3 of"):
    model_lib.read_prompts("jsonl", str(path), split="")


def test_greedy_of_a_pretrained_model_is_its_published_text(policy):
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS[:1])
  length = len(policy.tokenizer(STORY, add_special_tokens=False).input_ids)
  settings = decode.Settings(length + 5, temperature=0.0)
  ((sample,),) = policy.sample(prompts, settings, seed=0)
  whole = policy.tokenizer.decode(
    prompts[0] + sample.tokens, skip_special_tokens=True
  )
  assert whole.startswith(PROMPTS[0] + STORY)


@pytest.fixture(scope="module")
def sampled(policy):
  """Returns the tokens of `PROMPTS`, and four samples of each."""
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS)
  settings = decode.Settings(40, temperature=0.8, top_p=0.9)
  return prompts, policy.sample(prompts, settings, seed=0, samples_per_prompt=4)


def test_logps_of_samples_are_those_of_the_training_primitive(policy, sampled):
  prompts, found = sampled
  samples = [sample for samples in found for sample in samples]
  scored = policy.logps(
    [prompt for prompt in prompts for _ in range(4)],
    [sample.tokens for sample in samples],
  )
  sampled = [sample.logps.sum() for sample in samples]
  assert min(scored) < -10
  np.testing.assert_allclose(sampled, scored, atol=1e-4 * 40)


def test_a_response_behind_a_prompt_has_the_logps_of_the_whole_text(policy):
  """Values of transformers 5.23, float32: the whole text, cut behind prompts.

  The tokenizer puts a space in front of every text that it is given.
  """
  story = "Once upon a time, there was a little girl named"
  rows = [
    (story, " Lily. She loved to play.", -31.600),
    (story, " Tom. He was sad.", -42.480),
    ("Once upon a time,\n", "there was a girl.", -60.466),
  ]
  prompts, responses, expected = map(list, zip(*rows, strict=True))
  logps = policy.logps(
    tokenize.encode_prompts(policy.tokenizer, prompts),
    tokenize.encode_responses(policy.tokenizer, prompts, responses),
  )
  np.testing.assert_allclose(logps, expected, atol=1e-3)


def test_sampled_responses_come_back_as_the_tokens_that_were_sampled(
  policy, sampled
):
  prompts, found = sampled
  for text, prompt, samples in zip(PROMPTS, prompts, found, strict=True):
    responses = policy.responses(prompt, samples)
    again = tokenize.encode_responses(policy.tokenizer, [text] * 4, responses)
    for sample, ids in zip(samples, again, strict=True):
      assert ids[: len(sample.tokens)] == sample.tokens


def test_a_sampled_reply_is_the_content_of_its_message(policy, monkeypatch):
  """The space that this template puts in front of it is not said twice."""
  template = (
    "{% for m in messages %} {{ m.content }}{{ '' if loop.last else ':' }}"
  )
  template += "{% endfor %}{{ ':' if add_generation_prompt }}"
  tokenizer = policy.tokenizer
  monkeypatch.setattr(tokenizer, "chat_template", template)
  chat = [{"role": "user", "content": "Tom"}]
  reply = [{"role": "assistant", "content": "there was"}]
  (prompt,) = tokenize.encode_prompts(tokenizer, [chat])
  (ids,) = tokenize.encode_responses(tokenizer, [chat], [reply])
  zeros = np.zeros(len(ids), np.float32)
  sample = decode.Sample(ids, zeros, True, zeros)
  (line,) = model_lib._lines(policy, chat, prompt, [sample], {})
  assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["▁there", "▁was"]
  assert line["response"] == "there was"


@pytest.fixture(scope="module")
def stopping(folder, policy, tmp_path_factory):
  """The same model, which ends at its second greedy token as well.

  Its chat template ends a turn with yet another token.
  """
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS[:1])
  settings = decode.Settings(2, temperature=0.0)
  ((sample,),) = policy.sample(prompts, settings, seed=0)
  target = tmp_path_factory.mktemp("stopping")
  (target / "model.safetensors").symlink_to(f"{folder}/model.safetensors")
  shutil.copy(f"{folder}/config.json", target)
  tokenizer = tokenizer_files.load_tokenizer(folder)
  tokenizer.chat_template = (
    "{% for m in messages %}{{ m.content }}<unk>{% endfor %}"
  )
  tokenizer.save_pretrained(target)
  stops = [tokenizer.eos_token_id, sample.tokens[1]]
  values = {"eos_token_id": stops, "temperature": 0.6}
  (target / "generation_config.json").write_text(json.dumps(values))
  return target, sample.tokens, (*stops, tokenizer.unk_token_id)


def test_a_sample_ends_at_any_stop_token_of_its_model(stopping, tmp_path):
  folder, (first, _), stops = stopping
  output = tmp_path / "samples.jsonl"
  model_lib.write_samples(
    str(folder),
    PROMPTS[:1],
    decode.Settings(24, temperature=0.0),
    str(output),
    seed=0,
    samples_per_prompt=1,
    max_prompt_length=64,
  )
  line = json.loads(output.read_text())
  assert (line["num_tokens"], line["ended"]) == (2, True)
  # The stop token is no text of the response, special or not.
  found = model_lib.Policy(str(folder))
  assert found.stop_ids == stops
  prompt = tokenize.encode_prompts(found.tokenizer, PROMPTS[:1])
  _, (text,) = tokenize.decode(found.tokenizer, prompt, [[first]])
  assert line["response"] == text


def test_an_export_keeps_every_stop_token_and_the_chat_template(
  stopping, tmp_path
):
  folder, _, stops = stopping
  export.write(str(folder), str(tmp_path / "exported"))
  read = lambda name: json.loads((tmp_path / "exported" / name).read_text())
  assert read("config.json")["eos_token_id"] == list(stops)
  assert read("generation_config.json") == {
    "eos_token_id": list(stops),
    "temperature": 0.6,
  }
  exported = tokenizer_files.load_tokenizer(str(tmp_path / "exported"))
  given = tokenizer_files.load_tokenizer(str(folder))
  assert exported.chat_template == given.chat_template


def _write(folder, output, **options):
  model_lib.write_samples(
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
    patch.setattr(model_lib.files, "write_lines", _fail)
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
    patch.setattr(model_lib.files, "write_lines", _fail)
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
  policy = model_lib.Policy(folder, dtype="bfloat16")
  prompts = tokenize.encode_prompts(policy.tokenizer, PROMPTS)
  found = policy.sample(prompts, decode.Settings(4), seed=0)
  dtypes = {x.dtype for x in jax.tree.leaves(policy._sampler.params["block_0"])}
  assert dtypes == {jax.numpy.dtype("bfloat16"), jax.numpy.dtype("float32")}
  assert all(np.isfinite(sample.logps).all() for (sample,) in found)

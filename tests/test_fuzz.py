"""Whatever users' files and flags hold: the right values, or one line.

Every mutation is read as `launch.train` reads data, config, flags and weights.
Either it is read, and then what it holds is what comes out; or a ValueError
says what is wrong, which a command shows in one line and ends with status 2.
"""

import functools
import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from absl import flags

from dpo_jax.checkpoints import run_folder
from dpo_jax.run import experiment
from launch import cli

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
COUNTS = {"rows": 400, "weights": 250, "config": 150, "flags": 200}
# What stands for a value: of every type, and beyond every bound.
VALUES = [
  *(None, True, False, 0, 1, -1, 2, 64, 2**31, 2**63, 10**400, -(2**70)),
  *(0.0, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
  *("", "x", "a story", "../x", "\ud800", "\0", "é" * 300, [], [0], [[]]),
  *({}, {"a": 1}, [{"role": "user", "content": "a"}], [{"role": None}]),
]


class Commands:
  """Reads what a command would read."""

  def __init__(self, folder):
    self.folder = folder
    self._overrides = {
      "data.path": folder / "rows.jsonl",
      "data.cache_dir": folder / "cache",
      "data.max_length": 100_000,
      "data.max_prompt_length": 50_000,
      "model.path": folder / "model",
      "batch_size": 1,
      "steps": 1,
    }

  def __call__(self, part="rows", **changes):
    """Returns what was read; None where it ended in one line."""
    try:
      config = cli.load_config(
        f"{REPOSITORY}/configs/pairs.py:dpo", self._overrides | changes
      )
      built = experiment.build(config)
      found = {"settings": built.settings, "model": built.scorer.policy}
      if part == "weights":
        return found | {"weights": jax.device_get(built.load_policy())}
    except (ValueError, flags.Error) as error:
      line = " ".join(str(error).split())
      assert 0 < len(line) < 2000 and "Traceback" not in line, line
      return None
    return found | {
      "rows": _lists(built.loader),
      "report": built.loader.dataset.report,
    }


def _lists(batches):
  """Returns the token lists of prompt and responses of each row."""
  lengths = batches.dataset.lengths
  tokens = batches.dataset.take(np.arange(len(lengths)))
  columns = [
    [x.tolist() for x in np.split(column.values, column.offsets[1:-1])]
    for column in (tokens.prompt, *tokens.responses)
  ]
  return [list(row) for row in zip(*columns, strict=True)]


def _tokenizer():
  """Returns a tokenizer of bytes, which loses nothing of a text."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {piece: place for place, piece in enumerate(["</s>", *alphabet])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["</s>"])
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="</s>"
  )


def _write_model(folder):
  """Writes a small Llama, by other code than ours."""
  rng = np.random.default_rng(0)
  width, mlp, vocab = 16, 24, 257
  shapes = {
    "model.embed_tokens.weight": (vocab, width),
    "model.norm.weight": (width,),
    "lm_head.weight": (vocab, width),
  }
  for layer in range(2):
    names = {
      **{f"self_attn.{x}_proj": (width, width) for x in "qkvo"},
      "mlp.gate_proj": (mlp, width),
      "mlp.up_proj": (mlp, width),
      "mlp.down_proj": (width, mlp),
      "input_layernorm": (width,),
      "post_attention_layernorm": (width,),
    }
    shapes |= {
      f"model.layers.{layer}.{name}.weight": shape
      for name, shape in names.items()
    }
  weights = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  folder.mkdir()
  safetensors.numpy.save_file(weights, folder / "model.safetensors")
  config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": vocab,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
  }
  (folder / "config.json").write_text(json.dumps(config))
  _tokenizer().save_pretrained(folder)


ROWS = [
  {"prompt": "once ", "chosen": "upon a time", "rejected": "up"},
  {"prompt": "é\n", "chosen": " ü \u2028", "rejected": "\U0001f600", "n": 1},
  {"prompt": "a", "chosen": "b", "rejected": "b", "chosen_ended": False},
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fuzz")
  _write_model(folder / "model")
  (folder / "rows.jsonl").write_bytes(_lines(ROWS))
  made = Commands(folder)
  assert made()["rows"] == [_tokens(row) for row in ROWS]
  return made


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
  """A flag may name any folder, to which caches are then written."""
  monkeypatch.chdir(tmp_path)


def _check_both_happen(reads):
  """Checks that some mutations were read, and some refused."""
  assert 0.05 < sum(reads) / len(reads) < 0.95, reads


def _is_same(ours, theirs):
  return all(
    map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))
  )


def _lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


@functools.cache
def _ids(text):
  return _tokenizer()(text, add_special_tokens=False)["input_ids"]


def _tokens(row):
  """Returns what a row of strings is: bytes, and the end of what ended."""
  prompt = _ids(row["prompt"]) or [0]
  responses = [
    _ids(row[name]) + [0] * (row.get(f"{name}_ended") != 0)
    for name in ("chosen", "rejected")
  ]
  return [prompt, *responses]


def _paths(tree, path=()):
  yield path
  inner = (
    tree.items()
    if isinstance(tree, dict)
    else enumerate(tree)
    if isinstance(tree, list)
    else ()
  )
  for key, value in inner:
    yield from _paths(value, (*path, key))


def _mutate(tree, rng):
  """Returns a tree of JSON with one value taken out, renamed or replaced."""
  tree = json.loads(json.dumps(tree))
  *path, key = rng.choice(list(_paths(tree))[1:])
  node = functools.reduce(lambda x, at: x[at], path, tree)
  kind = rng.random()
  if kind < 0.2:
    del node[key]
  elif kind < 0.3 and isinstance(node, dict):
    node[str(rng.choice(VALUES))] = node.pop(key)
  elif kind < 0.5 and type(node[key]) in (int, float):
    node[key] += rng.choice([-8, -4, -1, 1, 4, 8])
  else:
    node[key] = rng.choice(VALUES)
  return tree


def _bytes(content, rng):
  """Returns bytes with some changed, lost or doubled."""
  content = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    place = rng.randrange(len(content))
    kind = rng.random()
    if kind < 0.6:
      content[place] = rng.randrange(256)
    elif kind < 0.8:
      del content[place : place + rng.randint(1, 9)]
    else:
      content[place:place] = content[place : place + rng.randint(1, 99)]
  return bytes(content)


def _changed_rows(rng):
  if rng.random() < 0.6:
    return _lines(_mutate(ROWS, rng))
  return _bytes(_lines(ROWS), rng)


@pytest.mark.slow
def test_rows_are_read_as_they_are_or_refused(commands):
  path = commands.folder / "rows.jsonl"
  reads = []
  try:
    for seed in range(COUNTS["rows"]):
      path.write_bytes(_changed_rows(random.Random(seed)))
      found = commands()
      reads.append(found is not None)
      if found is None:
        continue
      lines = path.read_bytes().decode().rstrip().split("\n")
      rows = [json.loads(line) for line in lines]
      report = found["report"]
      num_dropped = sum(report.dropped.values())
      assert report.read == len(rows), seed
      assert report.kept + num_dropped == report.read, seed
      plain = [
        row
        for row in rows
        if all(
          isinstance(row.get(x), str) for x in ("prompt", "chosen", "rejected")
        )
      ]
      if not num_dropped and len(plain) == len(rows):
        assert found["rows"] == [_tokens(row) for row in rows], seed
  finally:
    path.write_bytes(_lines(ROWS))
  _check_both_happen(reads)


def _changed_weights(content, rng):
  size = 8 + int.from_bytes(content[:8], "little")
  header, data, kind = content[8:size], bytearray(content[size:]), rng.random()
  if kind < 0.2:
    return _bytes(content[:size], rng) + data
  if kind < 0.3:
    return content[: rng.randrange(len(content))]
  if kind < 0.4:  # the last bits of a number
    data[4 * rng.randrange(len(data) // 4)] ^= rng.randrange(1, 256)
  elif kind < 0.5:  # the same, in another order
    names = list(json.loads(header).items())
    rng.shuffle(names)
    header = json.dumps(dict(names) | {"__metadata__": {"a": "b"}}).encode()
  else:
    header = json.dumps(_mutate(json.loads(header), rng)).encode()
  return len(header).to_bytes(8, "little") + header + data


@pytest.mark.slow
def test_weights_are_those_that_their_format_says_or_refused(commands):
  path = commands.folder / "model" / "model.safetensors"
  content, right = path.read_bytes(), commands(part="weights")["weights"]
  original = safetensors.numpy.load_file(path)
  reads = []
  try:
    for seed in range(COUNTS["weights"]):
      path.write_bytes(_changed_weights(content, random.Random(seed)))
      found = commands(part="weights")
      reads.append(found is not None)
      if found is None:
        continue
      stored = safetensors.numpy.load_file(path)  # may not refuse it either
      expected = right
      if any(not np.array_equal(original[k], x) for k, x in stored.items()):
        safetensors.numpy.save_file(stored, path)
        expected = commands(part="weights")["weights"]
      assert _is_same(found["weights"], expected), seed
  finally:
    path.write_bytes(content)
  _check_both_happen(reads)


@pytest.mark.slow
def test_a_models_config_is_taken_at_its_word_or_refused(commands):
  path = commands.folder / "model" / "config.json"
  content, right = path.read_text(), commands(part="weights")
  reads = []
  try:
    for seed in range(COUNTS["config"]):
      values = _mutate(json.loads(content), random.Random(seed))
      path.write_text(json.dumps(values))
      found = commands(part="weights")
      reads.append(found is not None)
      if found is None:
        continue
      assert _is_same(found["weights"], right["weights"]), seed
      said = [*values.values(), *map(_as_float, values.values())]
      # A key that is gone or null has its family's default.
      is_default = len(values) < len(json.loads(content)) or None in said
      for name, value in vars(found["model"]).items():
        is_right = repr(value) in map(repr, [vars(right["model"])[name], *said])
        assert is_right or is_default, (seed, name)
  finally:
    path.write_text(content)
  _check_both_happen(reads)


def _as_float(value):
  is_number = isinstance(value, int | float) and abs(value) < 1e300
  return float(value) if is_number else value


def _typed(value):
  """Returns what a user would type for a value."""
  return value if isinstance(value, str) else json.dumps(value)


def _is_meant(found, text):
  """Returns whether a setting is what was typed."""
  if isinstance(found, bool) or found is None:
    return text.lower() in (str(found).lower(), "null", str(int(found or 0)))
  if isinstance(found, int | float):
    return math.isclose(float(text), found) or math.isnan(found)
  return str(found) == text


@pytest.mark.slow
def test_flags_set_what_they_say_or_are_refused(commands):
  right = run_folder.flatten(commands()["settings"])
  reads = []
  for seed in range(COUNTS["flags"]):
    rng = random.Random(seed)
    key, text = rng.choice(sorted(right)), _typed(rng.choice(VALUES))
    found = commands(**{key: text})
    reads.append(found is not None)
    if found is None:
      continue
    settings = run_folder.flatten(found["settings"])
    assert _is_meant(settings.pop(key), text), (seed, key, text)
    others = {name: x for name, x in right.items() if name != key}
    assert settings == others, (seed, key, text)
  _check_both_happen(reads)


def test_the_mutations_are_a_thousand():
  assert sum(COUNTS.values()) == 1000

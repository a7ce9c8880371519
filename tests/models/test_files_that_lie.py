"""Model folders that say what cannot be are refused in one line.

A small model is written once, and each test changes what its files say.
Nothing but ValueError may come out, or the weights that were written.
"""

import functools
import json
import os
import pathlib
import random
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import lora, transformer
from dpo_jax.models.huggingface import adapters as huggingface_adapters
from dpo_jax.models.huggingface import folder as huggingface
from tests import drawn

SIZES = {
  "vocab_size": 20,
  "num_layers": 2,
  "d_model": 8,
  "d_mlp": 12,
  "num_heads": 2,
  "max_positions": 9,
}
CONFIG = model_config.llama(**SIZES)
ADAPTED = lora.with_lora(CONFIG, model_config.Lora(2, 3.0, "query|down"))
MUTATIONS = 120
# What stands for a value: of every type, and beyond every bound.
VALUES = [
  *(None, True, False, 0, 1, -1, 2, 64, 2**31, 2**63, 10**400, -(2**70)),
  *(0.0, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
  *("", "x", "gpt2", "../x", "/etc/passwd", "\ud800", "\0", [], [0], [[]]),
  *(["a"], {}, {"a": 1}, {"rope_type": "linear"}, {"rope_type": "llama3"}),
]


def _mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def _written(config):
  """Returns a model's parameters, and its files by their names."""
  params = drawn.weights(transformer.param_shapes(config))
  params = jax.device_put(params, transformer.layouts(_mesh(), config))
  with tempfile.TemporaryDirectory() as folder:
    huggingface.save_model(folder, config, params)
    return params, _read(folder)


@functools.cache
def _written_adapters():
  """Returns the same of adapters."""
  adapters = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), lora.shapes(ADAPTED)
  )
  with tempfile.TemporaryDirectory() as folder:
    huggingface_adapters.save(folder, ADAPTED, adapters, base="base")
    return adapters, _read(folder)


def _read(folder):
  return {x.name: x.read_bytes() for x in pathlib.Path(folder).iterdir()}


def _save(folder, config=CONFIG):
  """Writes a model, or the adapters where it is None; returns its numbers."""
  numbers, files = _written(config) if config else _written_adapters()
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return numbers


def _load(folder):
  config = huggingface.read_config(str(folder))
  layouts = transformer.layouts(_mesh(), config)
  return huggingface.load_params(str(folder), config, layouts)


def _load_adapters(folder):
  read = huggingface_adapters.read_lora(str(folder), CONFIG)
  config = lora.with_lora(CONFIG, read)
  layouts = lora.layouts(_mesh(), config)
  return huggingface_adapters.load(str(folder), config, layouts)


def _is_same(one, other):
  return jax.tree.structure(one) == jax.tree.structure(other) and all(
    map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))
  )


def _split(content):
  """Returns a safetensors file's header and its data."""
  end = 8 + int.from_bytes(content[:8], "little")
  return json.loads(content[8:end]), content[end:]


def _join(header, data):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def _update(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refuse(folder, *parts, load=_load):
  with pytest.raises(ValueError) as error:
    load(folder)
  for part in (str(folder), *parts):
    assert part in str(error.value)
  assert "\n" not in str(error.value)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def _entry(**changes):
  """Returns what changes a tensor's entry, and the rest of the file not."""
  return lambda header: header | {NORM: header[NORM] | changes}


def _moved(by):
  """Returns what moves a tensor."""

  def move(header):
    offsets = [offset + by for offset in header[NORM]["data_offsets"]]
    return _entry(data_offsets=offsets)(header)

  return move


@pytest.mark.parametrize(
  "change, message",
  [
    pytest.param(_moved(-4), "must begin at", id="overlap"),
    pytest.param(_moved(4), "must begin at", id="gap"),
    pytest.param(_moved(-(10**4)), "from 0 to", id="in the header"),
    pytest.param(_entry(shape=[4]), "data_offsets", id="shape"),
    pytest.param(_entry(shape=[-8, -1]), ".shape=[-8, -1]", id="negative"),
    pytest.param(_entry(shape=["8"]), ".shape=['8']: must", id="a text"),
    pytest.param(_entry(shape=8), ".shape=8: must be a list", id="no list"),
    pytest.param(_entry(shape=[8.0]), ".shape=[8.0]: must", id="a float"),
    pytest.param(_entry(dtype="F64"), ".dtype='F64': must be", id="dtype"),
    pytest.param(_entry(dtype=[]), ".dtype=[]: must be", id="dtype's type"),
    pytest.param(_entry(data_offsets=[0]), "a list of 2 times", id="one"),
    pytest.param(_entry(data_offsets=None), "is missing", id="no offsets"),
    pytest.param(lambda x: x | {NORM: 3}, f"{NORM}=3: must be", id="entry"),
    pytest.param(
      lambda x: {k: v for k, v in x.items() if k != NORM},
      "must begin at",
      id="bytes of no tensor",
    ),
    pytest.param(
      lambda x: x | {"__metadata__": {"format": 1}},
      "__metadata__={'format': 1}: must be",
      id="metadata",
    ),
    pytest.param(lambda x: [x], "must be a JSON object", id="a list"),
    pytest.param(lambda x: b"{" * 10**5, "not JSON", id="depth"),
    pytest.param(lambda x: b"\xff\xfe" * 9, "not JSON", id="no text"),
    pytest.param(
      lambda x: json.dumps(x).replace(EMBEDDING, NORM).encode(),
      "stands there twice",
      id="twice",
    ),
  ],
)
def test_headers_that_lie_are_refused(tmp_path, change, message):
  _save(tmp_path)
  path = tmp_path / "model.safetensors"
  header, data = _split(path.read_bytes())
  # Not the last tensor's, so that what is wrong is not the file's length.
  assert header[NORM]["data_offsets"][1] < len(data)
  path.write_bytes(_join(change(header), data))
  _refuse(tmp_path, "model.safetensors", message)


@pytest.mark.parametrize(
  "change",
  [
    lambda x: x[:5],
    lambda x: x[:100],
    lambda x: x[:-4],
    lambda x: x + b"1234",
    lambda x: (2**63).to_bytes(8, "little") + x[8:],
    lambda x: (10).to_bytes(8, "little") + x[8:],
    lambda x: b"",
  ],
)
def test_files_cut_and_lengthened_are_refused(tmp_path, change):
  _save(tmp_path)
  path = tmp_path / "model.safetensors"
  path.write_bytes(change(path.read_bytes()))
  _refuse(tmp_path, "model.safetensors")


@pytest.mark.parametrize(
  "key, value",
  [
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 0.0),
    ("rms_norm_eps", "1e-6"),
    ("rope_theta", 0),
    ("rope_theta", float("inf")),
    ("rope_theta", True),
    ("num_attention_heads", 0),
    ("num_attention_heads", 2.0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 10**9),
    ("hidden_size", [8]),
    ("vocab_size", 2**40),
    ("max_position_embeddings", 2**31),
    ("tie_word_embeddings", "false"),
    ("hidden_act", 3),
    ("model_type", ["llama"]),
    ("architectures", "LlamaForCausalLM"),
    ("id2label", []),
    ("rope_scaling", "llama3"),
    ("partial_rotary_factor", float("nan")),
  ],
)
def test_configs_that_lie_are_refused_by_key_and_value(tmp_path, key, value):
  _save(tmp_path)
  _update(tmp_path / "config.json", **{key: value})
  _refuse(tmp_path, "config.json", key, f"={value!r}: must be")


@pytest.mark.parametrize(
  "rope, message",
  [
    ({"rope_type": "linear"}, "'factor' is missing"),
    ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor=0: must be"),
    ({"rope_type": 1}, "rope_scaling.rope_type=1: must be a string"),
    (
      {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
      },
      "low_freq_factor=4.0: must be below high_freq_factor=4.0",
    ),
  ],
)
def test_scaling_that_cannot_be_is_refused(tmp_path, rope, message):
  _save(tmp_path)
  _update(tmp_path / "config.json", rope_scaling=rope)
  _refuse(tmp_path, "config.json", message)


def test_a_rotary_base_of_any_size_is_a_number(tmp_path):
  _save(tmp_path)
  _update(tmp_path / "config.json", rope_theta=10**11)
  assert huggingface.read_config(str(tmp_path)).rope_theta == 1e11
  _load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "7", "{", '{"a": 1, "a": 2}', "\xff"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
  _save(tmp_path)
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  _refuse(tmp_path, "config.json")


def _index(folder, **files):
  """Makes a folder of one file into one of an index."""
  path = folder / "model.safetensors"
  weights, _ = _split(path.read_bytes())
  weights.pop("__metadata__")
  path.rename(folder / "part.safetensors")
  weight_map = dict.fromkeys(weights, "part.safetensors") | files
  text = json.dumps({"weight_map": weight_map})
  (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
  "name",
  [
    *("../model.safetensors", "/etc/model.safetensors", "a/b.safetensors"),
    *("..", "", "config.json", 3, None, "\0.safetensors", "\ud800"),
  ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
  folder = tmp_path / "folder"
  _save(tmp_path)
  _save(folder)
  _index(folder)
  _load(folder)
  _update(folder / "model.safetensors.index.json", weight_map={NORM: name})
  _refuse(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
  _save(tmp_path)
  _index(tmp_path, **{NORM: "other.safetensors"})
  content = (tmp_path / "part.safetensors").read_bytes()
  (tmp_path / "other.safetensors").write_bytes(content)
  _refuse(tmp_path, "other.safetensors", "part.safetensors", "too")


def test_a_tensor_of_two_names_is_refused(tmp_path):
  _save(tmp_path)
  path = tmp_path / "model.safetensors"
  header, data = _split(path.read_bytes())
  size = len(data)
  entry = header[NORM] | {"data_offsets": [size, size + 32]}
  path.write_bytes(_join(header | {"norm.weight": entry}, data + data[:32]))
  _refuse(tmp_path, "norm.weight is in")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_head_of_its_own_is_never_dropped(tmp_path, family):
  tied = model_config.of_family(family, **SIZES, tied=True)
  _save(tmp_path, tied)
  whole = _load(tmp_path)
  path = tmp_path / "model.safetensors"
  header, data = _split(path.read_bytes())
  name = next(x for x in header if "embed" in x or "wte" in x)
  (begin, end), size = header[name]["data_offsets"], len(data)
  head = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
  entry = header[name] | {"data_offsets": [size, size + end - begin]}
  header |= {head: entry}
  path.write_bytes(_join(header, data + data[begin:end]))
  assert _is_same(_load(tmp_path), whole)
  other = bytearray(data[begin:end])
  other[-1] ^= 1
  path.write_bytes(_join(header, data + other))
  _refuse(tmp_path, head, "tie_word_embeddings")
  # What it says to do is done.
  if family == "llama":
    _update(tmp_path / "config.json", tie_word_embeddings=False)
    np.testing.assert_array_equal(
      _load(tmp_path)["head"].tobytes(), bytes(other)
    )


def test_a_missing_head_is_named_with_what_says_that_there_is_one(tmp_path):
  _save(tmp_path, model_config.llama(**SIZES, tied=True))
  _update(tmp_path / "config.json", tie_word_embeddings=False)
  _refuse(tmp_path, "lm_head.weight", "tie_word_embeddings=false")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_tensor(tmp_path, value):
  _save(tmp_path)
  path = tmp_path / "model.safetensors"
  header, data = _split(path.read_bytes())
  data = bytearray(data)
  name = "model.layers.1.mlp.up_proj.weight"
  _, end = header[name]["data_offsets"]
  data[end - 4 : end] = np.float32(value).tobytes()
  path.write_bytes(_join(header, data))
  _refuse(tmp_path, f"model.safetensors: {name} holds NaN or infinity")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
  params = drawn.weights(transformer.param_shapes(CONFIG))
  params["blocks"]["mlp"]["up"]["kernel"][1, 2, 3] = value
  params = jax.device_put(params, transformer.layouts(_mesh(), CONFIG))
  with pytest.raises(ValueError, match="mlp/up/kernel holds NaN or infinity"):
    huggingface.save_model(str(tmp_path / "model"), CONFIG, params)
  adapters, _ = _written_adapters()
  adapters = jax.tree.map(lambda x: x.at[1, 0].set(value), adapters)
  with pytest.raises(ValueError, match="holds NaN or infinity"):
    huggingface_adapters.save(
      str(tmp_path / "adapter"), ADAPTED, adapters, base="x"
    )
  assert not list(tmp_path.iterdir())


@pytest.fixture
def adapter(tmp_path):
  """An adapter folder."""
  _save(tmp_path, None)
  return tmp_path


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"lora_alpha": float("nan")}, "lora_alpha=nan: must be"),
    ({"lora_alpha": 0}, "lora_alpha=0: must be"),
    ({"lora_alpha": None}, "'lora_alpha' is missing"),
    ({"r": "2"}, "r='2': must be"),
    ({"r": 4}, "not of rank 4"),
    ({"rank_pattern": [2]}, "rank_pattern=[2]: must be"),
    ({"alpha_pattern": {"(": 1}}, "'(' is not a regular expression"),
    ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern={'q_proj': -1}: must"),
    ({"alpha_pattern": {"layers.1.mlp.down_proj": 2}}, "differ"),
    ({"use_rslora": "no"}, "use_rslora='no': must be"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path=3: must be"),
  ],
)
def test_adapters_that_lie_are_refused(adapter, changes, message):
  _update(adapter / "adapter_config.json", **changes)
  _refuse(adapter, "", message, load=_load_adapters)


def test_an_adapter_of_one_layer_has_the_shape_of_the_others(adapter):
  path = adapter / "adapter_model.safetensors"
  header, data = _split(path.read_bytes())
  name = next(x for x in header if "layers.1" in x and "lora_A" in x)
  header[name]["shape"] = header[name]["shape"][::-1]
  path.write_bytes(_join(header, data))
  _refuse(adapter, name, load=_load_adapters)


def test_an_adapter_that_is_not_finite_is_refused(adapter):
  path = adapter / "adapter_model.safetensors"
  header, data = _split(path.read_bytes())
  path.write_bytes(_join(header, data[:-4] + np.float32(np.nan).tobytes()))
  _refuse(adapter, "layers.1", "NaN or infinity", load=_load_adapters)


@pytest.mark.parametrize(
  "name",
  ["config.json", "model.safetensors", "model.safetensors.index.json"],
)
def test_what_is_no_file_is_refused_unopened(tmp_path, name):
  _save(tmp_path)
  if "index" in name:
    _index(tmp_path)
  (tmp_path / name).unlink()
  os.mkfifo(tmp_path / name)
  _refuse(tmp_path, f"{name} is not a regular file")


def _paths(tree, path=()):
  """Yields the path of every value in JSON."""
  yield path
  items = tree.items() if isinstance(tree, dict) else ()
  items = enumerate(tree) if isinstance(tree, list) else items
  for key, value in items:
    yield from _paths(value, (*path, key))


def _mutate(content, rng):
  """Returns a JSON text with a value taken out, renamed, moved or replaced."""
  tree = json.loads(content)
  *path, key = rng.choice(list(_paths(tree))[1:])
  node = functools.reduce(lambda x, at: x[at], path, tree)
  value, kind = node[key], rng.random()
  if kind < 0.15:
    del node[key]
  elif kind < 0.25 and isinstance(node, dict):
    node[str(rng.choice(VALUES))] = node.pop(key)
  elif kind < 0.5 and type(value) in (int, float):
    node[key] = value + rng.choice([-8, -4, -1, 1, 4, 8])
  else:
    node[key] = rng.choice(VALUES)
  return json.dumps(tree).encode()


def _flip(content, rng):
  """Returns a file with some bytes of its first part changed."""
  content = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
  return bytes(content)


def _mutate_header(content, rng):
  header, data = _split(content)
  return _join(_mutate(json.dumps(header), rng), data)


def test_mutated_files_are_refused_or_read_as_they_are(tmp_path):
  one, several, adapter = (tmp_path / x for x in ("one", "several", "adapter"))
  params = _save(one)
  _save(several)
  _index(several)
  adapters = _save(adapter, None)
  assert _is_same(_load_adapters(adapter), adapters)
  cases = [
    (_load, one / "config.json", _mutate, params),
    (_load, one / "model.safetensors", _mutate_header, params),
    (_load, one / "model.safetensors", _flip, params),
    (_load, several / "model.safetensors.index.json", _mutate, params),
    (_load_adapters, adapter / "adapter_config.json", _mutate, None),
    (
      _load_adapters,
      adapter / "adapter_model.safetensors",
      _mutate_header,
      adapters,
    ),
  ]
  for seed in range(MUTATIONS):
    load, path, change, expected = cases[seed % len(cases)]
    content = path.read_bytes()
    changed = change(content, random.Random(seed))
    path.write_bytes(changed)
    try:
      found = load(path.parent)
    except ValueError as error:
      assert type(error) is ValueError and str(path.parent) in str(error), seed
    else:
      assert expected is None or _is_same(found, expected), (seed, changed)
    path.write_bytes(content)

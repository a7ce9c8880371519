"""Folders in Hugging Face format: read, written, refused, and their numbers.

`tests/golden/transformers` was made by `tests/golden/
make_transformers_logits.py` (transformers 5.23.0, torch 2.13.0); run it again
to renew the numbers.
"""

import dataclasses
import json
import mmap
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "transformers"
MODELS = ("llama", "llama3_rope", "gpt2")
STALE = "differs from transformers; if those changed, run the script above"


def _load(folder, *, axes=None, **changes):
  config = huggingface.read_config(str(folder))
  config = dataclasses.replace(config, **changes)
  mesh = sharding.make_mesh(
    **(axes or {}), devices=None if axes else jax.devices()[:1]
  )
  shardings = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  return config, huggingface.load_params(str(folder), config, shardings)


def _logits(config, params, tokens):
  """Returns logits of sequences that begin at position 0."""
  tokens = jnp.asarray(tokens, jnp.int32)
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
  positions = jnp.broadcast_to(index[None], tokens.shape)

  @jax.jit
  def logits(params):
    states = transformer.hidden_states(
      config, params, tokens, positions, positions * 0, positions + 1
    )
    return transformer.unembedding(config, params).logits(states)

  return np.asarray(logits(params))


def _assert_trees_equal(one, other):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    one,
    other,
  )


def _rewrite(source, folder, *, tensors=None, **values):
  """Copies a golden model, with its tensors or config.json values changed."""
  shutil.copytree(source, folder)
  path = folder / "model.safetensors"
  if tensors is not None:
    stored = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors(stored), path)
  config = json.loads((folder / "config.json").read_text()) | values
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name):
  config, params = _load(GOLDEN / name)
  golden = np.load(GOLDEN / name / "logits.npz")
  np.testing.assert_allclose(
    _logits(config, params, golden["tokens"]),
    golden["logits"],
    atol=1e-4,
    err_msg=STALE,
  )


@pytest.mark.parametrize("name", MODELS)
def test_what_we_write_is_what_transformers_wrote(name, tmp_path):
  config, params = _load(GOLDEN / name)
  huggingface.save_model(str(tmp_path), config, params)
  ours, theirs = (
    safetensors.numpy.load_file(folder / "model.safetensors")
    for folder in (tmp_path, GOLDEN / name)
  )
  assert set(ours) == set(theirs)
  for key, tensor in theirs.items():
    np.testing.assert_array_equal(ours[key], tensor, key)
  assert huggingface.read_config(str(tmp_path)) == config
  ours, theirs = (
    transformers.AutoConfig.from_pretrained(folder).to_dict()
    for folder in (tmp_path, GOLDEN / name)
  )
  # Null and four times the width say the same.
  for values in (ours, theirs):
    for key in ("n_inner", "bos_token_id", "eos_token_id", "_name_or_path"):
      values.pop(key, None)
  assert ours == theirs


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_our_logits_from_what_we_write(name, tmp_path):
  torch = pytest.importorskip("torch")
  config, params = _load(GOLDEN / name)
  huggingface.save_model(str(tmp_path), config, params, max_shard_bytes=3e4)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 30))
  with torch.no_grad():
    theirs = model.eval()(input_ids=torch.from_numpy(tokens)).logits.numpy()
  np.testing.assert_allclose(_logits(config, params, tokens), theirs, atol=1e-4)


def test_stories260k_has_its_published_log_probs_and_text(shared_dir):
  folder = shared_dir / "data" / "models" / "stories260K"
  config, params = _load(folder)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer("Once upon a time").input_ids
  logps = jax.nn.log_softmax(_logits(config, params, [ids]))[0]
  expected = [-0.24374383, -0.01751267, -0.01211039, -0.00072385]
  np.testing.assert_allclose(
    logps[np.arange(4), np.array(ids[1:])], expected, atol=1e-5
  )
  text = (
    ", there was a little girl named Lily. She loved to play outside in the"
    " park. One day, she saw a big, red ball. She wanted to play with it, but"
    " it was too high.\nLily's mom said, \"Lily, let's go to the park"
  )
  full = tokenizer("Once upon a time" + text).input_ids
  assert full[: len(ids)] == ids
  greedy = np.argmax(_logits(config, params, [full])[0], axis=-1)
  assert list(greedy[len(ids) - 1 : -1]) == full[len(ids) :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_the_golden_runs_load(shared_dir, family):
  folder = shared_dir / "golden" / f"trl_trajectory_{family}" / "model"
  config, params = _load(folder)
  logits = _logits(config, params, np.arange(20)[None])
  assert logits.shape == (1, 20, config.vocab_size)
  assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
  "axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_sharded_read_and_write_equal_those_of_one_device(name, axes, tmp_path):
  config, whole = _load(GOLDEN / name)
  _, sharded = _load(GOLDEN / name, axes=axes)
  _assert_trees_equal(sharded, whole)
  kernel = sharded["blocks"]["mlp"]["up"]["kernel"]
  local = kernel.addressable_shards[0].data.shape
  assert local != kernel.shape
  with jax.transfer_guard("disallow"):
    huggingface.save_model(str(tmp_path), config, sharded)
  _assert_trees_equal(_load(tmp_path)[1], whole)


@pytest.mark.parametrize("name", ["llama3_rope", "gpt2"])
def test_several_files_equal_one(name, tmp_path):
  config, params = _load(GOLDEN / name)
  huggingface.save_model(str(tmp_path), config, params, max_shard_bytes=2e4)
  index = json.loads((tmp_path / huggingface.INDEX).read_text())
  files = set(index["weight_map"].values())
  assert len(files) > 2 and not (tmp_path / huggingface.WEIGHTS).exists()
  stored = [safetensors.numpy.load_file(tmp_path / file) for file in files]
  for tensors in stored:
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total <= 2e4 or len(tensors) == 1
  assert index["metadata"]["total_size"] == sum(
    tensor.nbytes for tensors in stored for tensor in tensors.values()
  )
  _assert_trees_equal(_load(tmp_path)[1], params)


def test_a_second_save_replaces_the_first(tmp_path):
  config, params = _load(GOLDEN / "llama")
  huggingface.save_model(str(tmp_path), config, params, max_shard_bytes=2e4)
  (tmp_path / "notes.txt").write_text("kept")
  doubled = jax.tree.map(lambda leaf: leaf * 2, params)
  huggingface.save_model(str(tmp_path), config, doubled)
  assert {path.name for path in tmp_path.iterdir()} == {
    "config.json",
    "model.safetensors",
    "notes.txt",
  }
  _assert_trees_equal(_load(tmp_path)[1], doubled)


def test_token_ids_are_written(tmp_path):
  config, params = _load(GOLDEN / "llama")
  huggingface.save_model(
    str(tmp_path), config, params, bos_token_id=3, eos_token_id=4
  )
  values = json.loads((tmp_path / "config.json").read_text())
  assert (values["bos_token_id"], values["eos_token_id"]) == (3, 4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_into_either_dtype(dtype, tmp_path):
  folder = _rewrite(
    GOLDEN / "llama",
    tmp_path / "half",
    tensors=lambda stored: {k: v.astype(dtype) for k, v in stored.items()},
  )
  expected = jax.tree.map(
    lambda leaf: np.asarray(leaf).astype(dtype), _load(GOLDEN / "llama")[1]
  )
  for param_dtype in ("float32", "bfloat16"):
    config, params = _load(folder, param_dtype=param_dtype)
    _assert_trees_equal(
      params, jax.tree.map(lambda x, p: x.astype(p.dtype), expected, params)
    )
    assert params["head"].dtype == param_dtype
  huggingface.save_model(str(tmp_path / "out"), config, params)
  _assert_trees_equal(
    _load(tmp_path / "out", param_dtype="bfloat16")[1], params
  )


@pytest.mark.parametrize("name", ["llama3_rope", "gpt2"])
def test_prefix_buffers_and_a_tied_head_may_be_there_or_not(name, tmp_path):
  prefix = {"llama3_rope": "model.", "gpt2": "transformer."}[name]
  embedding = {"llama3_rope": "embed_tokens", "gpt2": "wte"}[name]
  buffers = {
    "llama3_rope": ["layers.0.self_attn.rotary_emb.inv_freq"],
    "gpt2": ["h.0.attn.bias", "h.1.attn.masked_bias"],
  }[name]

  def bare(stored):
    stored = {key.removeprefix(prefix): v for key, v in stored.items()}
    extra = {key: np.zeros(3, np.float32) for key in buffers}
    return stored | extra | {"lm_head.weight": stored[f"{embedding}.weight"]}

  folder = _rewrite(GOLDEN / name, tmp_path / "bare", tensors=bare)
  _assert_trees_equal(_load(folder)[1], _load(GOLDEN / name)[1])


def test_views_do_not_copy_the_file():
  stored = huggingface.safetensors.open_file(
    str(GOLDEN / "gpt2" / "model.safetensors")
  )
  config = huggingface.read_config(str(GOLDEN / "gpt2"))
  for place in huggingface.huggingface_names.places(config).values():
    view = place.view(stored, 0)
    while isinstance(view, np.ndarray):
      view = view.base
    assert isinstance(view, mmap.mmap), place.tensor.name


def test_tensors_that_do_not_fit_are_named(tmp_path):
  def change(stored):
    stored.pop("model.layers.1.mlp.up_proj.weight")
    stored["model.layers.0.self_attn.q_proj.bias"] = np.ones(3, np.float32)
    stored["model.norm.weight"] = np.ones(25, np.float32)
    return stored

  folder = _rewrite(GOLDEN / "llama", tmp_path / "bad", tensors=change)
  with pytest.raises(ValueError) as error:
    _load(folder)
  message = str(error.value)
  for part in (
    str(folder),
    "missing tensors: model.layers.1.mlp.up_proj.weight;",
    "unexpected tensors: model.layers.0.self_attn.q_proj.bias;",
    "wrong shapes: model.norm.weight is [25], not [24]",
  ):
    assert part in message
  assert "\n" not in message


def test_long_lists_of_tensors_are_cut(tmp_path):
  folder = _rewrite(
    GOLDEN / "llama",
    tmp_path / "empty",
    tensors=lambda stored: {"model.norm.weight": stored["model.norm.weight"]},
  )
  with pytest.raises(ValueError, match="and 12 more$"):
    _load(folder)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"model_type": "mamba"}, "unknown architecture 'mamba'; known: llama"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"hidden_act": "relu"}, "unknown activation 'relu'; known: silu"),
    (
      {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
      "unknown rope_type 'yarn' of rotary scaling; known: default, llama3",
    ),
    (
      {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}},
      "unknown rope_type 'dynamic'",
    ),
    (
      {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
      "'low_freq_factor' is missing",
    ),
    ({"num_key_value_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
  ],
)
def test_unsupported_config_is_named(values, message, tmp_path):
  folder = _rewrite(GOLDEN / "llama", tmp_path / "model", **values)
  with pytest.raises(ValueError, match=message) as error:
    huggingface.read_config(str(folder))
  assert str(folder / "config.json") in str(error.value)


def test_config_of_transformers_4_says_the_same(tmp_path):
  rope = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
  }
  source = GOLDEN / "llama3_rope"
  folder = _rewrite(
    source,
    tmp_path / "model",
    rope_parameters=None,
    rope_theta=100.0,
    rope_scaling=rope,
  )
  config = huggingface.read_config(str(folder))
  assert config == huggingface.read_config(str(source))
  assert config.rope_theta == 100.0
  assert config.rope_scaling == model_config.RopeScaling(4.0, 1.0, 4.0, 32)


def test_folders_without_a_model_are_refused(tmp_path):
  with pytest.raises(ValueError, match="config.json: not a model in Hugging"):
    huggingface.read_config(str(tmp_path))
  shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
  with pytest.raises(ValueError, match="holds no model.safetensors"):
    _load(tmp_path)
  whole = (GOLDEN / "llama" / "model.safetensors").read_bytes()
  for size in (4, 100, len(whole) - 8):
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
      _load(tmp_path)


def test_resolve_returns_folders_and_refuses_the_rest(tmp_path):
  assert huggingface.resolve(str(tmp_path)) == str(tmp_path)
  for name in ("no-such-owner/no-such-model", "../nowhere", "a/b/c"):
    with pytest.raises(ValueError, match="no such model") as error:
      huggingface.resolve(name)
    assert "\n" not in str(error.value)

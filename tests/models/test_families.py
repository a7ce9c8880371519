"""Every family computes what transformers computes, and trains.

The numbers are those of `tests/golden/make_families.py`: computed anew where
torch is installed, else read from `tests/golden/families` (transformers
5.23.0, torch 2.13.0).
"""

import dataclasses
import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from dpo_jax import sharding
from dpo_jax.data import dataset, loader, placement
from dpo_jax.losses import objectives
from dpo_jax.models import presets, transformer
from dpo_jax.models.huggingface import config as huggingface_config
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.sampling import decode
from dpo_jax.training import optimizers, scoring, state, steps
from dpo_jax.training import scorer as scorer_lib
from tests.golden import make_families

CASES = tuple(make_families.CASES)
HAS_TORCH = importlib.util.find_spec("torch") is not None
STALE = "differs from transformers; if those changed, run the script above"


def _by_default(*cases):
  """Returns a parametrisation in which the other cases are slow."""
  slow = lambda case: pytest.param(case, marks=pytest.mark.slow)
  params = [case if case in cases else slow(case) for case in CASES]
  return pytest.mark.parametrize("case", params)


@functools.cache
def _golden(case):
  if HAS_TORCH:
    return make_families.compute(case)
  return dict(np.load(make_families.FOLDER / f"{case}.npz"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
  """The folder of each case as transformers writes it."""
  root = tmp_path_factory.mktemp("families")
  for case in CASES:
    golden = np.load(make_families.FOLDER / f"{case}.npz")
    folder = root / case
    folder.mkdir()
    (folder / "config.json").write_text(str(golden["config"]))
    family = make_families.CASES[case][0]
    tensors = {
      name: make_families.draw(name, shape, family)
      for name, shape in json.loads(str(golden["shapes"])).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return root


def _load(folder, mesh=None):
  config = huggingface.read_config(str(folder))
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  return config, huggingface.load_params(str(folder), config, layouts)


def _stored(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


@functools.cache
def _hidden_fn(config):
  return jax.jit(functools.partial(transformer.hidden_states, config))


def _logits(config, params, tokens):
  tokens = jnp.asarray(tokens, jnp.int32)
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  states = _hidden_fn(config)(params, tokens, index, 0 * index, index + 1)
  return np.asarray(transformer.unembedding(config, params).logits(states))


def _batches(config):
  """Returns a loader of the golden pairs in the layout that is allowed."""
  tokens = dataset.TokenDataset.from_lists(*make_families.token_lists())
  layout = placement.layout_for_window(
    tokens.lengths, "mirrored", config.window
  )
  return loader.Loader(
    tokens,
    batch_size=4,
    row_length=32,
    microbatch_rows=8,
    shuffle=False,
    layout=layout,
  )


def _scorer(config):
  objective = objectives.make_objective("dpo", {"beta": make_families.BETA})
  return scorer_lib.Scorer(config, None, objective, chunk_length=16)


@functools.cache
def _value_and_grad(config):
  """Returns (params, batch) -> DPO loss against -2 a token, and gradient."""
  scorer = _scorer(config)

  def loss(params, batch):
    scores = steps.make_score_step(scorer)(params, None, batch)
    reference = -2.0 * batch.lengths.astype(jnp.float32)
    scores = dataclasses.replace(scores, reference=reference)
    return scorer.mean_loss(scores, batch, None)[0]

  return jax.jit(jax.value_and_grad(loss))


@_by_default(*(set(CASES) - {"gpt2", "llama"}))
def test_logits_are_those_of_transformers(case, folders):
  config, params = _load(folders / case)
  np.testing.assert_allclose(
    _logits(config, params, make_families.sequences()),
    _golden(case)["logits"],
    atol=1e-4,
    err_msg=STALE,
  )


@_by_default("gemma2")
def test_gradients_are_those_of_transformers(case, folders, tmp_path):
  config, params = _load(folders / case)
  golden = _golden(case)
  batches = _batches(config)
  loss, gradient = _value_and_grad(config)(params, batches.batch(0))
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5, err_msg=STALE)
  huggingface.save_model(str(tmp_path), config, gradient)
  gradients = _stored(tmp_path)
  assert sorted(gradients) == list(json.loads(str(golden["shapes"])))
  norms = golden["gradients"][:, :1]
  np.testing.assert_array_less(0, norms)
  np.testing.assert_allclose(
    make_families.summaries(gradients) / norms,
    golden["gradients"] / norms,
    atol=1e-3,
    err_msg=STALE,
  )


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_what_transformers_wrote(case, folders, tmp_path):
  config, params = _load(folders / case)
  huggingface.save_model(str(tmp_path), config, params)
  ours, theirs = _stored(tmp_path), _stored(folders / case)
  assert ours.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor, name)
  assert huggingface.read_config(str(tmp_path)) == config


@_by_default("gptj")
def test_greedy_text_is_that_of_transformers(case, folders):
  config, params = _load(folders / case)
  found = decode.Sampler(config, params).sample(
    make_families.token_lists()[0],
    decode.Settings(make_families.NEW_TOKENS, temperature=0.0),
    seed=0,
    stop_ids=(),
    batch_rows=4,
  )
  responses = [sample.tokens for (sample,) in found]
  np.testing.assert_array_equal(responses, _golden(case)["greedy"], STALE)


@_by_default()
def test_training_lowers_the_loss_and_the_export_keeps_it(
  case, folders, tmp_path
):
  config, _ = _load(folders / case)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  batches = _batches(config)
  schedule = optimizers.make_schedule(
    1e-3, schedule="constant", warmup_steps=0, total_steps=5
  )
  optimizer = optimizers.make_optimizer("adamw", schedule, clip=0.0)
  objective = objectives.make_objective("dpo", {"beta": make_families.BETA})
  scorer = scorer_lib.Scorer(config, config, objective, chunk_length=16)
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  with jax.set_mesh(mesh):
    load = lambda: _load(folders / case, mesh)[1]
    now = state.init_state(load(), optimizer, layouts, mesh)
    now = dataclasses.replace(now, reference=load())
    step = jax.jit(steps.make_train_step(scorer, optimizer, schedule))
    losses = []
    for k in range(5):
      batch = scoring.device_batch(batches.batch(k), batches, mesh)
      now, metrics = step(now, batch)
      losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
  assert losses[-1] < 0.5
  assert ("router/largest_share" in metrics) == (config.num_experts > 0)
  huggingface.save_model(str(tmp_path), config, now.params)
  again, params = _load(tmp_path)
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, params, now.params)
  if not HAS_TORCH:
    return
  model = make_families.load_model(str(tmp_path))
  tokens = make_families.sequences()
  np.testing.assert_allclose(
    _logits(config, params, tokens),
    make_families.logits_of(model, tokens),
    atol=1e-4,
  )


@pytest.mark.parametrize(
  ("case", "axes"),
  [
    ("mixtral", (1, 2, 2, 2)),
    ("mixtral", (2, 1, 1, 4)),
    *((case, (2, 2, 2, 1)) for case in CASES),
  ],
)
@pytest.mark.slow
def test_8_devices_in_any_order_compute_what_1_computes(case, axes, folders):
  config, params = _load(folders / case)
  expected = _value_and_grad(config)(params, _batches(config).batch(0))
  order = np.random.default_rng(0).permutation(8)
  devices = [jax.devices()[i] for i in order]
  axes = dict(zip(sharding.MESH_AXES, axes))
  mesh = sharding.make_mesh(**axes, devices=devices)
  batches = _batches(config)
  with jax.set_mesh(mesh):
    _, params = _load(folders / case, mesh)
    batch = scoring.device_batch(batches.batch(0), batches, mesh)
    actual = _value_and_grad(config)(params, batch)
  assert float(actual[0]) == pytest.approx(float(expected[0]), abs=2e-3)
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    # Rounding is all there is where a key's bias moves all scores alike.
    atol = 2e-3 * np.abs(other).max() + 1e-6
    np.testing.assert_allclose(one, other, atol=atol)


def test_the_load_balancing_loss_is_that_of_transformers(folders, tmp_path):
  config, params = _load(folders / "mixtral")
  golden = _golden("mixtral")
  tokens = jnp.asarray(make_families.sequences(), jnp.int32)
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    _, routing = transformer.hidden_states_and_routing(
      config, params, tokens, index, 0 * index, index + 1
    )
    return routing.load_balancing_loss()

  value, gradient = loss(params)
  np.testing.assert_allclose(value, golden["aux_loss"], rtol=1e-5)
  huggingface.save_model(str(tmp_path), config, gradient)
  actual, expected = (
    make_families.summaries(_stored(tmp_path)),
    golden["aux_gradients"],
  )
  np.testing.assert_allclose(actual, expected, atol=1e-3 * expected[:, 0].max())


@pytest.mark.parametrize(
  ("case", "values", "message"),
  [
    (
      "phi3",
      {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
      "unknown rope_type 'longrope' of rotary scaling; known: default",
    ),
    (
      "gemma3",
      {"attn_logit_softcapping": 5.0},
      "attn_logit_softcapping=5.0 is not supported, only None",
    ),
    (
      "gemma2",
      {"layer_types": ["chunked_attention", "full_attention"]},
      "unknown layer type 'chunked_attention'; known: sliding_attention",
    ),
    ("olmo2", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("mixtral", {"num_experts_per_tok": 9}, "there are 4 experts"),
    ("qwen3", {"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
    ("gptj", {"model_type": "gpt_neo"}, "known: llama, gpt2, gptj, gpt_neox"),
  ],
)
def test_what_a_family_has_and_the_decoder_has_not_is_named(
  case, values, message, folders, tmp_path
):
  config = json.loads((folders / case / "config.json").read_text()) | values
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message) as error:
    huggingface.read_config(str(tmp_path))
  assert "\n" not in str(error.value)


def test_tensors_that_a_family_does_not_have_are_named(folders, tmp_path):
  (tmp_path / "config.json").write_text(
    (folders / "mixtral" / "config.json").read_text()
  )
  stored = _stored(folders / "mixtral")
  lost = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
  stored["model.layers.0.self_attn.q_norm.weight"] = stored.pop(lost)
  safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
  with pytest.raises(ValueError) as error:
    _load(tmp_path)
  assert f"missing tensors: {lost}; unexpected tensors: model.layers.0." in str(
    error.value
  )


def test_no_device_ever_holds_every_expert(folders):
  mesh = sharding.make_mesh(data=2, fsdp=1, expert=4)
  with jax.set_mesh(mesh):
    config, params = _load(folders / "mixtral", mesh)
    index = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32)[None], (8, 16))
    index = jax.device_put(index, sharding.rows(mesh))
    compiled = _hidden_fn(config).lower(params, *[index] * 4).compile()
  kernels = re.findall(
    r"f32\[(?:2,)?(\d),(?:32,40|40,32)\]", compiled.as_text()
  )
  assert set(kernels) == {"1"}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_transformers_reads_a_preset_and_writes_it_back(preset, tmp_path):
  config = presets.PRESETS[preset]
  huggingface.write_config(str(tmp_path), config)
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert huggingface_config.parse(theirs.to_dict()) == config

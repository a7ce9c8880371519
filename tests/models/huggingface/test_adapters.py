"""Adapter folders compute what PEFT computes, read and written.

The numbers are those of `tests/golden/make_adapters.py`: computed anew where
torch and peft are installed, else read from `tests/golden/adapters` (peft
0.21.2, transformers 5.23.0, torch 2.13.0).
"""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import sharding
from dpo_jax.models import lora, transformer
from dpo_jax.models.config import Lora
from dpo_jax.models.huggingface import adapters as huggingface_adapters
from dpo_jax.models.huggingface import folder as huggingface
from tests.golden import make_adapters, make_families

CASES = tuple(make_adapters.CASES)
HAS_PEFT = all(map(importlib.util.find_spec, ("torch", "peft")))
STALE = "differs from PEFT; if that changed, run the script above"


@pytest.fixture
def folder(tmp_path, case):
  """The folder `base` of a model and `adapter` of PEFT's adapter of it."""
  golden = np.load(make_families.FOLDER / f"{case}.npz")
  base, adapter = tmp_path / "base", tmp_path / "adapter"
  base.mkdir()
  adapter.mkdir()
  (base / "config.json").write_text(str(golden["config"]))
  _draw(base / "model.safetensors", golden, case)
  if HAS_PEFT:
    make_adapters.compute(case, str(adapter))
  else:
    golden = np.load(make_adapters.FOLDER / f"{case}.npz")
    (adapter / "adapter_config.json").write_text(str(golden["config"]))
    _draw(adapter / "adapter_model.safetensors", golden, case)
  return tmp_path


def _draw(path, golden, case):
  tensors = {
    name: make_families.draw(name, shape, case)
    for name, shape in json.loads(str(golden["shapes"])).items()
  }
  safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def _read(base, adapter):
  """Returns config, base and adapters, on one device."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  config = huggingface.read_config(str(base))
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  params = huggingface.load_params(str(base), config, layouts)
  config = lora.with_lora(
    config, huggingface_adapters.read_lora(str(adapter), config)
  )
  adapters = huggingface_adapters.load(
    str(adapter), config, lora.layouts(mesh, config)
  )
  return config, params, adapters


def _random(config):
  """Returns adapters of which no two factors are alike."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
    lora.shapes(config),
  )


def _logits(config, params):
  tokens = jnp.asarray(make_families.sequences(), jnp.int32)
  index = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
  hidden = jax.jit(functools.partial(transformer.hidden_states, config))
  states = hidden(params, tokens, index, 0 * index, index + 1)
  return np.asarray(transformer.unembedding(config, params).logits(states))


def _assert_close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


SOME = ("phi3", "query|value|down|up")
_by_default = pytest.mark.parametrize(
  "case",
  [
    case if case == SOME[0] else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)


@_by_default
def test_logits_are_those_of_peft(case, folder):
  config, base, adapters = _read(folder / "base", folder / "adapter")
  if HAS_PEFT:
    expected = make_adapters.compute(case, str(folder / "again"))["logits"]
  else:
    expected = np.load(make_adapters.FOLDER / f"{case}.npz")["logits"]
  got = _logits(config, lora.over(base, adapters))
  np.testing.assert_allclose(got, expected, atol=2e-4, err_msg=STALE)


@pytest.mark.parametrize(
  "case, targets",
  [
    pytest.param(
      case, targets, marks=[] if (case, targets) == SOME else pytest.mark.slow
    )
    for case in CASES
    for targets in (".*", SOME[1])
  ],
)
def test_what_is_written_is_read(case, folder, targets):
  config, base, _ = _read(folder / "base", folder / "adapter")
  config = lora.with_lora(config, Lora(2, 3.0, targets))
  adapters = _random(config)
  written = folder / "written"
  huggingface_adapters.save(
    str(written), config, adapters, base=str(folder / "base")
  )
  again, _, read = _read(folder / "base", written)
  merge = jax.jit(lora.merge, static_argnums=0)
  jax.tree.map(
    _assert_close, merge(again, base, read), merge(config, base, adapters)
  )
  is_fused = case in ("gpt2", "gpt_neox", "phi3")
  most = 3 if targets == ".*" else 2
  assert again.lora.rank == (most * 2 if is_fused else 2)
  assert again.lora.scale == config.lora.scale


@pytest.mark.skipif(not HAS_PEFT, reason="needs torch and peft")
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written(case, folder):
  config, base, _ = _read(folder / "base", folder / "adapter")
  config = lora.with_lora(config, Lora(2, 3.0, "query|value|down|up"))
  adapters = _random(config)
  written, merged = str(folder / "written"), str(folder / "merged")
  huggingface_adapters.save(
    written, config, adapters, base=str(folder / "base")
  )
  huggingface.save_model(merged, config, lora.merge(config, base, adapters))
  expected = _logits(config, lora.over(base, adapters))
  plain = make_families.load_model(str(folder / "base"))
  before = make_families.logits_of(plain, make_families.sequences())
  assert np.abs(before - expected).max() > 0.1
  for model in (
    make_adapters.load(plain, written),
    make_families.load_model(merged),
  ):
    got = make_families.logits_of(model, make_families.sequences())
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("case", ["llama"])
@pytest.mark.parametrize(
  "change, message",
  [
    ({"use_dora": True}, "use_dora=True: cannot be read"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA': only 'LORA' can be read"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    ({"bias": "all"}, "bias='all': only 'none' can be read"),
    ("model.embed_tokens.lora_A", "is no adapter of a projection"),
    ("-model.layers.1.mlp.up_proj.lora_A", "all layers or none"),
    ("model.layers.0.mlp.up_proj.lora_B", "the adapter is of another model"),
  ],
)
def test_what_cannot_be_read_is_refused(case, folder, change, message):
  adapter = folder / "adapter"
  if isinstance(change, dict):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
  else:
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = f"base_model.model.{change.removeprefix('-')}.weight"
    tensors.pop(name, None)
    if not change.startswith("-"):
      tensors[name] = np.zeros((3, 5), np.float32)
    safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError) as error:
    _read(folder / "base", adapter)
  assert message in str(error.value)
  assert str(pathlib.Path(adapter)) in str(error.value)

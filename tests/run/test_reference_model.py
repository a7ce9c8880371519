"""A policy that its reference is a copy of: margins of 0, to the last bit."""

import functools

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax import sharding
from dpo_jax.data.sources import synthetic
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.run import experiment as experiment_lib
from dpo_jax.run import trainer
from tests import drawn

MAKE_MESH = sharding.make_mesh
SIZES = dict(num_layers=2, d_model=32, d_mlp=64, num_heads=4, max_positions=128)
FEW_TURN = {"gptj": {"rotary_width": 4}}  # of a head's elements
_slow = lambda *value: pytest.param(*value, marks=pytest.mark.slow)


@functools.cache
def _weights(family):
  """Returns a decoder, and weights of which bfloat16 holds none exactly."""
  vocab_size = len(synthetic.make_tokenizer())
  sizes = SIZES | FEW_TURN.get(family, {})
  config = model_config.of_family(family, vocab_size=vocab_size, **sizes)
  rng = np.random.default_rng(3)
  move = lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype)
  return config, jax.tree.map(
    move, drawn.weights(transformer.param_shapes(config))
  )


def _write(folder, family):
  folder.mkdir()
  huggingface.save_model(
    str(folder),
    _weights(family)[0],
    jax.tree.map(jax.device_put, _weights(family)[1]),
    eos_token_id=1,
  )
  synthetic.make_tokenizer().save_pretrained(folder)
  return str(folder)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  make_mesh = functools.partial(MAKE_MESH, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)


def _config(folder, family, loss="dpo", **settings):
  config = quickstart.get_config(loss)
  config.batch_size = 8
  config.microbatch_rows = 4
  config.data.path, config.data.eval_path = "pairs:40", ""
  config.data.row_length = 128
  config.data.cache_dir = str(folder / "cache")
  config.model.preset, config.model.path = "", _write(folder / "model", family)
  config.optimizer.warmup_steps = 0
  config.optimizer.learning_rate = 1e-30  # the policy stays what it is
  config.update_from_flattened_dict(settings)
  return config


def _two_steps(config):
  """Returns the metrics of the first two steps."""
  experiment = experiment_lib.build(config)
  with jax.set_mesh(experiment.mesh):
    experiment, now = trainer.init_state(experiment)
    batch = lambda k: trainer.host_batch(experiment, k).batch
    step = trainer.compile_train_step(experiment, now, batch(0))
    now, first = step(now, batch(0))
    _, second = step(now, batch(1))
  return jax.device_get([first, second])


HALF = {"model.dtype": "bfloat16"}
CACHED = {"reference.mode": "cached"}
LORA = {"lora.rank": 4}
OFF = {"reference.mode": "adapter_off"}


@pytest.mark.parametrize(
  "family, loss, settings",
  [
    ("llama", "dpo", HALF | CACHED),
    ("gpt2", "dpo", HALF),
    ("llama", "dpo", HALF | LORA),
    _slow("llama", "dpo", {}),
    _slow("llama", "dpo", CACHED),
    _slow("llama", "dpo", HALF | {"reference.dtype": "float32"}),
    _slow("llama", "dpo", HALF | {"model.remat": "full"}),
    _slow("llama", "dpo", HALF | {"data.layout": "padded"} | CACHED),
    _slow("llama", "dpo", HALF | LORA | OFF),
    _slow("llama", "dpo", HALF | LORA | CACHED),
    _slow("gptj", "dpo", HALF),
    _slow("gemma2", "dpo", HALF | {"data.layout": "padded"}),
    _slow("llama", "kto", HALF | CACHED),
    _slow("llama", "aot", HALF | CACHED),
    _slow("llama", "robust", HALF | {"reference.mode": "sync"}),
  ],
)
def test_a_copy_of_the_policy_scores_the_same_bits(
  tmp_path, family, loss, settings
):
  at_reference = 0.5 if loss == "kto" else np.log(2)
  for metrics in _two_steps(_config(tmp_path, family, loss, **settings)):
    np.testing.assert_allclose(metrics["loss"], at_reference, atol=1e-6)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0


@pytest.mark.slow
def test_a_reference_of_its_own_path_scores_the_same_bits(tmp_path):
  path = _write(tmp_path / "other", "llama")
  for settings in (HALF, HALF | LORA):
    folder = tmp_path / str(len(settings))
    folder.mkdir()
    config = _config(folder, "llama", **settings, **{"reference.path": path})
    for metrics in _two_steps(config):
      assert metrics["rewards/margins"] == metrics["rewards/chosen"] == 0


def test_a_frozen_model_rounds_what_is_rounded_at_use():
  config, params = _weights("gptj")
  frozen = transformer.param_shapes(config.frozen("bfloat16"))
  wide = {
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(frozen)
    if x.dtype == "float32"
  }
  assert wide == {
    *(f"['final_norm']['{x}']" for x in ("scale", "bias")),
    *(f"['blocks']['attention_norm']['{x}']" for x in ("scale", "bias")),
    "['head_bias']",
  }
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  assert size(frozen) < 0.6 * size(params)

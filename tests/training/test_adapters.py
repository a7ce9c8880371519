"""Runs of adapters: identities, meshes, references, resumption, export."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax import sharding
from dpo_jax.checkpoints import manager, run_folder, source
from dpo_jax.data import dataset, loader
from dpo_jax.data.sources import synthetic
from dpo_jax.evaluation import held_out
from dpo_jax.inference import export
from dpo_jax.losses import objectives
from dpo_jax.models import config as model_config
from dpo_jax.models import lora, transformer
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.run import experiment as experiment_lib
from dpo_jax.run import trainer
from dpo_jax.training import optimizers, scoring, state, steps
from dpo_jax.training import scorer as scorer_lib
from tests import drawn

MAKE_MESH = sharding.make_mesh
SIZES = {
  "num_layers": 2,
  "d_model": 32,
  "d_mlp": 64,
  "num_heads": 4,
  "max_positions": 128,
}
MESHES = ((1, 8, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1), (1, 1, 8), (1, 2, 4))
LN2 = float(np.log(2))
OFF = {"reference.mode": "adapter_off"}

_slow = lambda *value: pytest.param(*value, marks=pytest.mark.slow)


def _pairs():
  rng = np.random.default_rng(0)
  lists = lambda: [
    rng.integers(1, 64, size=n).tolist() for n in rng.integers(3, 20, size=16)
  ]
  return dataset.TokenDataset.from_lists(lists(), lists(), lists())


@functools.cache
def _steps_on(
  family, mesh, order=None, targets=".*", num_steps=3, int8=False, **changes
):
  """Returns the metrics of each step on a mesh of devices in an order."""
  devices = np.array(jax.devices()[: int(np.prod(mesh))])
  if order is not None:
    devices = devices[np.random.default_rng(order).permutation(len(devices))]
  axes = dict(zip(sharding.MESH_AXES, mesh))
  mesh = MAKE_MESH(**axes, devices=list(devices))
  config = lora.with_lora(
    model_config.of_family(family, vocab_size=64, **SIZES, **changes),
    model_config.Lora(4, 8.0, targets),
  )
  objective = objectives.make_objective("dpo", {"beta": 0.5})
  plain = dataclasses.replace(config, lora=None)
  scorer = scorer_lib.Scorer(config, plain, objective, chunk_length=16)
  rate = lambda step: 1e-2 + 0 * step
  optimizer = optimizers.make_optimizer("adamw", rate, clip=0.0)
  batches = loader.Loader(
    _pairs(), batch_size=8, microbatch_rows=8, row_length=64
  )
  base = drawn.weights(transformer.param_shapes(config))
  base = jax.device_put(base, transformer.layouts(mesh, config))
  new, layouts = (
    drawn.new_adapters(lora.shapes(config)),
    lora.layouts(mesh, config),
  )
  with jax.set_mesh(mesh):
    if int8:
      base = lora.quantize(mesh, config, base)
    now = state.init_state(
      jax.device_put(new, layouts), optimizer, layouts, mesh
    )
    now = dataclasses.replace(now, base=base)
    step = jax.jit(
      steps.make_train_step(scorer, optimizer, rate), donate_argnums=0
    )
    history = []
    for k in range(num_steps):
      placed = scoring.device_batch(batches.batch(k), batches, mesh)
      now, metrics = step(now, placed)
      history.append({k: float(v) for k, v in metrics.items()})
  return history


def _assert_leaves_ln2(history):
  """Gradient at step 1; another loss, by more than rounding, by step 3."""
  losses = [line["loss"] for line in history]
  assert losses[0] == pytest.approx(LN2, abs=1e-6)
  assert history[0]["rewards/margins"] == 0
  assert history[0]["grad_norm"] > 1e-3
  assert abs(losses[2] - LN2) > 1e-3


def _assert_same(history, expected):
  for ours, theirs in zip(history, expected, strict=True):
    for key in ours:
      np.testing.assert_allclose(
        ours[key], theirs[key], rtol=2e-3, atol=1e-4, err_msg=key
      )


@pytest.mark.parametrize(
  "family, mesh, order, targets",
  [
    ("llama", (2, 2, 2), 1, "query|out|up"),
    *(
      _slow("llama", mesh, order, ".*")
      for mesh in MESHES
      for order in (None, 3)
    ),
    *(
      _slow(family, mesh, order, ".*")
      for family in ("gpt2", "phi3", "gpt_neox")
      for mesh, order in (((1, 8, 1), None), ((2, 2, 2), 4), ((1, 2, 4), 5))
    ),
  ],
)
def test_no_mesh_changes_a_number_or_stays_at_ln2(family, mesh, order, targets):
  one = _steps_on(family, (1, 1, 1), targets=targets)
  many = _steps_on(family, mesh, order, targets)
  _assert_leaves_ln2(many)
  _assert_same(many, one)


@pytest.mark.slow
def test_new_adapters_are_the_same_on_any_mesh():
  config = model_config.of_family("llama", vocab_size=64, **SIZES)
  config = lora.with_lora(config, model_config.Lora(4, 8.0, ".*"))
  init = functools.partial(lora.init, config, jax.random.key(0))
  layouts = lora.layouts(MAKE_MESH(data=1, fsdp=4, tensor=2), config)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(init, out_shardings=layouts)(),
    jax.jit(init)(),
  )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_no_mesh_changes_a_number_over_int8(family):
  pytest.importorskip("qwix")
  settings = {"int8": True, "remat": "full"}
  many = _steps_on(family, (2, 2, 2), 6, **settings)
  _assert_leaves_ln2(many)
  _assert_same(many, _steps_on(family, (1, 1, 1), **settings))


@pytest.mark.slow
def test_experts_stay_whole_beside_adapters_of_attention():
  settings = {"num_experts": 4, "experts_per_token": 2}
  many = _steps_on("mixtral", (1, 2, 1, 4), 7, **settings)
  _assert_leaves_ln2(many)
  _assert_same(many, _steps_on("mixtral", (1, 1, 1, 1), **settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A Hugging Face folder of a tiny Llama with a tokenizer."""
  folder = tmp_path_factory.mktemp("model")
  tokenizer = synthetic.make_tokenizer()
  config = model_config.llama(vocab_size=len(tokenizer), **SIZES)
  shapes = transformer.param_shapes(config)
  params = jax.tree.map(jax.device_put, drawn.weights(shapes, seed=7))
  huggingface.save_model(str(folder), config, params, eos_token_id=1)
  tokenizer.save_pretrained(folder)
  return str(folder)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Keeps whole runs on one device."""
  make_mesh = functools.partial(MAKE_MESH, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)


def _config(folder, model, loss="dpo", **settings):
  config = quickstart.get_config(loss)
  config.steps = 3
  config.batch_size = 8
  config.microbatch_rows = 4
  config.data.path, config.data.eval_path = "pairs:40", ""
  config.data.row_length = 128
  config.data.cache_dir = str(folder / "cache")
  config.log.every = 1
  config.optimizer.warmup_steps = 0
  config.optimizer.learning_rate = 1e-2
  config.optimizer.schedule = "constant"
  config.model.preset, config.model.path = "", model
  config.lora.rank = 4
  config.update_from_flattened_dict(settings)
  return config


class _Run:
  """A compiled step, run by hand."""

  def __init__(self, config, num_steps=3):
    experiment = experiment_lib.build(config)
    with jax.set_mesh(experiment.mesh):
      experiment, now = trainer.init_state(experiment)
      batch = trainer.host_batch(experiment, 0).batch
      compiled = trainer.compile_train_step(experiment, now, batch)
      self.base = jax.device_get(now.base)
      self.reference = jax.device_get(now.reference)
      self.history = []
      for k in range(num_steps):
        batch = trainer.host_batch(experiment, k).batch
        now, metrics = compiled(now, batch)
        self.history.append({k: float(v) for k, v in metrics.items()})
    self.experiment, self.state = experiment, now
    memory = compiled.memory_analysis()
    self.argument_bytes = memory.argument_size_in_bytes

  @property
  def losses(self):
    return [line["loss"] for line in self.history]


def _start(config):
  """Returns the first state, and what an evaluation says of it."""
  config.data.eval_path = "pairs:20"
  experiment = experiment_lib.build(config)
  with jax.set_mesh(experiment.mesh):
    experiment, now = trainer.init_state(experiment)
    return now, trainer.make_eval_fn(experiment)(now)


def _bytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_one_copy_of_the_base_serves_policy_and_reference(tmp_path, model):
  run = _Run(_config(tmp_path, model, **OFF))
  _assert_leaves_ln2(run.history)
  assert run.losses[0] == np.float32(LN2)
  assert run.state.reference is None
  jax.tree.map(np.testing.assert_array_equal, run.state.base, run.base)
  trained = _bytes(run.state.params) + _bytes(run.state.opt_state)
  # The rest is the batch.
  assert run.argument_bytes < 1.5 * _bytes(run.base) + trained
  shapes = jax.tree.map(np.shape, run.state.opt_state[1][0].mu)
  assert shapes == jax.tree.map(np.shape, run.state.params)


@pytest.mark.slow
def test_a_base_in_bfloat16_has_adapters_in_float32(tmp_path, model):
  half = _Run(_config(tmp_path, model, **{"lora.base_dtype": "bfloat16"}))
  whole = _Run(_config(tmp_path, model))
  norms = lambda run: _bytes(
    [x for key, x in run.state.base["blocks"].items() if "norm" in key]
    + [run.state.base["final_norm"]]
  )
  assert norms(half) == norms(whole)  # computed with in float32
  rest = [_bytes(run.state.base) - norms(run) for run in (half, whole)]
  assert 2 * rest[0] == rest[1]
  assert {x.dtype.name for x in jax.tree.leaves(half.state.params)} == {
    "float32"
  }
  _assert_leaves_ln2(half.history)
  np.testing.assert_allclose(half.losses, whole.losses, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["aot", "kto"])
def test_losses_across_the_batch_train_adapters(tmp_path, model, loss):
  run = _Run(_config(tmp_path, model, loss))
  assert run.history[0]["grad_norm"] > 1e-3
  assert abs(run.losses[2] - run.losses[0]) > 1e-4  # rounding: 1e-6


@pytest.mark.slow
def test_a_base_in_int8_trains(tmp_path, model):
  pytest.importorskip("qwix")
  small = {"lora.base_dtype": "int8", "model.remat": "full"}
  run = _Run(_config(tmp_path, model, **small))
  whole = _Run(_config(tmp_path, model, **{"model.remat": "full"}))
  _assert_leaves_ln2(run.history)
  jax.tree.map(np.testing.assert_array_equal, run.state.base, run.base)
  kernels = lambda run: [
    x.nbytes
    for path, x in jax.tree_util.tree_leaves_with_path(run.state.base)
    if "kernel" in jax.tree_util.keystr(path)
  ]
  assert sum(kernels(run)) < 0.4 * sum(kernels(whole))
  saved = sum(kernels(whole)) - sum(kernels(run))
  assert whole.argument_bytes - run.argument_bytes == saved
  np.testing.assert_allclose(run.losses, whole.losses, atol=2e-2)
  for name, loose in (("logps/chosen", 1e-2), ("grad_norm", 0.1)):
    ours, theirs = (x.history[0][name] for x in (run, whole))
    assert ours == pytest.approx(theirs, rel=loose) and ours != theirs
  cached = _config(tmp_path, model, **small | {"reference.mode": "cached"})
  np.testing.assert_allclose(_Run(cached).losses, run.losses, atol=1e-4)
  plain = _config(tmp_path, model, **{"lora.base_dtype": "int8"})
  with pytest.raises(ValueError, match="with model.remat='none'"):
    experiment_lib.build(plain)


@pytest.mark.slow
def test_cached_has_the_losses_of_live_and_none_needs_no_reference(
  tmp_path, model
):
  live = _Run(_config(tmp_path, model))
  cached = _Run(_config(tmp_path, model, **{"reference.mode": "cached"}))
  assert cached.experiment.loader is not live.experiment.loader
  np.testing.assert_allclose(cached.losses, live.losses, atol=1e-4)
  none = _Run(_config(tmp_path, model, "simpo", **{"reference.mode": "none"}))
  assert none.losses[-1] != none.losses[0]


@pytest.fixture(scope="module")
def sft(tmp_path_factory, model):
  """A finished LoRA run."""
  folder = tmp_path_factory.mktemp("sft")
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = functools.partial(MAKE_MESH, devices=jax.devices()[:1])
    patch.setattr(sharding, "make_mesh", make_mesh)
    trainer.train(_config(folder, model), str(folder / "run"))
  return folder / "run"


@pytest.fixture(scope="module")
def sft_margin(tmp_path_factory, model, sft):
  """What that run says, its adapters over the base, against the base.

  `reference.path` is then the base alone, of which there is no second copy.
  """
  settings = {"lora.path": str(sft), "reference.path": model}
  folder = tmp_path_factory.mktemp("margin")
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = functools.partial(MAKE_MESH, devices=jax.devices()[:1])
    patch.setattr(sharding, "make_mesh", make_mesh)
    now, line = _start(_config(folder, model, **settings))
  assert now.reference is None
  return line["rewards/margins"]


def test_a_run_of_adapters_keeps_no_base(sft):
  (step,) = manager.saved_steps(sft)
  text = (sft / "checkpoints" / str(step) / "fingerprints/metadata").read_text()
  names = list(json.loads(text))
  assert any("lora" in name for name in names)
  assert not [n for n in names if "embedding" in n or "kernel" in n]


@pytest.mark.slow
def test_an_adapter_can_be_the_reference(tmp_path, model, sft):
  # By default what the policy starts from: one more adapter in memory.
  now, own = _start(_config(tmp_path, model, **{"lora.path": str(sft)}))
  assert own["loss"] == pytest.approx(LN2, abs=1e-6)
  assert own["rewards/margins"] == 0
  assert now.reference.keys() == {"lora"}
  assert np.any(now.reference["lora"]["blocks"]["mlp"]["up"]["last"])


@pytest.mark.slow
def test_an_adapter_of_another_rank_can_be_the_reference(
  tmp_path, model, sft, sft_margin
):
  other = {"reference.path": str(sft), "lora.rank": 2, "lora.alpha": 7.0}
  _, new = _start(_config(tmp_path, model, **other))
  assert new["rewards/margins"] == pytest.approx(-sft_margin, rel=1e-3)


def test_adapter_off_is_the_base_alone(tmp_path, model, sft, sft_margin):
  start = _config(tmp_path, model, **OFF, **{"lora.path": str(sft)})
  now, line = _start(start)
  assert now.reference is None
  assert abs(line["loss"] - LN2) > 1e-3
  assert line["rewards/margins"] == sft_margin


@pytest.mark.parametrize("mode", ["adapter_off", "live"])
def test_an_evaluation_has_the_reference_of_the_run(tmp_path, mode):
  config = _config(tmp_path, "base")
  config.lora.path, config.reference.mode = "adapter", mode
  for name in ("checkpoints", "model"):
    (tmp_path / name).mkdir()
  run_folder.write_config(tmp_path, experiment_lib.to_plain(config))
  settings = held_out.make_settings(str(tmp_path))
  assert settings.reference == {"live": "adapter"}.get(mode, "base")


@pytest.mark.slow
def test_an_adapter_as_reference_stays(tmp_path, model, sft):
  run = _Run(_config(tmp_path, model, **{"lora.path": str(sft)}))
  _assert_leaves_ln2(run.history)
  jax.tree.map(
    np.testing.assert_array_equal, run.state.reference, run.reference
  )


@pytest.mark.slow
def test_a_run_of_adapters_is_a_model(tmp_path, model, sft):
  """As its base merged it starts another run, and is a whole reference."""
  merged = {"model.path": str(sft)}
  now, line = _start(_config(tmp_path, "", **merged))
  assert line["loss"] == pytest.approx(LN2, abs=1e-6)
  assert now.reference is None
  against = merged | {"reference.path": model, "lora.rank": 0}
  _, full = _start(_config(tmp_path, "", **against))
  start = {"lora.path": str(sft), "reference.path": model}
  _, adapted = _start(_config(tmp_path, model, **start))
  assert full["loss"] == pytest.approx(adapted["loss"], abs=1e-5)
  # A whole model is a reference too, in a copy of its own.
  other = {"reference.path": str(tmp_path / "other")}
  export.write(str(sft), other["reference.path"])
  now, line = _start(_config(tmp_path, model, **other))
  assert "embedding" in now.reference
  margin = adapted["rewards/margins"]
  assert line["rewards/margins"] == pytest.approx(-margin, rel=1e-3)


def test_a_run_goes_on_bit_for_bit(tmp_path, model, sft):
  for num_steps in (1, 3):
    trainer.train(
      _config(tmp_path, model, steps=num_steps), str(tmp_path / "parted")
    )
  timings = {"pairs_per_second", "tokens_per_second", "data_wait_seconds"}
  whole, parted = (
    [
      {k: v for k, v in json.loads(line).items() if k not in timings}
      for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    for folder in (sft, tmp_path / "parted")
  )
  assert len(whole) == 3 and whole == parted


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"lora.rank": -2}, "lora.rank=-2: must be at least 0"),
    ({"lora.targets": "c_attn"}, "lora.targets='c_attn' matches no projection"),
    (
      {"lora.rank": 0, "lora.alpha": 8.0},
      "lora.alpha=8.0: only with lora.rank",
    ),
    ({"reference.mode": "ema"}, "reference.mode='ema' with lora.rank above 0"),
    (
      {"reference.mode": "sync"},
      "reference.mode='sync' with lora.rank above 0",
    ),
    ({"reference.dtype": "bfloat16"}, "shares the policy's base, which is f"),
    (OFF | {"reference.path": "SFT"}, "'adapter_off' is the base alone"),
    (OFF | {"lora.rank": 0}, "there are no adapters to leave out; give lora.r"),
    ({"model.path": "", "model.preset": "tiny"}, "adapters need model.path"),
    ({"lora.path": "MODEL"}, "is a whole model, not an adapter"),
    ({"lora.path": "SFT", "lora.rank": 8}, "has rank 4, alpha 8 and targets"),
    ({"lora.base_dtype": "int4"}, "'int4'; known: float32, bfloat16"),
    (
      {"lora.rank": 0, "lora.base_dtype": "bfloat16"},
      "lora.base_dtype='bfloat16': only with lora.rank",
    ),
  ],
)
def test_what_cannot_be_is_refused(tmp_path, model, sft, settings, message):
  paths = {"MODEL": model, "SFT": str(sft)}
  settings = {k: paths.get(v, v) for k, v in settings.items()}
  with pytest.raises(ValueError) as error:
    experiment_lib.build(_config(tmp_path, model, **settings))
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_int8_without_its_package_is_refused(tmp_path, model, monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(ValueError, match="needs the package qwix: pip install"):
    experiment_lib.build(
      _config(tmp_path, model, **{"lora.base_dtype": "int8"})
    )


@pytest.mark.parametrize("adapter", [False, _slow(True)])
def test_an_exported_run_is_a_model(tmp_path, model, sft, sft_margin, adapter):
  target = str(tmp_path / "exported")
  export.write(str(sft), target, adapter=adapter)
  assert (source.open_adapter(target) is not None) == adapter
  settings = {"lora.rank": 0, "reference.path": model}
  _, line = _start(_config(tmp_path, target, **settings))
  assert abs(sft_margin) > 1e-3
  assert line["rewards/margins"] == pytest.approx(sft_margin, rel=1e-3)
  if not adapter:
    with pytest.raises(ValueError, match="is a whole model"):
      export.write(target, str(tmp_path / "again"), adapter=True)
    return
  # Adapters that were read go on where those of the run would.
  load = lambda path: jax.device_get(
    experiment_lib.build(
      _config(tmp_path, model, **{"lora.path": path})
    ).load_policy()
  )
  jax.tree.map(np.testing.assert_array_equal, load(target), load(str(sft)))

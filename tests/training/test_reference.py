"""Where reference log-probabilities come from: modes, and their cache."""

import functools
import json
import multiprocessing
import os
import pathlib
import time
import zipfile

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax import sharding
from dpo_jax.data import dataset, loader
from dpo_jax.losses import objectives
from dpo_jax.models import presets
from dpo_jax.run import experiment as experiment_lib
from dpo_jax.run import trainer
from dpo_jax.training import reference

TINY = presets.make_config("tiny")
DPO = objectives.make_objective("dpo", {"beta": 0.1})
MAKE_MESH = sharding.make_mesh
COMPUTES, READS = "computes log-probabilities", "read from"


def _config(folder, mode, loss="dpo", **settings):
  """Returns a small run: 8 pairs a step, 10 pairs of evaluation."""
  config = quickstart.get_config(loss)
  config.steps = 20
  config.batch_size = 8
  config.microbatch_rows = 8
  config.data.path, config.data.eval_path = "pairs:60", "pairs:10"
  config.data.row_length = 128
  config.data.cache_dir = str(folder / "cache")
  config.log.every = 1
  config.optimizer.warmup_steps = 0
  config.reference.mode = mode
  config.update_from_flattened_dict(settings)
  return config


def _use_devices(monkeypatch, count):
  make_mesh = functools.partial(MAKE_MESH, devices=jax.devices()[:count])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Keeps the runs of this file on one device, unless a test says more."""
  _use_devices(monkeypatch, 1)


class _Run:
  """A compiled step, run by hand."""

  def __init__(self, config):
    experiment = experiment_lib.build(config)
    with jax.set_mesh(experiment.mesh):
      self.experiment, self.state = trainer.init_state(experiment)
      first = trainer.host_batch(self.experiment, 0).batch
      self.compiled = trainer.compile_train_step(
        self.experiment, self.state, first
      )

  def steps(self, first, last):
    """Returns the metrics of these steps, counted from 0."""
    history = []
    with jax.set_mesh(self.experiment.mesh):
      for k in range(first, last):
        batch = trainer.host_batch(self.experiment, k).batch
        self.state, metrics = self.compiled(self.state, batch)
        history.append({k: float(v) for k, v in metrics.items()})
    return history

  def evaluate(self):
    with jax.set_mesh(self.experiment.mesh):
      return trainer.make_eval_fn(self.experiment)(self.state)

  @property
  def argument_bytes(self):
    return self.compiled.memory_analysis().argument_size_in_bytes


def _param_bytes(state):
  """Returns the bytes of the parameters on one device."""
  shards = [x.addressable_shards[0].data for x in jax.tree.leaves(state.params)]
  return sum(x.nbytes for x in shards)


def _assert_same(got, expected, atol):
  for ours, theirs in zip(got, expected, strict=True):
    assert ours.keys() == theirs.keys()
    # A margin of about 0 is above it or not by rounding.
    for key in ours.keys() - {"rewards/accuracies"}:
      np.testing.assert_allclose(
        ours[key], theirs[key], rtol=atol, atol=atol, err_msg=key
      )


def test_cached_has_the_losses_of_live_and_holds_no_reference(tmp_path, capfd):
  live = _Run(_config(tmp_path, "live"))
  cached = _Run(_config(tmp_path, "cached"))
  assert capfd.readouterr().out.count(COMPUTES) == 2  # training, evaluation
  size = _param_bytes(live.state)
  assert cached.state.reference is None
  assert live.argument_bytes - cached.argument_bytes > 0.99 * size
  # Two forwards of four: the reference's are gone from the program.
  flops = [x.compiled.cost_analysis()["flops"] for x in (cached, live)]
  assert flops[0] < 0.8 * flops[1]
  ours, theirs = cached.steps(0, 20), live.steps(0, 20)
  assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01
  _assert_same(
    [{"loss": line["loss"]} for line in ours],
    [{"loss": line["loss"]} for line in theirs],
    atol=1e-5,
  )
  _assert_same(ours, theirs, atol=1e-3)
  _assert_same([cached.evaluate()], [live.evaluate()], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("loss, devices", [("aot", 1), ("ipo", 8)])
def test_cached_equals_live_over_many_microbatches(
  tmp_path, loss, devices, monkeypatch
):
  _use_devices(monkeypatch, devices)
  small = {"data.row_length": 64, "batch_size": 32}
  runs = [_Run(_config(tmp_path, m, loss, **small)) for m in ("live", "cached")]
  assert len(trainer.host_batch(runs[0].experiment, 0).batch.rows.tokens) > 1
  live, cached = (run.steps(0, 3) for run in runs)
  _assert_same(cached, live, atol=1e-4)


@pytest.mark.slow
def test_cached_sums_have_the_weights_of_ld_alpha(tmp_path):
  settings = {"data.eval_path": "", "loss.ld_alpha": 0.5}
  runs = [_Run(_config(tmp_path, m, **settings)) for m in ("live", "cached")]
  live, cached = (run.steps(0, 2) for run in runs)
  _assert_same(cached, live, atol=1e-4)


@pytest.mark.slow
def test_cached_has_the_mismatched_responses_of_kto(tmp_path):
  runs = [_Run(_config(tmp_path, x, loss="kto")) for x in ("cached", "live")]
  ours, theirs = (run.steps(0, 6) for run in runs)
  assert theirs[-1]["kl"] != theirs[1]["kl"]
  _assert_same(ours, theirs, atol=1e-3)
  _assert_same(*([run.evaluate()] for run in runs), atol=1e-3)


@pytest.mark.slow
def test_a_sweep_computes_once(tmp_path, capfd):
  settings = {"steps": 1, "data.eval_path": ""}
  train = lambda name, **more: trainer.train(
    _config(tmp_path, "cached", **settings | more), tmp_path / name
  )
  train("first")
  assert COMPUTES in capfd.readouterr().out
  train("second", **{"loss.beta": 0.5, "optimizer.learning_rate": 1e-4})
  out = capfd.readouterr().out
  assert READS in out and COMPUTES not in out


def test_a_damaged_cache_is_computed_again(tmp_path):
  logps = np.arange(12, dtype=np.float32).reshape(6, 2)
  said = []
  load = lambda key="key", count=6: reference.cached_logps(
    tmp_path, key, (count, 2), lambda: logps[:count], said.append
  )
  load()
  path = tmp_path / "reference_key.npz"
  content = path.read_bytes()
  for damage in (content[:100], b"", b"x" * 500, _with_another_value(path)):
    path.write_bytes(damage)
    said.clear()
    np.testing.assert_array_equal(load(), logps)
    (line,) = said
    assert COMPUTES in line and f"{path.name} was damaged: " in line
    np.testing.assert_array_equal(load(), logps)
    assert READS in said[-1]
  # The cache of other data under this name is no better.
  path.rename(tmp_path / "reference_other.npz")
  load("other")
  assert "its checksum differs" in said[-1]
  load("other", count=5)
  assert "it holds float32[6, 2]" in said[-1]
  assert not list(tmp_path.glob(".reference*"))


def _save_array(path):
  with path.open("wb") as file:
    np.save(file, np.zeros((6, 2), np.float32))


@pytest.mark.parametrize(
  "place",
  [
    pathlib.Path.mkdir,
    os.mkfifo,
    lambda path: path.symlink_to("absent"),
    _save_array,
    lambda path: zipfile.ZipFile(path, "w").close(),
    lambda path: np.savez(path, logps=np.zeros(2), sha256=np.zeros(3)),
  ],
  ids=["folder", "fifo", "link", "array", "zip", "others"],
)
def test_whatever_else_is_at_a_cache_s_place_is_replaced(tmp_path, place):
  path, said = tmp_path / "reference_key.npz", []
  place(path)
  left = tmp_path / ".reference_gone.npz.part"
  left.touch()
  logps = np.ones((6, 2), np.float32)
  load = lambda: reference.cached_logps(
    tmp_path, "key", (6, 2), lambda: logps, said.append
  )
  np.testing.assert_array_equal(load(), logps)
  assert f"{path.name} was damaged: " in said[-1]
  np.testing.assert_array_equal(load(), logps)
  assert READS in said[-1] and not left.exists()


def _with_another_value(path: pathlib.Path) -> bytes:
  """Returns a cache that is well formed, with one number changed."""
  with np.load(path) as file:
    arrays = dict(file)
  arrays["logps"][3, 1] += 1
  other = path.with_name("other.npz")
  np.savez(other, **arrays)
  return other.read_bytes()


def test_the_key_is_of_tokens_weights_and_token_weights():
  def make_key(
    last=8, model=TINY, prints=(1,), objective=DPO, prompt=((1, 2), (3,)), **kw
  ):
    tokens = dataset.TokenDataset.from_lists(
      prompt, [[4], [5]], [[6], [7, last]]
    )
    batches = loader.Loader(tokens, batch_size=2, **kw)
    prints = dict(enumerate(prints))
    return reference.cache_key(batches, model, prints, objective)

  base = make_key()
  assert make_key(objective=objectives.make_objective("ipo", {"beta": 3})) == (
    base
  )
  assert make_key(row_length=256, seed=1, layout="mirrored") == base
  keys = {
    base,
    make_key(last=9),
    make_key(prompt=((1,), (2, 3))),
    make_key(prints=(2,)),
    make_key(model=presets.make_config("tiny", dtype="bfloat16")),
    make_key(
      objective=objectives.make_objective("dpo", {"beta": 0.1}, ld_alpha=0.5)
    ),
    make_key(extra_columns=("mismatched",)),
  }
  assert len(keys) == 7


def test_in_bfloat16_the_key_is_of_rows_too():
  model = presets.make_config("tiny", dtype="bfloat16")
  tokens = dataset.TokenDataset.from_lists([[1], [2]], [[4], [5]], [[6], [7]])

  def make_key(**settings):
    batches = loader.Loader(tokens, **{"batch_size": 2} | settings)
    return reference.cache_key(batches, model, {"a": 1}, DPO)

  others = (
    dict(batch_size=1),
    dict(row_length=256),
    dict(microbatch_rows=2),
    dict(seed=1),
    dict(shuffle=False),
  )
  assert len({make_key(), *(make_key(**x) for x in others)}) == 6
  in_file_order = make_key(shuffle=False)
  assert make_key(shuffle=False, seed=1) == in_file_order


def _compute_slowly(folder, begun):
  """Appends a line to a file each time that the values are computed."""

  def compute():
    with open(folder / "computed", "a") as file:
      file.write("once\n")
    time.sleep(1)
    return np.ones((2, 2), np.float32)

  begun.wait()
  logps = reference.cached_logps(folder, "key", (2, 2), compute, print)
  assert (logps == 1).all()


@pytest.mark.slow
def test_of_two_runs_one_computes(tmp_path):
  spawn = multiprocessing.get_context("spawn")
  begun = spawn.Barrier(2)
  runs = [
    spawn.Process(target=_compute_slowly, args=(tmp_path, begun))
    for _ in range(2)
  ]
  for run in runs:
    run.start()
  for run in runs:
    run.join(120)
  assert [run.exitcode for run in runs] == [0, 0]
  assert (tmp_path / "computed").read_text() == "once\n"


def test_an_update_by_hand():
  ours, policy = {"w": np.float32([4, 0])}, {"w": np.float32([0, 2])}
  soft = reference.make_reference("ema", TINY, alpha=0.25, every=3)
  updated = jax.jit(soft.updated)
  for step in (1, 2, 4):
    np.testing.assert_array_equal(updated(step, ours, policy)["w"], [4, 0])
  np.testing.assert_array_equal(updated(6, ours, policy)["w"], [3, 0.5])
  hard = reference.make_reference("sync", TINY, every=3)
  np.testing.assert_array_equal(hard.updated(3, ours, policy)["w"], [0, 2])


@pytest.mark.slow
@pytest.mark.parametrize(
  "mode, alpha, dtype", [("ema", 0.25, "bfloat16"), ("sync", 1.0, "float32")]
)
def test_the_reference_moves_every_few_steps(tmp_path, mode, alpha, dtype):
  settings = {"reference.every": 2, "reference.dtype": dtype}
  if mode == "ema":
    settings["reference.alpha"] = alpha
  run = _Run(_config(tmp_path, mode, **settings))
  expected, losses = jax.device_get(run.state.reference), []
  assert expected["head"].dtype == dtype
  assert expected["final_norm"]["scale"].dtype == "float32"
  for step in range(1, 5):
    losses += [line["loss"] for line in run.steps(step - 1, step)]
    policy, got = jax.device_get((run.state.params, run.state.reference))
    if step % 2 == 0:
      expected = jax.tree.map(
        lambda r, p: ((1 - alpha) * r.astype(np.float32) + alpha * p).astype(
          r.dtype
        ),
        expected,
        policy,
      )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a.astype(np.float32),
        b.astype(np.float32),
        rtol=1e-6 if dtype == "float32" else 1e-2,
        atol=1e-9,
      ),
      got,
      expected,
    )
  if mode == "sync":  # policy equals reference after every second step
    np.testing.assert_allclose(losses[::2], np.log(2), atol=1e-6)
    assert abs(losses[1] - np.log(2)) > 1e-4


def test_the_defaults_are_those_of_tr_dpo():
  soft, hard = (reference.make_reference(m, TINY) for m in ("ema", "sync"))
  assert (soft.alpha, soft.every) == (0.6, 512)
  assert (hard.alpha, hard.every) == (1.0, 512)
  assert str(hard) == "sync, float32, alpha 1 every 512 steps"


@pytest.mark.slow
def test_a_run_with_a_moving_reference_resumes_bit_for_bit(tmp_path):
  def train(name, **more):
    settings = {"reference.every": 2, "reference.alpha": 0.25, "steps": 7}
    settings |= {"data.eval_path": "", "optimizer.schedule": "constant"} | more
    config = _config(tmp_path, "ema", **settings)
    assert trainer.train(config, tmp_path / name)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    drop = ("pairs_per_second", "tokens_per_second", "data_wait_seconds")
    return [
      {k: v for k, v in json.loads(line).items() if k not in drop}
      for line in lines
    ]

  whole = train("whole")
  train("parted", steps=3)
  parted = train("parted")
  assert [line["step"] for line in parted] == list(range(1, 8))
  assert parted == whole


@pytest.mark.parametrize(
  "loss, settings, message",
  [
    (
      "dpo",
      {"reference.mode": "frozen"},
      "unknown reference.mode 'frozen'; known: live, cached, ",
    ),
    (
      "dpo",
      {"reference.mode": "none"},
      "reference.mode='none': loss 'dpo' needs a reference",
    ),
    (
      "sft",
      {"reference.mode": "ema"},
      "reference.mode='ema': loss 'sft' has no reference",
    ),
    (
      "dpo",
      {"reference.mode": "ema", "reference.alpha": 1.5},
      "reference.alpha=1.5: must be in (0, 1]",
    ),
    (
      "dpo",
      {"reference.mode": "ema", "reference.every": 0},
      "reference.every=0: must be at least 1",
    ),
    (
      "dpo",
      {"reference.mode": "sync", "reference.alpha": 0.5},
      "reference.alpha=0.5: reference.mode='sync' does not honour it",
    ),
    (
      "dpo",
      {"reference.every": 3},
      "reference.every=3: reference.mode='live' does not honour it",
    ),
    (
      "dpo",
      {"reference.dtype": "float8"},
      "model param_dtype 'float8'; known: float32, bfloat16",
    ),
  ],
)
def test_bad_settings_are_refused(tmp_path, loss, settings, message):
  config = _config(tmp_path, "live", loss, **settings)
  with pytest.raises(ValueError) as caught:
    experiment_lib.build(config)
  assert message in str(caught.value)

"""Where reference log-probabilities come from: modes, and their cache."""

import multiprocessing
import pathlib
import time

import jax
import numpy as np
import pytest

from configs import quickstart
from dpo_jax import experiment as experiment_lib
from dpo_jax import trainer
from dpo_jax.data import dataset
from dpo_jax.losses import preference
from dpo_jax.models import config as model_config
from dpo_jax.training import reference

TINY = model_config.make_config("tiny")
DPO = preference.make_objective("dpo", {"beta": 0.1})
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


@pytest.mark.parametrize("loss", ["aot", "ipo"])
def test_cached_equals_live_over_many_microbatches(tmp_path, loss):
  small = {"data.row_length": 64, "batch_size": 32}
  runs = [_Run(_config(tmp_path, m, loss, **small)) for m in ("live", "cached")]
  assert len(trainer.host_batch(runs[0].experiment, 0).batch.rows.tokens) > 1
  live, cached = (run.steps(0, 3) for run in runs)
  _assert_same(cached, live, atol=1e-4)


def test_ld_alpha_has_a_cache_of_its_own(tmp_path, capfd):
  settings = {"data.eval_path": "", "loss.ld_alpha": 0.5}
  _Run(_config(tmp_path, "cached", **{"data.eval_path": ""}))
  weighted = _Run(_config(tmp_path, "cached", **settings))
  assert capfd.readouterr().out.count(COMPUTES) == 2
  live = _Run(_config(tmp_path, "live", **settings))
  _assert_same(weighted.steps(0, 2), live.steps(0, 2), atol=1e-4)


def test_a_sweep_computes_once_and_a_damaged_cache_again(tmp_path, capfd):
  settings = {"steps": 1, "data.eval_path": ""}
  train = lambda name, **more: trainer.train(
    _config(tmp_path, "cached", **settings | more), tmp_path / name
  )
  train("first")
  assert COMPUTES in capfd.readouterr().out
  train("second", **{"loss.beta": 0.5, "optimizer.learning_rate": 1e-4})
  out = capfd.readouterr().out
  assert READS in out and COMPUTES not in out
  (path,) = (tmp_path / "cache").glob("reference_*.npz")
  content = path.read_bytes()
  for damage in (content[:100], b"", _with_another_value(path)):
    path.write_bytes(damage)
    train(f"after_{len(damage)}")
    (line,) = [x for x in capfd.readouterr().out.splitlines() if COMPUTES in x]
    assert f"{path.name} was damaged: " in line
    with np.load(path) as file:
      assert np.isfinite(file["logps"]).all()
    assert path.read_bytes() == content
  assert not list((tmp_path / "cache").glob(".reference*"))


def _with_another_value(path: pathlib.Path) -> bytes:
  """Returns a cache that is well formed, with one number changed."""
  with np.load(path) as file:
    arrays = dict(file)
  arrays["logps"][3, 1] += 1
  other = path.with_name("other.npz")
  np.savez(other, **arrays)
  return other.read_bytes()


def test_the_key_is_of_tokens_weights_and_token_weights():
  tokens = lambda last: dataset.TokenDataset.from_lists(
    [[1, 2], [3]], [[4], [5]], [[6], [7, last]]
  )
  prints = {"embed": 1}
  base = reference.cache_key(tokens(8), TINY, prints, DPO)
  again = reference.cache_key(tokens(8), TINY, prints, DPO)
  assert base == again
  more_beta = preference.make_objective("ipo", {"beta": 3.0})
  assert reference.cache_key(tokens(8), TINY, prints, more_beta) == base
  half = model_config.make_config("tiny", dtype="bfloat16")
  other = preference.make_objective("dpo", {"beta": 0.1}, ld_alpha=0.5)
  moved = dataset.TokenDataset.from_lists(
    [[1], [2, 3]], [[4], [5]], [[6], [7, 8]]
  )
  keys = {
    base,
    reference.cache_key(tokens(9), TINY, prints, DPO),
    reference.cache_key(moved, TINY, prints, DPO),
    reference.cache_key(tokens(8), TINY, {"embed": 2}, DPO),
    reference.cache_key(tokens(8), half, prints, DPO),
    reference.cache_key(tokens(8), TINY, prints, other),
  }
  assert len(keys) == 6


def _compute_slowly(folder, begun):
  """Appends a line to a file each time that the values are computed."""

  def compute():
    with open(folder / "computed", "a") as file:
      file.write("once\n")
    time.sleep(1)
    return np.ones((2, 2), np.float32)

  begun.wait()
  logps = reference.cached_logps(folder, "key", 2, compute, print)
  assert (logps == 1).all()


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
  ],
)
def test_bad_settings_are_refused(tmp_path, loss, settings, message):
  config = _config(tmp_path, "live", loss, **settings)
  with pytest.raises(ValueError) as caught:
    experiment_lib.build(config)
  assert message in str(caught.value)

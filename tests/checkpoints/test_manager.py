"""A checkpoint comes back bit for bit, or is said to be damaged."""

import contextlib
import errno
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax import sharding
from dpo_jax.checkpoints import manager, reader

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def _init(rng):
  embed, mlp = jax.random.split(rng)
  params = {
    "embed": jax.random.normal(embed, (64, 512)),
    "layers": {"mlp": jax.random.normal(mlp, (4, 32, 16), jnp.bfloat16)},
  }
  return {
    "params": params,
    "opt_state": OPTIMIZER.init(params),
    "reference": None,
    "step": jnp.int32(0),
  }


def _shardings(mesh):
  axes = {64: ("fsdp",), 4: (None, "tensor")}

  def layout(x):
    return NamedSharding(mesh, PartitionSpec(*axes.get((*x.shape, 0)[0], ())))

  return jax.tree.map(layout, jax.eval_shape(_init, jax.random.key(0)))


def _abstract(mesh):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(_init, jax.random.key(0)),
    _shardings(mesh),
  )


def _state(mesh, seed=0):
  init = jax.jit(_init, out_shardings=_shardings(mesh))
  return init(jax.random.key(seed))


def _update(state):
  """A training step that depends on all of the state."""
  grads = jax.tree.map(lambda p: (p * p).astype(p.dtype), state["params"])
  updates, opt_state = OPTIMIZER.update(
    grads, state["opt_state"], state["params"]
  )
  params = optax.apply_updates(state["params"], updates)
  step = state["step"] + 1
  return state | {"params": params, "opt_state": opt_state, "step": step}


@pytest.fixture
def mesh():
  return sharding.make_mesh(fsdp=4, tensor=2)


def _open(workdir, keep=10, **kwargs):
  return manager.Manager(workdir, every=1, keep=keep, **kwargs)


def _assert_equal(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _data_file(workdir, step):
  """Returns the file that holds most of a checkpoint's array data."""
  step_folder = workdir / "checkpoints" / str(step)
  return max(
    (p for p in step_folder.rglob("*") if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@contextlib.contextmanager
def _files_of_at_most(size):
  """As a full disk does: what is written past it fails in the system."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("then", ["wait", "save", "close"])
def test_a_save_that_the_system_refuses_is_its_error_and_keeps_the_last(
  then, tmp_path, capfd
):
  state = {"params": {"embed": jax.random.normal(jax.random.key(0), (99, 99))}}
  caught = pytest.raises(OSError, match="File too large")
  with caught as error, _open(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    with _files_of_at_most(20_000):
      checkpoints.save(2, state)
      if then == "wait":
        checkpoints.wait()
      if then == "save":
        checkpoints.save(3, state)
      checkpoints.close()
  assert error.value.errno == errno.EFBIG
  assert error.value.filename == str(tmp_path / "checkpoints")
  assert "Traceback" not in capfd.readouterr().err
  with _open(tmp_path, keep=1) as checkpoints:
    step, restored = checkpoints.restore(jax.eval_shape(lambda: state))
  assert step == 1
  _assert_equal(restored, state)


def test_a_file_where_checkpoints_belong_is_refused(tmp_path):
  (tmp_path / "checkpoints").touch()
  with pytest.raises(FileExistsError, match="checkpoints"):
    _open(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lower_is_better", [True, False])
def test_an_evaluation_that_is_not_finite_is_never_the_best(
  value, lower_is_better, tmp_path
):
  state = {"params": {"embed": jnp.ones(3)}}
  metric = "loss" if lower_is_better else "rewards/margins"
  options = dict(metric=metric, lower_is_better=lower_is_better)
  with _open(tmp_path, keep=1, **options) as checkpoints:
    for step, x in enumerate((1.0, value, 2.0), 1):
      worse = x if lower_is_better else -x
      checkpoints.save(step, state, {metric: worse})
    checkpoints.wait()
  assert manager.saved_steps(tmp_path) == [1, 3]
  assert manager.best_step(tmp_path, metric) == 1


DAMAGE = {
  "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
  "missing": lambda path: path.unlink(),
  "garbage": lambda path: path.write_bytes(b"\x5a" * path.stat().st_size),
  "one bit": _flip_a_bit,
}


def test_n_and_m_steps_equal_n_restart_m_bit_for_bit(tmp_path, mesh):
  step_fn = jax.jit(_update, donate_argnums=0)
  state = _state(mesh)
  with _open(tmp_path) as checkpoints:
    for step in range(1, 4):
      state = step_fn(state)
      assert checkpoints.save(step, state)
  whole = step_fn(step_fn(state))
  with _open(tmp_path) as checkpoints:
    step, state = checkpoints.restore(_abstract(mesh))
  assert step == 3
  _assert_equal(step_fn(step_fn(state)), whole)


def test_donating_a_state_that_is_being_saved_changes_no_checkpoint(
  tmp_path, mesh
):
  step_fn = jax.jit(_update, donate_argnums=0)
  state = _state(mesh)
  expected = jax.device_get(state)
  with _open(tmp_path) as checkpoints:
    with jax.transfer_guard("disallow"):
      checkpoints.save(1, state)
      for _ in range(5):
        state = step_fn(state)
      checkpoints.wait()
    _, restored = checkpoints.restore(_abstract(mesh))
  _assert_equal(jax.device_get(restored), expected)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {}])
def test_a_state_restores_onto_another_mesh(tmp_path, mesh, axes):
  state = _state(mesh)
  devices = jax.devices() if axes else jax.devices()[:1]
  other = sharding.make_mesh(**axes, devices=devices)
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    _, restored = checkpoints.restore(_abstract(other))
  _assert_equal(jax.device_get(restored), jax.device_get(state))
  assert all(x.sharding.mesh == other for x in jax.tree.leaves(restored))


def test_an_empty_run_folder_restores_to_nothing(tmp_path, mesh):
  with _open(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.restore(_abstract(mesh)) is None


def test_the_last_and_the_best_are_kept_across_a_restart(tmp_path, mesh):
  state = _state(mesh)
  losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 1.5}
  for steps in [(1, 2, 3), (4, 5, 6)]:
    with _open(tmp_path, keep=2) as checkpoints:
      for step in steps:
        loss = losses[step]
        checkpoints.save(step, state, None if loss is None else {"loss": loss})
  assert manager.saved_steps(tmp_path) == [2, 5, 6]


def test_the_best_may_be_the_highest(tmp_path, mesh):
  with _open(
    tmp_path, keep=1, metric="accuracy", lower_is_better=False
  ) as checkpoints:
    for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.1)]:
      checkpoints.save(step, _state(mesh), {"accuracy": accuracy})
  assert manager.saved_steps(tmp_path) == [2, 3]


def test_the_best_step_is_read_from_the_metrics_of_those_that_are_left(
  tmp_path, mesh
):
  state = _state(mesh)
  accuracies = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 5: None}
  with _open(tmp_path) as checkpoints:
    for step, value in accuracies.items():
      metrics = value and {"loss": value, "rewards/accuracies": value}
      checkpoints.save(step, state, metrics)
  assert manager.best_step(tmp_path, "rewards/accuracies") == 3
  assert manager.best_step(tmp_path, "loss") == 4
  assert manager.best_step(tmp_path, "rewards/margins") is None


def test_save_is_for_multiples_of_every_or_when_forced(tmp_path, mesh):
  state = _state(mesh)
  with manager.Manager(tmp_path, every=2, keep=9) as checkpoints:
    saved = [checkpoints.save(step, state) for step in (1, 2, 3)]
    assert saved == [False, True, False]
    assert checkpoints.save(3, state, force=True)
    assert not checkpoints.save(3, state, force=True), "it is there already"
  with manager.Manager(tmp_path, every=0, keep=9) as checkpoints:
    assert not checkpoints.save(4, state)
  assert manager.saved_steps(tmp_path) == [2, 3]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
  tmp_path, mesh, capfd, caplog, damage
):
  states = {step: _state(mesh, step) for step in (1, 2)}
  with _open(tmp_path) as checkpoints:
    for step, state in states.items():
      checkpoints.save(step, state)
  DAMAGE[damage](_data_file(tmp_path, 2))
  with _open(tmp_path) as checkpoints:
    step, restored = checkpoints.restore(_abstract(mesh))
    assert step == checkpoints.latest_step() == 1
    _assert_equal(restored, states[1])
    (said,) = [r for r in caplog.records if r.levelname != "INFO"]
    assert re.search(
      r"checkpoints/2 is damaged \(.+\): renamed it damaged_2", said.message
    )
    assert "Traceback" not in capfd.readouterr().err
    assert checkpoints.save(2, states[2]), "the step can be saved again"
    checkpoints.wait()
    step, restored = checkpoints.restore(_abstract(mesh))
  assert step == 2
  _assert_equal(restored, states[2])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_to_any_file_restores_right_or_falls_back(
  tmp_path, mesh, damage
):
  state = _state(mesh)
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.save(2, state)
  folder = tmp_path / "checkpoints" / "2"
  names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
  for name in names:
    saved = (folder / name).read_bytes()
    DAMAGE[damage](folder / name)
    with _open(tmp_path) as checkpoints:
      step, restored = checkpoints.restore(_abstract(mesh))
    _assert_equal(restored, state)
    aside = folder.with_name("damaged_2")
    assert aside.exists() == (step == 1)
    if step == 1:
      aside.rename(folder)
    (folder / name).write_bytes(saved)


def test_all_damaged_is_an_error_that_renames_nothing(tmp_path, mesh):
  with _open(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(mesh))
  for step in (1, 2):
    DAMAGE["truncated"](_data_file(tmp_path, step))
  with _open(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}") as e:
      checkpoints.restore(_abstract(mesh))
  assert "\n" not in str(e.value)
  assert manager.saved_steps(tmp_path) == [1, 2]


def test_another_model_is_an_error_and_not_damage(tmp_path, mesh):
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, _state(mesh))
    checkpoints.wait()
    other = _abstract(mesh)
    embed = other["params"]["embed"]
    other["params"]["embed"] = embed.update(shape=(64, 48))
    with pytest.raises(ValueError, match=r"params/embed is float32\[64, 512\]"):
      checkpoints.restore(other)
    del other["params"]["embed"]
    with pytest.raises(ValueError, match="absent here"):
      checkpoints.restore(other)
  assert manager.saved_steps(tmp_path) == [1]


def test_params_restore_without_the_optimizer(tmp_path, mesh, monkeypatch):
  state = _state(mesh)
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, _state(mesh, 1))
    checkpoints.save(2, state)
  abstract = _abstract(mesh)["params"]
  read = []
  fingerprints = reader.fingerprints
  monkeypatch.setattr(
    reader, "fingerprints", lambda tree: read.append(tree) or fingerprints(tree)
  )
  _assert_equal(manager.restore_params(tmp_path, abstract), state["params"])
  assert [list(tree) for tree in read] == [["params"]]
  first = manager.restore_params(tmp_path, abstract, step=1)
  _assert_equal(first, _state(mesh, 1)["params"])


def test_params_are_cast_to_the_dtype_asked_for(tmp_path, mesh):
  state = _state(mesh)
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, state)
  abstract = jax.tree.map(
    lambda x: x.update(dtype=jnp.bfloat16), _abstract(mesh)["params"]
  )
  params = manager.restore_params(tmp_path, abstract)
  expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["params"])
  _assert_equal(params, expected)
  assert params["embed"].sharding == abstract["embed"].sharding


def test_params_of_a_folder_without_them_are_an_error(tmp_path, mesh):
  abstract = _abstract(mesh)["params"]
  with pytest.raises(ValueError, match="no checkpoint in"):
    manager.restore_params(tmp_path, abstract)
  with _open(tmp_path) as checkpoints:
    checkpoints.save(1, _state(mesh))
  with pytest.raises(ValueError, match="of step 7 in .*; there are 1$"):
    manager.restore_params(tmp_path, abstract, step=7)
  _flip_a_bit(_data_file(tmp_path, 1))
  with pytest.raises(ValueError, match="is damaged"):
    manager.restore_params(tmp_path, abstract)


@pytest.mark.parametrize("setting", [{"every": -1}, {"keep": 0}])
def test_settings_out_of_range_are_refused(tmp_path, setting):
  with pytest.raises(ValueError, match=f"checkpoint.{next(iter(setting))}="):
    manager.Manager(tmp_path, **({"every": 1, "keep": 1} | setting))


def test_metrics_without_the_one_that_decides_are_refused(tmp_path, mesh):
  with _open(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="'loss'.*not among.*accuracy"):
      checkpoints.save(1, _state(mesh), {"accuracy": 1.0})


def test_a_fingerprint_is_the_weighted_sum_of_the_bits():
  x = jnp.array([[3, 5], [7, 11]], jnp.int32)
  expected = {"x": 3 * 1 + 5 * 3 + 7 * 5 + 11 * 7}
  assert jax.device_get(reader.fingerprints({"x": x})) == expected
  exchanged = jax.device_get(reader.fingerprints({"x": x[::-1]}))
  assert exchanged != expected


_KILLED = """
import sys, jax, jax.numpy as jnp
from dpo_jax.checkpoints import manager
checkpoints = manager.Manager(sys.argv[1], every=1, keep=3)
make = jax.jit(lambda step: {"x": jnp.full((1 << 21,), step, jnp.int32)})
for step in range(1, 10_000):
  checkpoints.save(step, make(step))
  print(step, flush=True)
"""


def _run_python(code, *args, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, args)],
    cwd=REPOSITORY,
    env=os.environ | {"XLA_FLAGS": ""} | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_a_write_killed_half_way_never_looks_complete(tmp_path):
  mesh = sharding.make_mesh()
  abstract = {
    "x": jax.ShapeDtypeStruct(
      (1 << 21,), jnp.int32, sharding=sharding.replicated(mesh)
    )
  }
  folder = tmp_path / "checkpoints"
  half_written = 0
  for _ in range(3):
    process = _run_python(_KILLED, tmp_path)
    for _ in range(3):
      process.stdout.readline()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
      if any(not p.name.isdigit() for p in folder.iterdir()):
        break
    process.send_signal(signal.SIGKILL)
    process.wait()
    half_written += any(not p.name.isdigit() for p in folder.iterdir())
    with _open(tmp_path) as checkpoints:
      step, state = checkpoints.restore(abstract)
      # Not the step that was being written: its leftovers go all the same.
      assert checkpoints.save(step + 2, state)
    assert step >= 2, "steps 1 and 2 were written before the third was said"
    np.testing.assert_array_equal(state["x"], np.full(1 << 21, step))
    assert all(p.name.isdigit() for p in folder.iterdir())
    shutil.rmtree(tmp_path)
  assert half_written, "no kill fell into a write: the test shows nothing"


_ONE_OF_TWO = """
import pathlib, sys, jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[3]))
from absl import logging
from jax.experimental import multihost_utils
from dpo_jax import sharding
from dpo_jax.checkpoints import manager
workdir = pathlib.Path(sys.argv[2])
layout = sharding.rows(sharding.make_mesh(fsdp=4))
def init(step):  # Large enough that Orbax does not put it into its index.
  return {"params": jax.random.normal(jax.random.key(step), (64, 512))}
make = jax.jit(init, out_shardings=layout)
with manager.Manager(workdir, every=1, keep=3) as checkpoints:
  for step in (1, 2):
    checkpoints.save(step, make(step), {"loss": 1.0})
  checkpoints.wait()
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
      make(1))
  step, state = checkpoints.restore(abstract)
  assert step == 2
  if jax.process_index() == 0:  # Spoils what only process 1 reads.
    parts = (workdir / "checkpoints/2/state/ocdbt.process_1/d").iterdir()
    max(parts, key=lambda p: p.stat().st_size).unlink()
  multihost_utils.sync_global_devices("spoilt")
  step, state = checkpoints.restore(abstract)
  assert step == 1, step
  for shard in state["params"].addressable_shards:
    expected = jax.jit(init)(1)["params"][shard.index]
    np.testing.assert_array_equal(shard.data, expected)
  assert checkpoints.save(2, make(2))
params = manager.restore_params(workdir, abstract["params"])
assert params.sharding == layout
print("done", jax.process_index())
"""


def test_two_processes_agree_on_what_is_damaged(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = "--xla_force_host_platform_device_count=2"
  processes = [
    _run_python(_ONE_OF_TWO, address, tmp_path, i, XLA_FLAGS=flags)
    for i in range(2)
  ]
  try:
    output = [process.communicate(timeout=60)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for i, text in enumerate(output):
    assert f"done {i}" in text, text[-3000:]
  assert "another process could not read it" in output[0]

"""How a run ends early, and what it leaves."""

import math
import os
import signal

import pytest

from configs import quickstart
from dpo_jax.checkpoints import manager, run_folder
from dpo_jax.host import endings
from dpo_jax.run import trainer
from dpo_jax.training import recorder, state
from tests import test_end_to_end as end_to_end


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache):
  config = quickstart.get_config("sft")
  config.data.path, config.data.eval_path = "reviews:16", ""
  config.data.cache_dir = str(cache)
  config.data.row_length = 128
  config.batch_size, config.microbatch_rows, config.steps = 8, 0, 5
  config.log.every = config.checkpoint.every = 1
  return config


def test_numbers_that_burst_end_the_run_and_leave_the_good_checkpoint(
  config, tmp_path, capsys
):
  config.optimizer.learning_rate = 1e30
  with pytest.raises(
    endings.NotFiniteError,
    match="^step 2: loss is .*: the run ends; last good checkpoint: that of"
    " step 1 stays$",
  ):
    trainer.train(config, str(tmp_path))
  assert manager.saved_steps(tmp_path) == [1]
  assert [line["step"] for line in end_to_end.metrics(tmp_path)] == [1, 2]
  assert not (tmp_path / run_folder.FINISHED).exists()
  out, errors = capsys.readouterr()
  assert not errors
  assert (
    "warm-up of 20 steps is longer than the run of 5: the rate never exceeds"
    f" {1e30 * 5 / 21:.2g}\n"
  ) in out


def test_weights_that_burst_in_the_last_update_are_not_saved(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(state, "is_finite", lambda params: False)
  with pytest.raises(
    endings.NotFiniteError,
    match="^step 1: the weights are not finite: .*: none was saved$",
  ):
    trainer.train(config, str(tmp_path))
  assert manager.saved_steps(tmp_path) == []
  (line,) = end_to_end.metrics(tmp_path)
  assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])


def test_ctrl_c_saves_and_says_where(config, tmp_path, capsys, monkeypatch):
  write = recorder.Recorder.write

  def interrupted(self, step, *rest):
    write(self, step, *rest)
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(recorder.Recorder, "write", interrupted)
  config.checkpoint.every = 0
  assert not trainer.train(config, str(tmp_path))
  assert endings.status() == 130
  (saved,) = manager.saved_steps(tmp_path)
  assert saved in (2, 3)
  *_, last = capsys.readouterr().out.splitlines()
  assert last == f"saved at step {saved}; the same command goes on from there"
  assert not (tmp_path / run_folder.FINISHED).exists()

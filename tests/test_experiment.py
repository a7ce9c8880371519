"""What an experiment makes of its config and its model together."""

import dataclasses

import pytest

from configs import quickstart
from dpo_jax import experiment
from dpo_jax.models import config as model_config


def _build(monkeypatch, tmp_path, **changes):
  """Builds the quickstart on a model with a window of so many keys."""
  window = changes.pop("window")
  config = quickstart.get_config("dpo")
  config.model.preset = "tiny"
  config.data.path, config.data.eval_path = "pairs:16", "pairs:8"
  config.data.row_length = 0
  config.data.cache_dir = str(tmp_path)
  config.batch_size = 8
  config.mesh.update(changes)
  small = dataclasses.replace(
    model_config.PRESETS["tiny"], window=window, sliding=(True, False)
  )
  monkeypatch.setitem(model_config.PRESETS, "tiny", small)
  return experiment.build(config)


@pytest.mark.parametrize(
  ("window", "layout"), [(12, "padded"), (512, "mirrored")]
)
def test_pairs_longer_than_a_window_are_laid_out_as_two_sequences(
  window, layout, monkeypatch, tmp_path, capsys
):
  built = _build(monkeypatch, tmp_path, window=window)
  assert built.loader.layout == built.eval_loader.layout == layout
  said = f"longer than the {window} keys" in capsys.readouterr().out
  assert said == (layout == "padded")


def test_experts_that_a_mesh_does_not_divide_are_refused(monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="mesh.expert=2: must divide the model"):
    _build(monkeypatch, tmp_path, window=512, expert=2)

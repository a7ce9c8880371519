"""Where a model comes from: a Hugging Face folder, a hub name or a run.

A run folder holds, beside its checkpoints, `model/`: the decoder's
`config.json` in Hugging Face format and the tokenizer.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax

from dpo_jax.checkpoints import manager, run_folder
from dpo_jax.models import huggingface, transformer
from dpo_jax.models.config import ModelConfig
from dpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model that can be loaded.

  Attributes:
    config: the decoder as it was saved.
    tokenizer: the folder that holds its tokenizer.
    load: (config, shardings) -> parameters on the mesh, in
      `config.param_dtype`.
  """

  config: ModelConfig
  tokenizer: str
  load: Callable[[ModelConfig, Params], Params]


def is_run(path: str) -> bool:
  """Returns whether `path` is a run folder."""
  folder = pathlib.Path(path)
  return (folder / "checkpoints").is_dir() and (
    folder / run_folder.MODEL_FOLDER
  ).is_dir()


def open_model(path: str, *, step: int | None = None) -> ModelSource:
  """Returns what `model.path` names, without reading any weights.

  Args:
    path: a folder in Hugging Face format, a hub name, or a run folder.
    step: which checkpoint of a run. By default the newest; of a reward model
      or classifier the one that its evaluations say is the best.

  Raises:
    ValueError: there is no such model, or its architecture is unknown.
  """
  if not is_run(path):
    folder = huggingface.resolve(path)

    def load_folder(config, shardings):
      return huggingface.load_params(folder, config, shardings)

    config = huggingface.read_config(folder)
    return ModelSource(config, str(folder), load_folder)

  folder = pathlib.Path(path) / run_folder.MODEL_FOLDER
  saved = huggingface.read_config(str(folder))
  if step is None and saved.head != "vocabulary":
    settings = json.loads((folder.parent / "config.json").read_text())
    step = manager.best_step(path, settings["checkpoint"]["metric"])

  def load_run(config, shardings):
    abstract = jax.tree.map(
      lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
      transformer.param_shapes(config),
      shardings,
    )
    return manager.restore_params(path, abstract, step)

  return ModelSource(saved, str(folder), load_run)

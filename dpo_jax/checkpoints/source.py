"""Where a model comes from: a Hugging Face folder, a hub name or a run.

A run stands for its newest checkpoint, `runs/x/checkpoints/120` for that one.

A run folder holds, beside its checkpoints, `model/`: the decoder's
`config.json` in Hugging Face format and the tokenizer. A run of adapters says
there, in `lora.json`, what they are and where their base is. Such a run, like
a folder in PEFT's format, is a model too: its base with the adapters merged.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable

import jax

from dpo_jax.checkpoints import manager, run_folder
from dpo_jax.host import schema
from dpo_jax.models import config as model_config
from dpo_jax.models import lora, transformer
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.models.huggingface import adapters as huggingface_adapters
from dpo_jax.models.huggingface import folder as huggingface
from dpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model that can be loaded.

  Attributes:
    config: the decoder as it was saved.
    tokenizer: the folder that holds its tokenizer.
    folders: those that hold what its files say of it besides: its own, and
      of adapters that of their base.
    load: (config, shardings) -> parameters on the mesh, in
      `config.param_dtype`.
  """

  config: ModelConfig
  tokenizer: str
  folders: tuple[str, ...]
  load: Callable[[ModelConfig, Params], Params]


@dataclasses.dataclass(frozen=True)
class AdapterSource:
  """Adapters that can be loaded.

  Attributes:
    folder: holds their tokenizer, if any.
    base: path or name of the model that they were trained on.
    lora: what they are, given the base's config.
    load: (config with that `lora`, shardings) -> adapters on the mesh.
  """

  folder: str
  base: str
  lora: Callable[[ModelConfig], Lora]
  load: Callable[[ModelConfig, Params], Params]


LORA = "lora.json"  # in a run's model folder
LORA_KINDS = {
  "base": schema.STRING,
  "rank": schema.integer(1, 2**20),
  "alpha": schema.POSITIVE,
  "targets": schema.STRING,
  "dtype": schema.choice(*model_config.CHOICES["param_dtype"]),
}
_LORA_FIELDS = LORA_KINDS.keys() - {"base"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def is_run(path: str) -> bool:
  """Returns whether `path` is a run folder."""
  folder = pathlib.Path(path)
  return (folder / "checkpoints").is_dir() and (
    folder / run_folder.MODEL_FOLDER
  ).is_dir()


def split_step(path: str, step: int | None = None) -> tuple[str, int | None]:
  """Returns a run folder and the step of the checkpoint that a path names.

  A path that is no checkpoint of a run is returned as it is.

  Raises:
    ValueError: it names another step than `step`.
  """
  folder = pathlib.Path(path).absolute()
  is_step = folder.name.isdecimal() and folder.parent.name == "checkpoints"
  run = str(folder.parent.parent)
  if not (is_step and is_run(run)):
    return path, step
  if step not in (None, int(folder.name)):
    raise ValueError(f"{path} is the checkpoint of that step, not of {step}")
  return run, int(folder.name)


def is_same(one: str, other: str) -> bool:
  """Returns whether two paths or hub names are of one model."""
  is_folder = os.path.isdir(one) and os.path.isdir(other)
  return os.path.samefile(one, other) if is_folder else one == other


def write_lora(folder: pathlib.Path, config: Lora, base: str) -> None:
  """Writes what the adapters of a run are into its model folder."""
  base = os.path.abspath(base) if os.path.isdir(base) else base
  values = {"base": base, **dataclasses.asdict(config)}
  (folder / LORA).write_text(json.dumps(values, indent=2) + "\n")


def open_adapter(path: str, *, step: int | None = None) -> AdapterSource | None:
  """Returns the adapters that a path names; None if it is a whole model.

  Args:
    path: a run folder, one of its checkpoints, a folder in PEFT's format, or
      a hub name.
    step: which checkpoint of a run; the newest by default.

  Raises:
    ValueError: there is no such model, a step of what is no run, or adapters
      that cannot be read.
  """
  path, step = split_step(path, step)
  if not is_run(path):
    folder = _resolve(path)
    if step is not None:
      raise ValueError(
        f"step={step}: {path!r} has no steps; allowed: a run folder, or none"
      )
    if not huggingface_adapters.is_adapter(folder):
      return None
    values = huggingface_adapters.read_config(folder)
    return AdapterSource(
      folder=folder,
      base=values.get("base_model_name_or_path") or "",
      lora=functools.partial(huggingface_adapters.read_lora, folder),
      load=functools.partial(huggingface_adapters.load, folder),
    )
  folder = pathlib.Path(path) / run_folder.MODEL_FOLDER
  if not (folder / LORA).exists():
    return None
  values = schema.read(folder / LORA, LORA_KINDS, required=LORA_KINDS)
  base = values.pop("base")
  return AdapterSource(
    folder=str(folder),
    base=base,
    lora=lambda config: Lora(**{name: values[name] for name in _LORA_FIELDS}),
    load=lambda config, shardings: _restore(
      path, step, lora.shapes(config), shardings
    ),
  )


def open_model(
  path: str, *, step: int | None = None, above: tuple[str, ...] = ()
) -> ModelSource:
  """Returns what `model.path` names, without reading any weights.

  Args:
    path: a folder in Hugging Face format, a hub name, a run folder or one of
      its checkpoints; or an adapter in PEFT's format, which is merged into its
      base.
    step: which checkpoint of a run. By default the newest; of a reward model
      or classifier the one that its evaluations say is the best.
    above: adapters whose base this is, or its base's base.

  Raises:
    ValueError: there is no such model, or its architecture is unknown.
  """
  adapter = open_adapter(path, step=step)
  path, step = split_step(path, step)
  if adapter is not None:
    return _merged(adapter, (*above, path))
  if not is_run(path):
    folder = _resolve(path)

    def load_folder(config, shardings):
      return huggingface.load_params(folder, config, shardings)

    config = huggingface.read_config(folder)
    return ModelSource(config, str(folder), (str(folder),), load_folder)

  folder = pathlib.Path(path) / run_folder.MODEL_FOLDER
  saved = huggingface.read_config(str(folder))
  if step is None and saved.head != "vocabulary":
    key = "checkpoint.metric"
    settings = run_folder.read_config(path, [key])
    step = manager.best_step(path, settings[key])

  def load_run(config, shardings):
    # A run may have padded its vocabulary otherwise.
    (num_rows, _) = manager.saved_shape(path, "params/embedding", step)
    saved = dataclasses.replace(config, vocab_multiple=num_rows)
    mesh = jax.tree.leaves(shardings)[0].mesh
    layouts = transformer.layouts(mesh, saved)
    params = _restore(path, step, transformer.param_shapes(saved), layouts)
    if saved.num_vocab_rows == config.num_vocab_rows:
      return params
    fit = functools.partial(transformer.fit_vocabulary, config)
    return jax.jit(fit, out_shardings=shardings)(params)

  return ModelSource(saved, str(folder), (str(folder),), load_run)


def _resolve(path: str) -> str:
  """Returns a local folder of a model or an adapter."""
  folder = huggingface.resolve(path)
  files = ("config.json", huggingface_adapters.CONFIG)
  if any(os.path.isfile(os.path.join(folder, name)) for name in files):
    return folder
  raise ValueError(
    f"{path!r} is no model: not a Hugging Face folder ({' or '.join(files)}),"
    " a run folder (checkpoints/ and model/) or a run's checkpoint"
    " (checkpoints/<step>)"
  )


def _merged(adapter: AdapterSource, paths: tuple[str, ...]) -> ModelSource:
  """Returns the model that an adapter and its base are together.

  Args:
    adapter: to be merged.
    paths: its own, and those of what it is itself a base of.
  """
  if not adapter.base:
    raise ValueError(f"{adapter.folder}: the adapter does not name its base")
  below, _ = split_step(adapter.base)
  if any(is_same(below, path) for path in (*paths, adapter.folder)):
    raise ValueError(
      f"{adapter.folder}: the adapter's base {adapter.base!r} is itself, or"
      " leads back to it"
    )
  base = open_model(adapter.base, above=paths)
  config = lora.with_lora(base.config, adapter.lora(base.config))

  def load(wanted, shardings):
    adapted = dataclasses.replace(wanted, lora=config.lora)
    mesh = jax.tree.leaves(shardings)[0].mesh
    adapters = adapter.load(adapted, lora.layouts(mesh, adapted))
    merge = jax.jit(
      functools.partial(lora.merge, adapted),
      donate_argnums=0,
      out_shardings=shardings,
    )
    return merge(base.load(wanted, shardings), adapters)

  has_own = any(
    os.path.isfile(os.path.join(adapter.folder, name))
    for name in TOKENIZER_FILES
  )
  tokenizer = adapter.folder if has_own else base.tokenizer
  folders = (adapter.folder, *base.folders)
  return ModelSource(base.config, tokenizer, folders, load)


def _restore(
  run: str, step: int | None, shapes: Params, shardings: Params
) -> Params:
  """Returns parameters of these shapes from a run's checkpoint."""
  abstract = jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    shapes,
    shardings,
  )
  return manager.restore_params(run, abstract, step)

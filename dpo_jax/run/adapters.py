"""What a run of adapters trains, over which base and against what."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dpo_jax.checkpoints import source
from dpo_jax.models import lora
from dpo_jax.models.config import Lora, ModelConfig
from dpo_jax.types import Params

# What the other options are without adapters, where nothing honours them.
OFF = {"alpha": None, "targets": "", "path": "", "base_dtype": "auto"}

Load = Callable[[], Params]


@dataclasses.dataclass(frozen=True)
class Options:
  """The group `lora` of a config (see configs/base.py), and its model.

  Attributes:
    base: path or name of the model that adapters are added to; empty where
      its weights are random.
    dtype: what adapters are kept in.
  """

  rank: int
  alpha: float | None
  targets: str
  path: str
  base_dtype: str
  base: str
  dtype: str


def add(options: Options, policy: ModelConfig) -> ModelConfig:
  """Returns the decoder with the adapters that are to be trained, if any.

  Its `param_dtype` is then that of the frozen weights.

  Raises:
    ValueError: an option that is not right, or that nothing would honour.
  """
  if not options.rank:
    for key, default in OFF.items():
      if (value := getattr(options, key)) != default:
        raise ValueError(f"lora.{key}={value!r}: only with lora.rank above 0")
    return policy
  if policy.head != "vocabulary":
    raise ValueError(
      f"lora.rank={options.rank}: a {policy.head} head is new, and adapters"
      " leave it as it is; allowed: losses of language models"
    )
  if not options.base:
    raise ValueError(
      f"lora.rank={options.rank}: adapters need model.path; the random weights"
      " of a model.preset are not kept"
    )
  alpha = 2.0 * options.rank if options.alpha is None else options.alpha
  wanted = Lora(options.rank, alpha, options.targets or ".*", options.dtype)
  dtype = options.base_dtype
  if dtype == "int8":
    lora.import_qwix()
    if policy.remat == "none":
      raise ValueError(
        "lora.base_dtype='int8' with model.remat='none': the backward pass"
        " would keep every kernel as it was brought back; known: dots, full"
      )
  # int8 is of projections; the rest is computed with.
  dtype = policy.dtype if dtype in ("auto", "int8") else dtype
  return lora.with_lora(policy.frozen(dtype), wanted)


def make_loads(
  options: Options, policy: ModelConfig, load: Load, mesh: Any, *, seed: int
) -> tuple[Load, Load, Params]:
  """Returns what returns the base, what the adapters, and their layouts.

  Args:
    options: of the adapters.
    policy: the decoder with them.
    load: returns the base's weights as they are stored.
    mesh: all devices.
    seed: of adapters that are drawn.

  Raises:
    ValueError: those at `lora.path` are not as the options say.
  """
  layouts = lora.layouts(mesh, policy)
  load_base = load
  if options.base_dtype == "int8":
    load_base = lambda: lora.quantize(mesh, policy, load())
  path = options.path
  if not path:
    rng = jax.random.key(seed)
    draw = jax.jit(lambda: lora.init(policy, rng), out_shardings=layouts)
    return load_base, draw, layouts
  adapted, load_adapters = _open(path, policy)
  shapes = lambda model: jax.tree.map(lambda x: x.shape, lora.shapes(model))
  ours, theirs = policy.lora, adapted.lora
  if shapes(policy) != shapes(adapted) or ours.scale != theirs.scale:
    raise ValueError(
      f"lora.path={path!r} has rank {theirs.rank}, alpha {theirs.alpha:g} and"
      f" targets {theirs.targets!r}; lora.rank={ours.rank},"
      f" lora.alpha={ours.alpha:g} and lora.targets={ours.targets!r} differ"
    )
  return load_base, lambda: load_adapters(policy, layouts), layouts


def share_reference(
  options: Options, policy: ModelConfig, mesh: Any, *, path: str, dtype: str
) -> tuple[ModelConfig, Callable[[Params], Params | None]] | None:
  """Returns a reference over the policy's base, and its loader.

  Args:
    options: of the policy.
    policy: with its adapters.
    mesh: all devices.
    path: of the reference; empty for the policy as it starts.
    dtype: the reference's, which can be no other than the base's.

  Returns:
    The decoder, and what returns its parameters: adapters, or None for the
    base alone. None where the reference is another model.

  Raises:
    ValueError: a dtype of its own, or adapters that cannot be read.
  """
  path = path or options.path or options.base
  model, load = dataclasses.replace(policy, lora=None), lambda params: None
  if not source.is_same(path, options.base):
    adapter = source.open_adapter(path)
    # What the policy starts from is over this base, whatever it says.
    is_own = path == options.path
    if adapter is None or not (
      is_own or source.is_same(adapter.base, options.base)
    ):
      return None
    model, load_adapter = _open(path, policy)
    layouts = lora.layouts(mesh, model)
    load = lambda params: load_adapter(model, layouts)
  if dtype not in ("auto", policy.param_dtype):
    raise ValueError(
      f"reference.dtype={dtype!r}: the reference shares the policy's base,"
      f" which is {policy.param_dtype} (lora.base_dtype)"
    )
  return model, load


def _open(
  path: str, policy: ModelConfig
) -> tuple[ModelConfig, Callable[[ModelConfig, Params], Params]]:
  """Returns the decoder with the adapters at a path, and how they load."""
  adapter = source.open_adapter(path)
  if adapter is None:
    raise ValueError(f"lora.path={path!r} is a whole model, not an adapter")
  theirs = adapter.lora(dataclasses.replace(policy, lora=None))
  theirs = dataclasses.replace(theirs, dtype=policy.lora.dtype)
  return lora.with_lora(policy, theirs), adapter.load

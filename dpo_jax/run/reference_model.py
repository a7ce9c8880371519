"""The model that a run's policy is compared to: which it is, how it is read."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from dpo_jax.checkpoints import source
from dpo_jax.models import transformer
from dpo_jax.models.config import ModelConfig
from dpo_jax.run import adapters
from dpo_jax.training import ppo, state
from dpo_jax.training import reference as reference_lib
from dpo_jax.types import Params


def make(
  options: Mapping[str, Any],
  policy: ModelConfig,
  lora_options: adapters.Options,
  shardings: Params,
  mesh: Mesh,
  *,
  loss_name: str,
  has_reference: bool,
  compute: Mapping[str, Any],
) -> tuple[reference_lib.Reference, Callable[[Params], Params | None]]:
  """Returns what the reference is, and how its weights come.

  Args:
    options: the group `reference` of a config (see configs/base.py).
    policy: with its adapters, if any.
    lora_options: of these.
    shardings: of the policy's parameters, as a copy of it has them.
    mesh: all devices.
    loss_name: for messages.
    has_reference: whether the loss reads one.
    compute: what a reference of its own path computes with, keys of
      `ModelConfig`.

  Returns:
    The reference, and what returns its parameters, given the policy's.

  Raises:
    ValueError: a mode that the loss cannot have, or a model that does not fit.
  """
  mode, path = options["mode"], options["path"]
  reference_lib.check_mode(
    mode,
    path,
    loss_name,
    has_reference=has_reference,
    has_adapters=bool(policy.lora),
  )
  build = functools.partial(
    reference_lib.make_reference,
    alpha=options["alpha"],
    every=options["every"],
  )
  if not has_reference:
    return build(mode, None), lambda params: None
  if policy.lora:
    is_off = mode == "adapter_off"
    shared = adapters.share_reference(
      lora_options,
      policy,
      mesh,
      path=lora_options.base if is_off else path,
      dtype=options["dtype"],
    )
    if shared:
      return build(mode, shared[0]), shared[1]
  dtype = policy.dtype if options["dtype"] == "auto" else options["dtype"]
  if not path:
    model = policy.frozen(dtype)
    copy = functools.partial(
      state.copy_params,
      like=transformer.param_shapes(model),
      shardings=shardings,
    )
    return build(mode, model), lambda params: copy(ppo.decoder_params(params))
  opened = source.open_model(path)
  if opened.config.vocab_size != policy.vocab_size:
    raise ValueError(
      f"reference.path='{path}': its vocabulary has"
      f" {opened.config.vocab_size} tokens and the policy's"
      f" {policy.vocab_size}"
    )
  model = dataclasses.replace(opened.config, **compute).frozen(dtype)
  layouts = transformer.layouts(mesh, model)
  reference = build(mode, model)
  shapes = lambda config: transformer.param_shapes(config.frozen("float32"))
  if reference.moves and shapes(model) != shapes(policy):
    raise ValueError(
      f"reference.mode={mode!r}: the reference at {path!r} has"
      " parameters of other shapes than the policy's, to which it should move"
    )
  return reference, lambda params: opened.load(model, layouts)

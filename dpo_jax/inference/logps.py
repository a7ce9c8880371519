"""How likely a saved model finds responses."""

import dataclasses

import jax
import numpy as np

from dpo_jax import sharding
from dpo_jax.checkpoints import source
from dpo_jax.data import (
  dataset,
  loader,
  placement,
)
from dpo_jax.losses import objectives
from dpo_jax.models import transformer
from dpo_jax.training import scoring

BATCH_PAIRS = 64  # scored before the host looks at them


SHARD_ROWS = 4  # rows that a device computes at once


CHUNK_LENGTH = 128  # scored positions of a row that meet the vocabulary at once


def model_logps(
  opened: source.ModelSource,
  tokens: dataset.TokenDataset,
  *,
  dtype: str,
  max_length: int,
) -> np.ndarray:
  """Returns f32[n,2] of one model, which is let go of afterwards.

  Args:
    opened: the model.
    tokens: prompts, each with two responses; an absent one has 0.
    dtype: of matmuls.
    max_length: tokens of prompt and one response.

  Raises:
    ValueError: the model has fewer positions.
  """
  model = dataclasses.replace(opened.config, dtype=dtype)
  if model.positions == "learned" and max_length > model.max_positions:
    raise ValueError(
      f"max_length={max_length}: the model has {model.max_positions} positions"
    )
  mesh = sharding.make_mesh()
  num_rows = SHARD_ROWS * sharding.num_row_shards(mesh)
  layouts = transformer.layouts(mesh, model)
  layout = placement.layout_for_window(tokens.lengths, "mirrored", model.window)
  if layout != "mirrored":
    print(
      f"layout: {layout}, as sequences are longer than the {model.window} keys"
      " that a sliding window of the model sees",
      flush=True,
    )
  batches = loader.Loader(
    tokens, batch_size=BATCH_PAIRS, microbatch_rows=num_rows, layout=layout
  )
  with jax.set_mesh(mesh):
    return scoring.response_logps(
      model,
      opened.load(model, layouts),
      objectives.make_objective("sft", {}),
      batches,
      mesh,
      chunk_length=CHUNK_LENGTH,
    )

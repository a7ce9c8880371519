"""Weights for tests, drawn without compiling anything."""

import jax
import numpy as np


def weights(shapes, *, seed=0, stddev=0.02):
  """Returns arrays of these shapes: norms that do nothing, the rest normal."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if "norm" in jax.tree_util.keystr(path):
      return np.full(leaf.shape, path[-1].key == "scale", leaf.dtype)
    return rng.normal(0, stddev, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def new_adapters(shapes, *, seed=1):
  """Returns adapters as `lora.init` draws them, of other numbers."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "last":
      return np.zeros(leaf.shape, leaf.dtype)
    stddev = (3 * np.prod(leaf.shape[1:-1])) ** -0.5
    return rng.normal(0, stddev, leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)

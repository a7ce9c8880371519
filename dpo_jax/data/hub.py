"""Rows of a dataset on the Hugging Face hub, or in its local cache."""

from collections.abc import Iterator

import datasets


def read(path: str, split: str) -> Iterator[dict]:
  """Yields the rows of one split in order.

  Args:
    path: `owner/name`, or `owner/name:configuration`.
    split: a name of `datasets`, such as `train` or `train[:10%]`.

  Raises:
    ValueError: the dataset, configuration or split cannot be had.
  """
  name, _, configuration = path.partition(":")
  if not split:
    raise ValueError(f"dataset {path!r} needs a split, such as 'train'")
  try:
    rows = datasets.load_dataset(name, configuration or None, split=split)
  except Exception as error:  # whatever a loader or the network raises
    reason = " ".join(str(error).split())
    raise ValueError(
      f"dataset {path!r}, split {split!r} cannot be had:"
      f" {type(error).__name__}: {reason}"
    ) from error
  yield from rows

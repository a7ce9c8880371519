"""Rows of a dataset on the Hugging Face hub, or in its local cache."""

from collections.abc import Iterator

import datasets


def read(path: str, split: str) -> Iterator[dict]:
  """Yields the rows of one split in order.

  Args:
    path: `owner/name`, or `owner/name:configuration`.
    split: a name of `datasets`, such as `train` or `train[:10%]`.

  Raises:
    ValueError: the dataset, configuration or split cannot be had, or a row
      of it.
  """
  name, _, configuration = path.partition(":")
  if not split:
    raise ValueError(f"dataset {path!r} needs a split, such as 'train'")
  number = 0
  try:
    rows = datasets.load_dataset(
      name, configuration or None, split=split, trust_remote_code=False
    )
    for row in rows:
      number += 1
      yield row
  except Exception as error:  # whatever a loader or the network raises
    while error.__cause__:  # `datasets` hides what was wrong
      error = error.__cause__
    reason = " ".join(str(error).split())
    where = f" from row {number + 1} on" if number else ""
    raise ValueError(
      f"dataset {path!r}, split {split!r} cannot be had{where}:"
      f" {type(error).__name__}: {reason}"
    ) from error

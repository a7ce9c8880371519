"""What a compiled program holds in memory."""

import re


def vocabulary_buffers(hlo_text, vocab):
  """Returns the shapes in compiled HLO with an axis that `vocab` divides."""
  shapes = {
    tuple(int(size) for size in dims.split(","))
    for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", hlo_text)
  }
  return {shape for shape in shapes if any(n and n % vocab == 0 for n in shape)}

"""The losses by name: one line each, with the hyper-parameters to start from.

`get("ipo")` is what a config puts under `loss`. Starting points, to be swept:
SPPO's eta of 1,000, EXO's label smoothing, DiscoPOP's tau and Tulu 3's
length-normalised beta are those works' own; beta is 0.1 where nothing else is
known to be better.
"""

import difflib

LOSSES = dict(
  dpo=dict(beta=0.1),
  cdpo=dict(beta=0.1, label_smoothing=0.1),
  robust=dict(beta=0.1, label_smoothing=0.1),
  ipo=dict(beta=0.1),
  ipo_sum=dict(beta=0.1),
  hinge=dict(beta=0.1),
  dpo_norm=dict(beta=5.0),
  apo_zero=dict(beta=0.1),
  apo_down=dict(beta=0.1),
  nca=dict(beta=0.1),
  bco_pair=dict(beta=0.1),
  sppo_hard=dict(beta=0.001),
  exo=dict(beta=0.1, label_smoothing=0.001),
  aot=dict(beta=0.1, label_smoothing=0.0),
  aot_unpaired=dict(beta=0.1, label_smoothing=0.0),
  discopop=dict(beta=0.05, tau=0.05),
  sft=dict(),
  sft_sum=dict(),
  preferred_ft=dict(),
  unlikelihood=dict(alpha=0.1),
)


def get(name: str) -> dict:
  """Returns `{"name": name, ...}` with the loss's hyper-parameters.

  Raises:
    ValueError: there is no such loss; the message names the nearest.
  """
  if name not in LOSSES:
    nearest = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
      f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}{hint}"
    )
  return dict(name=name, **LOSSES[name])

"""The losses by name: one line each, with the hyper-parameters to start from.

`get("ipo")` is what a config puts under `loss`. Starting points, to be swept:
SPPO's eta of 1,000, EXO's label smoothing, DiscoPOP's tau, Tulu 3's
length-normalised beta, Smaug's beta and lambda, SimPO's beta and gamma (Llama
3 Base), CPO's and ODPO's alpha, beta-DPO's three and, from NeMo-Aligner, RPO's
beta and eta are those works' own; AlphaPO's beta and gamma and RePO's gamma are
SimPO's. beta is 0.1 where nothing else is known to be better, and other numbers
are plain ones. `mpo` is Wang et al. 2024 (arXiv 2411.10442).
"""

import difflib

LOSSES = dict(
  dpo=dict(beta=0.1),
  cdpo=dict(beta=0.1, label_smoothing=0.1),
  robust=dict(beta=0.1, label_smoothing=0.1),
  plackett_luce=dict(beta=0.1),
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
  rdpo=dict(beta=0.1, alpha=0.05),
  dpop=dict(beta=0.3, lambda_=50.0),
  dpo_shift=dict(beta=0.1, shift=0.95),
  odpo=dict(beta=0.1, alpha=1.0),
  rpo_sq=dict(beta=0.2, eta=1.0),
  rpo_bwd_kl=dict(beta=0.2, eta=1.0),
  rebel=dict(eta=1.0),
  cal_dpo=dict(beta=0.1),
  chi_po=dict(beta=0.1, r_max=5.0),
  beta_dpo=dict(beta=0.1, alpha=5.4, momentum=0.9),
  kto=dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
  bco=dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
  apo_zero_unpaired=dict(
    beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
  ),
  mpo=dict(name="dpo:0.8,bco_pair:0.2,sft:1", beta=0.1),
  sft=dict(),
  sft_sum=dict(),
  preferred_ft=dict(),
  unlikelihood=dict(alpha=0.1),
  simpo=dict(beta=2.0, gamma=1.0, label_smoothing=0.0),
  alpha_po=dict(beta=2.0, gamma=1.0, alpha=0.25),
  simper=dict(),
  repo=dict(gamma=0.5),
  orpo=dict(lambda_=0.1),
  cpo=dict(beta=0.1, alpha=1.0),
  slic=dict(delta=1.0, lambda_=0.1),
  reward_model=dict(label_smoothing=0.0, center_weight=0.0),
  classifier=dict(label_smoothing=0.0),
)


def get(name: str) -> dict:
  """Returns `{"name": ..., ...}` with the loss's hyper-parameters.

  The name is the line's own, but for a weighted sum of losses.

  `ppo` has its settings in a section of its own.

  Raises:
    ValueError: there is no such loss; the message names the nearest.
  """
  if name == "ppo":
    return dict(name=name)
  if name not in LOSSES:
    nearest = difflib.get_close_matches(name, LOSSES, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
      f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}{hint}"
    )
  return dict(name=name) | LOSSES[name]

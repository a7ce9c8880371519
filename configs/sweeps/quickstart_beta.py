"""DPO at the betas of Rafailov et al. 2023, sec 6.1, on the quickstart.

  python -m launch.sweep --config=configs/quickstart.py \\
    --points=configs/sweeps/quickstart_beta.py --workdir=runs/quickstart_beta

Eight runs of 300 updates from random weights. Not yet run.
"""

BETAS = (0.05, 0.1, 1.0, 5.0)
SEEDS = (0, 1)


def get_points() -> list[dict]:
  """Returns every beta at every seed."""
  return [
    {"loss": "dpo", "loss.beta": beta, "seed": seed}
    for beta in BETAS
    for seed in SEEDS
  ]

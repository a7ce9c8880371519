"""Writes tests/golden/trl_reference_free.json: CPO, SimPO and ORPO by TRL.

Run where TRL is installed, from the repository's root:

  python tests/golden/make_trl_losses.py

The trainers' own `get_batch_loss_metrics` runs in float64 on a model whose
logits over two tokens are log p and log(1 - p), so that the log-probability
of each response token, token 0, is a leaf. Prompts have one token, which is
never predicted: TRL's ORPO then has the likelihood of responses alone.
"""

import json
import pathlib
import types

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PATH = pathlib.Path(__file__).parent / "trl_reference_free.json"
SEED = 0
CHOSEN_LENGTHS = (3, 1, 7, 4, 2)
REJECTED_LENGTHS = (2, 5, 4, 1, 6)

CASES = [
  dict(name="cpo", beta=0.1, alpha=1.0),
  dict(name="cpo", beta=0.5, alpha=0.0),
  dict(name="simpo", beta=2.0, gamma=1.0, label_smoothing=0.0),
  dict(name="simpo", beta=2.5, gamma=0.5, label_smoothing=0.1),
  dict(name="orpo", lambda_=0.1),
  dict(name="orpo", lambda_=1.0),
]


def make_trainer(case):
  """Returns a trainer that has what its loss reads, and nothing else."""
  kind = ORPOTrainer if case["name"] == "orpo" else CPOTrainer
  trainer = object.__new__(kind)
  trainer.accelerator = types.SimpleNamespace(
    device="cpu", gather_for_metrics=lambda x: x
  )
  trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
  trainer.pad_token_id = trainer.padding_value = 0
  if case["name"] == "orpo":
    trainer.beta = case["lambda_"]
    return trainer
  trainer.beta, trainer.alpha = case["beta"], 0.0
  trainer.loss_type = "simpo" if case["name"] == "simpo" else "sigmoid"
  trainer.simpo_gamma = case.get("gamma")
  trainer.cpo_alpha = case.get("alpha", 0.0)
  trainer.label_smoothing = case.get("label_smoothing", 0.0)
  return trainer


def make_batch():
  """Returns the batch: a prompt token, then response tokens, all token 0."""
  batch = {}
  for side, lengths in (
    ("chosen", CHOSEN_LENGTHS),
    ("rejected", REJECTED_LENGTHS),
  ):
    position = torch.arange(1 + max(lengths))[None]
    last = torch.tensor(lengths)[:, None]
    batch[f"{side}_input_ids"] = torch.zeros_like(position + last)
    batch[f"{side}_attention_mask"] = (position <= last).long()
    scored = (position > 0) & (position <= last)
    batch[f"{side}_labels"] = torch.where(scored, 0, -100)
  return batch


def evaluate(case, logps):
  """Returns TRL's loss of f64[2B,T] log-probabilities, with its gradient."""
  leaf = torch.tensor(logps, requires_grad=True)

  def model(*args, **kwargs):
    logits = torch.stack([leaf, torch.log(-torch.expm1(leaf))], -1)
    # The state of a token predicts the next one; the last predicts nothing.
    last = torch.zeros_like(logits[:, :1])
    return types.SimpleNamespace(logits=torch.cat([logits, last], 1))

  # ORPO casts to float32, which here would hide digits.
  to_float, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
  try:
    trainer = make_trainer(case)
    loss, _ = trainer.get_batch_loss_metrics(model, make_batch())
  finally:
    torch.Tensor.float = to_float
  loss.backward()
  assert loss.dtype == torch.float64
  return loss.item(), leaf.grad.numpy()


def split(values):
  """Returns lists per chosen and per rejected response of f64[2B,T]."""
  rows = [
    row[:length].tolist()
    for row, length in zip(values, CHOSEN_LENGTHS + REJECTED_LENGTHS)
  ]
  return rows[: len(CHOSEN_LENGTHS)], rows[len(CHOSEN_LENGTHS) :]


def main():
  rng = np.random.default_rng(SEED)
  longest = max(CHOSEN_LENGTHS + REJECTED_LENGTHS)
  # From near certainty to rare: both branches of ORPO's log(1 - p) are met.
  shape = (2 * len(CHOSEN_LENGTHS), longest)
  logps = -np.exp(rng.uniform(-3, 1.5, shape))
  cases = []
  for case in CASES:
    loss, grads = evaluate(case, logps)
    chosen, rejected = split(grads)
    cases.append(
      {**case, "loss": loss, "grad_chosen": chosen, "grad_rejected": rejected}
    )
  chosen, rejected = split(logps)
  golden = {
    "source": f"trl {trl.__version__}, torch {torch.__version__}",
    "seed": SEED,
    "dtype": "float64",
    "policy_chosen": chosen,
    "policy_rejected": rejected,
    "cases": cases,
  }
  PATH.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
  main()

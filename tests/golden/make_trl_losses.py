"""Writes trl_reference_free.json and trl_kto.json beside it, by TRL.

Run where TRL is installed, from the repository's root:

  python tests/golden/make_trl_losses.py

CPO, SimPO, AlphaPO and ORPO: the trainers' own `get_batch_loss_metrics` runs in
float64 on a model whose logits over two tokens are log p and log(1 - p), so
that the log-probability of each token, token 0, is a leaf. Prompts have one
token, which is never predicted: TRL's ORPO then has the likelihood of responses
alone. Where a case has `prompt_nll`, they have `PROMPT_LENGTHS` tokens.

KTO and APO's unpaired loss: the trainer's own `_compute_loss` runs in float64
on models that return the log-probabilities of completions as they are.
"""

import collections
import contextlib
import json
import pathlib
import types
from unittest import mock

import numpy as np
import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer import kto_trainer
from trl.trainer.kto_trainer import KTOTrainer

FOLDER = pathlib.Path(__file__).parent
SEED = 0
CHOSEN_LENGTHS = (3, 1, 7, 4, 2)
REJECTED_LENGTHS = (2, 5, 4, 1, 6)
PROMPT_LENGTHS = (3, 1, 2, 5, 4)

CASES = [
  dict(name="cpo", beta=0.1, alpha=1.0),
  dict(name="cpo", beta=0.5, alpha=0.0),
  dict(name="simpo", beta=2.0, gamma=1.0, label_smoothing=0.0),
  dict(name="simpo", beta=2.5, gamma=0.5, label_smoothing=0.1),
  dict(name="orpo", lambda_=0.1),
  dict(name="orpo", lambda_=1.0),
  dict(name="orpo", lambda_=0.3, prompt_nll=True),
  dict(name="alpha_po", beta=2.0, gamma=1.0, alpha=0.25),
  dict(name="alpha_po", beta=2.5, gamma=0.5, alpha=-0.5),
]

KTO_CASES = [
  dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
  dict(beta=0.5, desirable_weight=1.33, undesirable_weight=0.7),
  # Mismatched log-ratios below 0, where the estimate stops.
  dict(beta=0.3, desirable_weight=1.0, undesirable_weight=2.0, shift=-9.0),
  dict(
    name="apo_zero_unpaired",
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
  ),
  dict(
    name="apo_zero_unpaired",
    beta=0.5,
    desirable_weight=1.33,
    undesirable_weight=0.7,
  ),
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
  is_cpo, alpha = case["name"] == "cpo", case.get("alpha", 0.0)
  trainer.beta, trainer.alpha = case["beta"], 0.0 if is_cpo else alpha
  trainer.loss_type = "sigmoid" if is_cpo else "simpo"
  trainer.simpo_gamma = case.get("gamma")
  trainer.cpo_alpha = alpha if is_cpo else 0.0
  trainer.label_smoothing = case.get("label_smoothing", 0.0)
  return trainer


def make_batch(prompts):
  """Returns the batch: prompt tokens, then response tokens, all token 0."""
  batch = {}
  prompt = torch.tensor(prompts)[:, None]
  for side, lengths in (
    ("chosen", CHOSEN_LENGTHS),
    ("rejected", REJECTED_LENGTHS),
  ):
    end = prompt + torch.tensor(lengths)[:, None]
    position = torch.arange(end.max())[None]
    batch[f"{side}_input_ids"] = torch.zeros_like(position + end)
    batch[f"{side}_attention_mask"] = (position < end).long()
    scored = (position >= prompt) & (position < end)
    batch[f"{side}_labels"] = torch.where(scored, 0, -100)
  return batch


def evaluate(case, logps, prompts):
  """Returns TRL's loss of f64[2B,T] log-probabilities, with its gradient.

  A row has the log-probabilities of a prompt's tokens from its second on, then
  those of the response.
  """
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
    loss, _ = trainer.get_batch_loss_metrics(model, make_batch(prompts))
  finally:
    torch.Tensor.float = to_float
  loss.backward()
  assert loss.dtype == torch.float64
  return loss.item(), leaf.grad.numpy()


def split(values, prompts):
  """Returns lists per chosen and per rejected response of f64[2B,T]."""
  rows = [
    row[prompt - 1 : prompt - 1 + length].tolist()
    for row, prompt, length in zip(
      values, prompts + prompts, CHOSEN_LENGTHS + REJECTED_LENGTHS
    )
  ]
  return rows[: len(CHOSEN_LENGTHS)], rows[len(CHOSEN_LENGTHS) :]


def insert(prompt, logps):
  """Returns rows with the log-probabilities of prompts before the others."""
  prompts = PROMPT_LENGTHS + PROMPT_LENGTHS
  ends = np.add(prompts, CHOSEN_LENGTHS + REJECTED_LENGTHS) - 1
  rows = np.full((len(logps), ends.max()), -1.0)
  for row, (length, end) in enumerate(zip(prompts, ends)):
    own = prompt[row % len(prompt), : length - 1]
    rows[row, :end] = np.concatenate([own, logps[row]])[:end]
  return rows


def evaluate_kto(case, policy, reference, labels):
  """Returns TRL's loss of f64[n,2] sums, and its gradient by the first.

  The columns are the completion and the mismatched one.
  """
  leaf = torch.tensor(policy, requires_grad=True)
  name = case.get("name", "kto")

  def make_model(sums):
    # The first call is for mismatched completions, if any, the last for others.
    columns = iter((1, 0) if name == "kto" else (0,))

    def model(*args, labels, **kwargs):
      logps = sums[:, next(columns)][:, None]
      return types.SimpleNamespace(
        log_probs=logps, entropy=logps.detach(), mean_logits=logps.detach()
      )

    model.training = True
    return model

  trainer = object.__new__(KTOTrainer)
  trainer.accelerator = types.SimpleNamespace(
    device="cpu", gather_for_metrics=lambda x: x
  )
  trainer.model, trainer.ref_model = None, make_model(torch.tensor(reference))
  model = make_model(leaf)
  trainer.model = model
  trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
  trainer.calculate_KL, trainer.precompute_ref_logps = name == "kto", False
  trainer.aux_loss_enabled, trainer.loss_type = False, name
  trainer.beta = case["beta"]
  trainer.desirable_weight = case["desirable_weight"]
  trainer.undesirable_weight = case["undesirable_weight"]
  trainer._total_train_tokens, trainer._tp_size = 0, 1
  metrics = collections.defaultdict(list)
  trainer._metrics = {"train": metrics}
  # One prompt token and one of completion: its sum is the whole response's.
  ids = torch.zeros((len(labels), 2), dtype=torch.long)
  mask = torch.tensor([[0, 1]]).expand(len(labels), 2)
  batch = {"label": torch.tensor(labels)}
  for prefix in ("", "KL_"):
    batch[f"{prefix}input_ids"] = ids
    batch[f"{prefix}attention_mask"] = torch.ones_like(ids)
    batch[f"{prefix}completion_mask"] = mask
  with mock.patch.multiple(
    kto_trainer,
    disable_gradient_checkpointing=lambda *args: contextlib.nullcontext(),
    is_peft_model=lambda model: False,
  ):
    loss = trainer._compute_loss(model, batch, return_outputs=False)
  loss.backward()
  assert loss.dtype == torch.float64
  return loss.item(), metrics["kl"][0], leaf.grad.numpy()


def make_kto(rng):
  """Returns the golden numbers of KTO, and of APO where a case names it."""
  labels = [True, False, False, True, True, False, True]
  policy, reference = -rng.uniform(5, 9, (2, len(labels), 2))
  cases = []
  for case in KTO_CASES:
    shifted = policy + [0, case.get("shift", 2.0)]
    loss, kl, grads = evaluate_kto(case, shifted, reference, labels)
    cases.append(
      {
        **case,
        "mismatched": shifted[:, 1].tolist(),
        "loss": loss,
        "kl": kl,
        "grad": grads[:, 0].tolist(),
      }
    )
  return {
    "labels": labels,
    "policy": policy[:, 0].tolist(),
    "reference": reference[:, 0].tolist(),
    "reference_mismatched": reference[:, 1].tolist(),
    "cases": cases,
  }


def write(name, golden):
  """Writes golden numbers with where they are from."""
  source = f"trl {trl.__version__}, torch {torch.__version__}"
  origin = {"source": source, "seed": SEED, "dtype": "float64"}
  text = json.dumps(origin | golden, indent=1)
  (FOLDER / name).write_text(text + "\n")


def main():
  rng = np.random.default_rng(SEED)
  longest = max(CHOSEN_LENGTHS + REJECTED_LENGTHS)
  # From near certainty to rare: both branches of ORPO's log(1 - p) are met.
  shape = (2 * len(CHOSEN_LENGTHS), longest)
  logps = -np.exp(rng.uniform(-3, 1.5, shape))
  prompt_shape = (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS) - 1)
  prompt = -np.exp(rng.uniform(-3, 1.5, prompt_shape))
  ones = (1,) * len(PROMPT_LENGTHS)
  cases = []
  for case in CASES:
    with_prompt = case.get("prompt_nll", False)
    prompts = PROMPT_LENGTHS if with_prompt else ones
    rows = insert(prompt, logps) if with_prompt else logps
    loss, grads = evaluate(case, rows, prompts)
    chosen, rejected = split(grads, prompts)
    found = {"loss": loss, "grad_chosen": chosen, "grad_rejected": rejected}
    if with_prompt:
      found["grad_prompt"] = [
        row[: length - 1].tolist() for row, length in zip(grads, prompts)
      ]
    cases.append(case | found)
  chosen, rejected = split(logps, ones)
  golden = {
    "policy_chosen": chosen,
    "policy_rejected": rejected,
    "policy_prompt": [
      row[: length - 1].tolist() for row, length in zip(prompt, PROMPT_LENGTHS)
    ],
    "cases": cases,
  }
  write("trl_reference_free.json", golden)
  write("trl_kto.json", make_kto(rng))


if __name__ == "__main__":
  main()

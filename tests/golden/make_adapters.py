"""Writes tests/golden/adapters: what PEFT computes of tiny adapted models.

Run where torch, transformers 5 and peft are installed, from the root:

  PYTHONPATH=. python tests/golden/make_adapters.py

One npz a case of `make_families`, without weights: each tensor of the model
and of the adapter is drawn from a seed and its name.
"""

import json
import pathlib
import tempfile

import numpy as np

from tests.golden import make_families

FOLDER = pathlib.Path(__file__).parent / "adapters"
RANK, ALPHA = 3, 5
# What is adapted, by PEFT's names; the ranks and alphas of some differ.
CASES = {
  "gpt2": {"target_modules": ["c_attn", "attn.c_proj", "mlp.c_fc"]},
  "llama": {
    "target_modules": "all-linear",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 7},
  },
  "gpt_neox": {"target_modules": "all-linear", "use_rslora": True},
  "phi3": {"target_modules": "all-linear"},
}


def compute(case: str, folder: str) -> dict[str, np.ndarray]:
  """Returns what is kept of a case; leaves the adapter in the folder."""
  import peft
  import safetensors.numpy

  model, _, _ = make_families.make_model(case)
  config = peft.LoraConfig(
    task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, **CASES[case]
  )
  peft.get_peft_model(model, config).save_pretrained(folder)
  path = pathlib.Path(folder, "adapter_model.safetensors")
  stored = safetensors.numpy.load_file(path)
  shapes = {name: list(stored[name].shape) for name in sorted(stored)}
  drawn = {
    name: make_families.draw(name, shape, case)
    for name, shape in shapes.items()
  }
  safetensors.numpy.save_file(drawn, path, {"format": "pt"})
  model, _, _ = make_families.make_model(case)
  adapted = load(model, folder)
  written = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
  return {
    "config": np.array(json.dumps(written)),
    "shapes": np.array(json.dumps(shapes)),
    "logits": make_families.logits_of(adapted, make_families.sequences()),
  }


def load(model, folder: str):
  """Returns the model with the adapter of a folder, as PEFT reads it."""
  import peft

  return peft.PeftModel.from_pretrained(model, folder).eval()


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for case in CASES:
    with tempfile.TemporaryDirectory() as folder:
      values = compute(case, folder)
    np.savez_compressed(FOLDER / f"{case}.npz", **values)
    print(case, float(values["logits"].std()))


if __name__ == "__main__":
  main()

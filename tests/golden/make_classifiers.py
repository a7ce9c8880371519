"""Writes tests/golden/classifiers.json: scores that transformers computes.

Run where torch and transformers 5 are installed, from the repository's root:

  python -m tests.golden.make_classifiers

Each family of `make_families` as a ForSequenceClassification, of one label or
of two in turns; weights are drawn from names in the same way. The scores are
those of the last token of two sequences.
"""

import json
import pathlib
import tempfile

from tests.golden import make_families

PATH = pathlib.Path(__file__).parent / "classifiers.json"
CASES = {
  case: 1 + number % 2
  for number, case in enumerate(make_families.CASES)
  if case != "gpt_neox_sequential"
}


def load_model(folder: str):
  """Returns the model of a folder, as transformers reads it."""
  import transformers

  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, attn_implementation="eager"
  ).eval()


def scores_of(model, sequences) -> list[list[float]]:
  """Returns the logits of each sequence, one at a time: without padding."""
  import torch

  with torch.no_grad():
    return [
      model(input_ids=torch.tensor([list(map(int, sequence))]))
      .logits[0]
      .tolist()
      for sequence in sequences
    ]


def compute(case: str) -> dict:
  """Returns config.json, the shapes of tensors, and scores."""
  import safetensors.numpy
  import transformers

  family, values = make_families.CASES[case]
  config = transformers.AutoConfig.for_model(family, **values)
  config.dtype = "float32"
  config.num_labels = CASES[case]
  with tempfile.TemporaryDirectory() as folder:
    blank = transformers.AutoModelForSequenceClassification.from_config(config)
    blank.save_pretrained(folder)
    path = pathlib.Path(folder, "model.safetensors")
    stored = safetensors.numpy.load_file(path)
    shapes = {name: list(stored[name].shape) for name in sorted(stored)}
    drawn = {
      name: make_families.draw(name, shape, family)
      for name, shape in shapes.items()
    }
    safetensors.numpy.save_file(drawn, path, {"format": "pt"})
    scores = scores_of(load_model(folder), make_families.sequences())
    written = json.loads(pathlib.Path(folder, "config.json").read_text())
  return {"config": written, "shapes": shapes, "scores": scores}


def main() -> None:
  values = {case: compute(case) for case in CASES}
  lines = [f"{json.dumps(case)}: {json.dumps(x)}" for case, x in values.items()]
  PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  for case, value in values.items():
    print(case, value["config"]["architectures"], value["scores"])


if __name__ == "__main__":
  main()

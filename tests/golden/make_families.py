"""Writes tests/golden/families: what transformers computes of tiny models.

Run where torch and transformers 5 are installed, from the repository's root:

  python tests/golden/make_families.py

One npz a case, without weights: each tensor of the model's file is drawn from
a seed and its name (`draw`). No parameter is zero or one, windows are shorter
than the sequences, and soft caps bite.
"""

import json
import pathlib
import tempfile
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "families"
VOCAB_SIZE = 48
BETA = 0.5
NEW_TOKENS = 12

_SIZES = {
  "vocab_size": VOCAB_SIZE,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "bos_token_id": None,
  "eos_token_id": None,
  "pad_token_id": None,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "rope_theta": 100.0}
_WIDE = _GROUPED | {"head_dim": 16}
_GPT2 = {
  "vocab_size": VOCAB_SIZE,
  "n_embd": 32,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 64,
  "bos_token_id": None,
  "eos_token_id": None,
}
_GEMMA2 = _WIDE | {"query_pre_attn_scalar": 9, "sliding_window": 8}

# model_type, and what a config.json of transformers 4 would say.
CASES = {
  "gpt2": ("gpt2", _GPT2),
  "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
  "gpt_neox": ("gpt_neox", _SIZES | {"rotary_pct": 0.5}),
  "gpt_neox_sequential": (
    "gpt_neox",
    _SIZES
    | {
      "use_parallel_residual": False,
      "rotary_emb_base": 100,
      "rotary_pct": 1.0,
    },
  ),
  "llama": ("llama", _WIDE),
  "mistral": ("mistral", _WIDE | {"sliding_window": 8}),
  "mixtral": (
    "mixtral",
    _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
  ),
  "qwen2": (
    "qwen2",
    _GROUPED
    | {
      "use_sliding_window": True,
      "sliding_window": 8,
      "max_window_layers": 1,
      "tie_word_embeddings": True,
    },
  ),
  "qwen3": ("qwen3", _WIDE),
  "gemma": ("gemma", _WIDE | {"num_key_value_heads": 1}),
  "gemma2": (
    "gemma2",
    _GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma3": (
    "gemma3_text",
    _GEMMA2
    | {
      "rope_theta": 1000.0,
      "rope_local_base_freq": 20.0,
      "rope_scaling": {"rope_type": "linear", "factor": 2.0},
      "num_hidden_layers": 3,
      "sliding_window_pattern": 2,
    },
  ),
  "phi3": ("phi3", _GROUPED | {"sliding_window": 8}),
  "olmo2": ("olmo2", _GROUPED),
}


def draw(name: str, shape: tuple[int, ...], family: str) -> np.ndarray:
  """Returns the values of a tensor: noise, around 1 where it is a vector.

  Gemma adds the 1 itself.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  centre = 1.0 if len(shape) == 1 and not family.startswith("gemma") else 0.0
  return (centre + 0.2 * rng.normal(size=shape)).astype(np.float32)


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns what a gradient is projected on."""
  rng = np.random.default_rng([1, zlib.crc32(name.encode())])
  return rng.normal(size=shape).astype(np.float32)


def token_lists() -> tuple[list[list[int]], ...]:
  """Returns prompts, chosen and rejected responses of four pairs."""
  rng = np.random.default_rng(0)
  lists = lambda *lengths: [
    rng.integers(1, VOCAB_SIZE, size=n).tolist() for n in lengths
  ]
  return lists(4, 7, 9, 3), lists(8, 5, 11, 10), lists(6, 12, 2, 9)


def sequences() -> np.ndarray:
  """Returns the tokens i64[2,24] whose logits are kept."""
  return np.random.default_rng(1).integers(0, VOCAB_SIZE, (2, 24))


def make_model(case: str):
  """Returns the model in torch, and the config.json and shapes it saves."""
  import safetensors.numpy
  import transformers

  family, values = CASES[case]
  config = transformers.AutoConfig.for_model(family, **values)
  config.dtype = "float32"
  with tempfile.TemporaryDirectory() as folder:
    blank = transformers.AutoModelForCausalLM.from_config(config)
    blank.save_pretrained(folder)
    path = pathlib.Path(folder, "model.safetensors")
    stored = safetensors.numpy.load_file(path)
    shapes = {name: list(stored[name].shape) for name in sorted(stored)}
    drawn = {name: draw(name, shape, family) for name, shape in shapes.items()}
    safetensors.numpy.save_file(drawn, path, {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager"
    )
    written = json.loads(pathlib.Path(folder, "config.json").read_text())
  return model.eval(), written, shapes


def load_model(folder: str):
  """Returns the model of a folder, as transformers reads it."""
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager"
  ).eval()


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
  """Returns f32[R,T,V]."""
  import torch

  with torch.no_grad():
    return model(input_ids=torch.from_numpy(tokens)).logits.numpy()


def dpo_loss(model):
  """Returns the mean DPO loss of the pairs against a reference of -2 a token.

  Every response in a sequence of its own, without padding.
  """
  import torch

  def logp(prompt, response):
    ids = torch.tensor([prompt + response])
    logps = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
    at = logps[0, len(prompt) - 1 : -1]
    return at[range(len(response)), response].sum() + 2 * len(response)

  losses = [
    -torch.nn.functional.logsigmoid(
      BETA * (logp(prompt, chosen) - logp(prompt, rejected))
    )
    for prompt, chosen, rejected in zip(*token_lists())
  ]
  return torch.stack(losses).mean()


def gradients_of(model, loss) -> dict[str, np.ndarray]:
  """Returns the gradient of a loss by the names of the file's tensors."""
  import safetensors.numpy
  import torch

  parameters = list(model.parameters())
  grads = torch.autograd.grad(loss, parameters, allow_unused=True)
  with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    # Saving renames and splits tensors, gradients like parameters.
    kept = [parameter.clone() for parameter in parameters]
    for parameter, grad in zip(parameters, grads):
      parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    model.save_pretrained(folder)
    for parameter, value in zip(parameters, kept):
      parameter.copy_(value)
    return safetensors.numpy.load_file(
      pathlib.Path(folder, "model.safetensors")
    )


def summaries(gradients: dict[str, np.ndarray]) -> np.ndarray:
  """Returns f64[n,2], norm and projection of each, in the order of names."""
  return np.array(
    [
      (
        np.linalg.norm(gradient),
        np.vdot(gradient, direction(name, gradient.shape)),
      )
      for name, gradient in sorted(gradients.items())
    ]
  )


def compute(case: str) -> dict[str, np.ndarray]:
  """Returns what is kept of a case."""
  import torch

  model, config, shapes = make_model(case)
  loss = dpo_loss(model)
  values = {
    "config": np.array(json.dumps(config)),
    "shapes": np.array(json.dumps(shapes)),
    "logits": logits_of(model, sequences()),
    "loss": loss.detach().numpy(),
    "gradients": summaries(gradients_of(model, loss)),
  }
  prompts = token_lists()[0]
  values["greedy"] = np.array(
    [
      model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
      )[0, len(prompt) :].numpy()
      for prompt in prompts
    ]
  )
  if config["model_type"] == "mixtral":
    tokens = torch.from_numpy(sequences())
    aux = model(input_ids=tokens, output_router_logits=True).aux_loss
    values["aux_loss"] = aux.detach().numpy()
    values["aux_gradients"] = summaries(gradients_of(model, aux))
  return values


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for case in CASES:
    values = compute(case)
    np.savez_compressed(FOLDER / f"{case}.npz", **values)
    print(case, float(values["loss"]), float(values["logits"].std()))


if __name__ == "__main__":
  main()

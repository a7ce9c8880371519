"""Writes tests/golden/transformers: tiny models and the logits they give.

Run where torch and transformers 5 are installed, from the repository's root:

  python tests/golden/make_transformers_logits.py

Each folder holds a random model as `save_pretrained` writes it, and
`logits.npz` with `tokens` i32[2,40] and `logits` f32[2,40,48] of a causal
forward pass. No parameter is zero or one, so that one left out shows.
"""

import pathlib

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "transformers"
VOCAB_SIZE = 48
LENGTH = 40

LLAMA = {
  "vocab_size": VOCAB_SIZE,
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 64,
}

# Of the four wavelengths (6.3, 20, 63, 199) the first is kept, the second
# interpolated, and the others are stretched.
LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}


def make_models() -> dict[str, transformers.PreTrainedModel]:
  """Returns the models by the name of their folder."""
  return {
    "llama": transformers.LlamaForCausalLM(
      transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    ),
    "llama3_rope": transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        **LLAMA, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
      )
    ),
    "gpt2": transformers.GPT2LMHeadModel(
      transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=24, n_layer=2, n_head=3, n_positions=64
      )
    ),
  }


def main() -> None:
  generator = torch.Generator().manual_seed(0)
  for name, model in make_models().items():
    with torch.no_grad():
      for parameter in model.parameters():
        centre = 1.0 if parameter.ndim == 1 else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(centre + 0.2 * noise)
      tokens = torch.randint(VOCAB_SIZE, (2, LENGTH), generator=generator)
      logits = model.eval()(input_ids=tokens).logits
    model.save_pretrained(FOLDER / name)
    np.savez(
      FOLDER / name / "logits.npz",
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
    )
    print(name, float(logits.std()))


if __name__ == "__main__":
  main()

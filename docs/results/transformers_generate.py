"""Prints tokens/s of `transformers.generate` for the preset `small`.

  python docs/results/transformers_generate.py --rows=64

For an environment with torch and transformers. Random weights, the cache that
`generate` takes by default, temperature 1, no response ends early; as in
`launch.benchmark sample`, the time of the first token is left out.
"""

import argparse
import statistics
import time

import torch
import transformers


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--prompt_length", type=int, default=16)
  parser.add_argument("--max_new_tokens", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=3)
  options = parser.parse_args()
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=50_257,
      num_hidden_layers=6,
      hidden_size=160,
      intermediate_size=448,
      num_attention_heads=5,
      num_key_value_heads=5,
      tie_word_embeddings=True,
      eos_token_id=None,
      pad_token_id=0,
    )
  ).eval()
  shape = (options.rows, options.prompt_length)
  prompts = torch.randint(1, 50_257, shape)

  def seconds(count):
    begun = time.perf_counter()
    found = model.generate(
      prompts,
      attention_mask=torch.ones_like(prompts),
      do_sample=True,
      top_k=0,
      max_new_tokens=count,
    )
    assert found.shape[1] == options.prompt_length + count
    return time.perf_counter() - begun

  rates = []
  for number in range(options.rounds + 1):
    first, whole = seconds(1), seconds(options.max_new_tokens)
    if number:
      taken = (whole - first) / (options.max_new_tokens - 1)
      rates.append(options.rows / taken)
  print(f"{statistics.median(rates):.1f} tokens/s")


if __name__ == "__main__":
  with torch.no_grad():
    main()

"""`config.json` of a model in Hugging Face format, to and from ours."""

from typing import Any

from dpo_jax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}

# Our activations by their names in a config.json; the first is written.
ACTIVATIONS = {
  "silu": ("silu", "swish"),
  "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
  "gelu": ("gelu",),
}

# Settings that the decoder does not have, with the value (the default too)
# that leaves them out. Dropout is not among them: we train without it.
UNSUPPORTED = {
  "llama": {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
  },
  "gpt2": {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  },
}


def parse(values: dict[str, Any]) -> ModelConfig:
  """Returns the config that a config.json describes, with default dtypes.

  Args:
    values: as transformers 4 or 5 write them.

  Raises:
    ValueError: an architecture or a setting that the decoder does not have.
  """
  family = values.get("model_type")
  readers = {"llama": _llama_fields, "gpt2": _gpt2_fields}
  if family not in readers:
    raise ValueError(
      f"unknown architecture {family!r}; known: {', '.join(readers)}"
    )
  for name, supported in UNSUPPORTED[family].items():
    if values.get(name, supported) != supported:
      raise ValueError(
        f"{name}={values[name]!r} is not supported, only {supported!r}"
      )
  try:
    return ModelConfig(family=family, **readers[family](values))
  except KeyError as error:
    raise ValueError(f"{error} is missing") from error


def _llama_fields(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a Llama's ModelConfig."""
  num_heads = values["num_attention_heads"]
  rope_theta, rope_scaling = _rope(values)
  return {
    "vocab_size": values["vocab_size"],
    "num_layers": values["num_hidden_layers"],
    "d_model": values["hidden_size"],
    "d_mlp": values["intermediate_size"],
    "num_heads": num_heads,
    "num_kv_heads": values.get("num_key_value_heads") or num_heads,
    "head_width": values.get("head_dim") or values["hidden_size"] // num_heads,
    "norm": "rms",
    "norm_eps": values["rms_norm_eps"],
    "positions": "rotary",
    "rope_theta": rope_theta,
    "rope_scaling": rope_scaling,
    "max_positions": values["max_position_embeddings"],
    "activation": _activation(values.get("hidden_act", "silu")),
    "gated": True,
    "bias": False,
    "tied": values.get("tie_word_embeddings", False),
  }


def _gpt2_fields(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a GPT-2's ModelConfig."""
  d_model, num_heads = values["n_embd"], values["n_head"]
  return {
    "vocab_size": values["vocab_size"],
    "num_layers": values["n_layer"],
    "d_model": d_model,
    "d_mlp": values.get("n_inner") or 4 * d_model,
    "num_heads": num_heads,
    "num_kv_heads": num_heads,
    "head_width": d_model // num_heads,
    "norm": "layer",
    "norm_eps": values["layer_norm_epsilon"],
    "positions": "learned",
    "max_positions": values["n_positions"],
    "activation": _activation(values["activation_function"]),
    "gated": False,
    "bias": True,
    "tied": values.get("tie_word_embeddings", True),
  }


def _activation(name: str) -> str:
  """Returns our name of an activation."""
  for ours, theirs in ACTIVATIONS.items():
    if name in theirs:
      return ours
  known = ", ".join(sum(ACTIVATIONS.values(), ()))
  raise ValueError(f"unknown activation {name!r}; known: {known}")


def _rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns theta and the scaling, as transformers 4 or 5 write them."""
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor is not supported, only 1.0")
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(
      f"unknown rope_type {kind!r} of rotary scaling; known: default, llama3"
    )
  return theta, RopeScaling(
    factor=rope["factor"],
    low_freq_factor=rope["low_freq_factor"],
    high_freq_factor=rope["high_freq_factor"],
    original_max_positions=rope["original_max_position_embeddings"],
  )


def render(config: ModelConfig) -> dict[str, Any]:
  """Returns config.json, in the form of transformers 4, which 5 reads too."""
  values = {
    "architectures": [ARCHITECTURES[config.family]],
    "model_type": config.family,
    "torch_dtype": config.param_dtype,
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tied,
  }
  activation = ACTIVATIONS[config.activation][0]
  if config.family == "gpt2":
    return values | {
      "n_embd": config.d_model,
      "n_inner": config.d_mlp,
      "n_layer": config.num_layers,
      "n_head": config.num_heads,
      "n_positions": config.max_positions,
      "layer_norm_epsilon": config.norm_eps,
      "activation_function": activation,
    }
  scaling = config.rope_scaling
  return values | {
    "hidden_size": config.d_model,
    "intermediate_size": config.d_mlp,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_width,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": activation,
    "max_position_embeddings": config.max_positions,
    "rope_theta": config.rope_theta,
    "rope_scaling": scaling
    and {
      "rope_type": "llama3",
      "factor": scaling.factor,
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_positions,
    },
  }

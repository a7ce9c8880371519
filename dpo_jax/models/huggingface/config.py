"""`config.json` of a model in Hugging Face format, to and from ours."""

from typing import Any

from dpo_jax.host import schema
from dpo_jax.models import config as model_config
from dpo_jax.models.config import ModelConfig, RopeScaling

CLASSIFIER = "ForSequenceClassification"
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "gpt2": "GPT2LMHeadModel",
  "gptj": "GPTJForCausalLM",
  "gpt_neox": "GPTNeoXForCausalLM",
  "mistral": "MistralForCausalLM",
  "mixtral": "MixtralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma": "GemmaForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "phi3": "Phi3ForCausalLM",
  "olmo2": "Olmo2ForCausalLM",
}

_GPT2 = {
  "vocab_size": "vocab_size",
  "num_layers": "n_layer",
  "d_model": "n_embd",
  "d_mlp": "n_inner",
  "num_heads": "n_head",
  "norm_eps": "layer_norm_epsilon",
  "max_positions": "n_positions",
  "activation": "activation_function",
  "tied": "tie_word_embeddings",
}
_PHI = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "d_model": "hidden_size",
  "d_mlp": "intermediate_size",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "norm_eps": "rms_norm_eps",
  "max_positions": "max_position_embeddings",
  "activation": "hidden_act",
  "tied": "tie_word_embeddings",
}
_LLAMA = _PHI | {"head_width": "head_dim"}
_WINDOW = {"window": "sliding_window"}
_GEMMA3 = (
  _LLAMA
  | _WINDOW
  | {
    "activation": "hidden_activation",
    "query_scalar": "query_pre_attn_scalar",
    "logit_soft_cap": "final_logit_softcapping",
  }
)

# Our fields by their key in a family's config.json.
KEYS: dict[str, dict[str, str]] = {
  "llama": _LLAMA,
  "gpt2": _GPT2,
  "gptj": _GPT2 | {"rotary_width": "rotary_dim"},
  "gpt_neox": {
    field: "layer_norm_eps" if field == "norm_eps" else key
    for field, key in _PHI.items()
    if field != "num_kv_heads"
  },
  "mistral": _LLAMA | _WINDOW,
  "mixtral": _LLAMA
  | _WINDOW
  | {
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
  },
  "qwen2": _PHI | _WINDOW,
  "qwen3": _LLAMA | _WINDOW,
  "gemma": _LLAMA,
  "gemma2": _GEMMA3 | {"attention_soft_cap": "attn_logit_softcapping"},
  "gemma3_text": _GEMMA3,
  "phi3": _PHI | _WINDOW,
  "olmo2": _PHI,
}
REQUIRED = (
  *("vocab_size", "num_layers", "d_model", "d_mlp"),
  *("num_heads", "norm_eps", "max_positions"),
)
# Null is a value of these, and the family's default elsewhere.
NULLABLE = ("window", "attention_soft_cap", "logit_soft_cap")

# What the fields may be, and what else is read. The bounds lie far above all
# published models, and what is beyond them would be a slip or damage.
_HEADS = schema.integer(1, 2**12)
_WIDTH = schema.integer(1, 2**20)
_POSITIONS = schema.integer(1, schema.MAX_INDEX)
_LAYERS = schema.integer(1, 2**12)
KINDS = {
  **dict.fromkeys(("d_model", "d_mlp", "head_width", "rotary_width"), _WIDTH),
  "query_scalar": _WIDTH,
  **dict.fromkeys(("num_heads", "num_kv_heads"), _HEADS),
  **dict.fromkeys(("num_experts", "experts_per_token"), _HEADS),
  **dict.fromkeys(("max_positions", "window"), _POSITIONS),
  **dict.fromkeys(("attention_soft_cap", "logit_soft_cap"), schema.POSITIVE),
  "vocab_size": schema.integer(1, 2**24),
  "num_layers": _LAYERS,
  "norm_eps": schema.FRACTION,
  "activation": schema.STRING,
  "tied": schema.BOOLEAN,
}
_ROPE = {
  "rope_type": schema.STRING,
  "type": schema.STRING,
  "rope_theta": schema.POSITIVE,
  "partial_rotary_factor": schema.FRACTION,
  "factor": schema.POSITIVE,
  "low_freq_factor": schema.POSITIVE,
  "high_freq_factor": schema.POSITIVE,
  "original_max_position_embeddings": _POSITIONS,
}
_ROPES = _ROPE | {"full_attention": _ROPE, "sliding_attention": _ROPE}
OTHERS: schema.Schema = {
  "model_type": schema.STRING,
  "architectures": schema.list_of(schema.STRING),
  "id2label": {},
  "problem_type": schema.STRING,
  "rope_parameters": _ROPES,
  "rope_scaling": _ROPES,
  "rope_theta": schema.POSITIVE,
  "rotary_emb_base": schema.POSITIVE,
  "rope_local_base_freq": schema.POSITIVE,
  "rotary_pct": schema.FRACTION,
  "partial_rotary_factor": schema.FRACTION,
  "layer_types": schema.list_of(schema.STRING),
  "max_window_layers": schema.integer(0, schema.MAX_INDEX),
  "sliding_window_pattern": _LAYERS,
  "use_sliding_window": schema.BOOLEAN,
  "use_parallel_residual": schema.BOOLEAN,
}

# Families whose layers may differ, and those whose heads may turn in part.
LAYER_TYPES = {"sliding_attention": True, "full_attention": False}
LAYERED = ("qwen2", "qwen3", "gemma2", "gemma3_text")
PARTIAL = {"gpt_neox": "rotary_pct", "phi3": "partial_rotary_factor"}

# Our activations by their names in a config.json; the first is written, or
# the second for Gemma.
ACTIVATIONS = {
  "silu": ("silu", "swish"),
  "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
  "gelu": ("gelu",),
}

# Settings that the decoder does not have, with the value (the default too)
# that leaves them out. Dropout is not among them: we train without it.
_NO_BIAS = {"attention_bias": False}
_CAUSAL = _NO_BIAS | {"use_bidirectional_attention": False}
UNSUPPORTED: dict[str, dict[str, Any]] = {
  "llama": _NO_BIAS
  | {"mlp_bias": False, "pretraining_tp": 1, "partial_rotary_factor": 1.0},
  "gpt2": {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  },
  "gptj": {"scale_attn_weights": True},
  "gpt_neox": {"attention_bias": True},
  "mixtral": {"router_jitter_noise": 0.0},
  "qwen3": _NO_BIAS,
  "gemma": _CAUSAL,
  "gemma2": _CAUSAL,
  "gemma3_text": _CAUSAL | {"attn_logit_softcapping": None},
  "phi3": _NO_BIAS,
  "olmo2": _NO_BIAS | {"clip_qkv": None},
}


def parse(values: dict[str, Any]) -> ModelConfig:
  """Returns the config that a config.json describes, with default dtypes.

  Args:
    values: as transformers 4 or 5 write them.

  Raises:
    ValueError: an architecture or a setting that the decoder does not have.
  """
  schema.check(values, OTHERS)
  family = values.get("model_type")
  if family not in KEYS:
    raise ValueError(
      f"unknown architecture {family!r}; known: {', '.join(KEYS)}"
    )
  for name, supported in UNSUPPORTED.get(family, {}).items():
    if values.get(name) not in (None, supported):
      raise ValueError(
        f"{name}={values[name]!r} is not supported, only {supported!r}"
      )
  schema.check(values, {key: KINDS[x] for x, key in KEYS[family].items()})
  fields = {
    field: values[key]
    for field, key in KEYS[family].items()
    if key in values and (values[key] is not None or field in NULLABLE)
  }
  for field in fields:
    if KINDS[field] is schema.POSITIVE:
      # XLA takes no whole number beyond 32 bits.
      fields[field] = fields[field] and float(fields[field])
  required = {KEYS[family][field] for field in REQUIRED} - {"n_inner"}
  schema.check(values, {}, sorted(required))
  if "activation" in fields:
    fields["activation"] = _activation(family, fields["activation"])
  if model_config.FAMILIES[family]["positions"] == "rotary":
    fields |= _rope_fields(family, values, fields)
  fields |= _window_fields(family, values, fields)
  fields["head"] = _head(values)
  if family == "gpt_neox" and not values.get("use_parallel_residual", True):
    fields["residual"] = "sequential"
  return model_config.of_family(family, **fields)


def _head(values: dict[str, Any]) -> str:
  """Returns `reward` for a classifier of one label, `classifier` for two."""
  names = values.get("architectures") or [""]
  if not names[0].endswith(CLASSIFIER):
    return "vocabulary"
  # Two labels are the default, which is left out.
  num_labels = len(values.get("id2label") or "01")
  if num_labels > 2:
    raise ValueError(
      f"{names[0]} with {num_labels} labels is not supported, only 1 or 2"
    )
  problem = values.get("problem_type")
  if problem == "multi_label_classification":
    raise ValueError(f"problem_type {problem!r} is not supported")
  return "reward" if num_labels == 1 else "classifier"


def _render_head(config: ModelConfig) -> dict[str, Any]:
  """Returns the keys of config.json that say what the head is."""
  name = ARCHITECTURES[config.family]
  if config.head == "vocabulary":
    return {"architectures": [name]}
  body = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
  if config.family == "gemma3_text":
    body += "Text"
  labels = ["reward"]
  if config.head == "classifier":
    labels = ["negative", "positive"]
  return {
    "architectures": [body + CLASSIFIER],
    "id2label": {str(i): name for i, name in enumerate(labels)},
    "label2id": {name: i for i, name in enumerate(labels)},
  }


def _activation(family: str, name: str) -> str:
  """Returns our name of an activation."""
  if family == "gemma" and name == "gelu":
    return "gelu_tanh"  # What the first files say, and do not mean.
  for ours, theirs in ACTIVATIONS.items():
    if name in theirs:
      return ours
  known = ", ".join(sum(ACTIVATIONS.values(), ()))
  raise ValueError(f"unknown activation {name!r}; known: {known}")


def _rope_fields(
  family: str, values: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
  """Returns what turns how far, as transformers 4 or 5 write it."""
  rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
  local = rope.get("sliding_attention") or {}
  rope = rope.get("full_attention") or rope
  if (local.get("rope_type") or "default") != "default":
    raise ValueError(
      f"rope_type {local['rope_type']!r} of sliding layers is not supported,"
      " only 'default'"
    )
  found = {"rope_scaling": _rope_scaling(rope)}
  key = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
  if theta := rope.get("rope_theta") or values.get(key):
    found["rope_theta"] = float(theta)
  local_key = "rope_local_base_freq"
  if theta := local.get("rope_theta") or values.get(local_key):
    found["local_rope_theta"] = float(theta)
  key = PARTIAL.get(family, "partial_rotary_factor")
  part = rope.get("partial_rotary_factor") or values.get(key)
  if part is None:
    part = 0.25 if family == "gpt_neox" else 1.0
  if family not in PARTIAL and part != 1.0:
    raise ValueError("partial_rotary_factor is not supported, only 1.0")
  if part != 1.0:
    head_width = fields["d_model"] // fields["num_heads"]
    found["rotary_width"] = int(head_width * part)
  return found


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
  """Returns the scaling of global layers."""
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "default":
    return None
  if kind == "linear":
    schema.check(rope, {}, required=("factor",))
    return RopeScaling(float(rope["factor"]))
  if kind != "llama3":
    raise ValueError(
      f"unknown rope_type {kind!r} of rotary scaling; known: default, llama3,"
      " linear"
    )
  low, high = "low_freq_factor", "high_freq_factor"
  original = "original_max_position_embeddings"
  schema.check(rope, {}, required=("factor", low, high, original))
  if rope[low] >= rope[high]:
    raise ValueError(
      f"{low}={rope[low]!r}: must be below {high}={rope[high]!r}"
    )
  return RopeScaling(
    factor=float(rope["factor"]),
    low_freq_factor=float(rope[low]),
    high_freq_factor=float(rope[high]),
    original_max_positions=rope[original],
  )


def _window_fields(
  family: str, values: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
  """Returns the window and which layers slide, where it is told."""
  none = {"window": None, "sliding": ()}
  default = model_config.FAMILIES[family].get("window")
  if fields.get("window", default) is None:
    return none
  if family in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
    return none
  num_layers = fields["num_layers"]
  kinds = values.get("layer_types") if family in LAYERED else None
  if kinds:
    if unknown := set(kinds) - set(LAYER_TYPES):
      raise ValueError(
        f"unknown layer type {min(unknown)!r}; known: {', '.join(LAYER_TYPES)}"
      )
    sliding = tuple(LAYER_TYPES[kind] for kind in kinds)
  elif (first := values.get("max_window_layers")) is not None:
    sliding = tuple(layer >= first for layer in range(num_layers))
  else:
    period = values.get("sliding_window_pattern")
    sliding = model_config.sliding_layers(family, num_layers, period)
  return {"sliding": sliding} if any(sliding) else none


def render(config: ModelConfig) -> dict[str, Any]:
  """Returns config.json, in the form of transformers 4, which 5 reads too."""
  family = config.family
  is_gemma = family.startswith("gemma")
  values = {
    **_render_head(config),
    "model_type": family,
    "torch_dtype": config.param_dtype,
    **{key: getattr(config, field) for field, key in KEYS[family].items()},
  }
  values[KEYS[family]["activation"]] = ACTIVATIONS[config.activation][is_gemma]
  if family in LAYERED:
    kinds = {slides: kind for kind, slides in LAYER_TYPES.items()}
    sliding = config.sliding or (False,) * config.num_layers
    values["layer_types"] = [kinds[slides] for slides in sliding]
  if family in ("qwen2", "qwen3"):
    values["use_sliding_window"] = config.window is not None
  if family == "gpt_neox":
    values["use_parallel_residual"] = config.residual == "parallel"
  if config.positions == "rotary" and family != "gptj":
    values |= _render_rope(config)
  return values


def _render_rope(config: ModelConfig) -> dict[str, Any]:
  """Returns the keys of config.json that say what turns how far."""
  scaling = config.rope_scaling
  rope = None
  if scaling:
    rope = {"rope_type": "linear", "factor": scaling.factor}
  if scaling and scaling.low_freq_factor is not None:
    rope |= {
      "rope_type": "llama3",
      "low_freq_factor": scaling.low_freq_factor,
      "high_freq_factor": scaling.high_freq_factor,
      "original_max_position_embeddings": scaling.original_max_positions,
    }
  is_neox = config.family == "gpt_neox"
  key = "rotary_emb_base" if is_neox else "rope_theta"
  values = {key: config.rope_theta, "rope_scaling": rope}
  if config.local_rope_theta is not None:
    values["rope_local_base_freq"] = config.local_rope_theta
  if config.family in PARTIAL:
    width = config.rotary_width or config.head_width
    values[PARTIAL[config.family]] = width / config.head_width
  return values

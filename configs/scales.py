"""How large hh_dialogue and tldr_summarization are."""

# Of `cpu`: minutes are enough.
_ALL = {"microbatch_rows": 8, "log.every": 10}
_RUNS = {
  "sft": {"epochs": 4, "batch_size": 16},
  "reward_model": {
    "epochs": 2,
    "batch_size": 32,
    "eval.every": 20,
    "checkpoint.every": 20,
  },
  "preferred_ft": {"batch_size": 32},
  "unlikelihood": {"batch_size": 32},
  "dpo": {
    "batch_size": 32,
    "reference.mode": "cached",
    "eval.every": 20,
    "checkpoint.every": 10,
    "checkpoint.keep": 100,
  },
  "ppo": {
    "steps": 20,
    "batch_size": 64,
    "ppo.epochs": 2,
    "ppo.minibatches": 2,
    "ppo.horizon": 500.0,
  },
}
_FROM_SCRATCH = {
  "optimizer.name": "adamw",
  "optimizer.learning_rate": 3e-4,
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 10,
  "optimizer.clip": 1.0,
}
_RUNS_FROM_SCRATCH = {
  "sft": {
    "model.preset": "mini",
    "loss.prompt_nll": True,  # prompts are most of the text
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 50,
  },
  "reward_model": {"optimizer.learning_rate": 5e-4},
}


def parse(argument, known):
  """Returns the three parts of `LOSS,SCALE,START`; a missing one is empty.

  Raises:
    ValueError: a scale that is not known, or a start but `pretrained`.
  """
  loss, _, rest = argument.partition(",")
  scale, _, start = rest.partition(",")
  if scale not in ("", *known):
    raise ValueError(f"unknown scale {scale!r}; known: {', '.join(known)}")
  if start not in ("", "pretrained"):
    raise ValueError(f"unknown start {start!r}; known: pretrained, or none")
  return loss, scale, start


def set_small(config, loss, max_prompt_length, start):
  """Sets what the scale `cpu` changes.

  Args:
    config: changed in place.
    loss: its name.
    max_prompt_length: tokens.
    start: empty: the language model is one of random weights; `pretrained`: it
      is not, and optimizers stay as they are.
  """
  config.data.max_length, config.data.max_prompt_length = 384, max_prompt_length
  tables = [_ALL, _RUNS.get(loss, {})]
  if not start:
    tables += [_FROM_SCRATCH, _RUNS_FROM_SCRATCH.get(loss, {})]
  for table in tables:
    config.update_from_flattened_dict(table)

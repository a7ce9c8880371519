"""What a run of PPO gives to its reward."""

import types

import numpy as np
import optax

from dpo_jax import sharding
from dpo_jax.data.sources import synthetic
from dpo_jax.models import presets
from dpo_jax.rewards import registry
from dpo_jax.run import ppo as ppo_run
from dpo_jax.sampling import decode
from dpo_jax.training import ppo, ppo_rows


def test_the_reward_is_told_what_ended_and_reads_no_stop_token(monkeypatch):
  asked = []

  def reward_fn(prompts, responses, ended):
    asked.extend(zip(prompts, responses, ended, strict=True))
    return np.zeros(len(prompts), np.float32)

  monkeypatch.setattr(registry, "load", lambda name: reward_fn)
  tokenizer = synthetic.make_tokenizer()
  encode = lambda text: tokenizer(text).input_ids
  config = presets.make_config("tiny")
  iterate = ppo_run.make_iteration(
    ppo_run.Reinforcement(
      ppo.Settings(),
      decode.Settings(4),
      ppo_rows.RowSettings(128, 16, 1, (0, 1)),
      reward="",
      seed=0,
    ),
    types.SimpleNamespace(policy=config, chunk_length=1),
    config,
    tokenizer=tokenizer,
    stop_ids=(tokenizer.eos_token_id, *encode("dull")),
    optimizer=optax.sgd(0.0),
    mesh=sharding.make_mesh(),
  )
  prompt = encode("the plot was")
  whole = encode("not good")
  responses = [
    whole + [tokenizer.eos_token_id],
    whole + encode("dull"),
    whole + encode("dull"),
  ]
  iterate._score_fn([prompt] * 3, responses, [True, True, False])
  assert asked == [
    ("the plot was", " not good", True),
    ("the plot was", " not good", True),
    ("the plot was", " not good dull", False),
  ]

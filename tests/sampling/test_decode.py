"""The sampler against argmax by hand, softmax, and itself batched otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import transformer
from dpo_jax.sampling import decode
from dpo_jax.types import Unembedding

EOS = 1
VOCAB = 13
PROMPTS = [[4], [2, 5, 3], [7, 7, 2, 9, 3, 6], [5, 3], [8, 2, 2, 4, 11]]


def _hidden(params, tokens, positions, key_start, key_end):
  """Returns tanh of the mean over visible tokens, turned by their positions."""
  index = jnp.arange(tokens.shape[1])[None, None, :]
  visible = (key_start[..., None] <= index) & (index < key_end[..., None])
  weights = visible / jnp.sum(visible, axis=-1, keepdims=True)
  inputs = params["in"][tokens] * jnp.cos(positions)[..., None]
  return jnp.tanh(3 * jnp.einsum("rts,rsd->rtd", weights, inputs))


def _unembedding(params):
  return Unembedding(params["out"])


@pytest.fixture
def params():
  keys = jax.random.split(jax.random.key(0))
  return {
    "in": jax.random.normal(keys[0], (VOCAB, 8)),
    "out": jax.random.normal(keys[1], (VOCAB, 8)),
  }


def _sample(params, prompts, *, seed=0, **settings):
  settings = {"max_new_tokens": 10, "temperature": 1.0, **settings}
  return decode.sample(
    _hidden,
    _unembedding,
    params,
    prompts,
    rng=jax.random.key(seed),
    eos_id=EOS,
    **{"batch_rows": 8, **settings},
  )


def _greedy_by_hand(params, prompt, max_new_tokens):
  """Returns the argmax continuation in numpy, one token after another."""
  inputs, outputs = np.asarray(params["in"]), np.asarray(params["out"])
  tokens = list(prompt)
  for _ in range(max_new_tokens):
    turned = inputs[tokens] * np.cos(np.arange(len(tokens)))[:, None]
    state = np.tanh(3 * turned.mean(axis=0))
    tokens.append(int(np.argmax(outputs @ state)))
    if tokens[-1] == EOS:
      break
  return tokens[len(prompt) :]


def _fixed(params, tokens, *_):
  """Returns one state at every token."""
  return jnp.broadcast_to(params["state"], (*tokens.shape, 5))


def _frequencies(logits, *, num_samples, temperature):
  responses = decode.sample(
    _fixed,
    lambda params: Unembedding(jnp.eye(5)),
    {"state": jnp.array(logits)[None, None]},
    [[0]] * num_samples,
    rng=jax.random.key(3),
    max_new_tokens=1,
    temperature=temperature,
    eos_id=EOS,
    batch_rows=num_samples,
  )
  return np.bincount(np.ravel(responses), minlength=5)


def test_greedy_equals_argmax_by_hand(params):
  responses = _sample(params, PROMPTS, temperature=0.0)
  expected = [_greedy_by_hand(params, prompt, 10) for prompt in PROMPTS]
  assert responses == expected
  assert len({tuple(response) for response in responses}) > 1


def test_greedy_does_not_depend_on_the_seed(params):
  first, second = (
    _sample(params, PROMPTS, temperature=0.0, seed=seed) for seed in (0, 1)
  )
  assert first == second


def test_a_seed_gives_its_samples_again_and_another_seed_others(params):
  first, again, other = (_sample(params, PROMPTS, seed=s) for s in (0, 0, 1))
  assert first == again
  assert first != other


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 16])
def test_samples_do_not_depend_on_the_batch_split(params, batch_rows):
  prompts = PROMPTS * 2
  expected = _sample(params, prompts, batch_rows=10)
  assert _sample(params, prompts, batch_rows=batch_rows) == expected


def test_mixed_prompt_lengths_equal_the_first_alone(params):
  for prompt in PROMPTS:
    mixed = _sample(params, [prompt, *PROMPTS])
    assert mixed[0] == _sample(params, [prompt])[0]


def test_a_prompt_listed_twice_gets_two_samples(params):
  responses = _sample(params, [PROMPTS[2]] * 20, temperature=2.0)
  assert len({tuple(response) for response in responses}) > 10


def test_responses_end_at_eos_or_at_max_new_tokens(params):
  responses = _sample(params, PROMPTS * 20, batch_rows=100)
  for response in responses:
    assert EOS not in response[:-1]
    assert response[-1] == EOS or len(response) == 10
  lengths = {len(response) for response in responses}
  assert min(lengths) < 10 and max(lengths) == 10


def test_the_loop_stops_when_every_row_has_ended():
  calls = []

  def hidden(params, tokens, *_):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.broadcast_to(params["state"], (*tokens.shape, 5))

  state = jax.nn.one_hot(jnp.array([[EOS]]), 5)
  responses = decode.sample(
    hidden,
    lambda params: Unembedding(jnp.eye(5)),
    {"state": state},
    PROMPTS,
    rng=jax.random.key(0),
    max_new_tokens=50,
    temperature=0.0,
    eos_id=EOS,
    batch_rows=8,
  )
  jax.effects_barrier()
  assert responses == [[EOS]] * len(PROMPTS)
  assert len(calls) == 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_match_the_softmax(temperature):
  logits = np.array([0.5, -1.0, 1.5, 0.0, -2.0], np.float32)
  counts = _frequencies(logits, num_samples=4000, temperature=temperature)
  expected = 4000 * np.asarray(jax.nn.softmax(logits / temperature))
  # Four degrees of freedom: above 18.5 once in a thousand.
  assert ((counts - expected) ** 2 / expected).sum() < 18.5


def test_prompts_of_other_lengths_compile_nothing_new(params):
  _sample(params, [[2, 3, 4]], temperature=1.0)
  before = decode._sample_rows._cache_size()
  _sample(params, [[2], [3, 4, 5, 6]], temperature=0.7)
  assert decode._sample_rows._cache_size() == before


def test_no_prompts_give_no_responses(params):
  assert _sample(params, []) == []


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
    ({"batch_rows": 0}, "batch_rows=0: must be at least 1"),
    ({"temperature": -1.0}, "temperature=-1.0: must be finite"),
    ({"temperature": float("nan")}, "temperature=nan: must be finite"),
  ],
)
def test_an_argument_out_of_range_is_refused(params, settings, message):
  with pytest.raises(ValueError, match=message):
    _sample(params, PROMPTS, **settings)


def test_an_empty_prompt_is_refused(params):
  with pytest.raises(ValueError, match="prompt 1 is empty"):
    _sample(params, [[2], []])


@pytest.fixture(scope="module")
def decoder():
  config = model_config.llama(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=16,
    d_mlp=32,
    num_heads=2,
    max_positions=32,
  )
  params = transformer.init_params(config, jax.random.key(0))
  # Larger weights than those of a new model: the context must matter.
  params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
  return (
    functools.partial(transformer.hidden_states, config),
    functools.partial(transformer.unembedding, config),
    params,
  )


def test_greedy_of_a_transformer_is_the_argmax_of_its_full_forward(decoder):
  hidden_fn, unembedding_fn, params = decoder
  settings = {"max_new_tokens": 8, "temperature": 0.0, "eos_id": EOS}
  responses = decode.sample(
    *decoder, PROMPTS, rng=jax.random.key(0), batch_rows=8, **settings
  )
  tokens = np.zeros((len(PROMPTS), 16), np.int32)
  for row, (prompt, response) in enumerate(zip(PROMPTS, responses)):
    tokens[row, : len(prompt + response)] = prompt + response
  index = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
  hidden = jax.jit(hidden_fn)(params, tokens, index, 0 * index, index + 1)
  logits = np.asarray(unembedding_fn(params).logits(hidden))
  for row, (prompt, response) in enumerate(zip(PROMPTS, responses)):
    predicted = logits[row].argmax(axis=-1)[len(prompt) - 1 :]
    assert response == predicted[: len(response)].tolist()


def test_8_devices_sample_what_1_samples(decoder):
  hidden_fn, unembedding_fn, params = decoder
  settings = {"max_new_tokens": 8, "temperature": 1.0, "eos_id": EOS}
  sample = functools.partial(
    decode.sample, rng=jax.random.key(0), batch_rows=8, **settings
  )
  expected = sample(*decoder, PROMPTS)
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, sharding.replicated(mesh))
    assert sample(hidden_fn, unembedding_fn, params, PROMPTS) == expected

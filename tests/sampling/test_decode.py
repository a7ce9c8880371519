"""The sampler against full forward passes, and itself batched otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import config as model_config
from dpo_jax.models import incremental, transformer
from dpo_jax.sampling import decode, draws

EOS = 1
VOCAB = 13
PROMPTS = [[4], [2, 5, 3], [7, 7, 2, 9, 3, 6] * 2, [5, 3], [8, 2, 2, 4, 11]]
LONG = [7, 7, 2, 9, 3, 6] * 3  # padded to 32 tokens, where the others are to 16
_slow = lambda *value: pytest.param(*value, marks=pytest.mark.slow)
SIZES = {"vocab_size": VOCAB, "num_layers": 2, "d_model": 16, "num_heads": 2}
CONFIGS = {
  "llama": model_config.llama(
    **SIZES, d_mlp=32, num_kv_heads=1, max_positions=64
  ),
  "gpt2": model_config.gpt2(**SIZES, max_positions=64),
  # Every other layer sees four keys, with angles of its own; scores are
  # capped.
  "sliding": model_config.of_family(
    "gemma2",
    **SIZES,
    d_mlp=32,
    num_kv_heads=1,
    max_positions=64,
    window=4,
    sliding=(True, False),
    local_rope_theta=100.0,
    attention_soft_cap=2.0,
  ),
  "experts": model_config.of_family(
    "mixtral",
    **SIZES,
    d_mlp=32,
    num_kv_heads=2,
    max_positions=64,
    num_experts=4,
    experts_per_token=2,
  ),
}


@functools.cache
def _model(name="llama"):
  """Returns a config and weights with which the context matters."""
  config = CONFIGS[name]
  params = transformer.init_params(config, jax.random.key(0))
  return config, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


@functools.cache
def _sampler(name="llama"):
  return decode.Sampler(*_model(name))


def _sample(prompts, *, name="llama", seed=0, new=10, **options):
  settings = {
    key: options.pop(key)
    for key in ("temperature", "top_k", "top_p")
    if key in options
  }
  return _sampler(name).sample(
    prompts,
    decode.Settings(new, **settings),
    seed=seed,
    **{"batch_rows": 8, "stop_ids": (EOS,), **options},
  )


def _tokens(found):
  return [[sample.tokens for sample in samples] for samples in found]


def _logits(sequence, name="llama"):
  """Returns f32[T,V] of one full forward pass."""
  config, params = _model(name)
  tokens = np.zeros((1, 32), np.int32)
  tokens[0, : len(sequence)] = sequence
  index = np.arange(32, dtype=np.int32)[None]
  hidden = jax.jit(transformer.hidden_states, static_argnums=0)
  states = hidden(config, params, tokens, index, 0 * index, index + 1)
  logits = transformer.unembedding(config, params).logits(states)
  return np.asarray(logits)[0, : len(sequence)]


@pytest.mark.parametrize(
  "name",
  [
    "llama",
    *map(_slow, sorted(CONFIGS.keys() - {"llama"})),
  ],
)
def test_greedy_is_the_argmax_of_the_full_forward(name):
  prompts = [*PROMPTS, LONG]
  found = _sample(prompts, name=name, temperature=0.0)
  for prompt, (sample,) in zip(prompts, found, strict=True):
    logits = _logits(prompt + sample.tokens, name)[len(prompt) - 1 : -1]
    assert sample.tokens == logits.argmax(axis=-1).tolist()
  assert len({tuple(sample.tokens) for (sample,) in found}) > 1


@pytest.mark.parametrize(
  "name", ["sliding", *map(_slow, sorted(CONFIGS.keys() - {"sliding"}))]
)
def test_logps_are_those_of_the_full_forward(name):
  settings = {"temperature": 0.7, "top_k": 6, "samples_per_prompt": 3}
  for prompt, samples in zip(PROMPTS, _sample(PROMPTS, name=name, **settings)):
    for sample in samples:
      logits = _logits(prompt + sample.tokens, name)[len(prompt) - 1 : -1]
      logps = np.asarray(jax.nn.log_softmax(logits))
      expected = logps[np.arange(len(sample.tokens)), sample.tokens]
      np.testing.assert_allclose(sample.logps, expected, atol=1e-4)


def test_greedy_does_not_depend_on_the_seed():
  first, second = (_sample(PROMPTS, temperature=0.0, seed=s) for s in (0, 1))
  assert _tokens(first) == _tokens(second)


def test_a_seed_gives_its_samples_again_and_another_seed_others():
  first, again, other = (_tokens(_sample(PROMPTS, seed=s)) for s in (0, 0, 1))
  assert first == again
  assert first != other


@pytest.mark.parametrize("batch_rows", [3, _slow(1), _slow(16)])
def test_samples_do_not_depend_on_the_batch_split(batch_rows):
  options = {"samples_per_prompt": 2}
  expected = _tokens(_sample(PROMPTS, batch_rows=10, **options))
  found = _tokens(_sample(PROMPTS, batch_rows=batch_rows, **options))
  assert found == expected


def test_samples_do_not_depend_on_what_else_is_sampled():
  whole = _tokens(_sample(PROMPTS, samples_per_prompt=3))
  for place, prompt in enumerate(PROMPTS):
    (alone,) = _tokens(_sample([prompt], indices=[place], samples_per_prompt=2))
    assert alone == whole[place][:2]
    assert whole[place][0] != whole[place][1]


def test_a_prompt_listed_twice_gets_two_samples():
  found = _tokens(_sample([PROMPTS[2]] * 20, temperature=2.0))
  assert len({tuple(tokens) for (tokens,) in found}) > 10


@pytest.mark.parametrize(
  "stop_ids", [_slow((EOS,)), (EOS, 5, 9), _slow((9, EOS))]
)
def test_responses_end_at_any_stop_token_or_at_max_new_tokens(stop_ids):
  found = _sampler().sample(
    PROMPTS,
    decode.Settings(10),
    seed=0,
    stop_ids=stop_ids,
    samples_per_prompt=20,
    batch_rows=100,
  )
  samples = [sample for samples in found for sample in samples]
  for sample in samples:
    assert not set(stop_ids) & set(sample.content)
    assert sample.ended == (sample.tokens[-1] in stop_ids)
    assert sample.ended or len(sample.tokens) == 10
    assert sample.content == sample.tokens[: len(sample.tokens) - sample.ended]
    assert len(sample.logps) == len(sample.tokens)
  assert {x.tokens[-1] for x in samples if x.ended} == set(stop_ids)
  lengths = {len(sample.tokens) for sample in samples}
  assert min(lengths) < 10 and max(lengths) == 10


def test_a_stop_token_cuts_the_same_draws_short():
  without = _tokens(_sample(PROMPTS, stop_ids=()))
  assert {len(tokens) for (tokens,) in without} == {10}
  for (whole,), (cut,) in zip(without, _tokens(_sample(PROMPTS))):
    assert whole[: len(cut)] == cut


@pytest.mark.slow
def test_the_loop_stops_when_every_row_has_ended(monkeypatch):
  calls = []
  extend = incremental.extend

  def counted(*arguments):
    jax.debug.callback(lambda: calls.append(1))
    return extend(*arguments)

  monkeypatch.setattr(incremental, "extend", counted)
  # A length of its own, so that this is compiled anew.
  found = _sample(PROMPTS, new=200, samples_per_prompt=2, batch_rows=20)
  jax.effects_barrier()
  longest = max(len(s.tokens) for samples in found for s in samples)
  assert longest < 200
  assert len(calls) == longest - 1


@pytest.mark.parametrize("temperature", [1.0, _slow(2.0)])
def test_frequencies_match_the_softmax(temperature):
  (samples,) = _sample(
    PROMPTS[1:2],
    new=1,
    temperature=temperature,
    samples_per_prompt=4000,
    batch_rows=4000,
  )
  counts = np.bincount([s.tokens[0] for s in samples], minlength=VOCAB)
  logits = _logits(PROMPTS[1])[-1] / temperature
  expected = 4000 * np.asarray(jax.nn.softmax(logits))
  often = expected > 5
  statistic = ((counts - expected) ** 2 / expected)[often].sum()
  # At most twelve degrees of freedom: above 32.9 once in a thousand.
  assert often.sum() > 3 and statistic < 32.9


@pytest.mark.parametrize(
  ("settings", "kept"),
  [
    ({"top_k": 1}, 1),
    ({"top_k": 3}, 3),
    ({"top_k": 1000}, 5),
    ({"top_p": 0.45}, 1),
    ({"top_p": 0.7}, 2),
    ({"top_p": 0.97}, 4),
    ({"top_k": 3, "top_p": 0.84}, 2),
  ],
)
def test_top_k_and_top_p_leave_the_likeliest(settings, kept):
  # By hand: of the first three tokens, the first two hold 0.8 / 0.95.
  logits = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3, 1e-6]]))
  allowed = draws.allowed(
    logits, min(settings.get("top_k", 0), 5), settings.get("top_p")
  )
  likeliest = [1, 3, 2, 0, 4][:kept]
  assert set(np.flatnonzero(np.isfinite(allowed[0]))) == set(likeliest)
  np.testing.assert_array_equal(
    allowed[0][np.array(likeliest)], logits[0][np.array(likeliest)]
  )


# Within one block of tokens, whole blocks, and a rest.
@pytest.mark.parametrize("vocab", [200, 512, 700])
def test_what_has_no_weight_is_never_drawn_and_the_rest_by_its_share(vocab):
  likely = [7, vocab // 2, vocab - 1]
  logits = np.full(vocab, -np.inf, np.float32)
  logits[likely] = np.log([0.2, 0.5, 0.3])
  uniform = np.linspace(0, 1, 10_001, dtype=np.float32)
  uniform[-1] = np.nextafter(np.float32(1), np.float32(0))
  drawn = draws.choose(uniform, jnp.tile(logits, (len(uniform), 1)))
  tokens, counts = np.unique(drawn, return_counts=True)
  assert tokens.tolist() == likely
  np.testing.assert_allclose(counts / len(drawn), [0.2, 0.5, 0.3], atol=2e-4)


def test_top_k_of_one_is_greedy():
  greedy = _sample(PROMPTS, temperature=0.0)
  assert _tokens(_sample(PROMPTS, top_k=1)) == _tokens(greedy)
  assert _tokens(_sample(PROMPTS, top_p=1e-6)) == _tokens(greedy)


def test_prompts_of_other_lengths_compile_nothing_new():
  _sample([[2, 3, 4]], temperature=0.9)
  before = decode._sample_rows._cache_size()
  _sample([[2], [3, 4, 5, 6] * 4], temperature=0.7, seed=5)
  assert decode._sample_rows._cache_size() == before


@pytest.mark.parametrize("name", [_slow("llama"), "sliding"])
def test_a_cache_that_grows_changes_nothing(name, monkeypatch):
  found = []
  for room in (1, 64):
    monkeypatch.setattr(decode, "MIN_ROOM", room)
    decode._sample_rows.clear_cache()
    found.append(_sample(PROMPTS, name=name, new=12, temperature=0.7))
  assert max(len(tokens) for [tokens] in _tokens(found[0])) == 12
  assert _tokens(found[0]) == _tokens(found[1])
  for [grown], [whole] in zip(*found):
    np.testing.assert_allclose(grown.logps, whole.logps, atol=1e-5)


def test_a_cache_is_doubled_when_it_is_full():
  assert [decode._rooms(n) for n in (0, 1, 64)] == [[], [1], [64]]
  assert decode._rooms(127) == [64, 127]
  assert decode._rooms(511) == [128, 256, 511]


def test_each_batch_is_told_once():
  told = {}
  found = _sample(PROMPTS, batch_rows=2, on_batch=told.update)
  assert {place: told[place] for place in range(len(PROMPTS))} == dict(
    enumerate(found)
  )


def test_no_prompts_give_no_responses():
  assert _sample([]) == []


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"new": 0}, "max_new_tokens=0: at least 1"),
    ({"new": 10**9}, "max_new_tokens=1000000000: at least 1 and at most"),
    ({"batch_rows": 0}, "batch_rows=0: must be at least 1"),
    ({"samples_per_prompt": 0}, "samples_per_prompt=0: must be at least 1"),
    ({"temperature": -1.0}, "temperature=-1: must be finite"),
    ({"temperature": float("nan")}, "temperature=nan: must be finite"),
    ({"top_k": -1}, "top_k=-1: at least 1, or 0"),
    ({"top_p": 0.0}, r"top_p=0: must be in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p=1.5: must be in \(0, 1\]"),
    ({"name": "gpt2", "new": 54}, "prompt 2 has 12 tokens: .* 64 positions"),
  ],
)
def test_an_argument_out_of_range_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _sample(PROMPTS, **options)


def test_an_empty_prompt_is_refused():
  with pytest.raises(ValueError, match="prompt 1 is empty"):
    _sample([[2], []])


@pytest.mark.parametrize("name", [_slow("llama"), _slow("experts")])
def test_8_devices_sample_what_1_samples(name):
  config, params = _model(name)
  expected = _sample(PROMPTS, name=name, samples_per_prompt=2)
  axes = {"fsdp": 4, "tensor": 2} if name == "llama" else {"expert": 4}
  mesh = sharding.make_mesh(**{"fsdp": 2, **axes})
  layouts = sharding.array_shardings(
    mesh, transformer.logical_axes(config), transformer.param_shapes(config)
  )
  with jax.set_mesh(mesh):
    sampler = decode.Sampler(config, jax.device_put(params, layouts))
    found = sampler.sample(
      PROMPTS,
      decode.Settings(10),
      seed=0,
      stop_ids=(EOS,),
      samples_per_prompt=2,
    )
  assert _tokens(found) == _tokens(expected)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    _slow({"temperature": 0.7}),
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
  ],
)
def test_drawn_logps_are_of_what_was_drawn_from(settings):
  prompts = PROMPTS[:2]
  found = _sample(prompts, samples_per_prompt=3, **settings)
  temperature = settings.get("temperature", 1.0)
  for prompt, samples in zip(prompts, found, strict=True):
    for sample in samples:
      logits = _logits(prompt + sample.tokens)[len(prompt) - 1 : -1]
      allowed = draws.allowed(
        jnp.asarray(logits / temperature),
        settings.get("top_k", 0),
        settings.get("top_p"),
      )
      logps = np.asarray(jax.nn.log_softmax(allowed))
      expected = logps[np.arange(len(sample.tokens)), sample.tokens]
      np.testing.assert_allclose(sample.drawn_logps, expected, atol=1e-4)
      is_same = np.array_equal(sample.drawn_logps, sample.logps)
      assert is_same == (not settings)


def test_the_most_likely_token_is_drawn_for_sure():
  ((sample,),) = _sample(PROMPTS[:1], temperature=0.0)
  assert not sample.drawn_logps.any() and sample.logps.all()

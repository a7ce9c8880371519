"""Sampling: a prompt is read once, then every token extends a key cache.

Prompts end in the last column of their rows, so that what a new token sees is
one interval of keys: those of its prompt, then the response's. All samples of
a prompt read the same keys of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import sharding
from dpo_jax.models import incremental, transformer
from dpo_jax.models.config import ModelConfig
from dpo_jax.sampling import draws
from dpo_jax.types import Params

# Prompts are padded to a power of two of tokens, at least this: few lengths
# are ever compiled.
MIN_PROMPT_LENGTH = 16

# A cache is doubled when it is full, up to so many lengths.
MIN_ROOM, MAX_ROOMS = 64, 3

MAX_NEW_TOKENS = 2**20  # more than any model reads


@dataclasses.dataclass(frozen=True)
class Settings:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: at which length a response is cut, from 1 to
      `MAX_NEW_TOKENS`.
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: only the k most likely tokens are drawn; 0: all.
    top_p: of these, only the fewest that hold this share of the probability
      (Holtzman et al. 2020, arXiv 1904.09751); in (0, 1], 1: all.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
      raise ValueError(
        f"max_new_tokens={self.max_new_tokens}: at least 1 and at most"
        f" {MAX_NEW_TOKENS}"
      )
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f"temperature={self.temperature:g}: must be finite, at least 0"
      )
    if self.top_k < 0:
      raise ValueError(f"top_k={self.top_k}: at least 1, or 0 for all")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p:g}: must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Sample:
  """A response: its tokens, with the stop token where one was reached.

  Attributes:
    tokens: token ids.
    logps: f32, the log-probability of each under the model itself, whatever
      the temperature and the tokens left out, nats.
    ended: whether a stop token was drawn, which is the last one; else the
      response was cut.
    drawn_logps: f32, that under what it was drawn from: the model at this
      temperature, without those tokens; 0 where the most likely one is taken.
  """

  tokens: list[int]
  logps: np.ndarray
  ended: bool
  drawn_logps: np.ndarray

  @property
  def content(self) -> list[int]:
    """The tokens of its text: those before the stop token."""
    return self.tokens[:-1] if self.ended else self.tokens


class Sampler:
  """A model's weights, laid out to sample from.

  Attributes:
    config: the model.
    params: its weights in `config.dtype`, as `incremental.unstack` copies them.
  """

  def __init__(self, config: ModelConfig, params: Params):
    """Copies the weights."""
    self.config = config
    self.params = _unstack(config, params)

  def sample(
    self,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    seed: int,
    stop_ids: Sequence[int],
    samples_per_prompt: int = 1,
    batch_rows: int = 256,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[dict[int, list[Sample]]], None] | None = None,
  ) -> list[list[Sample]]:
    """Returns samples of each prompt, in the order of the prompts.

    A token's key is the seed's with the prompt's index, the sample's and the
    token's place in the response folded in, so samples depend neither on
    `batch_rows` nor on the other prompts. To be called under `jax.set_mesh`
    where the weights are on a mesh; every process gets all samples.

    Args:
      prompts: token ids, of any lengths above 0.
      settings: how tokens are drawn.
      seed: of the draws.
      stop_ids: the tokens that each end a response; none: all are cut.
      samples_per_prompt: at least 1.
      batch_rows: about how many responses grow at once: prompts come whole.
      indices: of the prompts; their places in the list by default. A prompt
        that is listed twice gets other samples each time.
      on_batch: is told the samples of each batch, by place in the list.

    Raises:
      ValueError: an argument out of range, an empty prompt, or one that with
        its response is longer than learned positions reach.
    """
    self._check(prompts, settings, samples_per_prompt, batch_rows)
    indices = range(len(prompts)) if indices is None else indices
    shards = sharding.num_row_shards_here()
    batch = -(-max(batch_rows // samples_per_prompt, 1) // shards) * shards
    found: dict[int, list[Sample]] = {}
    stops = np.array(stop_ids, np.int32)
    for length, places in _by_length(prompts).items():
      for first in range(0, len(places), batch):
        here = places[first : first + batch]
        tokens = np.full((batch, length), _filler(stop_ids), np.int32)
        lengths, numbers = np.zeros((2, batch), np.int32)
        for row, place in enumerate(here):
          tokens[row, length - len(prompts[place]) :] = prompts[place]
          lengths[row], numbers[row] = len(prompts[place]), indices[place]
        drawn = _sample_rows(
          self.config,
          self.params,
          *(tokens, lengths, numbers),
          jax.random.key(seed),
          *(
            None if value == 1 else np.float32(value)
            for value in (settings.temperature, settings.top_p)
          ),
          stops,
          np.int32(_filler(stop_ids)),
          max_new_tokens=settings.max_new_tokens,
          samples_per_prompt=samples_per_prompt,
          top_k=min(settings.top_k, self.config.vocab_size),
          is_greedy=settings.temperature == 0,
        )
        samples = _to_samples(
          *jax.device_get(drawn), samples_per_prompt, frozenset(stop_ids)
        )
        done = dict(zip(here, samples))
        found |= done
        if on_batch is not None:
          on_batch(done)
    return [found[place] for place in range(len(prompts))]

  def _check(self, prompts, settings, samples_per_prompt, batch_rows):
    for name, value in (
      ("samples_per_prompt", samples_per_prompt),
      ("batch_rows", batch_rows),
    ):
      if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")
    limit = None
    if self.config.positions == "learned":
      limit = self.config.max_positions
    for place, prompt in enumerate(prompts):
      if not len(prompt):
        raise ValueError(f"prompt {place} is empty: must hold a token or more")
      # The last token that is sampled is never read.
      needed = len(prompt) + settings.max_new_tokens - 1
      if limit is not None and needed > limit:
        raise ValueError(
          f"prompt {place} has {len(prompt)} tokens: with"
          f" max_new_tokens={settings.max_new_tokens} it is longer than the"
          f" model's {limit} positions"
        )


# Of the module, so that new weights of a model need no new program.
_unstack = jax.jit(incremental.unstack, static_argnums=0)


def _by_length(prompts: Sequence[Sequence[int]]) -> dict[int, list[int]]:
  """Returns the places of prompts by the length that they are padded to."""
  found: dict[int, list[int]] = {}
  for place, prompt in enumerate(prompts):
    length = max(MIN_PROMPT_LENGTH, 1 << (len(prompt) - 1).bit_length())
    found.setdefault(length, []).append(place)
  return dict(sorted(found.items()))


def _filler(stop_ids: Sequence[int]) -> int:
  """Returns the token where there is none, which nothing sees."""
  return stop_ids[0] if stop_ids else 0


def _to_samples(
  tokens: np.ndarray,
  logps: np.ndarray,
  lengths: np.ndarray,
  per_prompt: int,
  stop_ids: frozenset[int],
) -> list[list[Sample]]:
  """Returns the samples of each prompt from what `_sample_rows` returns."""
  rows = [
    Sample(kept, own, kept[-1] in stop_ids, drawn)
    for row, length in enumerate(lengths)
    for kept, (own, drawn) in [
      (tokens[row, :length].tolist(), logps[row, :length].T)
    ]
  ]
  return [
    rows[first : first + per_prompt]
    for first in range(0, len(rows), per_prompt)
  ]


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=(
    "max_new_tokens",
    "samples_per_prompt",
    "top_k",
    "is_greedy",
  ),
)
def _sample_rows(
  config: ModelConfig,
  params: Params,
  prompts: jax.Array,  # i32[P,T]  padding, then the prompt
  lengths: jax.Array,  # i32[P]  of the prompts; 0 is an unused row
  indices: jax.Array,  # i32[P]  what the prompt's key is made of
  rng: jax.Array,
  temperature: jax.Array | None,  # None: 1
  top_p: jax.Array | None,  # None: 1
  stop_ids: jax.Array,  # i32[K]
  filler: jax.Array,  # i32[]  stands where there is no token
  *,
  max_new_tokens: int,
  samples_per_prompt: int,
  top_k: int,
  is_greedy: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns tokens i32[R,U], logps f32[R,U,2] and lengths i32[R] of responses.

  The last axis of logps has those of the model, and of what was drawn from.
  Rows are the samples of the first prompt, then of the second, ...
  """
  prompt_length = prompts.shape[1]
  num_rows = len(prompts) * samples_per_prompt
  unembedding = transformer.unembedding(config, params)
  fold_in = jax.random.fold_in
  keys = jax.vmap(
    lambda index: jax.vmap(lambda sample: fold_in(fold_in(rng, index), sample))(
      jnp.arange(samples_per_prompt)
    )
  )(indices).reshape(num_rows)
  of_samples = lambda x: jnp.repeat(x, samples_per_prompt, axis=0)

  def draw(step, logits, tokens, logps, ended):
    if is_greedy:
      chosen, drawn = jnp.argmax(logits, axis=-1), jnp.zeros(num_rows)
    else:
      step_keys = jax.vmap(fold_in, (0, None))(keys, step)
      # As they are, the sums of `draws.choose` are those of the
      # log-probability: XLA computes them once.
      scaled = logits if temperature is None else logits / temperature
      allowed = draws.allowed(scaled, top_k, top_p)
      chosen = draws.choose(jax.vmap(jax.random.uniform)(step_keys), allowed)
      drawn = draws.logps_of(allowed, chosen)
    chosen = jnp.where(ended, filler, chosen).astype(jnp.int32)
    of_chosen = jnp.stack([draws.logps_of(logits, chosen), drawn], axis=-1)
    tokens = tokens.at[:, step].set(chosen)
    logps = logps.at[:, step].set(jnp.where(ended[:, None], 0.0, of_chosen))
    return tokens, logps, ended | jnp.isin(chosen, stop_ids)

  def unfinished(room, carry):
    step, _, _, _, ended = carry
    return (step <= room) & ~jnp.all(ended)

  def extend(carry):
    step, cache, tokens, logps, ended = carry
    last = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
    states, cache = incremental.extend(
      config,
      params,
      prompt,
      cache,
      last,
      first_positions + step - 1,
      key_start,
      jnp.full((num_rows, 1), prompt_length + step),
    )
    logits = unembedding.logits(states[:, 0])
    return step + 1, cache, *draw(step, logits, tokens, logps, ended)

  index = jnp.arange(prompt_length)[None]
  first = (prompt_length - lengths)[:, None]
  states, prompt = incremental.read_prompts(
    config,
    params,
    sharding.constrain(prompts, "rows", None),
    jnp.maximum(index - first, 0),
    jnp.broadcast_to(first, prompts.shape),
    # Padding sees nothing.
    jnp.where(index < first, 0, index + 1),
  )
  first_positions, key_start = of_samples(lengths[:, None]), of_samples(first)
  shape = (num_rows, max_new_tokens)
  drawn = draw(
    0,
    of_samples(unembedding.logits(states[:, -1])),
    jnp.full(shape, filler, jnp.int32),
    jnp.zeros((*shape, 2), jnp.float32),
    first_positions[:, 0] == 0,
  )
  cache = incremental.make_cache(prompt, num_rows)
  carry = (jnp.int32(1), cache, *drawn)
  for room in _rooms(max_new_tokens - 1):  # The last token is never read.
    step, cache, *drawn = carry
    carry = (step, incremental.grow_cache(cache, room), *drawn)
    is_unfinished = functools.partial(unfinished, room)
    carry = jax.lax.while_loop(is_unfinished, extend, carry)
  _, _, tokens, logps, _ = carry
  is_stop = jnp.isin(tokens, stop_ids)
  ends = jnp.where(is_stop.any(1), is_stop.argmax(1) + 1, max_new_tokens)
  # Every process reads all responses.
  whole = lambda x: sharding.constrain(x, *[None] * x.ndim)
  return whole(tokens), whole(logps), whole(ends)


def _rooms(length: int) -> list[int]:
  """Returns how long a cache is at first, and then, for `length` tokens.

  All of it is read at every token; each length is a loop to compile.
  """
  rooms = [length] if length else []
  while rooms and rooms[0] > MIN_ROOM and len(rooms) < MAX_ROOMS:
    rooms.insert(0, -(-rooms[0] // 2))
  return rooms

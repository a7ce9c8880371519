"""A response's tokens are those of the one text, for every tokenizer kind."""

import functools
import json

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from dpo_jax.data import continuation, tokenize, tokenizer_files

CORPUS = [
  "Once upon a time, there was a little girl named Lily.\n\nShe loved to play.",
  "One day, a big dog wanted to play there with the other little dogs!",
  "Was it sad? No... it was the best of times: 12 dogs, 365 days.",
  "A word, other words; the world, a worldly wish.\nThere, there.",
] * 3
ALPHABET = sorted(set("".join(CORPUS)))
SPECIAL = ["<unk>", "<s>", "</s>"]
SPACE = "▁"


def _byte_level(is_prefixed):
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=is_prefixed)
  backend.decoder = decoders.ByteLevel()
  return backend, trainers.BpeTrainer(
    vocab_size=340,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=SPECIAL,
    show_progress=False,
  )


def _prepend():
  """As Llama 2's: no words, and a space in front of every text."""
  backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  return backend, trainers.BpeTrainer(
    vocab_size=160, special_tokens=SPECIAL, show_progress=False
  )


def _metaspace(model, trainer, scheme):
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
  return backend, trainer


def _metaspace_bpe(scheme):
  trainer = trainers.BpeTrainer(
    vocab_size=160, special_tokens=SPECIAL, show_progress=False
  )
  return _metaspace(models.BPE(unk_token="<unk>"), trainer, scheme)


def _unigram():
  trainer = trainers.UnigramTrainer(
    vocab_size=120,
    special_tokens=SPECIAL,
    unk_token="<unk>",
    show_progress=False,
  )
  return _metaspace(models.Unigram(), trainer, "always")


def _wordpiece():
  backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  return backend, trainers.WordPieceTrainer(
    vocab_size=160, special_tokens=SPECIAL, show_progress=False
  )


KINDS = {
  "byte_level": lambda: _byte_level(False),
  "byte_level_prefixed": lambda: _byte_level(True),
  "prepend": _prepend,
  "metaspace_always": lambda: _metaspace_bpe("always"),
  "metaspace_first": lambda: _metaspace_bpe("first"),
  "unigram": _unigram,
  "wordpiece": _wordpiece,
}


@functools.cache
def make(kind, bos=False):
  """Returns a tokenizer of a kind, trained on the corpus."""
  backend, trainer = KINDS[kind]()
  backend.train_from_iterator(CORPUS, trainer)
  if bos:
    backend.post_processor = processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>" if bos else None,
    eos_token="</s>",
  )


def encode(tokenizer, prompt, response):
  """Returns the ids of a prompt, and of its response without EOS."""
  (head,) = tokenize.encode_prompts(tokenizer, [prompt])
  (tail,) = tokenize.encode_responses(tokenizer, [prompt], [response])
  assert tail.pop() == tokenizer.eos_token_id
  return head, tail


def whole(tokenizer, text):
  return tokenize.encode_prompts(tokenizer, [text])[0]


def read(tokenizer, ids):
  return tokenizer.decode(ids, skip_special_tokens=True)


texts = st.one_of(
  st.lists(st.sampled_from(" ".join(CORPUS).split(" ")), max_size=8).map(
    " ".join
  ),
  st.text(ALPHABET, max_size=20),
)
every_kind = pytest.mark.parametrize(
  "kind, bos", [(kind, bos) for kind in KINDS for bos in (False, True)]
)


@every_kind
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(text=texts, data=st.data())
def test_cut_anywhere_a_text_has_the_tokens_of_the_whole(kind, bos, text, data):
  tokenizer = make(kind, bos)
  place = data.draw(st.integers(0, len(text)))
  head, tail = encode(tokenizer, text[:place], text[place:])
  expected = whole(tokenizer, text)
  alone = tokenizer(text[:place], add_special_tokens=False).input_ids
  if not alone:  # the prompt has no token but what stands for an empty one
    assert tail == tokenizer(text, add_special_tokens=False).input_ids
  elif expected[: len(head)] == head:
    assert head + tail == expected
  elif kind != "wordpiece":  # which reads the halves of a word as two words
    assert read(tokenizer, head + tail) == read(tokenizer, expected)


@every_kind
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(text=texts, data=st.data())
def test_what_is_sampled_comes_back_as_the_tokens_it_was(kind, bos, text, data):
  """Of all tokens that some text has: of others there is no way back."""
  tokenizer = make(kind, bos)
  prompt = text[: data.draw(st.integers(0, len(text)))]
  head, ids = whole(tokenizer, prompt), whole(tokenizer, text)
  hypothesis.assume(prompt and ids[: len(head)] == head)
  cut = data.draw(st.integers(len(head), len(ids)))
  sampled = ids[len(head) : cut]
  hypothesis.assume(whole(tokenizer, read(tokenizer, ids[:cut])) == ids[:cut])
  _, (response,) = tokenize.decode(tokenizer, [head], [sampled])
  assert encode(tokenizer, prompt, response)[1] == sampled


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"wordpiece"}))
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.data())
def test_any_sample_reads_the_same_once_it_came_back(kind, data):
  """Behind a prompt; wordpiece's decoder takes spaces away from a text."""
  tokenizer = make(kind, bos=True)
  prompt = data.draw(texts.filter(str.strip))
  head = whole(tokenizer, prompt)
  ids = st.integers(len(SPECIAL), tokenizer.vocab_size - 1)
  sampled = data.draw(st.lists(ids, max_size=12))
  _, (response,) = tokenize.decode(tokenizer, [head], [sampled])
  _, again = encode(tokenizer, prompt, response)
  _, (response_again,) = tokenize.decode(tokenizer, [head], [again])
  assert encode(tokenizer, prompt, response_again)[1] == again


@pytest.mark.parametrize(
  "kind", ["prepend", "metaspace_always", "metaspace_first", "unigram"]
)
def test_no_response_begins_with_the_space_of_a_text(kind):
  tokenizer = make(kind)
  tokens = tokenizer.convert_ids_to_tokens
  head, tail = encode(tokenizer, "Once upon a time,", " there was")
  assert "".join(tokens(tail)) == "▁there▁was"
  # A token over the border: the response has no space, which it had alone.
  head, tail = encode(tokenizer, "Once, the", "re was")
  assert whole(tokenizer, "Once, there was")[: len(head)] != head
  assert "".join(tokens(head + tail)) == "▁Once,▁there▁was"


def test_llamas_own_kind_has_the_tokens_of_the_whole(shared_dir):
  folder = str(shared_dir / "data/models/stories260K")
  tokenizer = tokenizer_files.load_tokenizer(folder)
  for prompt, response, first in (
    ("Once upon a time, there was a girl named", " Lily. She sat.", "▁Lily"),
    ("Once upon a time,\n", "there was a girl.", "t"),
    ("Once upon a time, é", "\N{SNOWMAN} é", "<0xE2>"),
  ):
    head, tail = encode(tokenizer, prompt, response)
    assert tokenizer.convert_ids_to_tokens(tail[0]) == first
    assert head + tail == tokenizer(prompt + response).input_ids


def test_byte_level_tokens_are_those_of_the_response_alone(shared_dir):
  path = str(shared_dir / "data/tokenizers/gpt2_tokenizer.json")
  tokenizer = tokenizer_files.load_tokenizer(path)
  rows = (shared_dir / "golden/trl_trajectory_gpt2/pairs.jsonl").read_text()
  for row in map(json.loads, rows.splitlines()):
    _, tail = encode(tokenizer, row["prompt"], row["chosen"])
    alone = tokenizer(row["chosen"], add_special_tokens=False).input_ids
    assert tail == alone
  assert continuation._without_prefix(tokenizer) is tokenizer

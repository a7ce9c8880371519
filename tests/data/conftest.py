"""A tokenizer of single bytes, with and without what tokenizers may have."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
  "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_template():
  return CHAT_TEMPLATE


@pytest.fixture
def make_tokenizer():
  """Returns a function that makes a tokenizer of bytes: "ab" is 2 tokens."""

  def make(*, bos=False, eos=True, template=None):
    special = ["<s>"] * bos + ["</s>"] * eos
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if bos:
      backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
      )
    return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend,
      bos_token="<s>" if bos else None,
      eos_token="</s>" if eos else None,
      chat_template=template,
    )

  return make


@pytest.fixture
def tokenizer(make_tokenizer):
  return make_tokenizer()


@pytest.fixture
def write_lines(tmp_path):
  """Returns a function that writes rows as JSON lines, and gives the path."""

  def write(*rows, name="pairs.jsonl"):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)

  return write

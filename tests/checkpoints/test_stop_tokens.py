"""What ends a response: every place that says it, once, in order."""

import json

import pytest

from dpo_jax.checkpoints import source, stop_tokens
from dpo_jax.data.sources import synthetic
from dpo_jax.models import config as model_config

CONFIG = model_config.llama(
  vocab_size=40, num_layers=1, d_model=8, num_heads=1, max_positions=8
)
CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
  """A tokenizer with the tokens of a chat, and no template."""
  tokenizer = synthetic.make_tokenizer()
  names = ["<|im_start|>", "<|im_end|>", "<|im_end|>more"]
  tokenizer.add_special_tokens({"additional_special_tokens": names})
  return tokenizer


@pytest.fixture
def write_model(tmp_path):
  """Returns a function that writes what files say, and opens the model."""

  def write(config=None, generation=None, name="model"):
    folder = tmp_path / name
    folder.mkdir()
    for file, ids in (
      ("config.json", config),
      ("generation_config.json", generation),
    ):
      if ids is not None:
        values = {"eos_token_id": ids, "temperature": 0.6}
        (folder / file).write_text(json.dumps(values))
    return source.ModelSource(CONFIG, "", (str(folder),), lambda *_: None)

  return write


def test_stop_ids_are_those_of_all_files_and_the_tokenizers_first(
  tokenizer, write_model
):
  eos = tokenizer.eos_token_id
  assert stop_tokens.find(tokenizer) == (eos,)
  assert stop_tokens.find(tokenizer, write_model()) == (eos,)
  opened = write_model(config=[7, eos], generation=[9, 7], name="lists")
  assert stop_tokens.find(tokenizer, opened) == (eos, 9, 7)
  opened = write_model(config=8, name="one")
  assert stop_tokens.find(tokenizer, opened) == (eos, 8)
  # Of a merged adapter the files of its base count, too.
  both = (*write_model(generation=6, name="adapter").folders, *opened.folders)
  opened = source.ModelSource(CONFIG, "", both, opened.load)
  assert stop_tokens.find(tokenizer, opened) == (eos, 6, 8)


def test_ids_that_the_model_has_no_row_for_are_left_out(tokenizer, write_model):
  opened = write_model(config=[40, -1, 39])
  assert stop_tokens.find(tokenizer, opened) == (tokenizer.eos_token_id, 39)


@pytest.mark.parametrize(
  ("template", "token"),
  [
    (CHATML, "<|im_end|>"),
    (CHATML.replace("<|im_end|>", " <|im_end|>more"), "<|im_end|>more"),
    (CHATML.replace("<|im_end|>", "{{ eos_token }}"), None),
    (CHATML.replace("<|im_end|>", ", he said."), None),
    ("{{ raise_exception('no') }}", None),
    ("{{ messages[0].content + none }}", None),
    ("<|im_end|>", None),
  ],
)
def test_the_token_behind_an_answer_of_the_template_is_one(
  template, token, tokenizer
):
  tokenizer.chat_template = template
  expected = [tokenizer.eos_token] + [token] * (token is not None)
  ids = stop_tokens.find(tokenizer)
  assert tokenizer.convert_ids_to_tokens(list(ids)) == expected


@pytest.mark.parametrize("ids", [True, "2", [1, None], 2.0, {"id": 2}])
def test_ids_of_another_kind_are_refused(ids, tokenizer, write_model):
  with pytest.raises(ValueError, match="allowed: a token id, a list") as caught:
    stop_tokens.find(tokenizer, write_model(generation=ids))
  assert f"generation_config.json: eos_token_id is {json.dumps(ids)};" in str(
    caught.value
  )


def test_a_generation_config_that_is_none_is_refused(tokenizer, write_model):
  opened = write_model()
  (folder,) = opened.folders
  for text, message in (("[]", "is no JSON object"), ("{", "is not JSON: ")):
    with open(f"{folder}/generation_config.json", "w") as file:
      file.write(text)
    with pytest.raises(ValueError, match=f"generation_config.json {message}"):
      stop_tokens.find(tokenizer, opened)


def test_what_is_written_is_read_again_with_the_rest(
  tokenizer, write_model, tmp_path
):
  opened = write_model(generation=[5, 6])
  ids = stop_tokens.find(tokenizer, opened)
  assert ids == (tokenizer.eos_token_id, 5, 6)
  target = tmp_path / "target"
  target.mkdir()
  stop_tokens.write(target, ids, opened)
  written = json.loads((target / "generation_config.json").read_text())
  assert written == {"eos_token_id": list(ids), "temperature": 0.6}
  again = source.ModelSource(CONFIG, "", (str(target),), opened.load)
  assert stop_tokens.find(tokenizer, again) == ids
  stop_tokens.write(target, ids[:1])
  written = json.loads((target / "generation_config.json").read_text())
  assert written == {"eos_token_id": ids[0]}

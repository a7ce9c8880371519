"""Log-probabilities of answers against the model's own logits."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from dpo_jax import sharding
from dpo_jax.checkpoints import source
from dpo_jax.evaluation import agreement
from dpo_jax.judges import judge as judges
from dpo_jax.judges import kinds as judge_kinds
from dpo_jax.judges import local as local_judge
from dpo_jax.judges import prompts as judge_prompts
from dpo_jax.models import transformer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "transformers" / "llama"
WORDS = "<unk> </s> Preferred: A B the plot was good bad user assistant".split()
TEMPLATE = (
  "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
  """Returns a function from a chat template to a folder of model and words."""

  @functools.cache
  def make(chat_template=None):
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    ids = {word: index for index, word in enumerate(WORDS)}
    words = tokenizers.models.WordLevel(ids, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = chat_template
    made.save_pretrained(folder)
    return str(folder)

  return make


def _expected(folder, texts, answers):
  """Returns the log-probability of the words of each answer after its text."""
  opened = source.open_model(folder)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = opened.load(
    opened.config,
    sharding.array_shardings(
      mesh,
      transformer.logical_axes(opened.config),
      transformer.param_shapes(opened.config),
    ),
  )
  ids = lambda x: [WORDS.index(w) if w in WORDS else 0 for w in x.split()]
  length = max(len(ids(f"{x} {y}")) for x, y in zip(texts, answers))
  tokens = np.zeros((len(texts), length), np.int32)
  for row, text, answer in zip(tokens, texts, answers, strict=True):
    both = ids(text) + ids(answer)
    row[: len(both)] = both
  positions = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))

  @jax.jit
  def logps(params):
    states = transformer.hidden_states(
      opened.config, params, tokens, positions, positions * 0, positions + 1
    )
    logits = transformer.unembedding(opened.config, params).logits(states)
    return jax.nn.log_softmax(logits)

  found = np.asarray(logps(params))
  return [
    sum(row[len(ids(x)) - 1 + i, token] for i, token in enumerate(ids(y)))
    for row, x, y in zip(found, texts, answers, strict=True)
  ]


PROMPTS = ["the plot was good", "was bad bad", "the plot was good"]
ANSWERS = ["Preferred: A", "Preferred: B", "Preferred: B"]


def test_answers_have_the_models_log_probabilities(make_model):
  folder = make_model()
  logps_fn = local_judge.make_logps_fn(folder, max_length=6)
  found = logps_fn(["the " * 5, *PROMPTS], ["Preferred: A", *ANSWERS])
  assert np.isnan(found[0])  # seven tokens
  expected = _expected(folder, PROMPTS, ANSWERS)
  np.testing.assert_allclose(found[1:], expected, rtol=1e-5)


def test_a_chat_template_is_used(make_model):
  folder = make_model(TEMPLATE)
  found = local_judge.make_logps_fn(folder)(PROMPTS, ANSWERS)
  texts = [f"user {prompt} </s> assistant" for prompt in PROMPTS]
  expected = _expected(folder, texts, ANSWERS)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nothing_that_fits_and_no_room_at_all(make_model):
  logps_fn = local_judge.make_logps_fn(make_model(), max_length=4)
  assert np.isnan(logps_fn(PROMPTS, ANSWERS)).all()
  with pytest.raises(ValueError, match="max_length=0: must be at least 1"):
    local_judge.make_logps_fn(make_model(), max_length=0)


def test_a_folder_judges(make_model):
  folder = make_model()
  judge = judge_kinds.make_judge(f"local:{folder}", prompt="summary_simple")
  pairs = [
    judges.Comparison("the plot", "was good", "was bad"),
    judges.Comparison("the plot", "was good " * 2_000, "was bad"),
  ]
  short, long = judge.compare(pairs)
  assert (long.preferred, long.text) == (None, "too long")
  template = judge_prompts.find("summary_simple")
  question = template.fill("the plot", "was good", "was bad")
  first, second = _expected(folder, [question] * 2, ANSWERS[:2])
  assert short.preferred == ("first" if first > second else "second")
  numbers = [float(x.split()[1]) for x in short.text.split(", ")]
  np.testing.assert_allclose(numbers, [first, second], rtol=1e-5)


@pytest.mark.slow
def test_stories260k_knows_no_better_than_chance(shared_dir, tmp_path):
  folder = shared_dir / "data"
  judge = judge_kinds.make_judge(f"local:{folder / 'models' / 'stories260K'}")
  data = [str(folder / "judges" / "llmbar.jsonl.xz")]
  agreement.evaluate(judge, data, str(tmp_path), order="both", seed=0)
  first = (tmp_path / "summary.jsonl").read_text().splitlines()[0]
  found = json.loads(first)["ties_half"]
  assert found["low"] < 0.5 < found["high"]

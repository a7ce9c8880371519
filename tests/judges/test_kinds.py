"""A judge from what is typed."""

import sys
import types

import numpy as np
import pytest

from dpo_jax.judges import kinds as judge_kinds
from dpo_jax.judges.judge import Comparison
from tests import chat_server

PAIR = Comparison("p", "long one", "one")


def test_length_prefers_the_longer():
  (found,) = judge_kinds.make_judge("length").compare([PAIR])
  assert found.preferred == "first"


def test_a_reward_model_is_loaded_from_its_folder(monkeypatch):
  def load(path):
    assert path == "runs/reward:1"
    return lambda _, texts, ended: np.array([-len(x) for x in texts])

  learned = types.ModuleType("dpo_jax.rewards.learned")
  learned.load = load
  monkeypatch.setitem(sys.modules, learned.__name__, learned)
  import dpo_jax.rewards

  monkeypatch.setattr(dpo_jax.rewards, "learned", learned, raising=False)
  judge = judge_kinds.make_judge("reward:runs/reward:1")
  assert judge.name == "reward:runs/reward:1"
  assert judge.compare([PAIR])[0].preferred == "second"


def test_an_endpoint_is_asked_as_told(monkeypatch, tmp_path):
  server = chat_server.ChatServer(lambda _: "Comparison: x.\nPreferred: A")
  with server.running():
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", chat_server.KEY)
    monkeypatch.setenv("no_proxy", "*")
    judge = judge_kinds.make_judge(
      "endpoint:org/model:free",
      prompt="summary_concise",
      asks=2,
      cache=tmp_path / "answers.sqlite",
      sampling='{"top_p": 0.5, "max_tokens": null}',
      threads=1,
      prices=[10.0, 0.0],
    )
    assert judge.compare([PAIR])[0].preferred == "first"
    # Another prompt's answer is malformed to this one.
    server.reply_fn = lambda _: "Comparison: x.\nMore helpful: A"
    (found,) = judge.compare([Comparison("q", "a", "b")])
  assert found.preferred is None and found.text.endswith("More helpful: A")
  request = server.requests[0]
  assert request["model"] == "org/model:free" and request["top_p"] == 0.5
  assert "max_tokens" not in request and request["temperature"] == 0
  assert "precise and concise" in request["messages"][0]["content"]
  assert len(server.requests) == 3 and (tmp_path / "answers.sqlite").exists()
  assert judge.usage()["cost"] == pytest.approx(3 * 100 * 10 / 1e6)
  assert not judge.assumes_dialogue
  cache = tmp_path / "answers.sqlite"
  assert judge_kinds.make_judge("endpoint:m", cache=cache).assumes_dialogue


@pytest.mark.parametrize(
  "spec", ["", "gpt-4", "length:3", "local:", "rewards:x"]
)
def test_an_unknown_judge_is_refused(spec):
  with pytest.raises(
    ValueError, match=f"unknown judge '{spec}'; allowed: endpo"
  ):
    judge_kinds.make_judge(spec)


@pytest.mark.parametrize(
  ("spec", "options", "message"),
  [
    (
      "length",
      {"cache": "x"},
      "'length' does not honour cache='x'; judges that",
    ),
    (
      "local:x",
      {"threads": 2},
      "does not honour threads=2; judges that do: end",
    ),
    ("endpoint:x", {"max_length": 9}, "max_length=9; judges that do: local$"),
    ("endpoint:x", {"prompt": "tldr"}, "unknown judge prompt 'tldr'"),
    ("endpoint:x", {"sampling": "{"}, "sampling='{': not JSON"),
    ("endpoint:x", {"sampling": "[]"}, "must be a JSON object without model"),
    ("endpoint:x", {"sampling": '{"model": 1}'}, "object without model, messa"),
    ("local:/absent", {}, "no such model '/absent'"),
  ],
)
def test_an_option_that_cannot_be_honoured_is_refused(spec, options, message):
  with pytest.raises(ValueError, match=message):
    judge_kinds.make_judge(spec, **options)

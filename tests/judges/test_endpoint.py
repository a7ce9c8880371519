"""The endpoint's client against a server that speaks the protocol."""

import base64
import email.utils
import json
import math
import time
import traceback
import urllib.parse

import pytest

from dpo_jax.judges import answer_cache
from dpo_jax.judges import endpoint as chat_endpoint
from tests import chat_server

MESSAGES = [{"role": "user", "content": "which?"}]


@pytest.fixture
def server(monkeypatch):
  made = chat_server.ChatServer(lambda messages: messages[-1]["content"][::-1])
  with made.running():
    monkeypatch.setenv("OPENAI_BASE_URL", made.url)
    monkeypatch.setenv("OPENAI_API_KEY", chat_server.KEY)
    monkeypatch.setenv("no_proxy", "*")
    yield made


@pytest.fixture
def make_endpoint(tmp_path):
  """Returns a function from settings to an endpoint and its waits."""

  def make(model="m", **settings):
    waits = []
    cache = answer_cache.AnswerCache(tmp_path / "answers.sqlite")
    endpoint = chat_endpoint.ChatEndpoint(
      model, cache, sleep_fn=waits.append, **settings
    )
    return endpoint, waits

  return make


def _many(count):
  return [[{"role": "user", "content": f"q{i:03}"}] for i in range(count)]


def test_answers_come_in_order_and_a_rerun_asks_nothing(server, make_endpoint):
  endpoint, waits = make_endpoint(prices=(2.5, 10.0), num_threads=4)
  expected = [f"{i:03}"[::-1] + "q" for i in range(20)]
  assert endpoint.answers(_many(20)) == expected
  assert len(server.requests) == 20 and not waits
  assert server.requests[0].keys() == {
    "model",
    "messages",
    "temperature",
    "max_tokens",
  }
  assert server.requests[0]["temperature"] == 0
  found = endpoint.usage()
  assert (found["prompt_tokens"], found["completion_tokens"]) == (2000, 140)
  assert found["cost"] == pytest.approx((2000 * 2.5 + 140 * 10) / 1e6)
  assert found["cached_answers"] == 0 and found["requests"] == 20
  again, _ = make_endpoint(prices=(2.5, 10.0))
  assert again.answers(_many(20)) == expected
  assert len(server.requests) == 20
  found = again.usage()
  assert (found["requests"], found["cached_answers"]) == (0, 20)
  assert (found["cost"], found["prompt_tokens"]) == (0, 0)
  assert found["cached_prompt_tokens"] == 2000


def test_model_and_sampling_are_part_of_what_is_asked(server, make_endpoint):
  for settings in (
    {},
    {"model": "other"},
    {"sampling": {"temperature": 1, "max_tokens": None, "seed": 3}},
  ):
    make_endpoint(**settings)[0].answers([MESSAGES, MESSAGES])
  assert len(server.requests) == 3  # equal questions are asked once
  assert server.requests[2] == {
    "model": "m",
    "messages": MESSAGES,
    "temperature": 1,
    "seed": 3,
  }


def test_what_may_pass_is_asked_again(server, make_endpoint):
  server.faults = [
    (429, {}, "slow down"),
    (500, {}, "oops"),
    (503, {}, "overloaded"),
    chat_server.DROP,
    b"<html>bad gateway</html>",
    b'{"choices": []}',
    chat_server.HANG,
  ]
  endpoint, waits = make_endpoint(timeout=0.2)
  start = time.monotonic()
  assert endpoint.answers([MESSAGES]) == ["?hcihw"]
  assert len(server.requests) == 8 and endpoint.usage()["retries"] == 7
  assert len(waits) == 7
  assert time.monotonic() - start < 4  # the server would hang for longer
  for attempt, wait in enumerate(waits):
    assert 0.5 <= wait / min(2**attempt, 60) <= 1


def test_waits_differ_between_threads(server, make_endpoint):
  server.faults = [(429, {}, "slow down")] * 8
  endpoint, waits = make_endpoint()
  endpoint.answers(_many(8))
  assert len(set(waits)) == len(waits) >= 8


def test_retry_after_is_waited_for(server, make_endpoint):
  date = email.utils.formatdate(time.time() + 100, usegmt=True)
  server.faults = [
    (429, {"Retry-After": "37"}, "slow down"),
    (503, {"Retry-After": date}, "slow down"),
    (429, {"Retry-After": "soon"}, "slow down"),
    (429, {"Retry-After": "-5"}, "slow down"),
  ]
  endpoint, waits = make_endpoint()
  assert endpoint.answers([MESSAGES]) == ["?hcihw"]
  assert 37.5 <= waits[0] <= 38
  assert 98 <= waits[1] <= 102
  assert 2 <= waits[2] <= 4 and 4 <= waits[3] <= 8


def test_a_wait_of_hours_ends_the_command(server, make_endpoint):
  server.faults = [(429, {"Retry-After": "3600"}, "daily limit")]
  endpoint, waits = make_endpoint()
  with pytest.raises(
    ValueError, match=r"429 .*\(daily limit\), .* after 3600 s"
  ):
    endpoint.answers([MESSAGES])
  assert not waits


def test_an_endpoint_that_never_answers_is_given_up(server, make_endpoint):
  server.faults = [(502, {}, "bad gateway")] * 99
  endpoint, waits = make_endpoint()
  with pytest.raises(
    ValueError, match="no answer to 8 requests, .*502 Bad Gate"
  ):
    endpoint.answers([MESSAGES])
  assert len(server.requests) == 8 and len(waits) == 7


def test_nobody_listening_is_told(monkeypatch, server, make_endpoint):
  monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
  endpoint, _ = make_endpoint()
  with pytest.raises(
    ValueError, match="127.0.0.1:9/v1/chat.*Connection refused"
  ):
    endpoint.answers([MESSAGES])


@pytest.mark.parametrize(
  ("fault", "message"),
  [
    (
      (400, {}, "no such\nsetting"),
      r"400 Bad Request \(no such setting\); is t",
    ),
    ((404, {}, "model x"), r"404 Not Found \(model x\); are the model's name"),
    ((403, {}, "no"), r"403 Forbidden \(no\); is OPENAI_API_KEY right"),
    ((429, {}, "insufficient quota"), r"429 .* \(insufficient quota\)$"),
    ((302, {"Location": "http://127.0.0.1:9/"}, "away"), r"302 .* \(away\)$"),
  ],
)
def test_what_will_not_pass_is_told_at_once(
  server, make_endpoint, fault, message
):
  server.faults = [fault]
  endpoint, waits = make_endpoint()
  with pytest.raises(ValueError, match=message) as info:
    endpoint.answers([MESSAGES])
  assert f"{server.url}/chat/completions refuses a request" in str(info.value)
  assert "model 'm'" in str(info.value) and "\n" not in str(info.value)
  assert len(server.requests) == 1 and not waits


def test_a_wrong_key_is_told_and_not_shown(server, make_endpoint, monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", "the-wrong-key")
  endpoint, _ = make_endpoint()
  with pytest.raises(ValueError, match="401 .*is OPENAI_API_KEY right") as info:
    endpoint.answers(_many(50))
  assert "the-wrong-key" not in str(info.value)
  assert len(server.requests) < 50  # the others are not begun


def _respond(status, body, *, reason="Sorry", head=""):
  """Returns the bytes of a response."""
  return (
    f"HTTP/1.1 {status} {reason}\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    f"{body}"
  ).encode()


# What comes back of a request, given its key.
ECHOES = {
  "a reason": lambda x: _respond(401, "", reason=f"no {x}"),
  "a message": lambda x: _respond(403, json.dumps({"error": {"message": x}})),
  "a page": lambda x: _respond(404, f"<p>{x}</p>"),
  "a page that is cut": lambda x: _respond(400, "-" * 190 + x * 30),
  "half of it": lambda x: _respond(400, x[: len(x) // 2 + 2]),
  "a status line": lambda x: f"{x} 200 OK\r\n\r\n".encode(),
  "an answer without text": lambda x: _respond(200, json.dumps({"a": x})),
  "a header": lambda x: _respond(302, "", head=f"Location: http://{x}/\r\n"),
}


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("as_url", [False, True])
def test_no_secret_comes_back_in_an_error(
  server, make_endpoint, monkeypatch, echo, as_url
):
  secret = "s3cret/Key+with=signs&more" + "xyz" * 20
  monkeypatch.setenv("OPENAI_API_KEY", f" {secret}\n")
  shown = urllib.parse.quote(secret, safe="") if as_url else secret
  server.faults = [lambda headers: ECHOES[echo](shown)] * 8
  endpoint, _ = make_endpoint()
  with pytest.raises(ValueError) as info:
    endpoint.answers([MESSAGES])
  assert server.headers["Authorization"] == f"Bearer {secret}"
  said = "".join(traceback.format_exception(info.value))
  windows = {shown[at : at + 8] for at in range(len(shown) - 7)}
  assert not [window for window in windows if window in said], said


def test_a_user_in_the_url_is_sent_and_never_shown(
  server, make_endpoint, monkeypatch, tmp_path
):
  url = server.url.replace("://", "://alice:p%40ss-w0rd@")
  monkeypatch.setenv("OPENAI_BASE_URL", url)
  monkeypatch.setenv("OPENAI_API_KEY", "")
  echo = lambda headers: _respond(
    404, f"no alice with p@ss-w0rd or p%40ss-w0rd: {headers['Authorization']}"
  )
  server.faults = [echo]
  endpoint, _ = make_endpoint()
  assert "alice" not in endpoint.url
  with pytest.raises(ValueError, match="404 Sorry") as info:
    endpoint.answers([MESSAGES])
  token = base64.b64encode(b"alice:p@ss-w0rd").decode()
  assert server.headers["Authorization"] == f"Basic {token}"
  # The answer has them too.
  reply = {"choices": [{"message": {"content": f"A p@ss-w0rd {token} alice"}}]}
  server.faults = [json.dumps(reply).encode()]
  assert endpoint.answers([MESSAGES]) == ["A *** *** ***"]
  kept = (tmp_path / "answers.sqlite").read_bytes().decode("latin1")
  said = "".join(traceback.format_exception(info.value))
  for secret in ("alice", "p@ss-w0rd", "p%40ss-w0rd", token):
    assert secret not in said and secret not in kept


def test_a_user_of_one_letter_takes_nothing_out_of_an_answer(
  server, make_endpoint, monkeypatch
):
  url = server.url.replace("://", "://A:B@")
  monkeypatch.setenv("OPENAI_BASE_URL", url)
  monkeypatch.setenv("OPENAI_API_KEY", "")
  reply = {"choices": [{"message": {"content": "Preferred: A"}}]}
  server.faults = [json.dumps(reply).encode()]
  assert make_endpoint()[0].answers([MESSAGES]) == ["Preferred: A"]


def test_the_key_is_not_in_the_cache(server, make_endpoint, tmp_path):
  make_endpoint()[0].answers([MESSAGES])
  content = (tmp_path / "answers.sqlite").read_bytes()
  assert b"which?" in content and chat_server.KEY.encode() not in content


def test_what_was_answered_before_an_error_is_kept(server, make_endpoint):
  endpoint, _ = make_endpoint(num_threads=1)
  server.reply_fn = lambda messages: "kept"
  endpoint.answers(_many(3))
  server.faults = [(404, {}, "gone")]
  with pytest.raises(ValueError, match="404"):
    endpoint.answers(_many(4))
  server.faults = [(500, {}, "once more")]
  assert endpoint.answers(_many(4)) == ["kept"] * 4
  assert len(server.requests) == 6


def test_an_error_ends_the_waits_of_others(server, tmp_path):
  # One request waits for a minute; another's refusal is not held up by it.
  server.faults = [(429, {"Retry-After": "60"}, "slow down"), (404, {}, "gone")]
  cache = answer_cache.AnswerCache(tmp_path / "answers.sqlite")
  endpoint = chat_endpoint.ChatEndpoint("m", cache, num_threads=2)
  start = time.monotonic()
  with pytest.raises(ValueError, match="404"):
    endpoint.answers(_many(2))
  assert time.monotonic() - start < 10
  server.faults = []
  assert endpoint.answers(_many(1)) == ["000q"]


def test_an_answer_without_usage_or_text_is_counted(server, make_endpoint):
  reply = {"choices": [{"message": {"content": None}}]}
  server.faults = [json.dumps(reply).encode()]
  endpoint, _ = make_endpoint()
  assert endpoint.answers([MESSAGES]) == [""]
  assert endpoint.usage()["answers_without_usage"] == 1
  assert endpoint.usage()["prompt_tokens"] == 0


def test_half_a_character_is_replaced(server, make_endpoint):
  server.reply_fn = lambda messages: "cut \ud83d"
  assert make_endpoint()[0].answers([MESSAGES]) == ["cut ?"]


@pytest.mark.parametrize(
  ("settings", "environment", "message"),
  [
    ({}, {"OPENAI_BASE_URL": "localhost:1"}, "OPENAI_BASE_URL='localhost:1'"),
    (
      {},
      {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""},
      "OPENAI_API_KEY is not set",
    ),
    (
      {},
      {"OPENAI_API_KEY": "the-right\nkey"},
      "^OPENAI_API_KEY has a control character",
    ),
    ({}, {"OPENAI_API_KEY": "clé"}, "or one outside of ASCII"),
    (
      {},
      {"OPENAI_BASE_URL": "http://al:p/w@localhost:1/v1"},
      r"OPENAI_BASE_URL='http://\*\*\*@localhost:1/v1': not a URL",
    ),
    (
      {},
      {"OPENAI_BASE_URL": "al:pw@localhost:1"},
      r"OPENAI_BASE_URL='\*\*\*@localhost:1': must begin",
    ),
    (
      {},
      {"OPENAI_BASE_URL": "http://al:pw@localhost:1"},
      r"OPENAI_BASE_URL='http://\*\*\*@localhost:1' has a user; one of them",
    ),
    (
      {},
      {"OPENAI_BASE_URL": "http://localhost/v1?key=abc"},
      "OPENAI_BASE_URL='http://localhost/v1': must have no query",
    ),
    ({"model": ""}, {}, "needs a model: endpoint:MODEL"),
    ({"num_threads": 0}, {}, "num_threads=0: must be at least 1"),
    ({"prices": [1.0]}, {}, r"prices=\[1.0\]: must be two numbers"),
    ({"prices": [1.0, -1.0]}, {}, "must be two numbers of at least 0"),
    ({"prices": [1.0, math.nan]}, {}, "must be two numbers of at least 0"),
  ],
)
def test_settings_that_cannot_be_are_refused(
  server, make_endpoint, monkeypatch, settings, environment, message
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message) as info:
    make_endpoint(**settings)
  said = "".join(traceback.format_exception(info.value))
  assert not [x for x in ("the-right", "clé", "abc", "pw", "p/w") if x in said]

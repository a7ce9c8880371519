"""Answers of an OpenAI-compatible endpoint: POST {base}/chat/completions.

The environment says where and as whom (`endpoint_access`); a key, a user and a
password are in no error, cache or report, also where the endpoint echoes them.
"""

import collections
import concurrent.futures
import email.message
import email.utils
import http.client
import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from dpo_jax.judges import answer_cache, endpoint_access

# One sentence and a letter; greedy.
SAMPLING = {"temperature": 0, "max_tokens": 256}
TIMEOUT = 120.0  # seconds without a byte
MAX_ATTEMPTS = 8  # of one request: two to three minutes of waiting in all
BACKOFF, MAX_BACKOFF = 1.0, 60.0  # seconds, after the first failure and at most
MAX_MESSAGE = 500  # characters that are shown of what an endpoint says
# An endpoint that asks for more has told us to come back another day.
MAX_RETRY_AFTER = 600.0
_HINTS = {
  400: "is the model's name right, and does it take these sampling settings?",
  401: "is OPENAI_API_KEY right?",
  403: "is OPENAI_API_KEY right?",
  404: "are the model's name and OPENAI_BASE_URL right?",
}


class ChatEndpoint:
  """Asks in a few threads, again where it may help, and nothing twice."""

  def __init__(
    self,
    model: str,
    cache: answer_cache.AnswerCache,
    *,
    sampling: Mapping[str, Any] | None = None,
    num_threads: int = 8,
    prices: Sequence[float] | None = None,
    timeout: float = TIMEOUT,
    sleep_fn: Callable[[float], Any] | None = None,
  ):
    """Reads the environment.

    Args:
      model: its name.
      cache: answers that were given before.
      sampling: keys of a request instead of those of `SAMPLING` or beside
        them; one that is None is left out of it.
      num_threads: requests under way at once, at least 1.
      prices: of a million tokens of prompts and of completions.
      timeout: seconds without a byte after which a request has failed.
      sleep_fn: waits so many seconds; by default it ends early when another
        request is refused.

    Raises:
      ValueError: no key for the default URL, or a value that cannot be.
    """
    access = endpoint_access.read()
    if not model:
      raise ValueError("a chat endpoint needs a model: endpoint:MODEL")
    if num_threads < 1:
      raise ValueError(f"num_threads={num_threads}: must be at least 1")
    if prices is not None and not (
      len(prices) == 2 and all(0 <= price < math.inf for price in prices)
    ):
      raise ValueError(
        f"prices={list(prices)}: must be two numbers of at least 0, of a"
        " million tokens of prompts and of completions"
      )
    self.url = access.url + "/chat/completions"
    self._headers = {"Content-Type": "application/json", **access.headers}
    self._hide = access.hide
    self._model = model
    self._cache = cache
    settings = SAMPLING | dict(sampling or {})
    self._sampling = {k: v for k, v in settings.items() if v is not None}
    self._num_threads = num_threads
    self._prices = prices
    self._timeout = timeout
    self._is_over = threading.Event()
    self._sleep = sleep_fn or self._is_over.wait
    self._counts = collections.Counter()
    self._lock = threading.Lock()
    # A redirect would take the key to another host.
    self._opener = urllib.request.build_opener(_NoRedirect)

  def answers(self, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
    """Returns the next message of each conversation.

    Raises:
      ValueError: the endpoint refuses, or does not answer; what it answered
        before is in the cache.
    """
    requests = [
      {"model": self._model, "messages": messages, **self._sampling}
      for messages in conversations
    ]
    keys = [answer_cache.make_key(request) for request in requests]
    found = {}
    pool = concurrent.futures.ThreadPoolExecutor(self._num_threads)
    try:
      futures = {
        pool.submit(self._answer, request): key
        for key, request in dict(zip(keys, requests, strict=True)).items()
      }
      done = concurrent.futures.as_completed(futures)
      # disable=None: on a terminal only.
      for future in tqdm.tqdm(done, self._model, len(futures), disable=None):
        found[futures[future]] = future.result()
    finally:
      # After an error, nothing more is begun or waited for.
      self._is_over.set()
      pool.shutdown(cancel_futures=True)
      self._is_over.clear()
    return [found[key] for key in keys]

  def usage(self) -> dict[str, float]:
    """Returns what was spent, since the beginning.

    Returns:
      `requests` that were answered by the endpoint, `retries` before them, and
      their `prompt_tokens` and `completion_tokens`; `cached_answers` from the
      cache, and what these took once; `answers_without_usage`, where the
      endpoint did not say what they took; and, if prices are known, `cost` of
      what was not in the cache.
    """
    names = (
      "requests retries prompt_tokens completion_tokens cached_answers"
      " cached_prompt_tokens cached_completion_tokens answers_without_usage"
    ).split()
    found = {name: self._counts[name] for name in names}
    if self._prices is not None:
      prompt, completion = self._prices
      cost = found["prompt_tokens"] * prompt
      cost += found["completion_tokens"] * completion
      found["cost"] = cost / 1e6
    return found

  def _answer(self, request: dict[str, Any]) -> str:
    """Returns the answer to one request, from the cache or the endpoint."""
    answer = self._cache.get(request)
    prefix = "cached_"
    if answer is None:
      answer = self._ask(request)
      self._cache.put(request, answer)
      prefix = ""
    self._count(
      **{
        "cached_answers" if prefix else "requests": 1,
        f"{prefix}prompt_tokens": answer.prompt_tokens or 0,
        f"{prefix}completion_tokens": answer.completion_tokens or 0,
        "answers_without_usage": answer.prompt_tokens is None,
      }
    )
    return answer.text

  def _ask(self, request: dict[str, Any]) -> answer_cache.Answer:
    """Returns the endpoint's answer, asking again after what may pass."""
    for attempt in range(MAX_ATTEMPTS):
      if attempt:
        self._sleep(_wait_seconds(attempt, failure.retry_after))
        if self._is_over.is_set():
          break
        self._count(retries=1)
      try:
        return self._post(request)
      except _PassingError as error:
        failure = error
    raise ValueError(
      f"{self.url}: no answer to {attempt + 1} requests, the last time:"
      f" {failure}; what was answered is kept, and the same command goes on"
    )

  def _post(self, request: dict[str, Any]) -> answer_cache.Answer:
    """Returns the answer; no error has one behind it, which might tell more."""
    data = json.dumps(request).encode()
    asked = urllib.request.Request(self.url, data, self._headers)
    try:
      with self._opener.open(asked, timeout=self._timeout) as response:
        content = response.read()
    except urllib.error.HTTPError as error:
      raise self._refusal(error) from None
    except urllib.error.URLError as error:
      raise _PassingError(self._hide(str(error.reason))) from None
    except (OSError, http.client.HTTPException) as error:
      said = str(error) or type(error).__name__
      raise _PassingError(self._hide(said)) from None
    return self._read_answer(content)

  def _refusal(self, error: urllib.error.HTTPError) -> Exception:
    """Returns what to raise for an HTTP status that is not 2xx."""
    message, code = _read_error(error)
    # Hidden before it is cut: what is cut may leave a part.
    message = _cut(self._hide(message), MAX_MESSAGE)
    said = f"{error.code} {_cut(self._hide(error.reason), MAX_MESSAGE)}"
    said += f" ({message})" if message else ""
    passes = error.code in (408, 409, 429) or error.code >= 500
    if not passes or code == "insufficient_quota":
      hint = _HINTS.get(error.code)
      hint = f"; {hint}" if hint else ""
      return ValueError(
        f"{self.url} refuses a request for model {self._model!r}: {said}{hint}"
      )
    retry_after = _retry_after(error.headers)
    if retry_after > MAX_RETRY_AFTER:
      return ValueError(
        f"{self.url}: {said}, to be asked again after {retry_after:.0f} s;"
        " what was answered is kept, and the same command goes on"
      )
    return _PassingError(said, retry_after)

  def _read_answer(self, content: bytes) -> answer_cache.Answer:
    """Returns the answer in the body of a response."""
    try:
      body = json.loads(content)
      text = body["choices"][0]["message"]["content"] or ""  # null: a refusal
      # A lone surrogate cannot be written to a file.
      text = text.encode("utf-8", "replace").decode()
      usage = body.get("usage") or {}
      tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (ValueError, TypeError, LookupError, AttributeError):
      said = self._hide(content.decode("utf-8", "replace"))
      raise _PassingError(
        f"a reply without choices[0].message.content: {said[:60]!r}"
      ) from None
    # A user named A must not take the letter out of a verdict.
    text = self._hide(text, min_length=4)
    return answer_cache.Answer(text, *tokens)

  def _count(self, **counts: int) -> None:
    with self._lock:
      self._counts.update(counts)


class _PassingError(Exception):
  """A failure that may not come again."""

  def __init__(self, said: str, retry_after: float = 0.0):
    super().__init__(said)
    self.retry_after = retry_after  # seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *args, **kwargs):
    """Returns None: a redirect is an error."""


def _wait_seconds(attempt: int, retry_after: float) -> float:
  """Returns how long to wait before an attempt; the second one has number 1.

  Twice as long each time; drawn at random from its upper half, so that threads
  that failed together do not come back together. What the endpoint asks for
  comes before that.
  """
  backoff = min(BACKOFF * 2 ** (attempt - 1), MAX_BACKOFF)
  return retry_after + backoff * random.uniform(0.5, 1)


def _retry_after(headers: email.message.Message) -> float:
  """Returns the seconds that a Retry-After header asks for, 0 without one."""
  value = headers.get("Retry-After", "0")
  if value.isdecimal():
    return float(value)
  try:
    date = email.utils.parsedate_to_datetime(value)
  except ValueError:
    return 0.0
  return max(date.timestamp() - time.time(), 0.0)


def _read_error(error: urllib.error.HTTPError) -> tuple[str, str | None]:
  """Returns the message and the code in the body of an error."""
  try:
    body = error.read().decode("utf-8", "replace")
  except (OSError, http.client.HTTPException):
    return "", None
  try:
    details = json.loads(body)["error"]
    return " ".join(str(details["message"]).split()), details.get("code")
  except (ValueError, TypeError, KeyError, AttributeError):
    return " ".join(body.split()), None


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else text[:length] + "..."

"""The cache of answers under threads, other processes and kill -9."""

import concurrent.futures
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from dpo_jax.judges import answer_cache
from dpo_jax.judges.answer_cache import Answer, AnswerCache

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WRITER = """
import sys
from dpo_jax.judges.answer_cache import Answer, AnswerCache

cache = AnswerCache(sys.argv[1])
for i in range(1_000_000):
  cache.put({"i": i}, Answer("text %d" % i, i, None))
  print(i, flush=True)
"""


def test_an_answer_is_found_by_all_of_its_request(tmp_path):
  cache = AnswerCache(tmp_path / "new" / "answers.sqlite")
  request = {"model": "m", "messages": [{"role": "user", "content": "é\n"}]}
  assert cache.get(request) is None
  cache.put(request, Answer("good ∑", 3, None))
  reordered = dict(reversed(request.items()))
  again = AnswerCache(tmp_path / "new" / "answers.sqlite")
  assert again.get(reordered) == Answer("good ∑", 3, None)
  for key in ("model", "messages", "temperature"):
    assert cache.get(request | {key: "other"}) is None


def test_threads_and_connections_share_a_file(tmp_path):
  caches = [AnswerCache(tmp_path / "answers.sqlite") for _ in range(2)]

  def work(i):
    caches[i % 2].put({"i": i % 20}, Answer(str(i % 20), i, i))
    return caches[1 - i % 2].get({"i": i % 20}).text == str(i % 20)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(work, range(60)))


def test_a_killed_writer_loses_nothing_that_it_had_written(tmp_path):
  path = tmp_path / "answers.sqlite"
  writer = subprocess.Popen(
    [sys.executable, "-c", WRITER, path],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    stdout=subprocess.PIPE,
    text=True,
  )
  for _ in range(20):
    writer.stdout.readline()
  writer.send_signal(signal.SIGKILL)
  rest = writer.communicate()[0]
  count = 20 + rest.count("\n")
  cache = AnswerCache(path)
  for i in range(count):
    assert cache.get({"i": i}) == Answer(f"text {i}", i, None)
  cache.put({"i": "more"}, Answer("more", None, None))
  assert cache.get({"i": "more"}).text == "more"


@pytest.mark.parametrize("content", [b"not a database" * 99, None])
def test_what_is_no_cache_is_refused(tmp_path, content):
  path = tmp_path / "answers.sqlite"
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(ValueError, match="answers.sqlite' cannot be used: .*new"):
    AnswerCache(path)
  assert answer_cache.make_key({"a": 1, "b": 2}) == answer_cache.make_key(
    {"b": 2, "a": 1}
  )


def test_an_answer_that_cannot_be_kept_is_the_systems_error(tmp_path):
  path = tmp_path / "answers.sqlite"
  cache = AnswerCache(path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    with pytest.raises(OSError, match="answers.sqlite"):
      cache.put({"a": 1}, Answer("x" * 50_000, None, None))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="file"):
    AnswerCache(tmp_path / "file" / "answers.sqlite")

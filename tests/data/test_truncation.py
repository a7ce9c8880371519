"""Rows that are too long: which tokens stay, rule by rule."""

import itertools

import pytest

from dpo_jax.data import examples, tokenize, tokenizer_files, truncation


def cut(prompt, *responses, rule="if_needed", limits=(10, 4)):
  """Returns the first and last token of each list that is left, or None.

  Lists are given by their lengths, and hold 0, 1, 2, ...
  """
  found = truncation.Limits(*limits, rule).cut(
    [*range(prompt)], [[*range(length)] for length in responses]
  )
  if found is None:
    return None
  assert all(x == [*range(x[0], x[-1] + 1)] for x in (found[0], *found[1]) if x)
  return [(x[0], x[-1]) if x else None for x in (found[0], *found[1])]


def test_a_prompt_that_fits_with_its_longest_response_is_whole():
  assert cut(7, 3, 1) == [(0, 6), (0, 2), (0, 0)]
  assert cut(300, 20, limits=(512, 256)) == [(0, 299), (0, 19)]


def test_a_prompt_loses_its_start_where_the_longest_response_does_not_fit():
  assert cut(7, 4, 1) == [(3, 6), (0, 3), (0, 0)]
  assert cut(7, 1, 4) == [(3, 6), (0, 0), (0, 3)]
  assert cut(3, 6, 7) == [(0, 2), (0, 5), (0, 6)]  # as many as fit


def test_all_responses_are_cut_alike_where_the_longest_still_does_not_fit():
  """Also behind a prompt that is shorter than its bound."""
  assert cut(7, 7, 6) == [(3, 6), (0, 5), (0, 5)]
  assert cut(2, 9, 7, 1) == [(0, 1), (0, 5), (0, 5), (0, 0)]


def test_a_prompt_bound_that_leaves_nothing_leaves_what_the_prompt_does():
  assert cut(3, 9, limits=(10, 10)) == [(0, 2), (0, 6)]
  assert cut(10, 1, limits=(10, 10)) is None


def test_always_cuts_prompts_that_fit_and_never_cuts_none():
  assert cut(7, 3, 1, rule="always") == [(3, 6), (0, 2), (0, 0)]
  assert cut(2, 9, 7, rule="always") == [(0, 1), (0, 7), (0, 6)]
  assert cut(7, 4, 1, rule="never") == [(0, 6), (0, 2), (0, 0)]
  assert cut(9, 4, 1, rule="never") == [(0, 8), (0, 0), (0, 0)]
  assert cut(10, 4, 1, rule="never") is None


def test_a_response_that_is_absent_stays_absent():
  for rule in truncation.RULES:
    assert cut(3, 0, 2, rule=rule) == [(0, 2), None, (0, 1)]


def test_no_rule_passes_its_limits_or_loses_a_token_without_need():
  for lengths in itertools.product(range(1, 9), range(6), range(1, 6)):
    prompt, *responses = lengths
    for rule, *limits in itertools.product(
      truncation.RULES, range(1, 9), range(1, 9)
    ):
      found = cut(*lengths, rule=rule, limits=limits)
      if found is None:
        assert prompt >= limits[0]
        continue
      kept, *rest = [0 if x is None else x[1] - x[0] + 1 for x in found]
      assert 1 <= kept and kept + max(rest) <= limits[0]
      assert kept in (prompt, min(prompt, limits[1]))
      fits = prompt + max(responses) <= limits[0]
      if fits and rule != "always":
        assert [kept, *rest] == [*lengths]


def test_an_unknown_rule_is_refused():
  with pytest.raises(ValueError, match="truncate_prompts 'start'; known: if_n"):
    truncation.Limits(9, 9, "start")


def test_runs_before_the_rule_was_a_setting_cut_all_prompts():
  config = {"data.max_length": 9, "data.max_prompt_length": 4, "steps": 1}
  made = truncation.Limits(**truncation.of_run(config))
  assert made == truncation.Limits(9, 4, "always")
  config["data.truncate_prompts"] = "never"
  made = truncation.Limits(**truncation.of_run(config))
  assert made == truncation.Limits(9, 4, "never")


@pytest.mark.slow
def test_prompts_of_dialogues_are_cut_as_their_authors_cut_them(shared_dir):
  """Of 3,000 rows 421 prompts of 900 that are too long fit as they are."""
  path = str(shared_dir / "data/hh/train.jsonl.xz")
  tokenizer = tokenizer_files.load_tokenizer(
    str(shared_dir / "data/tokenizers/gpt2_tokenizer.json")
  )
  rows = examples.read("hh", path, split="", inputs="pairs")
  rows = list(itertools.islice(rows, 3000))
  count = lambda rule: (
    tokenize.tokenize(
      rows,
      tokenizer,
      inputs="pairs",
      max_length=512,
      max_prompt_length=256,
      truncate_prompts=rule,
    )[1].truncated_prompts
  )
  assert [count(rule) for rule in truncation.RULES] == [900 - 421, 900, 0]

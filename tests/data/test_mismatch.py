"""Partners whose prompts differ, wherever a file puts rows of one prompt."""

import hypothesis
import pytest
from hypothesis import strategies as st

from dpo_jax.data import dataset, loader, mismatch


def labelled(prompts, labels=None):
  """Returns a dataset of a response a prompt, [row]; prompts are ids."""
  labels = labels or [True] * len(prompts)
  prompts = [p if isinstance(p, list) else [p] for p in prompts]
  responses = lambda kind: [
    [100 + row] if label is kind else [] for row, label in enumerate(labels)
  ]
  return dataset.TokenDataset.from_lists(
    prompts, responses(True), responses(False)
  )


def partners(*arguments, **options):
  return mismatch.find(labelled(*arguments), **options)[0].tolist()


def test_rows_sorted_by_label_have_partners_of_other_prompts():
  prompts, labels = [1, 2, 3, 4] * 2, [True] * 4 + [False] * 4
  assert partners(prompts, labels) == [5, 6, 7, 0, 1, 2, 3, 4]
  tokens = labelled(prompts, labels)
  batches = loader.Loader(
    tokens, batch_size=8, shuffle=False, extra_columns=("mismatched",)
  )
  rows = batches.batch(0).mismatched
  is_scored = rows.response >= 0
  found = dict(zip(rows.response[is_scored] // 3, rows.targets[is_scored]))
  assert found == dict(enumerate([105, 106, 107, 100, 101, 102, 103, 104]))


def test_partners_half_the_data_away_stay_where_their_prompts_differ():
  assert partners([1, 1, 2, 2, 3, 3]) == [3, 4, 5, 0, 1, 2]
  assert partners([1, 2, 3, 1, 4, 5]) == [4, 4, 5, 1, 1, 2]


def test_a_run_of_equal_prompts_may_go_on_at_the_start():
  assert partners([1, 2, 1, 1]) == [1, 3, 1, 1]


@hypothesis.given(st.lists(st.integers(0, 3), min_size=2, max_size=20))
def test_no_partner_has_the_rows_own_prompt(prompts):
  hypothesis.assume(len(set(prompts)) > 1)
  found = partners(prompts)
  assert all(prompts[i] != prompts[j] for i, j in enumerate(found))
  half = len(prompts) // 2
  away = [(i + half) % len(prompts) for i in range(len(prompts))]
  for i, j in enumerate(found):
    assert j == away[i] or prompts[i] == prompts[away[i]]


def test_a_prompt_that_was_cut_is_that_which_stands_whole():
  whole, cut, other = [1, 2, 3, 4], [2, 3, 4], [9, 2, 3, 4]
  prompts = [whole, [5], cut, [6]]
  assert partners(prompts) == [2, 3, 0, 1]
  assert partners(prompts, max_prompt_length=3) == [3, 3, 1, 1]
  # Without one that was cut, whole prompts with one end are two.
  assert partners([whole, other], max_prompt_length=3) == [1, 0]


def test_chunks_change_nothing(monkeypatch):
  prompts = [*range(5), 0, *range(5, 9), 4]
  whole = partners(prompts)
  monkeypatch.setattr(mismatch, "READ_PAIRS", 3)
  assert partners(prompts) == whole


@pytest.mark.parametrize("count", [1, 5])
def test_data_of_one_prompt_is_refused(count):
  with pytest.raises(ValueError, match=f"all {count} rows have the same prom"):
    partners([7] * count)

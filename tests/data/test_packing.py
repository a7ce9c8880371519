"""Mirrored rows against a pair's two sequences, written out token by token."""

import dataclasses
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpo_jax.data import dataset, loader, placement

RESPONSE = st.integers(0, 6)
# Pairs, demonstrations, and responses that are labelled undesirable.
SIZES = st.tuples(st.integers(1, 6), RESPONSE, RESPONSE).filter(
  lambda sizes: any(sizes[1:])
)
LISTS = st.integers(2, 5).flatmap(
  lambda count: st.lists(
    st.tuples(st.integers(1, 6), *[RESPONSE] * count).filter(
      lambda sizes: any(sizes[1:])
    ),
    min_size=1,
    max_size=8,
  )
)
PAIR_SIZES = st.tuples(*[st.integers(1, 6)] * 3)


def make_dataset(sizes):
  """Returns the dataset of these lengths whose tokens all differ."""
  bounds = np.cumsum([0, *np.ravel(sizes)]) + 1
  lists = [list(range(a, b)) for a, b in zip(bounds[:-1], bounds[1:])]
  width = len(sizes[0])
  columns = [lists[first::width] for first in range(width)]
  return dataset.TokenDataset.from_lists(*columns)


def make_batch(sizes, **kwargs):
  kwargs = {"row_length": 56, "microbatch_rows": 2, "shuffle": False} | kwargs
  tokens = make_dataset(sizes)
  return loader.Loader(tokens, batch_size=len(sizes), **kwargs).batch(0)


def sequences(sizes):
  """Yields (response id, prompt, response) of every two-sequence example."""
  tokens = make_dataset(sizes).take(np.arange(len(sizes)))
  lists = [
    [column.values[a:b].tolist() for a, b in zip(o[:-1], o[1:])]
    for column in (tokens.prompt, *tokens.responses)
    for o in [column.offsets]
  ]
  for pair, (prompt, *responses) in enumerate(zip(*lists)):
    for column, response in enumerate(responses):
      if response:
        yield len(responses) * pair + column, prompt, response


def filled(batch):
  """Returns the batch's rows of microbatches that are filled, one after one."""
  return {
    field.name: getattr(batch.rows, field.name)[
      : batch.num_microbatches
    ].reshape(-1, batch.rows.tokens.shape[-1])
    for field in dataclasses.fields(batch.rows)
  }


def queries(batch):
  """Yields (token, position, tokens that it sees) of all that is no padding."""
  rows = filled(batch)
  for row, index in np.argwhere(rows["key_end"] > 0):
    start, end = rows["key_start"][row, index], rows["key_end"][row, index]
    seen = rows["tokens"][row, start:end].tolist()
    assert len(set(seen)) == len(seen)
    token, position = rows["tokens"][row, index], rows["positions"][row, index]
    yield int(token), int(position), frozenset(seen)


def scores(batch):
  """Yields (response, rank, target, token whose state predicts it)."""
  rows = filled(batch)
  for row, entry in np.argwhere(rows["response"] >= 0):
    index = rows["score_index"][row, entry]
    names = ("response", "rank", "targets")
    values = [int(rows[name][row, entry]) for name in names]
    yield *values, int(rows["tokens"][row, index])


def test_one_pair_by_hand():
  tokens = dataset.TokenDataset.from_lists([[1, 2, 3]], [[4, 5]], [[6, 7]])
  batch = loader.Loader(tokens, batch_size=1, row_length=8).batch(0)
  rows = {name: leaf[0].tolist() for name, leaf in filled(batch).items()}
  assert rows == {
    "tokens": [5, 4, 1, 2, 3, 6, 7, 0],
    "positions": [4, 3, 0, 1, 2, 3, 4, 0],
    "key_start": [0, 1, 2, 2, 2, 2, 2, 0],
    "key_end": [5, 5, 3, 4, 5, 6, 7, 0],
    "score_index": [4, 1, 4, 5, 0, 0, 0, 0],
    "targets": [4, 5, 6, 7, 0, 0, 0, 0],
    "response": [0, 0, 1, 1, -1, -1, -1, -1],
    "rank": [0, 1, 0, 1, 0, 0, 0, 0],
  }
  assert batch.lengths.tolist() == [[2, 2]]


def test_one_demonstration_by_hand():
  tokens = dataset.TokenDataset.from_lists([[1, 2]], [[4, 5, 6]], [[]])
  batch = loader.Loader(tokens, batch_size=1, row_length=6).batch(0)
  rows = {name: leaf[0].tolist() for name, leaf in filled(batch).items()}
  assert rows == {
    "tokens": [1, 2, 4, 5, 6, 0],
    "positions": [0, 1, 2, 3, 4, 0],
    "key_start": [0, 0, 0, 0, 0, 0],
    "key_end": [1, 2, 3, 4, 5, 0],
    "score_index": [1, 2, 3, 0, 0, 0],
    "targets": [4, 5, 6, 0, 0, 0],
    "response": [0, 0, 0, -1, -1, -1],
    "rank": [0, 1, 2, 0, 0, 0],
  }
  assert batch.lengths.tolist() == [[3, 0]]


@hypothesis.given(st.lists(SIZES, min_size=1, max_size=12))
def test_mirrored_rows_hold_every_token_once(sizes):
  found = [token for token, _, _ in queries(make_batch(sizes))]
  assert sorted(found) == list(range(1, int(np.sum(sizes)) + 1))


def assert_queries_and_scores(sizes, layout):
  """Every query sees its own past; every response token is scored once."""
  seen, scored = set(), []
  for number, prompt, response in sequences(sizes):
    sequence = prompt + response
    for position, token in enumerate(sequence):
      seen.add((token, position, frozenset(sequence[: position + 1])))
    before = [prompt[-1], *response[:-1]]
    for rank, (token, previous) in enumerate(zip(response, before)):
      scored.append((number, rank, token, previous))
  batch = make_batch(sizes, layout=layout)
  assert set(queries(batch)) == seen
  assert sorted(scores(batch)) == sorted(scored)
  assert batch.lengths.sum() == len(scored)


@pytest.mark.parametrize("layout", placement.LAYOUTS)
@hypothesis.given(sizes=st.lists(SIZES, min_size=1, max_size=12))
def test_responses_see_their_past_and_are_scored_once(layout, sizes):
  assert_queries_and_scores(sizes, layout)


@hypothesis.given(LISTS)
def test_so_do_those_of_lists_which_stand_in_one_row(sizes):
  assert_queries_and_scores(sizes, "mirrored")
  response = filled(make_batch(sizes))["response"]
  for pair in range(len(sizes)):
    rows, _ = np.nonzero(response // (len(sizes[0]) - 1) == pair)
    assert len({*rows}) == 1


def test_ends_of_one_pair_by_hand():
  tokens = dataset.TokenDataset.from_lists([[1, 2, 3]], [[4, 5]], [[6, 7]])
  kwargs = {"batch_size": 1, "row_length": 8}
  whole = filled(loader.Loader(tokens, **kwargs).batch(0))
  batch = loader.Loader(tokens, scored="ends", **kwargs).batch(0)
  ends = filled(batch)
  assert ends["score_index"][0].tolist() == [0, 6, 0, 0, 0, 0, 0, 0]
  assert ends["targets"][0].tolist() == [5, 7, 0, 0, 0, 0, 0, 0]
  assert ends["response"][0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
  assert ends["rank"][0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  assert batch.lengths.tolist() == [[2, 2]]
  for name in ("tokens", "positions", "key_start", "key_end"):
    np.testing.assert_array_equal(ends[name], whole[name])


@pytest.mark.parametrize("layout", placement.LAYOUTS)
@hypothesis.given(sizes=st.lists(SIZES, min_size=1, max_size=12))
def test_an_end_is_the_last_token_of_each_response(layout, sizes):
  batch = make_batch(sizes, layout=layout, scored="ends")
  expected = [
    (number, len(response) - 1, response[-1], response[-1])
    for number, _, response in sequences(sizes)
  ]
  assert sorted(scores(batch)) == expected


def test_padded_holds_no_lists():
  with pytest.raises(ValueError, match="lists of 3 responses, it holds pairs"):
    make_batch([(1, 2, 3, 4)], layout="padded")


@pytest.mark.parametrize("layout", placement.LAYOUTS)
@hypothesis.given(sizes=st.lists(PAIR_SIZES, min_size=1, max_size=12))
def test_a_prompt_is_scored_once_a_pair_from_its_second_token(layout, sizes):
  batch = make_batch(sizes, layout=layout, extra_columns=("prompt",))
  tokens = make_dataset(sizes).take(np.arange(len(sizes))).prompt
  expected = [
    (3 * pair + 2, rank, token, before)
    for pair, prompt in enumerate(np.split(tokens.values, tokens.offsets[1:-1]))
    for rank, (before, token) in enumerate(zip(prompt[:-1], prompt[1:]))
  ]
  found = [entry for entry in scores(batch) if entry[0] % 3 == 2]
  assert sorted(found) == sorted(expected)
  assert batch.lengths[:, 2].sum() == len(expected)
  assert batch.lengths[:, :2].tolist() == [list(x[1:]) for x in sizes]


def test_mismatched_responses_stand_behind_other_prompts():
  # Prompts 1, 5, 9, 13; of pairs, chosen and rejected are taken in turns, of
  # a lone response that one. The longest sequence has 3 tokens.
  tokens = dataset.TokenDataset.from_lists(
    [[1], [5, 6], [9], [13]],
    [[2], [7], [], [14]],
    [[3, 4], [8], [10, 11], [15]],
  )
  batches = loader.Loader(
    tokens, batch_size=4, shuffle=False, extra_columns=("mismatched",)
  )
  batch = batches.batch(0)
  assert batch.lengths.tolist() == [[1, 2, 2], [1, 1, 1], [0, 2, 1], [1, 1, 1]]
  rows = {
    field.name: getattr(batch.mismatched, field.name)[: batch.num_mismatched]
    for field in _fields(batch.mismatched)
  }
  is_scored = rows["response"] >= 0
  found = zip(rows["response"][is_scored], rows["targets"][is_scored])
  assert sorted(found) == [(2, 10), (2, 11), (5, 15), (8, 2), (11, 8)]
  assert sorted(rows["tokens"][rows["key_end"] > 0]) == sorted(
    [1, 10, 11, 5, 6, 15, 9, 2, 13, 8]
  )
  assert not np.isin(batch.rows.response, [2, 5, 8, 11]).any()
  assert batches.num_tokens(0) == (4 + 4 + 3 + 3) + 10


def test_a_mismatched_response_is_cut_to_the_longest_sequence():
  tokens = dataset.TokenDataset.from_lists(
    [[1, 1, 1, 1], [2]], [[3], [4, 5, 6, 7]], [[], []]
  )
  batch = loader.Loader(
    tokens, batch_size=2, shuffle=False, extra_columns=("mismatched",)
  ).batch(0)
  assert batch.lengths.tolist() == [[1, 0, 1], [4, 0, 1]]


@hypothesis.given(st.lists(SIZES, min_size=1, max_size=12))
def test_scored_entries_stand_first_in_their_row(sizes):
  is_scored = filled(make_batch(sizes))["response"] >= 0
  assert (np.diff(is_scored.astype(int), axis=1) <= 0).all()


@hypothesis.given(st.lists(SIZES, min_size=1, max_size=12))
def test_padding_is_zero_and_sees_nothing(sizes):
  batch = make_batch(sizes)
  rows = {f.name: getattr(batch.rows, f.name) for f in _fields(batch.rows)}
  is_padding = rows["key_end"] == 0
  for name in ("tokens", "positions", "key_start"):
    assert not rows[name][is_padding].any()
  assert is_padding[batch.num_microbatches :].all()
  is_unscored = rows["response"] < 0
  for name in ("score_index", "targets", "rank"):
    assert not rows[name][is_unscored].any()


def test_padded_keeps_both_rows_of_a_pair_in_one_microbatch():
  batch = make_batch([(2, 3, 4)] * 5, layout="padded")
  response = batch.rows.response
  for pair in range(5):
    chosen = np.argwhere(response == 2 * pair)
    rejected = np.argwhere(response == 2 * pair + 1)
    assert {*chosen[:, 0]} == {*rejected[:, 0]}  # microbatch
    assert {*chosen[:, 1]}.isdisjoint(rejected[:, 1])  # row


def test_padded_demonstrations_fill_one_row_each():
  batch = make_batch([(2, 3, 0)] * 5, layout="padded")
  assert batch.num_microbatches == 3
  assert (batch.rows.key_end > 0).sum() == 25


@hypothesis.given(
  st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 60)
)
def test_rows_are_never_overfull_and_spans_never_overlap(lengths, row_length):
  lengths = np.array(lengths)
  row, offset = placement.assign_rows(lengths, row_length)
  assert (offset + lengths <= row_length).all()
  covered = {
    (r, i) for r, o, n in zip(row, offset, lengths) for i in range(o, o + n)
  }
  assert len(covered) == lengths.sum()
  assert {*row} == {*range(row.max() + 1)}


@hypothesis.given(
  st.lists(st.integers(1, 20), min_size=2, max_size=40),
  st.integers(20, 60),
  st.data(),
)
def test_no_batch_fills_more_rows_than_the_bound(lengths, row_length, data):
  """Also where a batch spans two epochs and holds pairs twice."""
  batch_size = data.draw(st.integers(1, len(lengths)))
  order = st.permutations(range(len(lengths)))
  epochs = [*data.draw(order), *data.draw(order)]
  first = data.draw(st.integers(0, len(lengths)))
  spans = np.array(lengths)[epochs[first : first + batch_size]]
  row, _ = placement.assign_rows(spans, row_length)
  bound = placement.max_rows(np.array(lengths), batch_size, row_length)
  assert row.max() + 1 <= bound <= batch_size


def test_short_spans_need_few_rows():
  by_spans = placement.max_rows(np.array([25] * 50), 32, 100)
  by_tokens = placement.max_rows(np.array([10] * 50 + [60]), 32, 100)
  assert (by_spans, by_tokens) == (8, 8)


@pytest.mark.slow
def test_100000_pairs_pack_in_under_10_seconds():
  rng = np.random.default_rng(0)
  means = np.array([[100.0, 50.0, 50.0]])
  sizes = np.clip(rng.exponential(means, (100_000, 3)), 1, 256).astype(int)
  lists = [[[7] * n for n in column] for column in sizes.T]
  tokens = dataset.TokenDataset.from_lists(*lists)
  batches = loader.Loader(tokens, batch_size=64, microbatch_rows=2)
  start = time.process_time()
  for k in range(len(sizes) // 64):
    batches.batch(k)
  seconds = time.process_time() - start
  print(f"{len(sizes) / seconds:,.0f} pairs a second")
  assert seconds < 10


def _fields(rows):
  return dataclasses.fields(rows)


@pytest.mark.parametrize(
  ("sizes", "window", "layout"),
  [
    ([(4, 5, 3)], None, "mirrored"),
    ([(4, 5, 3)], 9, "mirrored"),  # the longest mirrored sequence
    ([(4, 5, 30)], 9, "mirrored"),  # right of a prompt windows are intervals
    ([(4, 5, 0)], 8, "mirrored"),  # so are those of demonstrations
    ([(1, 1, 1), (4, 5, 3)], 8, "padded"),
  ],
)
def test_layout_is_padded_only_where_a_window_cuts_mirrored_keys(
  sizes, window, layout
):
  assert placement.layout_for_window(sizes, "mirrored", window) == layout
  assert placement.layout_for_window(sizes, "padded", window) == "padded"

"""Batches: purity, order, slices by process, and work ahead in a thread."""

import dataclasses
import gc
import threading
import time

import numpy as np
import pytest

from dpo_jax.data import dataset, loader, tokenizer_files
from dpo_jax.data import prefetch as prefetch_lib


def make_dataset(num_pairs=10, longest=9):
  """Returns a dataset in which all tokens of pair i are i + 1."""
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, longest + 1, (num_pairs, 3))
  lists = [[[i + 1] * n for i, n in enumerate(column)] for column in sizes.T]
  return dataset.TokenDataset.from_lists(*lists)


def make_loader(num_pairs=10, **kwargs):
  kwargs = {"batch_size": 4, "row_length": 40, "microbatch_rows": 2} | kwargs
  return loader.Loader(make_dataset(num_pairs), **kwargs)


def leaves(batch):
  rows = [getattr(batch.rows, f.name) for f in dataclasses.fields(batch.rows)]
  return [*rows, batch.num_microbatches, batch.lengths]


def pairs_of(batch):
  return sorted({*batch.rows.tokens.ravel().tolist()} - {0})


def test_batch_is_a_pure_function_of_seed_and_k():
  asked = [make_loader(seed=3).batch(k) for k in (5, 0, 5)]
  loader.epoch_order.cache_clear()
  in_order = [b for s in [make_loader(seed=3)] for b in map(s.batch, range(6))]
  for batch, k in zip(asked, (5, 0, 5)):
    for ours, theirs in zip(leaves(batch), leaves(in_order[k])):
      np.testing.assert_array_equal(ours, theirs)


def test_another_seed_gives_another_order():
  one, two = (make_loader(100, seed=seed).indices(0) for seed in (1, 2))
  assert one.tolist() != two.tolist()


def test_every_epoch_holds_every_pair_once_and_is_reshuffled():
  batches = make_loader(10, batch_size=4)
  order = np.concatenate([batches.indices(k) for k in range(5)]).tolist()
  assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
  assert order[:10] != order[10:]


def test_pairs_come_in_file_order_without_shuffle():
  batches = make_loader(10, batch_size=4, shuffle=False)
  order = np.concatenate([batches.indices(k) for k in range(5)]).tolist()
  assert order == [*range(10), *range(10)]


def test_batch_holds_exactly_the_pairs_of_its_indices():
  batches = make_loader(50, batch_size=8)
  for k in range(4):
    indices = batches.indices(k)
    assert pairs_of(batches.batch(k)) == sorted(indices + 1)
    expected = batches.dataset.lengths[indices, 1:]
    np.testing.assert_array_equal(batches.batch(k).lengths, expected)


@pytest.mark.parametrize("layout", ["mirrored", "padded"])
def test_slices_of_processes_concatenate_to_the_whole(layout):
  kwargs = {"microbatch_rows": 4, "batch_size": 8, "layout": layout}
  whole = make_loader(**kwargs).batch(1)
  ranges = [(0, 1), (1, 3), (3, 4)]
  parts = [make_loader(**kwargs, row_range=r).batch(1) for r in ranges]
  for field in dataclasses.fields(whole.rows):
    slices = [getattr(part.rows, field.name) for part in parts]
    np.testing.assert_array_equal(
      np.concatenate(slices, 1), getattr(whole.rows, field.name)
    )
  for part in parts:
    assert part.num_microbatches == whole.num_microbatches
    np.testing.assert_array_equal(part.lengths, whole.lengths)


def test_shapes_are_the_same_in_every_batch():
  batches = make_loader(50)
  shapes = {tuple(x.shape for x in leaves(batches.batch(k))) for k in range(9)}
  shapes |= {tuple(x.shape for x in leaves(b)) for b in batches.eval_batches()}
  assert len(shapes) == 1
  assert all(x.dtype == np.int32 for x in leaves(batches.batch(0)))


def test_eval_batches_hold_every_pair_once_and_empty_slots_at_the_end():
  batches = list(make_loader(10, batch_size=4).eval_batches())
  assert [pairs_of(b) for b in batches] == [
    [1, 2, 3, 4], [5, 6, 7, 8], [9, 10],
  ]  # fmt: skip
  assert (batches[-1].lengths > 0).all(1).tolist() == [True] * 2 + [False] * 2


def test_eval_batch_may_be_larger_than_the_dataset():
  (batch,) = make_loader(3, batch_size=8).eval_batches()
  assert pairs_of(batch) == [1, 2, 3]


def test_batch_larger_than_the_dataset_is_refused():
  with pytest.raises(ValueError, match="batch_size=11: .* at most .* 10"):
    make_loader(10, batch_size=11).batch(0)


def test_padding_fraction_counts_computed_positions_only():
  lists = [[[1] * 3] * 2, [[1] * 2] * 2, [[1] * 5] * 2]
  tokens = dataset.TokenDataset.from_lists(*lists)
  batches = loader.Loader(
    tokens, batch_size=2, row_length=10, microbatch_rows=4
  )
  assert batches.num_tokens(0) == 20
  assert batches.padding_fraction(0) == 0.5
  padded = loader.Loader(
    tokens, batch_size=2, row_length=10, microbatch_rows=4, layout="padded"
  )
  assert padded.num_tokens(0) == 26
  assert padded.padding_fraction(0) == pytest.approx(0.35)


def test_row_length_that_does_not_hold_a_span_names_the_needed_one():
  lists = [[[1]] * 3, [[1], [1] * 9, [1]], [[1], [1] * 2, [1]]]
  tokens = dataset.TokenDataset.from_lists(*lists)
  with pytest.raises(ValueError, match="row_length=11: pair 1 .* at least 12"):
    loader.Loader(tokens, batch_size=1, row_length=11)
  assert loader.Loader(tokens, batch_size=1, row_length=12).row_length == 12


def test_automatic_row_length_holds_the_longest_span():
  lists = [[[1] * 100] * 3, [[1] * 60] * 3, [[1] * 60] * 3]
  tokens = dataset.TokenDataset.from_lists(*lists)
  assert loader.Loader(tokens, batch_size=1).row_length == 256
  padded = {"layout": "padded", "microbatch_rows": 2}
  assert loader.Loader(tokens, batch_size=1, **padded).row_length == 256
  short = dataset.TokenDataset.from_lists(*[[[1] * 5] * 3] * 3)
  assert loader.Loader(short, batch_size=1).row_length == 128


def test_automatic_row_length_is_longer_where_that_leaves_less_padding():
  """Rows of 128 hold one span of 85 tokens, rows of 256 three."""
  lists = [[[1] * 25] * 9, [[1] * 30] * 9, [[1] * 30] * 9]
  tokens = dataset.TokenDataset.from_lists(*lists)
  batches = loader.Loader(tokens, batch_size=9)
  assert batches.row_length == 256
  assert batches.padding_fraction(0) < 0.01
  assert loader.Loader(tokens, batch_size=1).row_length == 128


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"batch_size": 0}, "batch_size=0"),
    ({"microbatch_rows": 0}, "microbatch_rows=0"),
    ({"seed": -1}, "seed=-1"),
    ({"layout": "mirored"}, "unknown layout 'mirored'; known: mirrored"),
    ({"layout": "padded", "microbatch_rows": 3}, "even"),
    ({"row_range": (1, 3)}, r"row_range=\(1, 3\)"),
  ],
)
def test_wrong_setting_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    make_loader(**kwargs)


@pytest.mark.slow
def test_padding_on_real_dialogues_is_under_6_percent(shared_dir, tmp_path):
  tokens = dataset.load(
    tmp_path,
    source="hh",
    path=str(shared_dir / "data/hh/train.jsonl.xz"),
    split="",
    tokenizer=tokenizer_files.load_tokenizer(
      str(shared_dir / "data/tokenizers/gpt2_tokenizer.json")
    ),
    inputs="pairs",
    max_length=512,
    max_prompt_length=256,
  )
  batches = loader.Loader(tokens, batch_size=64, microbatch_rows=2)
  epoch = range(len(tokens.lengths) // 64)
  assert np.mean([batches.padding_fraction(k) for k in epoch]) < 0.06


def test_prefetch_gives_all_in_order():
  assert list(prefetch_lib.prefetch(lambda k: k * k, 3, 7)) == [9, 16, 25, 36]


def test_prefetch_works_ahead_by_its_depth_and_no_more():
  called = []
  iterator = prefetch_lib.prefetch(called.append, 0, 100, depth=2)
  next(iterator)
  _wait_for(lambda: len(called) == 3)
  time.sleep(0.05)
  assert called == [0, 1, 2]


def test_prefetch_measures_what_the_consumer_waited():
  iterator = prefetch_lib.prefetch(lambda k: time.sleep(0.1), 0, 1)
  next(iterator)
  assert 0.05 < iterator.wait_seconds < 1
  iterator = prefetch_lib.prefetch(lambda k: k, 0, 1)
  time.sleep(0.1)
  next(iterator)
  assert iterator.wait_seconds < 0.05


def test_prefetch_raises_in_the_consumer_after_what_came_before():
  def fail(k):
    if k == 2:
      raise ValueError("two")
    return k

  iterator = prefetch_lib.prefetch(fail, 0, 10)
  assert [next(iterator), next(iterator)] == [0, 1]
  with pytest.raises(ValueError, match="two"):
    next(iterator)
  with pytest.raises(StopIteration):
    next(iterator)


@pytest.mark.parametrize("stop", ["close", "let go"])
def test_prefetch_thread_ends_when_the_consumer_stops(stop):
  before = {*threading.enumerate()}
  iterator = prefetch_lib.prefetch(lambda k: k, 0, 10**9)
  next(iterator)
  (thread,) = {*threading.enumerate()} - before
  if stop == "close":
    iterator.close()
  del iterator
  gc.collect()
  thread.join(timeout=5)
  assert not thread.is_alive()


def _wait_for(is_true):
  deadline = time.monotonic() + 5
  while not is_true() and time.monotonic() < deadline:
    time.sleep(0.001)
  assert is_true()


def test_a_batch_has_the_score_gaps_of_its_pairs():
  tokens = make_dataset()
  tokens.score_gaps = np.arange(1, 11, dtype=np.float32)
  batches = loader.Loader(tokens, batch_size=4, row_length=40)
  for k in range(4):
    expected = batches.indices(k) + 1
    np.testing.assert_array_equal(batches.batch(k).score_gaps, expected)
  *_, last = batches.eval_batches()
  np.testing.assert_array_equal(last.score_gaps, [9, 10, 0, 0])
  assert make_loader().batch(0).score_gaps is None

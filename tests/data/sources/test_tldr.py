"""Posts lose their TL;DR, and judged summaries are pairs."""

import collections
import csv
import itertools
import lzma

import pytest

from dpo_jax.data import examples
from dpo_jax.data.sources import tldr

POST = {
  "subreddit": "tifu",
  "title": "TIFU by cooking",
  "selftext": "I burnt the rice.\n\n**TL;DR**: burnt rice\n\nEdit: rice again",
  "tldr_span": [21, 26],
  "tldr_position": "end",
  "summary": "burnt rice",
}
START = POST | {
  "selftext": "TL;DR: burnt rice**\n\nI cooked.\n\nToo long.",
  "tldr_span": [0, 5],
  "tldr_position": "start",
}
COLUMNS = ("query", *tldr._SUMMARIES.values(), "preferred", "shuffled_index")
PROMPT = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"


def read(path, split="all", inputs="demonstrations"):
  return list(examples.read("tldr", str(path), split=split, inputs=inputs))


@pytest.fixture
def write_judged(tmp_path):
  """Returns a function that writes rows of (preferred, shuffled_index)."""

  def write(*rows):
    path = tmp_path / "judged.csv.xz"
    with lzma.open(path, "wt", newline="") as file:
      table = csv.writer(file)
      table.writerow(COLUMNS)
      table.writerows((PROMPT, "  by PPO", "  the\nauthor's", *r) for r in rows)
    return path

  return write


def test_a_post_becomes_a_prompt_without_its_summary(write_lines):
  at_end, at_start = read(write_lines(POST, START))
  head = "SUBREDDIT: r/tifu\n\nTITLE: TIFU by cooking\n\nPOST: "
  assert at_end == {
    "prompt": head + "I burnt the rice.\n\nTL;DR:",
    "response": " burnt rice",
  }
  assert at_start["prompt"] == head + "I cooked.\n\nToo long.\n\nTL;DR:"
  assert at_start["response"] == " burnt rice"


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"tldr_position": "other", "summary": None}, tldr.NO_SUMMARY),
    ({"summary": "boiled rice"}, tldr.NO_SUMMARY),
    ({"selftext": "TL;DR: burnt rice", "tldr_span": [0, 5]}, tldr.NO_POST),
    ({"selftext": "a burnt rice TL;DR: burnt rice"}, tldr.NO_POST),
  ],
)
def test_a_post_without_a_summary_is_dropped(changes, reason, write_lines):
  if changes.get("selftext", "").startswith("a "):
    changes = changes | {"tldr_span": [13, 18]}
  assert read(write_lines(POST | changes)) == [{"dropped": reason}]


def test_splits_share_no_post_and_are_cached_apart(write_lines):
  posts = [
    POST | {"selftext": f"{n} {POST['selftext']}", "tldr_span": [24, 29]}
    for n in range(10, 99)
  ]
  path = write_lines(*posts)
  parts = {split: read(path, split) for split in tldr.SPLITS}
  prompts = {k: {x["prompt"] for x in v} for k, v in parts.items()}
  assert prompts["train"] | prompts["test"] == prompts["all"]
  assert not prompts["train"] & prompts["test"] and prompts["test"]
  prints = {examples.fingerprint("tldr", path, x) for x in tldr.SPLITS}
  assert len(prints) == 3
  with pytest.raises(ValueError, match="unknown split 'tes'; known: train"):
    read(path, "tes")


def test_judged_rows_are_pairs_whatever_the_order_shown(write_judged):
  path = write_judged(("ours", 0), ("reference", 0), ("ours", 1), ("", ""))
  *pairs, last = read(path, inputs="pairs")
  ours = {
    "prompt": PROMPT,
    "chosen": " by PPO",
    "rejected": " the\nauthor's",
    "subset": "ours",
  }
  assert pairs[0] == pairs[2] == ours
  assert pairs[1] == ours | {
    "chosen": ours["rejected"],
    "rejected": ours["chosen"],
    "subset": "reference",
  }
  assert last == {"dropped": tldr.NO_PREFERENCE}


def test_bad_rows_and_files_are_refused(write_lines, write_judged, tmp_path):
  with pytest.raises(ValueError, match="row 1: column 'selftext' is None"):
    read(write_lines({"title": "x"}))
  with pytest.raises(ValueError, match="row 1: tldr_span=.*two positions"):
    read(write_lines(POST | {"tldr_span": [1]}))
  with pytest.raises(ValueError, match="row 1: column 'preferred' is 'both'"):
    read(write_judged(("both", 0)), inputs="pairs")
  with pytest.raises(ValueError, match="row 1: column 'preferred' is None"):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    read(path, inputs="pairs")
  with pytest.raises(ValueError, match="no such file: '.*none.csv'"):
    read(tmp_path / "none.csv", inputs="pairs")
  path.write_bytes(b'preferred\n""\n\xff\n')
  with pytest.raises(ValueError, match="other.csv, line 3: .* byte 0xff"):
    list(tldr.read(str(path), ""))
  path.write_text('preferred\n""\n"not ended\n\n')
  with pytest.raises(ValueError, match="other.csv' cannot be read from line 3"):
    list(tldr.read(str(path), ""))
  path = tmp_path / "broken.csv.xz"
  path.write_bytes(b"no xz")
  with pytest.raises(ValueError, match="broken.csv.xz' cannot be read"):
    read(path, inputs="pairs")


def test_real_posts_do_not_hold_their_summary(shared_dir):
  path = str(shared_dir / "data/tldr/posts.jsonl.xz")
  rows = tldr.read(path, "train")
  kept = [x for x in itertools.islice(rows, 2000) if "dropped" not in x]
  assert len(kept) > 1500
  for row in kept:
    assert row["response"].strip() not in row["prompt"].split("POST: ", 1)[1]
    assert row["prompt"].endswith("\n\nTL;DR:")


def test_real_comparisons_are_a_thousand(shared_dir):
  path = shared_dir / "data/tldr/ppo_vs_human_judged.csv.xz"
  rows = read(path, inputs="pairs")
  counts = collections.Counter(x.get("subset", x.get("dropped")) for x in rows)
  assert counts == {"ours": 640, "reference": 360, tldr.NO_PREFERENCE: 945}
  assert all(x["prompt"].endswith("\n\nTL;DR:") for x in rows if "prompt" in x)

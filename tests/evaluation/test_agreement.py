"""Agreement with people by hand, and the readers of their labels."""

import json
import lzma

import pytest

from dpo_jax.evaluation import agreement, intervals
from dpo_jax.judges import judge
from dpo_jax.judges.judge import Judge, Verdict

NAMES = ("tie", "first", "second")


def _rows(tmp_path, labels):
  """Returns rows whose first response says what a judge is to say of them."""
  rows = [
    {"instruction": f"q{i}", "response1": said, "response2": "x"}
    | {f"annotator{k}": label for k, label in enumerate(each, 1)}
    for i, (each, said) in enumerate(labels)
  ]
  path = tmp_path / "rows.json"
  path.write_text(json.dumps(rows))
  return agreement.read(str(path))


def _obey(comparisons):
  verdicts = []
  for x in comparisons:
    said = x.first if x.first != "x" else judge.SWAPPED.get(x.second)
    verdicts.append(Verdict(said if said in NAMES else None, "..."))
  return verdicts


OBEY = Judge("obey", _obey)


def _summary(tmp_path, labels):
  rows = _rows(tmp_path, labels)
  comparisons = [row.comparison for row in rows]
  decisions = judge.decide(OBEY, comparisons, order="both", seed=0)
  return agreement.summarise(rows, decisions)


def test_agreement_by_hand(tmp_path):
  found = _summary(
    tmp_path,
    [
      ((1, 1, 1), "first"),
      ((2, 2, 0), "first"),
      ((2, 2, 2), "tie"),
      ((0, 0, 1), "tie"),
      ((0, 1, 2), "first"),  # no majority
      ((1, 1, 1), "?"),  # unparsed
    ],
  )
  counts = ("num_rows", "no_majority", "unparsed", "judge_ties")
  assert [found[x] for x in counts] == [6, 1, 1, 2]
  assert found["majority_ties"] == 1
  assert found["ties_in"]["share"] == 0.5 and found["ties_in"]["num_rows"] == 4
  low, high = intervals.wilson(0.5, 4)
  assert (found["ties_in"]["low"], found["ties_in"]["high"]) == (low, high)
  # Labels first, second, second, tie; judge first, first, tie, tie.
  assert found["ties_in"]["kappa"] == pytest.approx((0.5 - 0.25) / 0.75)
  assert found["ties_half"]["share"] == pytest.approx(2.5 / 4)
  assert (
    found["ties_out"]["share"] == 0.5 and found["ties_out"]["num_rows"] == 2
  )
  # With annotators: 3 + 0 + 0 + 2 + 1 of 15; without ties 3 + 0 + 1 of 7.
  assert found["judge_annotator"]["ties_in"] == pytest.approx(6 / 15)
  assert found["judge_annotator"]["ties_out"] == pytest.approx(4 / 7)
  # Pairs of annotators: 3 + 1 + 3 + 1 + 0 + 3 of 18.
  assert found["annotator_annotator"]["ties_in"] == pytest.approx(11 / 18)
  assert found["annotator_annotator"]["ties_out"] == pytest.approx(10 / 11)
  assert found["consistency"] == 1


def test_a_judge_of_positions_is_half_right(tmp_path):
  rows = _rows(tmp_path, [((1,), "y"), ((2,), "y")])
  always = Judge("first", lambda asked: [Verdict("first", "") for _ in asked])
  comparisons = [row.comparison for row in rows]
  decisions = judge.decide(always, comparisons, order="both", seed=0)
  found = agreement.summarise(rows, decisions)
  assert found["ties_in"]["share"] == 0 and found["ties_half"]["share"] == 0.5
  assert found["ties_out"]["share"] is None and found["first_share"] == 1
  # One annotator has nobody to agree with.
  assert found["annotator_annotator"]["ties_in"] is None


@pytest.mark.parametrize(
  ("labels", "majority"),
  [
    (("first",), "first"),
    (("first", "tie"), None),
    (("tie", "second", "tie"), "tie"),
    (("first", "first", "second", "tie"), None),
  ],
)
def test_a_majority_is_more_than_half(labels, majority):
  pair = judge.Comparison("p", "a", "b")
  row = agreement.Labelled("rows.json", 1, "", pair, labels)
  assert row.majority == majority


def test_rows_of_llmbar_and_pandalm_are_read(tmp_path, capsys):
  row = {"input": "1+1?", "output_1": "2", "output_2": "3", "label": 1}
  path = tmp_path / "bar.jsonl.xz"
  path.write_bytes(lzma.compress(json.dumps(row | {"subset": "s"}).encode()))
  (found,) = agreement.read(str(path))
  assert found.comparison == judge.Comparison("1+1?", "2", "3")
  assert (found.labels, found.majority, found.subset) == (
    ("first",),
    "first",
    "s",
  )
  row = {"instruction": "Add.", "input": "1+1", "response1": "2"}
  row |= {"response2": "", "annotator1": 1, "annotator2": 0, "annotator3": 2}
  path = tmp_path / "panda.json.xz"
  rows = [row, row | {"response1": True}, row | {"input": "", "annotator2": 1}]
  path.write_bytes(lzma.compress(json.dumps(rows).encode()))
  one, two = agreement.read(str(path))
  assert one.comparison == judge.Comparison("Add.\n\n1+1", "2", "")
  assert one.labels == ("first", "tie", "second") and one.majority is None
  assert two.comparison.prompt == "Add." and two.majority == "first"
  assert (one.row, two.row) == (1, 3)
  said = capsys.readouterr().out
  assert "2 of 3 rows kept; 1 dropped: a response is true or false" in said


GOOD = {"input": "a", "output_1": "b", "output_2": "c", "label": 2}


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (GOOD | {"label": 0}, "line 2: column 'label' is 0; allowed: 1, 2$"),
    (GOOD | {"label": True}, "line 2: column 'label' is True; allowed: 1, 2"),
    (GOOD | {"input": 5}, "line 2: column 'input' is 5; allowed: a string"),
    ({"label": 1, "input": "a"}, "line 2: column 'output_1' is not there; all"),
    ({"annotator1": 3}, "line 2: column 'annotator1' is 3; allowed: 0, 1, 2"),
    ({"a": 1}, "line 2: no labels; columns: a; allowed: instruction, input"),
  ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
  path = tmp_path / "bad.jsonl"
  path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
  with pytest.raises(ValueError, match=message):
    agreement.read(str(path))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[1]", "bad.json': must be a JSON array of objects"),
    ("{}", "bad.json': must be a JSON array of objects"),
    ("[{]", "bad.json': not JSON .Expecting"),
    ('[{"a": "\\ud800"}]', "bad.json': character 1 of .* half of a surr"),
    ("[]", "bad.json': none of 0 rows is kept"),
    (None, "bad.json' cannot be read: .*No such file"),
  ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
  path = tmp_path / "bad.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=message):
    agreement.read(str(path))


def test_the_files_hold_what_was_found(tmp_path):
  rows = [
    GOOD | {"subset": x, "output_1": y} for x, y in zip("ba", ["s", "ll"])
  ]
  path = tmp_path / "bar.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  table = agreement.evaluate(
    judge.length_judge(),
    [str(path)],
    str(tmp_path / "o"),
    order="both",
    seed=3,
  )
  assert (tmp_path / "o" / "summary.md").read_text() == table + "\n"
  assert len(table.splitlines()) == 5
  assert len({line.count("|") for line in table.splitlines()}) == 1
  read = lambda name: [
    json.loads(x) for x in (tmp_path / "o" / name).read_text().splitlines()
  ]
  found = read("summary.jsonl")
  assert [x["subset"] for x in found] == ["all", "a", "b"]
  assert found[0]["judge"] == "length" and found[0]["seed"] == 3
  assert found[0]["judge_ties"] == found[2]["judge_ties"] == 1
  one, two = read("comparisons.jsonl")
  assert (one["row"], one["majority"], one["preferred"]) == (1, "second", "tie")
  assert two["preferred"] == "first" and two["labels"] == ["second"]
  assert two["verdicts"][1] == {
    "is_swapped": True,
    "preferred": "second",
    "text": "first 1, second 2",
  }


def test_the_longer_answer_agrees_with_people_a_little(shared_dir, tmp_path):
  path = str(shared_dir / "data" / "judges" / "pandalm.json.xz")
  agreement.evaluate(
    judge.length_judge(), [path], str(tmp_path), order="both", seed=0
  )
  found = json.loads((tmp_path / "summary.jsonl").read_text())
  assert (found["num_rows"], found["ties_out"]["num_rows"]) == (993, 881)
  assert 0.65 < found["ties_out"]["share"] < 0.71
  assert 0.9 < found["annotator_annotator"]["ties_in"] < 0.94

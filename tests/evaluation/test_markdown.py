"""What users' files hold stays text in the Markdown that is written."""

import pathlib
import re

import numpy as np
import pytest

from dpo_jax.evaluation import (
  agreement,
  frontier,
  markdown,
  matched_kl,
  win_rate,
  win_rate_report,
)
from dpo_jax.judges import judge
from dpo_jax.sweeps import points, results


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    ("a|b", r"a\|b"),
    ("two\nlines\r\n\tand a tab", "two lines and a tab"),
    ("<script>alert(1)</script>", r"\<script>alert(1)\</script>"),
    ("![x](http://a.b)", r"!\[x\](http\://a.b)"),
    ("see https://a.b or www.a.b", r"see https\://a.b or www\.a.b"),
    ("me@a.b", r"me\@a.b"),
    ("`code` *and* ~~so~~ $x$", r"\`code\` \*and\* \~\~so\~\~ \$x\$"),
    ("_a_ dpo_norm loss.lambda_", r"\_a_ dpo_norm loss.lambda_"),
    (r"\| &copy; & &#60;", r"\\\| \&copy; & \&#60;"),
    ("loss=dpo:0.8,bco_pair:0.2 +- 95%", "loss=dpo:0.8,bco_pair:0.2 +- 95%"),
    (0.5, "0.5"),
  ],
)
def test_text_stays_text(value, expected):
  assert markdown.escape(value) == expected


def test_a_table_has_as_many_cells_in_every_line():
  text = markdown.table(["name|", "n"], [["a\n|b", 1], ["c", None]])
  assert text.splitlines() == [
    r"| name\| | n |",
    "| --- | ---: |",
    r"| a \|b | 1 |",
    "| c | None |",
  ]


def test_a_padded_table_has_columns():
  text = markdown.table(["k", "value"], [["a|", 1]], is_padded=True)
  assert text.splitlines() == [
    "| k   | value |",
    "| --- | ----- |",
    r"| a\| | 1     |",
  ]


NAME = "a|b\n<script>x</script>"
SHOWN = r"a\|b \<script>x\</script>"


def test_a_method_of_a_users_file_stays_in_its_cell():
  cell = win_rate.Cell(NAME, None, None, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1)
  assert win_rate_report.table([cell]).count(SHOWN) == 1


def test_a_subset_of_a_users_file_stays_in_its_cell():
  comparison = judge.Comparison("p", "a", "b")
  row = agreement.Labelled("x", 1, NAME, comparison, ("first",))
  decision = judge.decide(
    judge.length_judge(), [comparison], order="both", seed=0
  )
  found = agreement.summarise([row], decision) | {"subset": NAME}
  assert agreement.table([found]).splitlines()[2].count(SHOWN) == 1


def test_a_label_of_a_dot_stays_in_its_cell():
  limit = frontier.optimal_frontier(np.ones((2, 2)), np.ones(1))
  dots = [frontier.Point(x, 0.0, 0.0, 0.5, 0.1, 2) for x in ("SFT", NAME)]
  assert SHOWN in matched_kl.compare(dots, limit, [0.0], max_reward=2.0)


def test_a_value_of_a_sweep_stays_in_its_cell(tmp_path):
  settings = {"loss": {"name": "dpo", "beta": 0.1}}
  point = points.Point("run", {"data.path": NAME}, (), settings)
  row = results.Row(point, "finished", {"eval/loss": 1.0})
  table = results.write(tmp_path, [row], metric="loss", x="loss.beta")
  assert SHOWN in table and SHOWN in (tmp_path / "sweep.md").read_text()


def test_no_other_module_writes_tables():
  package = pathlib.Path(markdown.__file__).parent
  writers = [
    path.name
    for path in [*package.rglob("*.py"), *package.parent.glob("launch/*.py")]
    if re.search(r'"\|\s?-|---:|f"\| ', path.read_text())
  ]
  assert writers == ["markdown.py"]

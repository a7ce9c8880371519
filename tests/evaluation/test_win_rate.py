"""Win rates by hand, from files to cells."""

import dataclasses
import json

import pytest
from matplotlib import figure

from dpo_jax.evaluation import intervals, win_rate, win_rate_report
from dpo_jax.judges import judge as judges
from dpo_jax.judges.judge import Judge, Verdict


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _row(prompt, response, temperature=None, **more):
  row = {"prompt": prompt, "response": response} | more
  return row if temperature is None else row | {"temperature": temperature}


def _by_words(comparisons):
  """Prefers the response with more `good`; of `?`, it cannot be parsed."""
  verdicts = []
  for x in comparisons:
    first, second = x.first.count("good"), x.second.count("good")
    said = "first" if first > second else "second" if second > first else "tie"
    verdicts.append(Verdict(None if "?" in x.first + x.second else said, "..."))
  return verdicts


JUDGE = Judge("words", _by_words)


def _cells(tmp_path, policy, baseline, judge=JUDGE, order="both"):
  responses = win_rate.read_responses(_write(tmp_path / "dpo.jsonl", policy))
  against = win_rate.read_responses(_write(tmp_path / "base.jsonl", baseline))
  matches = win_rate.match(responses, against)
  decisions = win_rate.compare(judge, matches, order=order, seed=0)
  return win_rate.summarise(matches, decisions)


BASELINE = [_row(prompt, "fine") for prompt in "abcd"]


@pytest.mark.parametrize("order", ["both", "random"])
def test_wins_and_losses_have_wilsons_interval(tmp_path, order):
  policy = [_row("a", "good"), _row("b", "good"), _row("c", "good")]
  baseline = [*BASELINE[:2], _row("c", "good good")]
  (cell,) = _cells(tmp_path, policy, baseline, order=order)
  assert (cell.wins, cell.ties, cell.losses, cell.unparsed) == (2, 0, 1, 0)
  assert cell.win_rate == pytest.approx(2 / 3)
  assert (cell.low, cell.high) == pytest.approx(intervals.wilson(2 / 3, 3))
  assert (cell.method, cell.temperature) == ("dpo", None)
  assert cell.consistency == (1 if order == "both" else None)


def test_a_judge_is_told_which_responses_were_cut(tmp_path):
  shown = []

  def compare(comparisons):
    shown.extend(comparisons)
    return _by_words(comparisons)

  policy = [_row("a", "good", ended=False), _row("b", "good", ended=True)]
  baseline = [
    {"prompt": "a", "chosen": "x", "rejected": "y", "chosen_ended": True},
    {"prompt": "b", "chosen": "x", "rejected": "y", "chosen_ended": False},
  ]
  _cells(tmp_path, policy, baseline, Judge("words", compare))
  ended = [(x.first_ended, x.second_ended) for x in shown]
  assert ended == [(False, True), (True, False), (True, False), (False, True)]


def test_summaries_are_not_judged_as_dialogue_unless_it_is_asked(tmp_path):
  prompts = ["Is TL;DR: a word?", "POST: I burnt the rice.\n\nTL;DR:"]
  rows = [[_row(x, text) for x in prompts] for text in ("good", "fine")]
  asked = []
  judge = Judge("words", lambda x: asked.extend(x) or _by_words(x))
  message = (
    "dpo.jsonl, line 2: the prompt, which ends 'nt the rice.*TL;DR:', asks"
  )
  with pytest.raises(ValueError, match=message):
    unnamed = dataclasses.replace(judge, assumes_dialogue=True)
    _cells(tmp_path, *rows, judge=unnamed)
  assert not asked
  (cell,) = _cells(tmp_path, *rows, judge=judge)
  assert cell.wins == 2


def test_a_tie_is_half_a_win(tmp_path):
  policy = [_row("a", "good"), _row("b", "fine"), _row("c", "fine")]
  (cell,) = _cells(tmp_path, policy, BASELINE)
  assert (cell.wins, cell.ties, cell.losses) == (1, 2, 0)
  assert cell.win_rate == pytest.approx(2 / 3) and cell.effective_size > 3


def test_prompts_count_the_same_however_often_they_were_sampled(tmp_path):
  policy = [_row("a", "good")] * 3 + [_row("b", "good")]
  baseline = [_row("a", "fine"), _row("b", "good good")]
  (cell,) = _cells(tmp_path, policy, baseline)
  assert cell.win_rate == 0.5 and (cell.wins, cell.losses) == (3, 1)
  assert (cell.num_prompts, cell.num_comparisons) == (2, 4)
  assert cell.effective_size == pytest.approx(2)


def test_unparsed_comparisons_are_counted_and_left_out(tmp_path):
  policy = [_row("a", "good"), _row("b", "?"), _row("c", "good?")]
  (cell,) = _cells(tmp_path, policy, BASELINE)
  assert (cell.wins, cell.unparsed, cell.num_comparisons) == (1, 2, 3)
  assert cell.win_rate == 1 and cell.num_prompts == 1
  (cell,) = _cells(tmp_path, policy[1:], BASELINE)
  assert cell.win_rate is None and cell.low is None and cell.unparsed == 2


def test_swapping_policy_and_baseline_mirrors_the_win_rate(tmp_path):
  ours = [_row("a", "good"), _row("b", "fine"), _row("c", "good")]
  theirs = [_row("a", "fine"), _row("b", "fine"), _row("c", "good good")]
  ours += [_row("d", "good")]
  theirs += [_row("d", "fine")]
  (one,) = _cells(tmp_path, ours, theirs)
  (other,) = _cells(tmp_path, theirs, ours)
  assert one.win_rate == 0.625 and other.win_rate == 1 - one.win_rate
  assert (one.wins, one.losses) == (other.losses, other.wins)


def test_a_judge_of_positions_gives_one_half(tmp_path):
  first = Judge("first", lambda asked: [Verdict("first", "") for _ in asked])
  policy = [_row(prompt, "good") for prompt in "abcd"]
  (cell,) = _cells(tmp_path, policy, BASELINE, judge=first)
  assert cell.win_rate == 0.5 and cell.ties == 4
  assert cell.first_share == 1 and cell.consistency == 0


def test_cells_are_methods_as_they_came_at_rising_temperatures(tmp_path):
  policy = [
    _row("a", "good", 1.0, method="sft"),
    _row("a", "good", method="dpo"),
    _row("a", "good", 0.7, method="dpo"),
    _row("a", "good", 0, method="dpo"),
    _row("b", "good", 0, method="dpo"),
    _row("b", "good", 0.7, method="dpo", step=20),
    _row("b", "fine", 0.7, method="dpo", step=0),
  ]
  found = _cells(tmp_path, policy, BASELINE)
  assert [
    (x.method, x.temperature, x.step, x.num_comparisons, x.win_rate)
    for x in found
  ] == [
    ("sft", 1.0, None, 1, 1.0),
    ("dpo", 0.0, None, 2, 1.0),
    ("dpo", 0.7, 0, 1, 0.5),
    ("dpo", 0.7, 20, 1, 1.0),
    ("dpo", 0.7, None, 1, 1.0),
    ("dpo", None, None, 1, 1.0),
  ]


@pytest.mark.parametrize(
  ("steps", "label", "lines"),
  [
    ((None, None), "sampling temperature", {"dpo", "people"}),
    (
      (0, 20),
      "updates",
      {"dpo, temperature 0.7", "dpo, temperature 1", "people"},
    ),
  ],
)
def test_the_figure_is_over_steps_where_there_are_any(
  tmp_path, steps, label, lines
):
  policy = [
    _row(x, "good", t, method="dpo", step=step)
    for x in "ab"
    for t in (0.7, 1.0)
    for step in steps
  ]
  policy.append(_row("a", "good", method="people"))
  ax = figure.Figure().subplots()
  win_rate_report.draw(ax, _cells(tmp_path, policy, BASELINE))
  assert ax.get_xlabel() == label
  assert set(ax.get_legend_handles_labels()[1]) == lines


def test_the_kth_response_meets_the_baselines_kth(tmp_path):
  path = tmp_path / "dpo.jsonl"
  rows = [_row("a", str(i), t) for t in (0.0, 1.0) for i in range(3)]
  policy = win_rate.read_responses(_write(path, rows))
  rows = [_row("a", "x"), _row("b", "z"), _row("a", "y")]
  baseline = win_rate.read_responses(_write(path, rows))
  found = win_rate.match(policy, baseline)
  assert [x.baseline.text for x in found] == ["x", "y", "x"] * 2
  assert [x.policy.text for x in found] == ["0", "1", "2"] * 2


def test_messages_are_read_as_text(tmp_path):
  user = {"role": "user", "content": "Hi"}
  reply = {"role": "assistant", "content": "Hello."}
  rows = [_row([user], [reply]), _row([user, reply, user], "Again?")]
  one, two = win_rate.read_responses(_write(tmp_path / "a.jsonl", rows))
  assert (one.prompt, one.text) == ("Hi", "Hello.")
  assert two.prompt == "User: Hi\n\nAssistant: Hello.\n\nUser: Hi"


def test_a_method_is_named_by_its_row_then_its_argument(tmp_path, capsys):
  rows = [_row("a", "x"), _row("a", "x", method="ppo")]
  path = _write(tmp_path / "dpo_0.7.jsonl.part.jsonl", rows)
  methods = lambda spec: [x.method for x in win_rate.read_responses(spec)]
  assert methods(path) == ["dpo_0", "ppo"]
  assert methods(f"dpo={path}") == ["dpo", "ppo"]
  assert "2 responses\n" in capsys.readouterr().out
  (tmp_path / "beta=1").mkdir()
  assert methods(_write(tmp_path / "beta=1" / "ipo.jsonl", rows[:1])) == ["ipo"]


def test_the_chosen_response_of_a_pair_counts(tmp_path, capsys):
  turn = "\n\nHuman: Hi\n\nAssistant:"
  rows = [
    {"prompt": "a", "chosen": "x", "rejected": "y"},
    {"chosen": f"{turn} good", "rejected": f"{turn} bad"},
    {"chosen": f"{turn} good", "rejected": "\n\nHuman: Ho\n\nAssistant: bad"},
  ]
  one, two = win_rate.read_responses(_write(tmp_path / "pairs.jsonl", rows))
  assert (one.prompt, one.text) == ("a", "x")
  assert (two.prompt, two.text) == (turn, " good")
  assert "2 responses; 1 dropped: prompts differ" in capsys.readouterr().out
  with pytest.raises(ValueError, match="no row is kept; 1 dropped: prompts di"):
    win_rate.read_responses(_write(tmp_path / "pairs.jsonl", rows[2:]))


@pytest.mark.parametrize(
  ("row", "message"),
  [
    ({"prompt": "a"}, "line 2: no column 'response'; columns: prompt; allow"),
    (
      _row("a", 7),
      r"line 2: column 'response' is int \(7\); allowed: a string",
    ),
    (_row([], "x"), r"line 2: column 'prompt' is a list \(\[\]\)"),
    (_row("a", "x", -1), "line 2: column 'temperature' is -1; allowed: a numb"),
    (_row("a", "x", True), "line 2: column 'temperature' is True"),
    (_row("a", "x", step=-1), "line 2: column 'step' is -1; allowed: a whole"),
    (_row("a", "x", step=1.0), "line 2: column 'step' is 1.0"),
    (_row("a", "x", method=3), "line 2: column 'method' is 3; allowed: a name"),
  ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
  path = _write(tmp_path / "bad.jsonl", [_row("a", "x"), row])
  with pytest.raises(ValueError, match=message):
    win_rate.read_responses(path)


def test_what_cannot_be_matched_is_named(tmp_path):
  baseline = _write(tmp_path / "base.jsonl", BASELINE)
  policy = _write(tmp_path / "dpo.jsonl", [_row("a", "x"), _row("e", "x")])
  read = win_rate.read_responses
  with pytest.raises(
    ValueError, match="dpo.jsonl, line 2: the baseline has no"
  ):
    win_rate.match(read(policy), read(baseline))
  with pytest.raises(ValueError, match="empty.jsonl' is empty"):
    read(_write(tmp_path / "empty.jsonl", []))


def test_the_files_hold_what_was_found(tmp_path):
  rows = [_row(x, "good", t) for t in (0.0, 0.7) for x in "abc"]
  rows += [_row("a", "?", 1.0), _row("d", "good", method="people")]
  policy = _write(tmp_path / "dpo.jsonl", rows)
  baseline = _write(tmp_path / "base.jsonl", [*BASELINE, _row("e", "x")])
  table = win_rate_report.evaluate(
    dataclasses.replace(JUDGE, usage=lambda: {"cost": 1.5}),
    [policy],
    baseline,
    str(tmp_path / "out"),
    order="both",
    seed=0,
  )
  assert (tmp_path / "out" / "win_rate.md").read_text() == table + "\n"
  lines = table.splitlines()
  assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6
  assert lines[2].startswith("| dpo | 0 | - | 3 | 3 | 3 | 0 | 0 | 0 | 1.0000 |")
  assert lines[4].startswith("| dpo | 1 | - | 0 | 1 | 0 | 0 | 0 | 1 | - | - |")
  record = json.loads((tmp_path / "out" / "win_rate.json").read_text())
  assert record["usage"] == {"cost": 1.5} and record["judge"] == "words"
  assert record["num_baseline_prompts"] == 5
  cells = [win_rate.Cell(**cell) for cell in record["cells"]]
  assert win_rate_report.table(cells) == table
  compared = [
    json.loads(line)
    for line in (tmp_path / "out/comparisons.jsonl").read_text().splitlines()
  ]
  assert [x["points"] for x in compared] == [1.0] * 6 + [None, 1.0]
  assert compared[0]["policy"] == "good" and compared[0]["baseline"] == "fine"
  swaps = [x["is_swapped"] for x in compared[0]["verdicts"]]
  assert swaps == [False, True] and compared[0]["preferred"] == judges.FIRST
  image = (tmp_path / "out" / "win_rate.png").read_bytes()
  assert image.startswith(b"\x89PNG") and len(image) > 10_000

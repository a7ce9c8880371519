"""What a sweep shows while it runs."""

import io

import rich.console

from dpo_jax.sweeps import display


def test_progress_is_the_last_whole_line(tmp_path):
  assert display.progress(tmp_path) == ""
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1')
  assert display.progress(tmp_path) == ""
  line = '{"step": 20, "split": "train", "loss": 0.5}\n'
  path.write_text("x" * display.TAIL_BYTES + "\n" + line + '{"step": 3')
  assert display.progress(tmp_path) == "20  loss 0.5000"


def test_lines_tell_each_beginning_once_and_each_end(capsys):
  with display.Lines(2) as shown:
    for _ in range(3):
      shown.begin("a", "started")
    shown.end("a", "finished")
  assert capsys.readouterr().out == "[0/2] a started\n[1/2] a finished\n"


def test_the_live_table_has_what_is_under_way(tmp_path):
  metrics = '{"step": 20, "split": "train", "loss": 0.5}\n'
  (tmp_path / "metrics.jsonl").write_text(metrics)
  console = rich.console.Console(
    file=io.StringIO(), force_terminal=True, color_system=None, width=80
  )
  with display.Live(2, console) as shown:
    shown.begin("loss=dpo", "started")
    shown.progress("loss=dpo", tmp_path)
    shown.begin("loss=ipo", "started")
    shown.progress("loss=ipo", tmp_path / "absent")
    console.print(shown._table())
    shown.end("loss=dpo", "finished after 3 s")
  lines = [line.strip() for line in console.file.getvalue().splitlines()]
  assert "0 of 2 ended  step" in lines
  assert "loss=dpo      20  loss 0.5000" in lines
  assert "loss=ipo      started" in lines
  assert any(line.endswith("loss=dpo finished after 3 s") for line in lines)

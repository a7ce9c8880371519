"""Files and folders whole or not at all, and by one process."""

import errno
import json
import os
import subprocess
import sys

import filelock
import pytest

from dpo_jax.host import files


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / "new" / "rows.jsonl"
  files.write_lines(path, [{"a": 1}, {"b": "é"}])
  before = path.read_text()
  assert [json.loads(x) for x in before.splitlines()] == [{"a": 1}, {"b": "é"}]

  def rows():
    yield {"a": 2}
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    files.write_lines(path, rows())
  with pytest.raises(ValueError, match="not JSON compliant"):
    files.write_json(path, {"a": float("nan")}, allow_nan=False)
  assert path.read_text() == before
  assert names(path.parent) == ["rows.jsonl"]


def test_a_link_is_written_through(tmp_path):
  files.write_text(tmp_path / "real.txt", "old")
  (tmp_path / "link.txt").symlink_to("real.txt")
  files.write_text(tmp_path / "link.txt", "new")
  assert (tmp_path / "real.txt").read_text() == "new"
  assert (tmp_path / "link.txt").is_symlink()


def test_what_a_kill_left_is_replaced(tmp_path):
  (tmp_path / ".a.txt.part").write_text("half")
  files.write_text(tmp_path / "a.txt", "whole")
  (tmp_path / ".out.part").mkdir()
  (tmp_path / ".out.part" / "half").write_text("")
  with files.folder(tmp_path / "out", marker="last") as part:
    (part / "last").write_text("")
  assert names(tmp_path) == ["a.txt", "out"]
  assert names(tmp_path / "out") == ["last"]


def test_a_new_folder_appears_whole(tmp_path):
  with pytest.raises(OSError, match="killed"):
    with files.folder(tmp_path / "out", marker="last") as part:
      (part / "last").write_text("")
      assert not (tmp_path / "out").exists()
      raise OSError("killed")
  assert not names(tmp_path)


def test_a_folder_that_is_there_has_its_marker_last(tmp_path, monkeypatch):
  for name in ("last", "old_1", "mine"):
    (tmp_path / name).write_text("old")

  def write():
    with files.folder(tmp_path, marker="last", stale=r"old_\d") as part:
      (part / "deep").mkdir()
      for name in ("a", "last", "z", "deep/er"):
        (part / name).write_text("new")

  moved = []

  def killed(source, target):
    assert "last" not in names(tmp_path)
    if len(moved) == 2:
      raise OSError("killed")
    moved.append(source)
    os.replace(source, target)

  with monkeypatch.context() as patch:
    patch.setattr(files.pathlib.Path, "replace", killed)
    with pytest.raises(OSError, match="killed"):
      write()
  assert "last" not in names(tmp_path)
  write()
  assert names(tmp_path) == ["a", "deep", "last", "mine", "z"]
  assert (tmp_path / "mine").read_text() == "old"
  assert (tmp_path / "last").read_text() == "new"


def test_equal_content_is_left_alone(tmp_path):
  (tmp_path / "last").write_text("same")
  before = (tmp_path / "last").stat().st_ino
  with files.folder(tmp_path, marker="last") as part:
    (part / "last").write_text("same")
  assert (tmp_path / "last").stat().st_ino == before


def test_one_process_owns_a_folder_and_a_kill_frees_it(tmp_path):
  lock = tmp_path / "run" / files.LOCK
  holder = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import sys; from dpo_jax.host import files\n"
      "with files.owned(sys.argv[1], 'taken'):\n"
      "  print('held', flush=True); sys.stdin.read()",
      lock,
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process trains in"):
      with files.owned(lock, "another process trains in run"):
        pytest.fail("two owners")
  finally:
    holder.kill()
    holder.communicate()
  assert lock.exists()
  with files.owned(lock, "taken"), pytest.raises(ValueError, match="mine"):
    with files.owned(lock, "mine"):
      pytest.fail("two owners")
  assert not names(lock.parent)


def test_a_folder_that_only_a_lock_made_does_not_stay(tmp_path):
  with files.owned(tmp_path / "run" / files.LOCK, "taken"):
    pass
  with files.owned(tmp_path / "kept" / files.LOCK, "taken"):
    (tmp_path / "kept" / "config.json").touch()
  assert names(tmp_path) == ["kept"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_said(
  tmp_path, monkeypatch, capsys, number
):
  def fail(*_, **__):
    raise OSError(number, "no locks here")

  monkeypatch.setattr(filelock.FileLock, "acquire", fail)
  with files.owned(tmp_path / "lock", "taken"):
    pass
  (line,) = capsys.readouterr().err.splitlines()
  assert "the file system has no locks (no locks here)" in line

"""Files and folders that are written whole or not at all, by one process.

What is written grows beside its place, under a hidden name that no reader
looks for, and is renamed when it is whole. A process that is killed leaves the
old content or none, and a `.NAME.part` that the next writer replaces.

Who owns a folder or a file holds a lock (`owned`) on `.lock` in it, or on
`.NAME.lock` beside it. The operating system lets go of it however the process
ends, so a lock file that a kill leaves behind keeps nobody out.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import filelock

from dpo_jax.host import endings

LOCK = ".lock"  # in a folder that one process owns
# What file systems without locks answer: some NFS mounts, FUSE, object stores.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields where to write a file, which is at `path` once the block ends.

  An error in the block leaves `path` as it was. The folder is made. Where
  `path` is a link, the file that it leads to is replaced.
  """
  target = pathlib.Path(os.path.realpath(path))
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(f".{target.name}.part")
  try:
    with endings.writing(target):
      yield part
      _sync(part)
      part.replace(target)
  finally:
    part.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file, whole or not at all; makes its folder."""
  with replacing(path) as part:
    part.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes a text in UTF-8, whole or not at all; makes its folder."""
  write_bytes(path, text.encode())


def write_json(
  path: str | os.PathLike[str], values: Any, **options: Any
) -> None:
  """Writes indented JSON, whole or not at all; options as for json.dumps."""
  write_text(path, json.dumps(values, indent=2, **options) + "\n")


def write_lines(
  path: str | os.PathLike[str],
  rows: Iterable[Mapping[str, Any]],
  **options: Any,
) -> None:
  """Writes JSON lines, all or none; options as for json.dumps."""
  with replacing(path) as part, part.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, **options) + "\n")


@contextlib.contextmanager
def folder(
  path: str | os.PathLike[str], *, marker: str, stale: str = ""
) -> Iterator[pathlib.Path]:
  """Yields an empty folder whose content is that of `path` at the block's end.

  A new folder appears at once. In one that is there the marker, without which
  no reader takes the folder for whole, is removed first and comes back last;
  content that is there already, to the byte, is left alone. An error in the
  block leaves `path` as it was.

  Args:
    path: the folder to be written; what else it holds stays.
    marker: the name of the file that readers look for.
    stale: a regular expression of names that go when new content comes.
  """
  target = pathlib.Path(os.path.realpath(path))
  is_new = not target.exists()
  # Within a folder that is there, as it may be a file system of its own.
  part = target / ".part"
  if is_new:
    part = target.with_name(f".{target.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  try:
    yield part
    for path in part.rglob("*"):
      if path.is_file():
        _sync(path)
    if is_new:
      part.rename(target)
    else:
      _move_in(part, target, marker, stale)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _move_in(part, target, marker, stale):
  names = {path.name for path in part.iterdir()}
  gone = {
    path.name
    for path in target.iterdir()
    if path.name not in names and re.fullmatch(stale, path.name)
  }
  if not gone and all(_is_same(part / x, target / x) for x in names):
    return
  (target / marker).unlink(missing_ok=True)
  for name in gone:
    (target / name).unlink()
  for name in sorted(names, key=lambda name: name == marker):
    if (target / name).is_dir():
      shutil.rmtree(target / name)
    (part / name).replace(target / name)


def _is_same(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Returns whether two files hold the same bytes; of folders never."""
  if not (one.is_file() and other.is_file()):
    return False
  if one.stat().st_size != other.stat().st_size:
    return False
  with one.open("rb") as first, other.open("rb") as second:
    while block := first.read(2**20):
      if block != second.read(2**20):
        return False
  return True


def _sync(path: pathlib.Path) -> None:
  """Returns when a file is on the disk, so that a rename cannot overtake it."""
  with path.open("rb") as file:
    os.fsync(file.fileno())


@contextlib.contextmanager
def owned(lock: str | os.PathLike[str], taken: str) -> Iterator[None]:
  """Holds a lock while the block runs; never waits for it.

  A folder that is made for the lock alone does not stay. On a file system that
  has no locks a line on stderr says so, and nothing keeps others out.

  Args:
    lock: the file, which is made, with its folder, and removed at the end.
    taken: what the error says where another process holds it.

  Raises:
    ValueError: another process holds it.
  """
  path = pathlib.Path(lock)
  is_new = not path.parent.exists()
  path.parent.mkdir(parents=True, exist_ok=True)
  held = filelock.FileLock(path, fallback_to_soft=False)
  try:
    held.acquire(timeout=0)
  except filelock.Timeout as error:
    raise ValueError(taken) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    print(
      f"{path}: the file system has no locks ({error.strerror}): see to it that"
      " no second process writes here",
      file=sys.stderr,
    )
    held = None
  try:
    yield
  finally:
    if held:
      # Before it is let go of: whoever opened the file meanwhile sees, when
      # filelock gives it to them, that it has no name any more, and fails.
      path.unlink(missing_ok=True)
      held.release()
    if is_new:
      with contextlib.suppress(OSError):  # it is not empty
        path.parent.rmdir()


def owned_folder(
  path: str | os.PathLike[str], doing: str
) -> contextlib.AbstractContextManager[None]:
  """Returns `owned` of a folder; `doing` is what another one does to it."""
  taken = f"another process {doing} {path}"
  return owned(pathlib.Path(path) / LOCK, taken)


def owned_file(
  path: str | os.PathLike[str],
) -> contextlib.AbstractContextManager[None]:
  """Returns `owned` of a file that is written."""
  real = pathlib.Path(os.path.realpath(path))
  lock = real.with_name(f".{real.name}.lock")
  return owned(lock, f"another process writes {path}")

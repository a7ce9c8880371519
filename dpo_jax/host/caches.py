"""What keeps caches whole: locks, and the end of what killed writers left.

A cache is written by whoever holds its lock, as `files` writes. So a
`.NAME.part` while nobody holds the lock is of a process that was killed.
"""

import contextlib
import os
import pathlib
import re
import shutil

import filelock


def lock(path: pathlib.Path) -> filelock.FileLock:
  """Returns the lock of a cache, a file or folder; its folder must exist."""
  return filelock.FileLock(path.with_suffix(".lock"))


def remove(path: pathlib.Path) -> None:
  """Removes a file, a folder, or whatever is there; there may be nothing."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def sweep(cache_dir: str | os.PathLike[str]) -> None:
  """Removes what killed writers of any cache left in a folder.

  Nothing is removed beneath a writer that lives, this process's own included.
  """
  for path in pathlib.Path(cache_dir).iterdir():
    if match := re.fullmatch(r"\.(.+)\.part", path.name):
      # Where its writer lives, the lock is held.
      with contextlib.suppress(filelock.Timeout):
        with lock(path.with_name(match[1])).acquire(timeout=0):
          remove(path)

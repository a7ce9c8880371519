"""Python files that users write: what goes wrong in them, in one line."""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Iterator


def load(path: str, name: str) -> types.ModuleType:
  """Returns the module of a file, run anew, with a function of this name.

  Raises:
    ValueError: it does not define the function.
    Exception: whatever the file raises; see `errors_in`.
  """
  loader = importlib.machinery.SourceFileLoader(f"file_of_{name}", path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # dataclasses look there
  loader.exec_module(module)
  if not callable(vars(module).get(name)):
    raise ValueError(f"it has no {name}()")
  return module


@contextlib.contextmanager
def errors_in(path: str, typed: str) -> Iterator[None]:
  """Makes a ValueError of what a user's file raises, at the line that did it.

  Args:
    path: of the file.
    typed: what was typed to name it, which begins the message.
  """
  try:
    yield
  except Exception as error:
    raise ValueError(f"{typed}: {_describe(error, path)}") from error


def _describe(error: Exception, path: str) -> str:
  """Returns what an error says, its type, and the file's line, if need be.

  A ValueError that is raised on purpose says all there is to say.
  """
  said = str(error)
  frames = traceback.extract_tb(error.__traceback__)
  is_raised = (frames[-1].line or "").startswith("raise ")
  if isinstance(error, ValueError) and is_raised:
    return said
  places = [(frame.filename, frame.lineno) for frame in frames]
  if isinstance(error, SyntaxError):
    said = error.msg
    places.append((error.filename, error.lineno))
  is_here = lambda name: os.path.abspath(name or "") == os.path.abspath(path)
  lines = [line for name, line in places if is_here(name)]
  where = f" ({path}, line {lines[-1]})" if lines else ""
  return f"{type(error).__name__}: {said}{where}"

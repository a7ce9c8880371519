"""Runs a launch script so that whatever ends it early ends it in one line.

Exit status: 0 the run finished (or help was asked for), 1 the system refused
something (a full disk), 2 the user asked for something that cannot be had, 3
the numbers of a run are no longer finite, 128 + n signal n said so. Each has
one line on stderr, to which `--verbosity=1` adds the traceback. Anything else
that broke has status 1 and its traceback.
"""

import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from dpo_jax import endings

# What to do where the system refuses a file.
REMEDIES = {
  errno.ENOSPC: "free some space, and start the same command again",
  errno.EDQUOT: "this user's quota is used up: free some space",
  errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
  errno.EROFS: "give a path that can be written",
  errno.EACCES: "allow it, or give another path",
  errno.EPERM: "allow it, or give another path",
  errno.ENOTDIR: "a file is where a folder belongs: give another path",
  errno.EEXIST: "move what is there, or give another path",
  errno.EISDIR: "a folder is where a file belongs: give another path",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
# Flags that say where a command writes.
_TARGETS = ("workdir", "output", "target")


def run(
  main: Callable[[list[str]], int | None], *, num_arguments: int = 0
) -> NoReturn:
  """Parses flags, calls `main`, and exits.

  A script does `if __name__ == "__main__": cli.run(main)`. A config flag should
  have no default file: absl would load it before errors are caught here.

  Args:
    main: takes the program's name and arguments; its ValueErrors are the user's
      mistakes. What it returns is the exit status, None for 0.
    num_arguments: how many arguments without a flag follow the program's name.
  """
  # Else transformers says at its import that torch is not there.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  endings.listen()
  try:
    app.run(main, flags_parser=functools.partial(_parse_flags, num_arguments))
  except (ValueError, flags.Error) as error:
    _end(2, f"error: {error}")
  except endings.NotFiniteError as error:
    _end(3, f"error: {error}")
  except endings.Stopped as error:
    _end(128 + error.number, str(error))
  except OSError as error:
    _end(1, f"error: {_refusal(error)}")


def _end(status: int, text: str) -> NoReturn:
  """Exits with one line, from within an `except`."""
  logging.debug("the traceback of the error below", exc_info=True)
  print(" ".join(text.split()), file=sys.stderr)
  sys.exit(status)


def _refusal(error: OSError) -> str:
  """Returns what the system refused, of which path, and what to do."""
  if isinstance(error, BrokenPipeError):
    # Or the interpreter would fail once more, on what is left to print.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  where = error.filename or ", ".join(
    f"--{name}={flags.FLAGS[name].value}"
    for name in _TARGETS
    if name in flags.FLAGS and flags.FLAGS[name].value
  )
  remedy = REMEDIES.get(error.errno)
  parts = (where, error.strerror or str(error), remedy)
  return ": ".join(str(part) for part in parts if part)


def load_config(
  path: str, overrides: Mapping[str, Any]
) -> config_dict.ConfigDict:
  """Returns the config of `--config=path` with `--config.KEY=VALUE` overrides.

  Raises:
    ValueError: what a script started with these flags would say.
  """
  argv = ["", f"--config={path}"]
  argv += [f"--config.{key}={value}" for key, value in overrides.items()]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=argv
  )
  try:
    _read_flags(values, argv)
  except flags.Error as error:
    raise ValueError(str(error)) from error
  return config.value


def check_flags(
  command: str,
  needed: Mapping[str, Sequence[flags.FlagHolder]],
  optional: Mapping[str, Sequence[flags.FlagHolder]],
) -> None:
  """Checks that a command of several has its flags, and no other's.

  Args:
    command: a key of both.
    needed: the flags that each command cannot do without.
    optional: those that it can.

  Raises:
    ValueError: one is missing, or is of other commands only.
  """
  for holder in needed[command]:
    if holder.value is None:
      raise ValueError(f"{command} needs --{holder.name}")
  own = {x.name for x in (*needed[command], *optional[command])}
  for other in needed:
    for holder in (*needed[other], *optional[other]):
      if holder.present and holder.name not in own:
        raise ValueError(
          f"--{holder.name} is not a flag of {command}; those are:"
          f" {', '.join(sorted(own))}"
        )


def _parse_flags(num_arguments: int, argv: list[str]) -> list[str]:
  """Returns what is left of `argv` when the flags are taken out of it.

  Raises:
    ValueError: a mistake in a config or one of its overrides, or arguments
      that are no flags.
    flags.Error: any other mistake in a flag.
    SystemExit: with status 0, after help.
  """
  try:
    rest = _read_flags(flags.FLAGS, argv)
  except SystemExit as done:
    # absl's help flags exit with 1.
    raise SystemExit(0) from done
  unexpected = rest[1 + num_arguments :]
  if unexpected:
    raise ValueError(
      f"unexpected argument {unexpected[0]!r}; flags begin with --"
    )
  if flags.FLAGS["verbosity"].using_default_value:
    # absl would show INFO, at which Orbax tells of every step of a save.
    flags.FLAGS.verbosity = logging.WARNING
  return rest


def _read_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
  """Returns what is left of `argv`; mistakes in a config become one line."""
  try:
    rest = values(argv)
    for flag in _config_flags(values):
      # ml_collections keeps a failure to load for the first use: this is one.
      getattr(flag.value, "is_locked", None)
  except (KeyError, AttributeError):
    _raise_for_unknown_keys(values, argv)
    raise
  except TypeError as error:
    raise ValueError(
      f"a config override has the wrong type: {error}"
    ) from error
  except OSError as error:
    raise ValueError(_unread_config(values, argv, error)) from error
  except flags.IllegalFlagValueError as error:
    # An error within get_config comes with the text of its traceback.
    first, *more = str(error).splitlines()
    if not more:
      raise
    name = first.split(": ")[0].removeprefix("flag ")
    raise ValueError(f"{name}: {_innermost(error)}") from error
  return rest


def _innermost(error: BaseException) -> str:
  while (inner := error.__cause__ or error.__context__) is not None:
    error = inner
  return str(error)


def _config_flags(values: flags.FlagValues) -> Iterator[flags.Flag]:
  for name in values:
    if config_flags.is_config_flag(values[name]):
      yield values[name]


def _config_path(flag: flags.Flag, argv: list[str]) -> str | None:
  """Returns what `argv` gives as a config file; the flag may be unparsed."""
  path = None
  for arg, following in zip(argv, [*argv[1:], ""], strict=True):
    match = re.fullmatch(rf"--?{flag.name}(=.*)?", arg)
    if match:
      path = match[1][1:] if match[1] else following
  return path


def _unread_config(
  values: flags.FlagValues, argv: list[str], error: OSError
) -> str:
  """Returns what to say of a config that could not be loaded."""
  for flag in _config_flags(values):
    path = _config_path(flag, argv) or ""
    if not os.path.isfile(path.split(":")[0]):
      return f"--{flag.name}={path}: there is no such config file"
  return f"a config cannot be loaded: {_innermost(error)}"


def _raise_for_unknown_keys(values: flags.FlagValues, argv: list[str]) -> None:
  """Raises a ValueError that names an override's key that no config has."""
  for flag in _config_flags(values):
    path = _config_path(flag, argv)
    if path is None:
      continue
    known = set(_keys(flag.parser.parse(path)))
    for arg in argv:
      match = re.fullmatch(rf"--?(?:no)?{flag.name}\.([^=]+)(?:=.*)?", arg)
      if match and match[1] not in known:
        near = difflib.get_close_matches(match[1], known, n=1)
        hint = (
          f"did you mean {near[0]!r}?"
          if near
          else f"known: {', '.join(sorted(known))}"
        )
        raise ValueError(f"unknown config key {match[1]!r}; {hint}")


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
  """Yields the dotted name of every key, inner ones included."""
  for key, value in config.items():
    yield prefix + key
    if isinstance(value, config_dict.ConfigDict | dict):
      yield from _keys(value, f"{prefix}{key}.")

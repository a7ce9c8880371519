"""Runs a launch script so that a user's mistake ends in one line.

Exit status: 0 the run finished (or help was asked for), 1 something broke (with
its traceback), 2 the user asked for something that cannot be had (one line on
stderr; `--verbosity=1` adds the traceback).
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from dpo_jax import schema


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
  try:
    app.run(main, flags_parser=functools.partial(_parse_flags, num_arguments))
  except (ValueError, flags.Error) as error:
    logging.debug("the traceback of the error below", exc_info=True)
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


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
  for flag in _config_flags(values):
    schema.check_regular((_config_path(flag, argv) or "").split(":")[0])
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

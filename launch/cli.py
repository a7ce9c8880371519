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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from dpo_jax.host import endings, schema, user_code

# ml_collections warns of a config that is None, which is an error here.
logging.get_absl_logger().addFilter(
  lambda record: "get_config() returned None" not in str(record.msg)
)

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
  _check_numbers(flags.FLAGS)
  if flags.FLAGS["verbosity"].using_default_value:
    # absl would show INFO, at which Orbax tells of every step of a save.
    flags.FLAGS.verbosity = logging.WARNING
  return rest


def _check_numbers(values: flags.FlagValues) -> None:
  """Raises ValueError for a number that no flag allows."""
  for name in values:
    value = values[name].value
    for number in value if isinstance(value, list) else [value]:
      if isinstance(number, int | float) and not abs(number) < 2**63:
        raise ValueError(f"--{name}={number}: must be finite and fit 64 bits")


def _read_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
  """Returns what is left of `argv`; mistakes in a config become one line."""
  for flag in _config_flags(values):
    schema.check_regular((_config_path(flag, argv) or "").split(":")[0])
  try:
    rest = values(argv)
    for flag in _config_flags(values):
      # ml_collections keeps a failure to load for the first use: this is one.
      if flag.present and not isinstance(flag.value, config_dict.ConfigDict):
        raise TypeError(f"--{flag.name} is no config")
      for key, value in (flag.present and flag.override_values or {}).items():
        if isinstance(value, config_dict.ConfigDict):
          raise TypeError(f"{key!r} is a group; give its keys one by one")
  except Exception as error:
    for flag in _config_flags(values):
      _raise_for_config(flag, argv, error)
    if isinstance(error, TypeError):
      raise ValueError(
        f"a config override has the wrong type: {error}"
      ) from error
    raise
  return rest


def _config_flags(values: flags.FlagValues) -> Iterator[flags.Flag]:
  for name in values:
    if config_flags.is_config_flag(values[name]):
      yield values[name]


def _config_path(flag: flags.Flag, argv: list[str]) -> str | None:
  """Returns what `argv` gives as a config file; the flag may be unparsed."""
  path = None
  for arg, following in zip(argv, [*argv[1:], None], strict=True):
    match = re.fullmatch(rf"--?{flag.name}(=.*)?", arg)
    if match:
      path = match[1][1:] if match[1] else following
  return path


def _raise_for_config(
  flag: flags.Flag, argv: list[str], error: Exception
) -> None:
  """Raises a ValueError that says what is wrong with a config or its keys."""
  path = _config_path(flag, argv)
  if path is None:
    return
  file, colon, argument = path.partition(":")
  typed = f"--{flag.name}={path}"
  if not os.path.isfile(file):
    raise ValueError(f"{typed}: there is no such config file") from error
  with user_code.errors_in(file, typed):
    module = user_code.load(file, "get_config")
    config = module.get_config(*[argument] * bool(colon))
  if not isinstance(config, config_dict.ConfigDict):
    raise ValueError(
      f"{typed}: get_config() returns {type(config).__name__}; allowed: a"
      " ConfigDict"
    ) from error
  known = set(_keys(config))
  for arg in argv:
    match = re.fullmatch(rf"--?(?:no)?{flag.name}\.([^=]+)(?:=.*)?", arg)
    if match and match[1] not in known:
      near = _nearest(match[1], known) or difflib.get_close_matches(
        match[1], known, n=1
      )
      hint = f"known: {', '.join(sorted(known))}"
      if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
      raise ValueError(f"unknown config key {match[1]!r}; {hint}") from error
  if isinstance(error, flags.UnrecognizedFlagError):
    near = [f"--{flag.name}.{x}" for x in _nearest(error.flagname, known)]
    if near:
      raise ValueError(
        f"unknown flag --{error.flagname}; did you mean {' or '.join(near)}?"
      ) from error


def _nearest(key: str, known: Iterable[str]) -> list[str]:
  """Returns the keys whose last part is this key's, or has it as initials.

  As `optimizer.learning_rate` of `learning_rate`, `model.learning_rate`, `lr`.
  """
  last = key.rpartition(".")[2]
  parts = {name: name.rpartition(".")[2] for name in sorted(known)}
  initials = lambda part: "".join(word[:1] for word in part.split("_"))
  same = [name for name, part in parts.items() if part == last]
  return same or [
    name
    for name, part in parts.items()
    if "_" in part and initials(part) == last
  ]


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
  """Yields the dotted name of every key, inner ones included."""
  for key, value in config.items():
    yield prefix + key
    if isinstance(value, config_dict.ConfigDict | dict):
      yield from _keys(value, f"{prefix}{key}.")

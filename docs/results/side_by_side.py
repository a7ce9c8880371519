"""Runs commands in turns A B A B, reads pairs/s from each, prints ratios.

  python docs/results/side_by_side.py --rounds=3 \\
    ours='python -m launch.benchmark ... --layouts=mirrored --rounds=1' \\
    trl='.venv-trl/bin/python trl_dpo.py bench 6 8 512 6 512 padding_free'

The first command is what the others are compared with. A rate is the last
number before or after the unit (`--unit=tokens/s`; by default pairs/s) in a
command's output, and peak memory is that of its process as the system measures
it.
"""

import re
import resource
import shlex
import statistics
import subprocess
import sys


def main() -> None:
  commands = dict(argument.split("=", 1) for argument in sys.argv[1:])
  rounds = int(commands.pop("--rounds", 3))
  unit = commands.pop("--unit", "pairs/s")
  rates = {name: [] for name in commands}
  peaks = dict.fromkeys(commands, 0)
  for number in range(1, rounds + 1):
    for name, command in commands.items():
      rate, peak = _run(command, unit)
      rates[name].append(rate)
      peaks[name] = max(peaks[name], peak)
      print(f"round {number} {name}: {rate:.3f} {unit}", flush=True)
  first = next(iter(rates))
  for name, values in rates.items():
    ratio = statistics.median(
      ours / theirs for ours, theirs in zip(rates[first], values, strict=True)
    )
    print(
      f"{name}: median {statistics.median(values):.3f} {unit}, peak"
      f" {peaks[name] / 1e9:.2f} GB; {first} is {ratio:.2f} times as fast"
    )


def _run(command: str, unit: str) -> tuple[float, int]:
  """Returns the rate and the peak resident bytes of one run of a command."""
  measured = subprocess.run(
    [sys.executable, __file__, "--child", command],
    capture_output=True,
    text=True,
    check=False,
  )
  number = r"(\d+\.\d+)"
  found = re.findall(f"{unit} {number}|{number} {unit}", measured.stdout)
  if measured.returncode or not found:
    sys.exit(f"{command}\n{measured.stdout}\n{measured.stderr}")
  peak = int(measured.stdout.strip().splitlines()[-1])
  return float(next(x for x in found[-1] if x)), peak


def _child(command: str) -> None:
  done = subprocess.run(shlex.split(command), check=False)
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(usage.ru_maxrss * 1024, flush=True)
  sys.exit(done.returncode)


if __name__ == "__main__":
  if sys.argv[1:2] == ["--child"]:
    _child(sys.argv[2])
  else:
    main()

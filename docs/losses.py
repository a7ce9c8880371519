"""Writes docs/losses.md and docs/losses.png: what each loss is, and weighs.

  python -m docs.losses

A loss's docstring is the source of its formula and its paper. It begins
"Returns FORMULA", up to a full stop or to a colon and more words, and it
cites the paper as "Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq 7"; the
address may be https://... instead, and `eq`, `sec` and `app` may be left out.
Paragraphs that begin with "Differs:" or "Beware:" stand below the tables. All
else is read from the registry and from configs/losses.py.
"""

import inspect
import itertools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import figure

from configs import losses as configs
from dpo_jax.losses import objectives, preference, registry

PAGE = pathlib.Path(__file__).with_suffix(".md")
MARGINS = np.linspace(-40, 40, 321)

# What the figure holds fixed: each response's tokens and its log-probability
# under the reference, and the gap of a scored pair.
LENGTH, REFERENCE, SCORE_GAP = 20, -40.0, 2.0

_FORMULA = re.compile(r"Returns (.+?)(?:: |\. |\.$)")
_SOURCE = re.compile(
  r"(?P<authors>[A-Z][\w'-]+(?: et al\.| and [A-Z][\w'-]+)?) (?P<year>\d{4})"
  r" \((?P<name>[^(),]+), (?P<address>arXiv \d{4}\.\d{4,5}|https://[^\s)]+)\)"
  r"(?P<where>, (?:eq|sec|app) [\w.]*\w(?: and [\w.]*\w)?)?"
)

_HEAD = """\
# The losses

Written by `python -m docs.losses` from the docstrings, the registry and
[configs/losses.py](../configs/losses.py); not by hand. A loss is one number a
pair; the step takes the mean over the batch's pairs. After a hyper-parameter
stand the values that it may have and, bold, the one to start from.
"""

_TABLE = """\
| loss | a pair's loss | source | hyper-parameters | reference | reads | \
whole batch | modifiers |
|---|---|---|---|---|---|---|---|
"""

_FIGURE = f"""
## The weight of a pair

![d loss / d margin against the margin, one panel a loss](losses.png)

How hard each loss pulls at a pair: its derivative by the margin d, negative
where a step raises the margin. A batch is one pair with log-ratios u = d / 2
and v = -d / 2. Either response has {LENGTH} tokens and a log-probability of
{REFERENCE:g} under the reference, also where a loss does not read it; scores
of the data, where read, differ by {SCORE_GAP:g}. Of a loss of a model's scores
these are d / 2 and -d / 2. Running means are 0 before the batch, and
so is the log-ratio of mismatched responses.
Hyper-parameters are those to start from. Vertical scales differ.
"""


# Weighted sums that have a name, and what is not as in their source.
_SUMS = {
  "mpo": (
    "Of its source two parts are missing. The quality loss there has a reward"
    " shift, which `bco_pair` has not; it comes with `dpo:0.8,bco:0.4,sft:1`,"
    " desirable and undesirable weighing 1 (`bco` takes the mean of a pair's"
    " two terms, not the sum). And the generation loss there averages each"
    " chosen response over its own tokens first; `sft` averages over all."
  )
}


def main() -> None:
  PAGE.write_text(page())
  draw(PAGE.with_suffix(".png"))


def page() -> str:
  """Returns docs/losses.md."""
  parts = [_HEAD]
  for module, group in itertools.groupby(_losses(), _module):
    title, _, text = inspect.getdoc(sys.modules[module]).partition("\n")
    parts.append(
      f"\n## {title.rstrip('.')}\n\n```text\n{text.strip()}\n```\n\n"
    )
    group = list(group)
    parts += [_TABLE, *(row(loss) for loss in group)]
    found = [note for loss in group for note in notes(loss)]
    parts += ["\n", *found] if found else []
  for name, text in _SUMS.items():
    whole = configs.LOSSES[name]["name"]
    parts.append(f"\n`{name}` is the weighted sum `{whole}`. {text}\n")
  return "".join([*parts, _FIGURE])


def notes(loss: registry.Loss) -> list[str]:
  """Returns what its docstring says of differences and dangers, as lists."""
  return [
    f"- `{loss.name}` {begin.lower()} {text}\n"
    for begin in ("Differs:", "Beware:")
    for text in loss.paragraphs(begin)
  ]


def formula(loss: registry.Loss) -> str:
  """Returns the formula of a loss, in the symbols of its module.

  Raises:
    ValueError: its docstring does not begin with one.
  """
  found = _FORMULA.match(_words(loss))
  if not found:
    raise ValueError(f"docstring of {loss.name!r}: must begin 'Returns ...'")
  return found[1]


def source(loss: registry.Loss) -> str:
  """Returns where a loss is from, linked; "-" for plain likelihood.

  Raises:
    ValueError: the docstring of a loss of more than demonstrations cites
      nothing.
  """
  found = _SOURCE.search(_words(loss))
  if found:
    url = found["address"].replace("arXiv ", "https://arxiv.org/abs/")
    title = f"{found['authors']} {found['year']}, [{found['name']}]({url})"
    return title + (found["where"] or "")
  if loss.inputs == "demonstrations":
    return "-"
  raise ValueError(
    f"docstring of {loss.name!r}: must cite its source, as in"
    " 'Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq 7'"
  )


def pair_of_margin(loss: registry.Loss, margin) -> registry.PairLogps | None:
  """Returns a batch of one pair with this margin; None if it reads none."""
  if loss.inputs == "demonstrations":
    return None
  fixed = jnp.full(1, REFERENCE if loss.head == "vocabulary" else 0.0)
  length = jnp.full(1, float(LENGTH))
  return registry.PairLogps(
    policy_chosen=fixed + margin / 2,
    policy_rejected=fixed - margin / 2,
    reference_chosen=fixed,
    reference_rejected=fixed,
    chosen_lengths=length,
    rejected_lengths=length,
    score_gaps=jnp.full(1, SCORE_GAP),
    mismatched_logratio=jnp.zeros(1),
  )


def is_drawn(loss: registry.Loss) -> bool:
  """Returns whether a margin determines the loss of a pair."""
  return pair_of_margin(loss, 0.0) is not None


def weights(loss: registry.Loss, margins) -> np.ndarray:
  """Returns d loss / d margin at each margin, at the starting values."""
  objective = objectives.make_objective(loss.name, _start(loss))
  state = {name: jnp.zeros(()) for name in objective.state}

  def of_margin(margin):
    pair = pair_of_margin(loss, margin)
    return objective.per_pair(pair, state=state)[0]

  return np.asarray(jax.vmap(jax.grad(of_margin))(jnp.asarray(margins)))


def draw(path: pathlib.Path) -> None:
  """Writes the figure: a small panel for each loss of pairs."""
  drawn = [x for x in _losses() if is_drawn(x)]
  columns = 6
  rows = -(-len(drawn) // columns)
  fig = figure.Figure(figsize=(11, 1.45 * rows + 0.5), layout="constrained")
  panels = fig.subplots(rows, columns, sharex=True, squeeze=False).flat
  for loss, ax in itertools.zip_longest(drawn, panels):
    if loss is None:
      ax.axis("off")
      continue
    ax.axhline(0, color="0.8", linewidth=0.8)
    ax.axvline(0, color="0.8", linewidth=0.8)
    ax.plot(MARGINS, weights(loss, MARGINS), linewidth=1.3)
    ax.set_title(loss.name, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.margins(x=0)
  fig.supxlabel("margin d, nats", fontsize=9)
  fig.supylabel("d loss / d margin", fontsize=9)
  # Without the version of matplotlib, which would change the file.
  fig.savefig(path, dpi=110, metadata={"Software": None})


def row(loss: registry.Loss) -> str:
  """Returns the table's line of a loss."""
  start = _start(loss)
  settings = [
    f"`{key}` {loss.range_of(key)}, **{start[key]:g}**"
    for key in loss.hyperparameters
  ]
  reads = loss.inputs.replace("_", " ")
  if loss.inputs == "demonstrations":
    reads += ": a constant weight"
  if loss.head != "vocabulary":
    reads += ", their scores"
  cells = (
    f"`{loss.name}`",
    f"`{formula(loss)}`",
    source(loss),
    "; ".join(settings) or "-",
    "yes" if loss.needs_reference else "no",
    reads,
    "yes" if loss.looks_across_batch else "no",
    ", ".join(f"`{x}`" for x in sorted(loss.honours)) or "-",
  )
  return f"| {' | '.join(cells)} |\n"


def _losses() -> list[registry.Loss]:
  """Returns all losses, module by module: symbols are explained before use."""
  first = preference.__name__
  return sorted(objectives.LOSSES.values(), key=lambda x: _module(x) != first)


def _module(loss: registry.Loss) -> str:
  return loss.fn.__module__


def _words(loss: registry.Loss) -> str:
  """Returns the docstring on one line; a paragraph ends with a full stop."""
  return " ".join((loss.fn.__doc__ or "").split())


def _start(loss: registry.Loss) -> dict[str, float]:
  settings = configs.get(loss.name)
  return {key: settings[key] for key in loss.hyperparameters}


if __name__ == "__main__":
  main()

import dataclasses
import pathlib
import re

import numpy as np
import pytest

from docs import losses

LOSSES = losses.objectives.LOSSES
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def with_docstring(text):
  def fn():
    pass

  fn.__doc__ = text
  return dataclasses.replace(LOSSES["dpo"], fn=fn)


def test_page_is_what_the_program_writes_now():
  written = losses.PAGE.read_text()
  assert written == losses.page(), "renew it: python -m docs.losses"


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_docstring_of_every_loss_has_a_formula_and_a_source(loss):
  assert losses.formula(loss)
  assert "https://" in losses.source(loss) or loss.inputs == "demonstrations"


def test_formula_and_source_are_read_from_a_docstring():
  loss = with_docstring("""Returns -ls(2 z), z = 0.5 d: half of a beta.

  O'Neil et al. 2024 (X-PO, arXiv 2401.00001), eq 6 and B.7, at e = 0.
  """)
  assert losses.formula(loss) == "-ls(2 z), z = 0.5 d"
  assert losses.source(loss) == (
    "O'Neil et al. 2024, [X-PO](https://arxiv.org/abs/2401.00001), eq 6 and B.7"
  )


def test_differences_and_dangers_are_listed_below_the_tables():
  loss = with_docstring("""Returns -ls(z).

  Rafailov et al. 2023 (DPO, arXiv 2305.18290).

  Differs: two
  lines.

  Beware: of it.
  """)
  assert losses.notes(loss) == [
    "- `dpo` differs: two lines.\n",
    "- `dpo` beware: of it.\n",
  ]
  page = losses.page()
  for said in (
    "- `bco` differs: there are no density ratios",
    "- `discopop` beware: where tau is below",
    "`mpo` is the weighted sum `dpo:0.8,bco_pair:0.2,sft:1`. Of its source two",
  ):
    assert said in page


def test_beta_dpo_starts_where_its_authors_ran():
  # Their 1 + 0.6 (mean(d) - m), with this batch in m: 0.9 m0 + 0.1 mean(d).
  start = losses.configs.get("beta_dpo")
  wanted = 0.6 * start["momentum"] / start["beta"]
  assert start["alpha"] == pytest.approx(wanted)


def test_docstrings_without_a_formula_or_a_source_are_refused():
  with pytest.raises(ValueError, match="'dpo': must begin 'Returns"):
    losses.formula(with_docstring("The loss -ls(z)."))
  with pytest.raises(ValueError, match="'dpo': must cite its source"):
    losses.source(with_docstring("Returns -ls(z). Rafailov, eq 7."))


def test_weight_of_dpo_is_minus_beta_times_the_probability_of_a_mistake():
  margins = np.linspace(-40, 40, 9)
  expected = -0.1 / (1 + np.exp(0.1 * margins))
  drawn = losses.weights(LOSSES["dpo"], margins)
  np.testing.assert_allclose(drawn, expected, rtol=1e-5)


def test_a_loss_of_demonstrations_is_listed_and_not_drawn():
  assert not losses.is_drawn(LOSSES["sft"])
  assert "| demonstrations: a constant weight |" in losses.row(LOSSES["sft"])
  assert losses.page().index("| `dpo` |") < losses.page().index("| `kto` |")


PAGES = [
  REPOSITORY / "README.md",
  *sorted((REPOSITORY / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
  links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
  absent = [
    link
    for link in links
    if "://" not in link and not (page.parent / link).exists()
  ]
  assert not absent


def test_the_tour_says_how_long_it_is():
  text = (REPOSITORY / "docs" / "tour.md").read_text()
  files = dict.fromkeys(re.findall(r"\(\.\./(dpo_jax/[^)]+\.py)\)", text))
  lines = sum(len((REPOSITORY / x).read_text().splitlines()) for x in files)
  said = re.search(r"through (\d+) files, about ([\d,]+) lines", text)
  assert int(said[1]) == len(files)
  assert abs(int(said[2].replace(",", "")) - lines) < 100

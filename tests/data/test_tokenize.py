"""Special tokens once, truncation exactly at the limit, and the report."""

import json
import resource

import hypothesis
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import strategies as st

from dpo_jax.data import tokenize, tokenizer_files

USER = {"role": "user", "content": "u"}
GOOD = {"role": "assistant", "content": "g"}


def pair(prompt, chosen, rejected):
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def run(
  rows,
  tokenizer,
  inputs="pairs",
  max_length=99,
  max_prompt_length=50,
):
  """Returns the texts of prompt, chosen and rejected of pairs; the report."""
  tokens, report = tokenize.tokenize(
    rows,
    tokenizer,
    inputs=inputs,
    max_length=max_length,
    max_prompt_length=max_prompt_length,
  )
  columns = [
    [tokenizer.decode(c.values[a:b]) for a, b in zip(c.offsets, c.offsets[1:])]
    for c in (tokens.prompt, *tokens.responses)
  ]
  return list(zip(*columns)), report


def test_no_token_reaches_from_a_prompt_into_its_response(shared_dir):
  path = str(shared_dir / "data/tokenizers/gpt2_tokenizer.json")
  tokenizer = tokenizer_files.load_tokenizer(path)
  tokens, _ = tokenize.tokenize(
    [pair("Hello wor", "ld", " world")],
    tokenizer,
    inputs="pairs",
    max_length=99,
    max_prompt_length=50,
  )
  (hello, wor), (ld,) = tokenizer.encode("Hello wor"), tokenizer.encode("ld")
  assert tokens.prompt.values.tolist() == [hello, wor]
  assert tokens.responses[0].values.tolist() == [ld, 50256]
  assert tokens.responses[1].values.tolist() == [995, 50256]
  assert tokens.prompt.values.dtype == np.int32


def test_bos_stands_once_in_front_of_the_prompt_only(make_tokenizer):
  rows = [pair("p", "c", "r"), pair("<s>p", "c", "r"), pair("", "c", "r")]
  texts, _ = run(rows, make_tokenizer(bos=True))
  assert texts == [
    ("<s>p", "c</s>", "r</s>"),
    ("<s>p", "c</s>", "r</s>"),
    ("<s>", "c</s>", "r</s>"),
  ]


def test_empty_prompt_is_eos_without_bos(tokenizer):
  assert run([pair("", "c", "r")], tokenizer)[0][0][0] == "</s>"


def test_eos_ends_each_response_once(tokenizer):
  rows = [pair("p", "c", "r</s>"), pair("p", "", "r")]
  assert run(rows, tokenizer)[0] == [
    ("p", "c</s>", "r</s>"),
    ("p", "</s>", "r</s>"),
  ]


def test_demonstrations_stand_in_chosen(tokenizer):
  rows = [{"prompt": "p", "response": "r"}]
  texts, report = run(rows, tokenizer, inputs="demonstrations")
  assert texts == [("p", "r</s>", "")]
  assert report.identical == 0
  assert report.tokens == {"prompt": 1, "response": 2}


def test_prompt_is_cut_on_the_left_exactly_at_the_limit(tokenizer):
  rows = [pair("abc", "c", "r"), pair("abcd", "c", "r")]
  texts, report = run(rows, tokenizer, max_length=5, max_prompt_length=3)
  assert [text[0] for text in texts] == ["abc", "bcd"]
  assert report.truncated_prompts == 1


def test_a_prompt_that_fits_with_its_response_is_not_cut(tokenizer):
  rows = [pair("abcd", "c", ""), pair("abcd", "c", "r!")]
  texts, report = run(rows, tokenizer, max_length=6, max_prompt_length=3)
  assert texts == [("abcd", "c</s>", "</s>"), ("bcd", "c</s>", "r!</s>")]
  assert (report.truncated_prompts, report.truncated_responses) == (1, 0)


def test_responses_are_cut_on_the_right_exactly_at_the_limit(tokenizer):
  rows = [pair("pp", "abc", "abcd")]
  texts, report = run(rows, tokenizer, max_length=6)
  assert texts == [("pp", "abc</s>", "abcd")]
  assert report.truncated_responses == 1
  texts, report = run(rows, tokenizer, max_length=5)
  assert texts == [("pp", "abc", "abc")]
  assert report.truncated_responses == 2
  assert report.identical == 1


def test_a_response_that_did_not_end_has_no_eos(tokenizer):
  rows = [
    pair("p", "c", "r") | {"rejected_ended": False},
    pair("p", "", "") | {"chosen_ended": False},
  ]
  texts, report = run(rows, tokenizer)
  assert texts == [("p", "c</s>", "r")]
  assert (report.kept, report.not_ended) == (1, 1)
  assert report.dropped == {"a response without a token that did not end": 1}
  lines = tokenize.report_lines(report)
  assert "         1  responses that did not end (no EOS)" in lines
  rows = [{"prompt": "p", "responses": ["a", "b"], "ended": [False, True]}]
  assert run(rows, tokenizer, inputs="ranked")[0] == [("p", "a", "b</s>")]
  rows = [{"prompt": "p", "response": "a", "ended": False, "label": False}]
  assert run(rows, tokenizer, inputs="labelled")[0] == [("p", "", "a")]


@pytest.mark.parametrize("end", ["eos_token", "''", "'<|im_end|>'"])
def test_a_message_that_did_not_end_has_nothing_of_the_template_behind_it(
  end, make_tokenizer, chat_template
):
  template = chat_template.replace("eos_token", end)
  tokenizer = make_tokenizer(bos=True, template=template)
  rows = [pair([USER], [GOOD], [GOOD]) | {"rejected_ended": False}]
  ((prompt, chosen, rejected),), _ = run(rows, tokenizer)
  assert prompt == "<s>[user]u\n[assistant]"
  assert chosen.endswith("</s>") and rejected == "g"


def test_pair_without_room_for_a_response_is_dropped_and_counted(tokenizer):
  rows = [pair("abc", "c", "r"), pair("abcd", "c", "r"), {"dropped": "why"}]
  texts, report = run(rows, tokenizer, max_length=4)
  assert texts == [("abc", "c", "r")]
  assert (report.read, report.kept) == (3, 1)
  assert report.dropped == {"why": 1, "no room for a response": 1}


@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
  st.lists(st.tuples(*[st.text("ab", max_size=9)] * 3), max_size=9),
  st.integers(1, 12),
  st.integers(1, 12),
)
def test_lengths_never_pass_the_limits(tokenizer, rows, longest, prompt_limit):
  tokens, report = tokenize.tokenize(
    [pair(*row) for row in rows],
    tokenizer,
    inputs="pairs",
    max_length=longest,
    max_prompt_length=prompt_limit,
  )
  prompt, chosen, rejected = (
    np.diff(column.offsets) for column in (tokens.prompt, *tokens.responses)
  )
  assert (prompt >= 1).all()
  for response in (chosen, rejected):
    assert ((response >= 1) & (prompt + response <= longest)).all()
  assert report.kept == len(prompt)
  assert report.read == len(rows) == report.kept + sum(report.dropped.values())
  totals = (prompt.sum(), chosen.sum(), rejected.sum())
  assert tuple(report.tokens.values()) == totals


def test_every_response_has_the_column_of_its_class_or_rank(tokenizer):
  settings = dict(max_length=9, max_prompt_length=9)
  rows = [
    {"prompt": "p", "response": "good", "label": True},
    {"prompt": "p", "response": "bad", "label": False},
    pair("p", "c", "r"),
  ]
  tokens, report = tokenize.tokenize(
    rows, tokenizer, inputs="labelled", **settings
  )
  lengths = [np.diff(x.offsets).tolist() for x in tokens.responses]
  assert lengths == [[5, 0, 2], [0, 4, 2]]
  assert report.tokens == {"prompt": 3, "desirable": 7, "undesirable": 6}
  rows = [
    {"prompt": "p", "responses": responses}
    for responses in (["a", "b"], ["aa", "b", "c", "a"], ["a", "b", "a"])
  ]
  tokens, report = tokenize.tokenize(
    rows, tokenizer, inputs="ranked", **settings
  )
  lengths = [np.diff(x.offsets).tolist() for x in tokens.responses]
  assert lengths == [[2, 3, 2], [2, 2, 2], [0, 2, 2], [0, 2, 0]]
  assert report.tokens == {"prompt": 3, "responses": 19}
  assert report.identical == 1


def test_chunks_change_nothing(tokenizer, monkeypatch):
  rows = [pair("p" * n, "c" * (n % 7), "r" * (n % 5)) for n in range(20)]
  whole = run(rows, tokenizer, max_length=9)
  monkeypatch.setattr(tokenize, "CHUNK_ROWS", 3)
  assert run(iter(rows), tokenizer, max_length=9) == whole


def test_chat_template_writes_special_tokens_once(
  make_tokenizer, chat_template
):
  tokenizer = make_tokenizer(bos=True, template=chat_template)
  rows = [pair([USER], [GOOD], [GOOD | {"content": "bad"}])]
  assert run(rows, tokenizer)[0] == [
    ("<s>[user]u\n[assistant]", "g</s>", "bad</s>")
  ]


def test_no_bos_is_added_to_what_a_template_writes(
  make_tokenizer, chat_template
):
  template = chat_template.replace("{{ bos_token }}", "")
  tokenizer = make_tokenizer(bos=True, template=template)
  texts, _ = run([pair([USER], [GOOD], [GOOD])], tokenizer)
  assert texts[0][0] == "[user]u\n[assistant]"


def test_eos_is_appended_where_the_template_ends_a_turn_without_it(
  make_tokenizer, chat_template
):
  template = chat_template.replace("eos_token", "''")
  tokenizer = make_tokenizer(bos=True, template=template)
  assert run([pair([USER], [GOOD], [GOOD])], tokenizer)[0] == [
    ("<s>[user]u\n[assistant]", "g\n</s>", "g\n</s>")
  ]


def test_messages_without_a_usable_template_are_refused(make_tokenizer):
  rows = [pair([USER], [GOOD], [GOOD])]
  for template, message in (
    (None, "has no chat template"),
    ("{{ messages|length }}{{ messages|tojson }}", "differently once"),
    ("{{ raise_exception('no user') }}", "refuses .*no user"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      run(rows, make_tokenizer(template=template))
    assert "\n" not in str(error.value)


def test_an_error_names_the_row(make_tokenizer, monkeypatch):
  monkeypatch.setattr(tokenize, "CHUNK_ROWS", 2)
  rows = [pair("p", "c", "r"), {"dropped": "why"}, pair([USER], [GOOD], [GOOD])]
  with pytest.raises(ValueError, match="^row 3: the data holds chat messages"):
    run(rows, make_tokenizer())


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length"])
def test_length_below_1_is_refused(name, tokenizer):
  with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
    run([], tokenizer, **{name: 0})


def test_report_is_told_in_lines(tokenizer):
  rows = [pair("p", "a", "a"), pair("p", "abc", "b"), {"dropped": "why"}]
  _, report = run(rows, tokenizer)
  assert tokenize.report_lines(report) == [
    "         3  rows read",
    "         2  kept",
    "         1  dropped: why",
    "         0  truncated prompts",
    "         0  truncated responses",
    "         1  pairs with identical responses (kept)",
    "       1.0  mean tokens of prompt",
    "       3.0  mean tokens of chosen",
    "       2.0  mean tokens of rejected",
  ]


def test_bare_file_and_folder_tokenise_alike(make_tokenizer, tmp_path):
  tokenizer = make_tokenizer(bos=True)
  tokenizer.save_pretrained(tmp_path)
  folder = tokenizer_files.load_tokenizer(str(tmp_path))
  bare = tokenizer_files.load_tokenizer(str(tmp_path / "tokenizer.json"))
  rows = [pair("p", "c", "r"), pair("", "c", "r")]
  assert run(rows, bare)[0] == run(rows, folder)[0] == run(rows, tokenizer)[0]


def test_tokenizer_that_cannot_be_used_is_refused(make_tokenizer, tmp_path):
  make_tokenizer(eos=False).save_pretrained(tmp_path / "no_eos")
  (tmp_path / "broken.json").write_text("{}")
  (tmp_path / "empty").mkdir()
  for path, message in (
    (tmp_path / "no_eos", "has no end-of-sequence token"),
    (tmp_path / "no_eos" / "tokenizer.json", "has no end-of-sequence token"),
    (tmp_path / "broken.json", "no tokenizer at '.*broken.json'"),
    (tmp_path / "empty", "no tokenizer at '.*empty'"),
    (tmp_path / "none.json", "no such tokenizer: '.*none.json'"),
    ("no/such-tokenizer", "no tokenizer at 'no/such-tokenizer'"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      tokenizer_files.load_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_backend_in_rust_is_refused(tmp_path):
  transformers.ByT5Tokenizer().save_pretrained(tmp_path)
  message = "is a ByT5Tokenizer, which has no tokenizer.json; allowed: one with"
  with pytest.raises(ValueError, match=message):
    tokenizer_files.load_tokenizer(str(tmp_path))


def _settings(**changes):
  return lambda values: values | changes


@pytest.mark.parametrize(
  "name, change, message",
  [
    # Panics in Rust.
    (
      "tokenizer.json",
      _settings(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
      "Precompiled",
    ),
    (
      "tokenizer.json",
      _settings(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}),
      "no tokenizer at",
    ),
    ("tokenizer.json", lambda values: [values], "no tokenizer at"),
    ("tokenizer_config.json", lambda values: [values], "no tokenizer at"),
    (
      "tokenizer_config.json",
      _settings(model_max_length="x"),
      "'int' and 'str",
    ),
    ("tokenizer_config.json", _settings(eos_token=5), "eos_token has to be"),
    (
      "tokenizer_config.json",
      _settings(eos_token=""),
      "has no end-of-sequence",
    ),
    (
      "tokenizer_config.json",
      _settings(chat_template=5),
      "chat_template=5; all",
    ),
  ],
  ids="charsmap merges array settings length eos no-eos template".split(),
)
def test_a_broken_tokenizer_is_one_line(
  name, change, message, make_tokenizer, tmp_path, capfd
):
  make_tokenizer().save_pretrained(tmp_path)
  values = json.loads((tmp_path / name).read_text())
  (tmp_path / name).write_text(json.dumps(change(values)))
  with pytest.raises(ValueError, match=message) as error:
    tokenizer_files.load_tokenizer(str(tmp_path))
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
  assert capfd.readouterr() == ("", "")


def test_no_code_of_a_tokenizers_folder_is_run(make_tokenizer, tmp_path, capfd):
  make_tokenizer().save_pretrained(tmp_path)
  path, marker = tmp_path / "tokenizer_config.json", tmp_path / "marker"
  values = json.loads(path.read_text()) | {"tokenizer_class": "Mine"}
  values["auto_map"] = {"AutoTokenizer": [None, "mine.Mine"]}
  path.write_text(json.dumps(values))
  (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
  with pytest.raises(ValueError, match="code of its own, which is never run"):
    tokenizer_files.load_tokenizer(str(tmp_path))
  assert not marker.exists() and capfd.readouterr() == ("", "")


def test_fingerprint_follows_vocabulary_special_tokens_and_template(
  make_tokenizer,
):
  tokenizer = make_tokenizer()
  before = tokenizer_files.fingerprint(tokenizer)
  tokenizer(["a", "bb"], padding=False, truncation=True, max_length=1)
  assert tokenizer_files.fingerprint(tokenizer) == before
  others = [make_tokenizer(bos=True), make_tokenizer(template="x")]
  others.append(make_tokenizer())
  others[-1].eos_token = "a"
  assert before not in [tokenizer_files.fingerprint(other) for other in others]
  assert json.loads(before)


def test_a_tokenizer_that_cannot_be_written_is_the_systems_error(
  make_tokenizer, tmp_path
):
  (tmp_path / "file").touch()
  with pytest.raises(FileExistsError):
    tokenizer_files.save_tokenizer(make_tokenizer(), tmp_path / "file")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
  try:
    with pytest.raises(OSError, match="File too large") as caught:
      tokenizer_files.save_tokenizer(make_tokenizer(), tmp_path / "folder")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert caught.value.filename == str(tmp_path / "folder")


@pytest.mark.parametrize(
  "name, ids", [("gpt2", [15496, 995]), ("neox_20B", [12092, 1533])]
)
def test_real_bare_tokenizers_know_their_end(name, ids, shared_dir):
  path = shared_dir / f"data/tokenizers/{name}_tokenizer.json"
  tokenizer = tokenizer_files.load_tokenizer(str(path))
  assert tokenizer.eos_token == "<|endoftext|>"
  assert tokenize.encode_prompts(tokenizer, ["Hello world"]) == [ids]


def test_a_text_without_tokens_is_refused_by_its_row():
  """A tokenizer without an unknown token, which its library takes for a bug."""
  words = tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "<unk>")
  backend = tokenizers.Tokenizer(words)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="</s>"
  )
  with pytest.raises(ValueError, match="^row 2: the tokenizer cannot encode"):
    run([pair("a", " b", " a"), pair("a", " b", " c")], tokenizer)

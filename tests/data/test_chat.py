"""What a chat template writes is trained on whole, or the row is refused."""

import pytest

from dpo_jax.data import chat

USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "sunny"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

TOOL_TEMPLATE = (
  "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}"
  "[{{ m.role }}]{% if 'tool_calls' in m %}"
  "{{ m.tool_calls[0].function|tojson }}{% else %}{{ m.content }}{% endif %}"
  "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Opens a thought, which a finished turn has not: as DeepSeek-R1's.
THINKING = (
  "{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}"
  "{% else %}[assistant]{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
# Puts a space in front of what is said: as Mistral's.
SPACED = (
  "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
  " [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def says(text, role="assistant"):
  return {"role": role, "content": text}


def texts(tokenizer, prompt, response):
  """Returns the text of a prompt, and what stands behind it."""
  before = chat.prompt_text(tokenizer, prompt)
  whole = chat.whole_text(tokenizer, prompt, response, before)
  assert whole.startswith(before)
  return before, whole[len(before) :]


def test_tools_calls_and_results_are_written_by_the_template(make_tokenizer):
  tokenizer = make_tokenizer(template=TOOL_TEMPLATE)
  prompt = {"messages": [USER, CALLING, RESULT], "tools": TOOLS}
  before, behind = texts(tokenizer, prompt, [says("Sunny.")])
  assert before == (
    '[{"type": "function", "function": {"name": "f"}}][user]Weather?'
    '[assistant]{"name": "f", "arguments": {"x": "y"}}</s>[tool]sunny'
    "[assistant]"
  )
  assert behind == "Sunny.</s>"
  _, behind = texts(tokenizer, [USER], [CALLING])
  assert behind == '{"name": "f", "arguments": {"x": "y"}}</s>'


def test_parts_are_written_where_the_template_has_them(make_tokenizer):
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  template = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for x in m.content %}<{{ x.text }}>{% endfor %}{% endif %}"
    "{% endfor %}"
  )
  tokenizer = make_tokenizer(template=template)
  found = texts(tokenizer, [says(parts, "user")], [says("c")])
  assert found == ("<a><b>", "c")


@pytest.mark.parametrize(
  "prompt, message",
  [
    ({"messages": [USER], "tools": TOOLS}, "writes no tools"),
    ([USER, CALLING, RESULT], "writes no tool_calls"),
    ([USER, says("Hi"), RESULT], "not write the content of .*'sunny'"),
    ([says([{"type": "text", "text": "a"}], "user")], "not write the content"),
  ],
)
def test_what_a_template_drops_or_writes_as_python_is_refused(
  prompt, message, make_tokenizer
):
  template = (
    "{% for m in messages if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}"
  )
  with pytest.raises(ValueError, match=message) as error:
    chat.prompt_text(make_tokenizer(template=template), prompt)
  assert "\n" not in str(error.value)


def test_a_response_continues_what_the_generation_prompt_opens(make_tokenizer):
  tokenizer = make_tokenizer(template=THINKING)
  response = [says("<think>\neasy\n</think>\n\n4")]
  before, behind = texts(tokenizer, [says("2+2?", "user")], response)
  assert before == "[user]2+2?[assistant]<think>\n"
  assert behind == "easy\n</think>\n\n4</s>"


def test_a_response_may_begin_in_the_generation_prompt(make_tokenizer):
  """Its beginning is written there, as Qwen3.5's template does."""
  template = THINKING.replace(
    "[assistant]{{ m.content.split('</think>')[-1] }}",
    "[assistant]<think>\n{{ m.content.removeprefix('<think>').strip() }}",
  )
  tokenizer = make_tokenizer(template=template)
  response = [says("<think>easy\n</think>4")]
  before, behind = texts(tokenizer, [says("2+2?", "user")], response)
  assert before == "[user]2+2?[assistant]<think>\n"
  assert behind == "easy\n</think>4</s>"


def test_a_thought_that_the_template_drops_is_kept(make_tokenizer):
  template = THINKING.replace("]<think>\n{% endif", "]{% endif")
  tokenizer = make_tokenizer(template=template)
  response = [says("<think>easy</think>4")]
  _, behind = texts(tokenizer, [says("2+2?", "user")], response)
  assert behind == "<think>easy</think>4</s>"


def test_texts_that_do_not_agree_are_refused_with_their_difference(
  make_tokenizer,
):
  tokenizer = make_tokenizer(template=THINKING)
  with pytest.raises(ValueError) as error:
    texts(tokenizer, [says("2+2?", "user")], [says("4")])
  assert str(error.value) == (
    "the tokenizer's chat template writes a prompt differently once its"
    " response is there: 'user]2+2?[assistant]<think>\\n' alone,"
    " 'user]2+2?[assistant]4</s>' with it; allowed: a response that begins as"
    " the prompt ends, or another template"
  )
  template = (
    "{% for m in messages %}[{{ m.content.split('*')[0] }}]{% endfor %}"
  )
  with pytest.raises(ValueError, match=r"writes only '\[a\]' of .*'a\*b'"):
    texts(make_tokenizer(template=template), [USER], [says("a*b")])


@pytest.mark.parametrize(
  "template, text, content",
  [
    (TOOL_TEMPLATE, " Hi", " Hi"),
    (SPACED, " Hi", "Hi"),
    (SPACED, "Hi", "Hi"),
    (THINKING, "so\n</think>Hi", "<think>\nso\n</think>Hi"),
  ],
)
def test_a_sampled_text_is_the_content_of_its_message(
  template, text, content, make_tokenizer
):
  tokenizer = make_tokenizer(template=template)
  found = chat.content(tokenizer, [USER], text)
  assert found == content
  if template != SPACED or text[0] == " ":
    _, behind = texts(tokenizer, [USER], [says(found)])
    assert behind == text + "</s>"
  assert chat.content(tokenizer, "Weather?", text) == text

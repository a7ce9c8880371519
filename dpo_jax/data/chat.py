"""Texts of chats, as the tokenizer's own template writes them.

The text of a response is what the template writes behind its prompt. What a
template drops, or writes as Python would, is refused: nothing of a row is lost
in silence.
"""

import functools
from collections.abc import Callable
from typing import Any

import transformers

from dpo_jax.data import examples

ROLES = ("system", "user", "assistant")  # that every template knows
SLOT = "qzslotzq"  # stands for a content; no text holds it

Tokenizer = transformers.PreTrainedTokenizerBase


def prompt_text(tokenizer: Tokenizer, prompt: examples.Text) -> str:
  """Returns the text that a response continues.

  Raises:
    ValueError: messages, and no template, or one that cannot write them.
  """
  if isinstance(prompt, str):
    return prompt
  return _apply(tokenizer, prompt, [])


def whole_text(
  tokenizer: Tokenizer,
  prompt: examples.Text,
  response: examples.Text,
  before: str,
  has_end: bool = True,
) -> str:
  """Returns the text of prompt and response, up to the EOS that ends it.

  Of a response that did not end, up to its last message's content.

  A template may open what the finished turn has elsewhere or not at all, such
  as `<think>`; the response then continues the opened text, where it begins as
  that does.

  Args:
    tokenizer: whose template is used.
    prompt: a string, or messages.
    response: the same.
    before: `prompt_text` of the prompt, with which the text begins.
    has_end: whether the response ended.

  Raises:
    ValueError: as `prompt_text`; or the two texts do not agree.
  """
  if isinstance(response, str):
    return before + response
  whole = _apply(tokenizer, prompt, response, is_open=not has_end)
  said = [x.get("content") for x in response]
  is_whole = all(_is_said(x, before, whole) for x in said if isinstance(x, str))
  if not is_whole or not whole.startswith(before):
    whole = _continued(tokenizer, prompt, response, before, whole, has_end)
  if not has_end:
    return whole
  ended = whole.rstrip()
  is_ended = len(ended) > len(before) and ended.endswith(tokenizer.eos_token)
  return ended if is_ended else whole


def content(tokenizer: Tokenizer, prompt: examples.Text, text: str) -> str:
  """Returns the content of the message whose text, behind a prompt, is given.

  Args:
    tokenizer: whose template is used.
    prompt: messages; behind a string the text is the content itself.
    text: a response as it was sampled, without special tokens.
  """
  if isinstance(prompt, str):
    return text
  before = prompt_text(tokenizer, prompt)
  head, _ = _frame(tokenizer, prompt)
  if head.startswith(before):
    return text.removeprefix(head[len(before) :])
  return before[len(head) :] + text if before.startswith(head) else text


def _continued(tokenizer, prompt, response, before, whole, has_end) -> str:
  """Returns prompt and response where the template's own texts differ."""
  (first, *more) = response
  head, tail = _frame(tokenizer, prompt)
  is_plain = not more and first.keys() == {"role", "content"}
  if is_plain and isinstance(first["content"], str):
    continued = head + first["content"] + (tail if has_end else "")
    if len(before) >= len(head) and continued.startswith(before):
      return continued
  if whole.startswith(before):
    raise ValueError(
      f"the tokenizer's chat template writes only {whole[len(before) :]!r} of"
      f" {_short(response)}"
    )
  pairs = enumerate(zip(before, whole, strict=False))
  differ = (k for k, (ours, theirs) in pairs if ours != theirs)
  place = next(differ, min(len(before), len(whole)))
  begin = max(place - 20, 0)
  raise ValueError(
    "the tokenizer's chat template writes a prompt differently once its"
    f" response is there: {before[begin : place + 20]!r} alone,"
    f" {whole[begin : place + 60]!r} with it; allowed: a response that begins"
    " as the prompt ends, or another template"
  )


def _frame(tokenizer, prompt) -> tuple[str, str]:
  """Returns what a template writes before and behind a response's content."""
  reply = {"role": "assistant", "content": SLOT}
  head, _, tail = _apply(tokenizer, prompt, [reply]).partition(SLOT)
  return head, tail


def _apply(
  tokenizer: Tokenizer,
  prompt: examples.Text,
  response: list[dict],
  *,
  is_open: bool = False,
) -> str:
  """Returns the template's text; without a response, ready for one.

  With `is_open` it ends with the last message's content.
  """
  has_tools = isinstance(prompt, dict)
  tools = prompt["tools"] if has_tools else None
  chat = (prompt["messages"] if has_tools else prompt) + response
  if tokenizer.chat_template is None:
    raise ValueError(
      "the data holds chat messages, and the tokenizer"
      f" {tokenizer.name_or_path!r} has no chat template; allowed: strings,"
      " or a tokenizer with one"
    )
  render = functools.partial(
    _render,
    tokenizer,
    tools=tools,
    add_generation_prompt=not response,
    continue_final_message=is_open,
  )
  text = render(chat)
  template = tokenizer.get_chat_template(tools=tools)
  has_calls = any("tool_calls" in message for message in chat)
  for name, is_there in (("tools", has_tools), ("tool_calls", has_calls)):
    if is_there and name not in template:
      raise ValueError(f"the tokenizer's chat template writes no {name}")
  for number, message in enumerate(chat):
    if not _is_written(message, text, _replacing(render, chat, number)):
      raise ValueError(
        "the tokenizer's chat template does not write the content of"
        f" {_short(message)}"
      )
  return text


def _render(tokenizer, chat, **options: Any) -> str:
  try:
    return tokenizer.apply_chat_template(chat, tokenize=False, **options)
  except Exception as error:  # a template is a program, which may raise any
    reason = " ".join(str(error).split())
    raise ValueError(
      f"the tokenizer's chat template refuses {_short(chat)}: {reason}"
    ) from error


def _replacing(render, chat, number) -> Callable[[str], str]:
  """Returns what renders a chat with another content of one message."""
  return lambda text: render(
    [*chat[:number], chat[number] | {"content": text}, *chat[number + 1 :]]
  )


def _is_written(message, text, render_with) -> bool:
  """Returns whether a template's text has the content of a message."""
  found = message.get("content", "")
  if isinstance(found, str):
    stripped = found.strip()
    is_there = message["role"] in ROLES and stripped in text
    return not stripped or is_there or SLOT in render_with(SLOT)
  said = [part["text"] for part in found if isinstance(part.get("text"), str)]
  return str(found) not in text and all(x.strip() in text for x in said)


def _is_said(said: str, before: str, whole: str) -> bool:
  """Returns whether a content ends behind the prompt, but for its spaces."""
  said, behind = _squeeze(said), _squeeze(whole[len(before) :])
  opened = _squeeze(before)[-len(said) :][1:]  # may be the content's beginning
  return said in opened + behind


def _squeeze(text: str) -> str:
  return "".join(text.split())


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 200 else text[:197] + "..."

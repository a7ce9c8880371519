"""Token lists cut to length: which tokens of a row that is too long stay.

What becomes of a row says `truncate_prompts`:

  if_needed  as the code of Rafailov et al. 2023 (arXiv 2305.18290): where the
             prompt and the longest response exceed `max_length`, the prompt
             loses its start, down to `max_prompt_length`; where they still do,
             every response loses its end, down to `max_length` -
             `max_prompt_length`, whatever the prompt has left
  always     a prompt has never more than `max_prompt_length` tokens, as where
             responses are sampled; a response ends where prompt and response
             have `max_length`
  never      as TRL 1.16: a prompt stays whole, whatever `max_prompt_length`;
             a response ends where prompt and response have `max_length`

A row whose responses are left without a token is none.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# What a run's config must say of its lengths.
NEEDED = ("data.max_length", "data.max_prompt_length")
RULES = ("if_needed", "always", "never")

Tokens = list[int]


@dataclasses.dataclass(frozen=True)
class Limits:
  """How long a row may be.

  Attributes:
    max_length: tokens in prompt and one response together, at least 1.
    max_prompt_length: tokens in a prompt that is cut, at least 1.
    truncate_prompts: one of `RULES`.
  """

  max_length: int
  max_prompt_length: int
  truncate_prompts: str = "if_needed"

  def __post_init__(self):
    """Raises ValueError for a limit that cannot be."""
    for name in ("max_length", "max_prompt_length"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
    if self.truncate_prompts not in RULES:
      raise ValueError(
        f"unknown truncate_prompts {self.truncate_prompts!r}; known:"
        f" {', '.join(RULES)}"
      )

  def cut(
    self, prompt: Tokens, responses: Sequence[Tokens]
  ) -> tuple[Tokens, list[Tokens]] | None:
    """Returns a prompt and its responses cut to length; None without room.

    Args:
      prompt: token ids, at least one.
      responses: all that stand behind this prompt; one without tokens is
        absent.
    """
    longest = max(map(len, responses))
    is_long = len(prompt) + longest > self.max_length
    if self.truncate_prompts == "always" or (
      self.truncate_prompts == "if_needed" and is_long
    ):
      prompt = prompt[-self.max_prompt_length :]
    room = self.max_length - len(prompt)
    if self.truncate_prompts == "if_needed" and longest > room:
      # Where this bound leaves nothing the prompt's own length counts.
      room = max(self.max_length - self.max_prompt_length, 0) or room
    if room <= 0:
      return None
    return prompt, [response[:room] for response in responses]


def of_run(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of `Limits` of a run, from its config by dotted keys.

  Runs that do not say `truncate_prompts` cut all prompts.
  """
  return {
    "max_length": config["data.max_length"],
    "max_prompt_length": config["data.max_prompt_length"],
    "truncate_prompts": config.get("data.truncate_prompts", "always"),
  }

"""Where a chat endpoint is and as whom it is asked, which is never shown.

The environment says both: OPENAI_BASE_URL (default `DEFAULT_URL`), with
`user:password@` before the host where it wants those, and OPENAI_API_KEY.
"""

import base64
import dataclasses
import html
import json
import os
import re
import urllib.parse
from collections.abc import Iterable

DEFAULT_URL = "https://api.openai.com/v1"
HIDDEN = "***"
# Of a secret, so many characters in a row are hidden wherever they stand: what
# a server or a limit of length cut off.
_MIN_PART = 8


@dataclasses.dataclass(frozen=True)
class Access:
  """An endpoint's address, without user and password, and what proves a user.

  Attributes:
    url: of the endpoint, without a slash at its end.
    headers: with the key, or with user and password, if there are any.
    secrets: what is hidden, in every form in which it may come back.
  """

  url: str
  headers: dict[str, str] = dataclasses.field(repr=False)
  secrets: frozenset[str] = dataclasses.field(repr=False)

  def hide(self, text: str, *, min_length: int = 1) -> str:
    """Returns a text with `HIDDEN` in place of secrets and parts of them.

    Args:
      text: what may be shown or kept.
      min_length: secrets of fewer characters stay.
    """
    is_hidden = bytearray(len(text))
    for secret in self.secrets:
      if len(secret) < min_length:
        continue
      length = min(len(secret), _MIN_PART)
      parts = {
        secret[at : at + length] for at in range(len(secret) - length + 1)
      }
      for at in range(len(text) - length + 1):
        if text[at : at + length] in parts:
          is_hidden[at : at + length] = b"\x01" * length
    kept, runs = [], re.finditer(rb"\x00+|\x01+", bytes(is_hidden))
    for run in runs:
      shown = text[run.start() : run.end()]
      kept.append(HIDDEN if is_hidden[run.start()] else shown)
    return "".join(kept)


def read() -> Access:
  """Returns what the environment says.

  Raises:
    ValueError: no key for the default URL, or a value that cannot be; it is
      shown without user and password, and the key not at all.
  """
  base = (os.environ.get("OPENAI_BASE_URL") or "").strip() or DEFAULT_URL
  key = os.environ.get("OPENAI_API_KEY", "").strip()
  if not _is_plain(key):
    raise ValueError(
      "OPENAI_API_KEY has a control character, or one outside of ASCII, in it"
      " (its value is not shown); allowed: the key alone"
    )
  shown = re.sub(r"^(https?://|).*@", rf"\1{HIDDEN}@", base, flags=re.S)
  if not base.startswith(("http://", "https://")):
    raise ValueError(f"OPENAI_BASE_URL={shown!r}: must begin with http(s)://")
  url, user = _split_user(base, shown)
  if url == DEFAULT_URL and not (key or user):
    raise ValueError(
      f"OPENAI_API_KEY is not set, which {DEFAULT_URL} asks for; allowed: a"
      " key, or another OPENAI_BASE_URL"
    )
  if key and user:
    raise ValueError(
      f"OPENAI_API_KEY is set, and OPENAI_BASE_URL={shown!r} has a user; one"
      " of them can be sent: allowed: the key, or the user"
    )
  proof, names = key and f"Bearer {key}", [key]
  if user:
    name, _, password = map(urllib.parse.unquote, user.partition(":"))
    token = base64.b64encode(f"{name}:{password}".encode()).decode()
    proof, names = f"Basic {token}", [user, name, password, token]
  return Access(
    url=url,
    headers={"Authorization": proof} if proof else {},
    secrets=frozenset(_forms(names)),
  )


def _is_plain(text: str) -> bool:
  return text.isascii() and text.isprintable()


def _split_user(base: str, shown: str) -> tuple[str, str]:
  """Returns a URL without its user, and `user:password` as they stand in it."""
  problem = "not a URL"
  try:
    parts = urllib.parse.urlsplit(base)
    user, _, host = parts.netloc.rpartition("@")
    is_url = bool(parts.hostname) and parts.port != 0 and _is_plain(base)
    if parts.query or parts.fragment or base.endswith(("?", "#")):
      is_url, problem = False, "must have no query and no fragment"
  except ValueError:
    is_url = False
  if not is_url:
    # What follows a question mark may be a key as well.
    raise ValueError(
      f"OPENAI_BASE_URL={re.split('[?#]', shown)[0]!r}: {problem}; allowed:"
      " such as http://localhost:8000/v1 (in a password, / ? # @ as %2F %3F"
      " %23 %40)"
    )
  return f"{parts.scheme}://{host}{parts.path.rstrip('/')}", user


def _forms(secrets: Iterable[str]) -> Iterable[str]:
  """Yields secrets as they are, and as URLs, JSON, HTML, Python have them."""
  quote = urllib.parse.quote
  for secret in filter(None, secrets):
    yield secret
    yield quote(secret, safe="")
    yield quote(secret)
    yield quote(quote(secret, safe=""), safe="")
    yield urllib.parse.quote_plus(secret)
    yield json.dumps(secret)[1:-1]
    yield html.escape(secret)
    yield repr(secret)[1:-1]

"""Lines of JSON that hold a conversation, or token ids, in place of a text.

  {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]}
  {"tokens": [1, 4093, 198, ...], "tokenizer": "huggingface:0123456789abcdef"}

Messages become the ids that the tokenizer's chat template gives, special tokens among them, up to the end of the last
turn. Ids are taken as they are where they are of this tokenizer: a text that a model wrote need not have the tokens
that its own text has. Such a line also has messages or a text (`evo_jax.generate --output` writes both), which other
tokenizers read.

A document has neither a begin token in front nor a separator behind, since those are the stream's: where a
conversation has them, they are left out. Templates that write them between turns, too (Llama 2's), give conversations
that `model.isolate_documents` takes apart there.
"""

import functools
import hashlib
import json
from typing import Any

import numpy as np

from evo_jax.data import chat
from evo_jax.data.chat import ChatTemplate, Message
from evo_jax.data.json_lines import BadLine
from evo_jax.data.tokenizers import Tokenizer
from evo_jax.errors import UserError

MESSAGES = "messages"
ROLES = ("system", "user", "assistant", "tool")


def check_messages(messages: Any) -> list[Message]:
  """What stands in a field `messages`. Raises BadLine where it is no conversation."""
  if not isinstance(messages, list):
    raise BadLine(f"has no list in field '{MESSAGES}'")
  if not messages:
    raise BadLine("has a conversation without messages")
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
      raise BadLine("has a message without a string in field 'content'")
    if message.get("role") not in ROLES:
      raise BadLine(f"has a message whose role is none of {', '.join(ROLES)} ({message.get('role')!r})")
    if not message["content"].strip():
      raise BadLine(f"has an empty message (of the {message['role']})")
  return messages


def template_identity(tokenizer: Tokenizer) -> str:
  """Names the chat template, on which the ids of messages depend beside the tokenizer's identity; "" for none."""
  template = getattr(tokenizer, "chat_template", None)
  return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""


def end_of_turn(tokenizer: Tokenizer, ids: np.ndarray) -> int:
  """How many of ids (n,) there are up to and with the last that ends a turn; all where text follows, or none does."""
  ends = np.flatnonzero(np.isin(ids, tokenizer.turn_end_ids))
  end = ends[-1] + 1 if len(ends) else len(ids)
  return len(ids) if tokenizer.decode(ids[end:]).strip() else end


class Conversations:
  """Reads lines without a text for a tokenizer."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer

  def read(self, line: dict[str, Any], field: str, default: str) -> tuple[bytes, np.ndarray] | None:
    """The content by which a document is known, as bytes, and its ids (n,); None: the line is to be read as text.

    field: that is asked for. Where it is the `default`, a line may have a conversation or ids instead. Raises BadLine.
    """
    has_ids = field == default and isinstance(line.get("tokens"), list) and isinstance(line.get("tokenizer"), str)
    has_messages = field == MESSAGES or (field == default and field not in line and MESSAGES in line)
    own = has_ids and line["tokenizer"] == self._tokenizer.identity
    if not own and not has_messages:
      if has_ids and field not in line:
        raise BadLine(f"has tokens of another tokenizer ({line['tokenizer']})")
      return None
    if has_messages and MESSAGES not in line:
      raise BadLine(f"has no field '{MESSAGES}'")
    content = next(line[name] for name in (field, MESSAGES, "tokens") if name in line)
    if not own:
      check_messages(content)
    try:
      raw = content.encode() if isinstance(content, str) else json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can escape
      raise BadLine("has text that is not valid Unicode") from error
    return raw, self._as_document(self._own_ids(line["tokens"]) if own else self._encode(content))

  @functools.cached_property
  def _template(self) -> ChatTemplate:
    try:
      return ChatTemplate(self._tokenizer, chat.DATE)
    except UserError as error:
      raise BadLine(f"has messages, which cannot be read: {error}") from error

  def _encode(self, messages: list[Message]) -> np.ndarray:
    """The ids of a conversation, up to the end of its last turn."""
    try:
      ids = np.array(self._template.encode(messages, add_generation_prompt=False), np.int64)
    except UserError as error:
      raise BadLine(f"has messages that cannot be used ({error})") from error
    return ids[: end_of_turn(self._tokenizer, ids)]

  def _own_ids(self, tokens: list[Any]) -> np.ndarray:
    vocab_size = self._tokenizer.vocab_size
    for token in tokens:
      if not isinstance(token, float) or not token.is_integer() or not 0 <= token < vocab_size:  # as DECODER reads them
        raise BadLine(f"has tokens that are no ids of the vocabulary ({token})")
    return np.array(tokens, np.int64)

  def _as_document(self, ids: np.ndarray) -> np.ndarray:
    """The ids without what the stream has around a document."""
    begins = len(ids) > 0 and ids[0] == self._tokenizer.begin_id
    ends = len(ids) > begins and ids[-1] == self._tokenizer.separator_id
    return ids[int(begins) : len(ids) - int(ends)]

"""Lines of JSON that hold a conversation, as ids of which each says whether it belongs to an answer.

  {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine."}]}
  {"prompt": "Name a river.", "completion": "The Rhine."}

A prompt is what a user says, a completion what the assistant does, or each is a list of messages; answers are then the
assistant's in the completion. Ids are those of the tokenizer's chat template. An answer is what generation would write
(`ChatTemplate.encode_answers`), up to and with the token that ends its turn. What stands behind the last answer is left
out.

A number of a stream is an id, with two bits more: ANSWER, and BEGIN of the first token of a conversation. There is no
separator between conversations, nor a begin token in front where the template writes none: each is what `generate
--chat` reads and writes. A line is several conversations where the template rewrites earlier turns.
"""

import functools
import json
from typing import Any

import numpy as np

from evo_jax.data import chat
from evo_jax.data.chat import ChatTemplate, Message
from evo_jax.data.conversations import MESSAGES, check_messages, end_of_turn
from evo_jax.data.json_lines import BadLine
from evo_jax.data.tokenizers import Tokenizer
from evo_jax.errors import UserError

DTYPE = np.dtype("<u4")  # of numbers
ANSWER, BEGIN = 1 << 31, 1 << 30
_ID = BEGIN - 1
_PROMPT, _COMPLETION = "prompt", "completion"


def ids_of(numbers: np.ndarray) -> np.ndarray:
  """The ids, int32, of numbers of any shape."""
  return (numbers & DTYPE.type(_ID)).astype(np.int32)


def are_answers(numbers: np.ndarray) -> np.ndarray:
  """bool: which of the numbers, of any shape, belong to answers."""
  return numbers >= ANSWER


def index_of(numbers: np.ndarray) -> np.ndarray:
  """(n, 2) uint32: of each conversation of a stream's numbers, its length and the place of its first answer's token."""
  begins = np.flatnonzero(numbers & DTYPE.type(BEGIN))
  answers = np.flatnonzero(are_answers(numbers))
  first = answers[np.searchsorted(answers, begins)] - begins
  return np.stack([np.diff(np.append(begins, len(numbers))), first], axis=1).astype(DTYPE)


class Answers:
  """Reads lines of conversations for a tokenizer. which: answers are all of the assistant's ("answers"), or the last
  one ("last")."""

  def __init__(self, tokenizer: Tokenizer, which: str):
    self._tokenizer, self._which = tokenizer, which

  def read(self, line: dict[str, Any], field: str, default: str) -> tuple[bytes, np.ndarray]:
    """The messages, by which a document is known, as bytes, and the numbers (n,) of its conversations. Raises BadLine,
    also for a line without an answer. field, default: not read."""
    messages, first = _messages_of(line)
    answers = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if not answers:
      raise BadLine("has no answer (no message of the assistant)")
    try:
      raw = json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can escape
      raise BadLine("has text that is not valid Unicode") from error
    try:
      found = self._template.encode_answers(messages, answers if self._which == "answers" else answers[-1:])
    except UserError as error:
      raise BadLine(f"has messages that cannot be used ({error})") from error
    return raw, np.concatenate([self._numbers(parts) for parts in found])

  @functools.cached_property
  def _template(self) -> ChatTemplate:
    return ChatTemplate(self._tokenizer, chat.DATE)

  def _numbers(self, parts: list[list[int]]) -> np.ndarray:
    """Of a conversation's parts, in turn read and answered."""
    numbers = [np.array(part, DTYPE) for part in parts]
    for i, part in enumerate(numbers):
      if i % 2:
        end = end_of_turn(self._tokenizer, part)
        part[:end] |= DTYPE.type(ANSWER)
    whole = np.concatenate(numbers)
    answered = np.flatnonzero(are_answers(whole))
    if not len(answered) or answered[0] == 0:
      raise BadLine("has an answer without tokens, or with nothing before it")
    whole[0] |= DTYPE.type(BEGIN)
    return whole[: answered[-1] + 1]


def _messages_of(line: dict[str, Any]) -> tuple[list[Message], int]:
  """A line's conversation, and the number of its first message that may be an answer. Raises BadLine."""
  if MESSAGES in line:
    return check_messages(line[MESSAGES]), 0
  if _PROMPT not in line or _COMPLETION not in line:
    raise BadLine(f"has neither '{MESSAGES}' nor '{_PROMPT}' and '{_COMPLETION}'")
  prompt, completion = (
    [{"role": role, "content": line[name]}] if isinstance(line[name], str) else line[name]
    for name, role in ((_PROMPT, "user"), (_COMPLETION, "assistant"))
  )
  if not isinstance(prompt, list) or not isinstance(completion, list):
    raise BadLine(f"has a '{_PROMPT}' or '{_COMPLETION}' that is neither a string nor messages")
  return check_messages([*prompt, *completion]), len(prompt)

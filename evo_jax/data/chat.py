"""Chat templates: conversations as token ids, by the Jinja template that comes with a tokenizer.

A template is a program from elsewhere: it runs in Jinja's sandbox and cannot change what it is given. It finds what
Hugging Face's templates expect: messages, add_generation_prompt, bos_token and the other named tokens, raise_exception,
strftime_now, `tojson` without escapes for HTML, and the tags `break`, `continue` and `generation`.

Special tokens that the template writes become their ids; the same characters in a message are text. To tell them apart,
each special token in a message is one character that occurs nowhere else while the template runs.
"""

from collections.abc import Mapping, Sequence
import datetime
import json
import re
from typing import Any

import numpy as np

from evo_jax.data.huggingface import HuggingFace
from evo_jax.errors import UserError

Message = Mapping[str, Any]  # "role", "content", and what else a template asks for

DATE = datetime.datetime(2024, 7, 26)  # of conversations that are kept: they are the same on any day
_PRIVATE = range(0xF0000, 0x10FFFE)  # characters without a meaning, one of which a text rarely has


class ChatTemplate:
  """The chat template of a tokenizer."""

  def __init__(self, tokenizer: Any, date: datetime.datetime | None = None):
    """date: that templates find; default: today. Raises UserError where the tokenizer has no template, or one that
    cannot be compiled."""
    if not isinstance(tokenizer, HuggingFace) or not isinstance(tokenizer.chat_template, str):
      raise UserError(f"the tokenizer, {tokenizer.identity}, has no chat template")
    self._tokenizer = tokenizer
    self._template = _compile(tokenizer.chat_template, date)

  def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """Ids of a conversation, the first of them at position 0: where a begin token belongs, the template writes it.

    add_generation_prompt: whether the assistant's next message is begun. Raises UserError where the template refuses
    the messages.
    """
    messages, hidden = self._hidden(messages)
    (ids,) = self._tokenizer.encode_with_special(self._render(messages, add_generation_prompt), hidden)
    if not ids:
      raise UserError("the chat template makes nothing of these messages")
    return ids

  def encode_answers(self, messages: Sequence[Message], numbers: Sequence[int]) -> list[list[list[int]]]:
    """Ids of a conversation up to the last of some answers, in parts: what is read, an answer, what is read, ...

    An answer is what generation would write: all that the rendering up to and with its message has behind the rendering
    of the messages before it with the generation prompt. Each part is encoded by itself, since generation begins behind
    the ids of the prompt. Where the template writes a turn otherwise once others follow (it strips or rewrites earlier
    turns), the answers before them are not what the model would read: then there are several conversations, each up to
    the last of the answers that stand in it as they were written, and each answer is in one.

    numbers: of the messages that are the answers, ascending. Raises UserError where the template refuses the messages,
    and where it does not write an answer as it begins one.
    """
    messages, hidden = self._hidden(messages)
    found, ends, text = [], [], ""
    for number in numbers:
      begun = self._render(messages[:number], True)
      written = self._render(messages[: number + 1], False)
      if not written.startswith(begun):
        raise UserError("the chat template writes an answer otherwise than its generation prompt begins it")
      if ends and not begun.startswith(text):
        found.append(self._tokenizer.encode_with_special(text, hidden, ends[:-1]))
        ends = []
      text = written
      ends += [len(begun), len(written)]
    return [*found, self._tokenizer.encode_with_special(text, hidden, ends[:-1])]

  def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text of a conversation, in which special tokens of template and messages look alike. Raises UserError."""
    return self._render(messages, add_generation_prompt)

  def _hidden(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages with a character for each special token, and what the characters stand for."""
    used = {*self._tokenizer.chat_template, *json.dumps(messages, ensure_ascii=False)}
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    special = sorted(self._tokenizer.special, key=len, reverse=True)
    hidden = dict(zip([*special, *sorted({token[0] for token in special} - {*special})], free))
    return _hide(messages, special, hidden), {character: original for original, character in hidden.items()}

  def _render(self, messages: Any, add_generation_prompt: bool) -> str:
    variables = {**self._tokenizer.named, "messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
      return self._template.render(**variables, tools=None, documents=None)
    except Exception as error:  # whatever a program may raise
      reason = " ".join(str(error).split()) or type(error).__name__
      raise UserError(f"the chat template refuses these messages: {reason}") from error


class ChatTokenizer:
  """A tokenizer to which a text is what a user says, or messages: `encode` gives the conversation up to the answer.

  begin_id is the first token of the conversation, so that `encode` begins at position 1, as that of others does.
  Everything else is the tokenizer's, also what `continuing` gives, for the answer.
  """

  def __init__(self, tokenizer: Any, system: str = "", date: datetime.datetime | None = None):
    """system: the system message, of conversations without one; empty: none, or the template's own. date: as for
    `ChatTemplate`. Raises UserError as that does."""
    if re.search("[\ud800-\udfff]", system):
      raise UserError("the system message is not valid UTF-8")
    self._tokenizer, self._template, self._system = tokenizer, ChatTemplate(tokenizer, date), system
    self.begin_id = self._template.encode(self.messages("Hello"))[0]

  def __getattr__(self, name: str) -> Any:
    return getattr(self._tokenizer, name)

  def encode(self, prompt: str | Sequence[Message]) -> np.ndarray:
    """(n,) ids of the conversation behind its first token. Raises UserError where the template refuses the prompt."""
    begin, *ids = self._template.encode(self.messages(prompt))
    if begin != self.begin_id:
      raise UserError("the chat template does not begin every conversation with the same token")
    return np.array(ids, np.uint32)

  def messages(self, prompt: str | Sequence[Message]) -> list[Message]:
    """The conversation that a prompt stands for."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if self._system and messages[0]["role"] != "system":
      messages.insert(0, {"role": "system", "content": self._system})
    return messages


def _hide(value: Any, special: list[str], hidden: dict[str, str]) -> Any:
  """Messages, or a part of them, with a character for each special token.

  A message may also end with the beginning of a special token that the text behind it would complete: of such a
  beginning, the first character is replaced. special: the tokens, the longest first.
  """
  if isinstance(value, Mapping):
    return {key: _hide(part, special, hidden) for key, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_hide(part, special, hidden) for part in value]
  if not isinstance(value, str):
    return value
  for token in special:
    value = value.replace(token, hidden[token])
  characters, end = list(value), len(value.rstrip())  # the template may strip it
  for i in range(max(0, end - len(special[0]) if special else end), end):
    if value[i] in hidden and any(token.startswith(value[i:end]) for token in special):
      characters[i] = hidden[characters[i]]
  return "".join(characters)


def _compile(source: str, date: datetime.datetime | None):
  """The template in a sandbox. Raises UserError."""
  try:
    import jinja2
    from jinja2 import ext, sandbox
  except ImportError as error:
    raise UserError("chat templates need the package jinja2: pip install 'evo_jax[pretrained]'") from error

  class Generation(ext.Extension):
    """{% generation %}, which marks what the assistant wrote, as a block like any other."""

    tags = frozenset({"generation"})

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(["name:endgeneration"], drop_needle=True)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: (date or datetime.datetime.now()).strftime(form)
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise UserError(f"the chat template is no Jinja: {error.message} (line {error.lineno})") from error

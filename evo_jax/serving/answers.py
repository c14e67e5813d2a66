"""What clients get: finished texts and pieces of them in the forms of OpenAI's completions and chat completions."""

from collections.abc import Iterable, Sequence
import dataclasses
import time
from typing import Any
import uuid

import numpy as np

from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.decoding.progress import Generation, TokenChoice
from evo_jax.decoding.recorder import TracedPass
from evo_jax.serving.requests import Asked

_INVALID = "\ufffd"
_LEAST = -9999.0  # stands for a log-probability of minus infinity, which JSON lacks
_CHARACTER = 4  # bytes that a character has at most


class TokenNames:
  """Tokens as log-probabilities name them: by their text; special ones, and parts of characters, by what stands for
  them."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = continuing(tokenizer)
    self._special = {id_: text for text, id_ in getattr(tokenizer, "special", {}).items()}

  def __call__(self, token: int) -> str:
    text = self._tokenizer.decode(np.array([token], np.int64))
    return text if text and _INVALID not in text else self._special.get(token, f"token_id:{token}")

  def bytes(self, token: int) -> list[int] | None:
    """Its text's UTF-8 bytes; None: it is not text by itself."""
    text = self._tokenizer.decode(np.array([token], np.int64))
    return list(text.encode()) if text and _INVALID not in text else None

  def offsets(self, tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Where each token's text begins in the text of all; that of a character's parts where the character does.
    tokenizer: the one by which the first is decoded."""
    start, offsets, part = 0, [], []
    for token in tokens:
      offsets.append(start)
      part.append(token)
      text = tokenizer.decode(np.array(part, np.int64))
      if not text.endswith(_INVALID) or len(part) >= _CHARACTER:
        start, part, tokenizer = start + len(text), [], self._tokenizer
    return offsets


@dataclasses.dataclass(frozen=True)
class Written:
  """A text that is done. text: with the prompt, where it is to be echoed. reason: why it ended, "stop" or "length".
  begins: whether no prompt stands before it. given, choices: log-probabilities of the prompt's tokens, where they are
  echoed, and of what was written."""

  index: int
  text: str
  reason: str
  tokens: int = 0
  begins: bool = False
  generation: Generation | None = None
  given: list[TokenChoice] = dataclasses.field(default_factory=list)

  @property
  def choices(self) -> list[TokenChoice]:
    return (self.generation.choices or []) if self.generation else []


class Answer:
  """Makes the objects of one answer."""

  def __init__(self, asked: Asked, model: str, fingerprint: str, names: TokenNames, tokenizer: Tokenizer):
    self._asked, self._names, self._tokenizer = asked, names, tokenizer
    self._object = "chat.completion" if asked.chat else "text_completion"
    self._head = {
      "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model,
      "system_fingerprint": fingerprint,
    }

  def whole(self, written: Iterable[Written], usage: dict[str, Any]) -> dict[str, Any]:
    """The answer, where it is not streamed."""
    choices = [self._choice(each) for each in written]
    return {**self._head, "object": self._object, "choices": choices, "usage": usage}

  def _choice(self, written: Written) -> dict[str, Any]:
    content = {"text": written.text}
    if self._asked.chat:
      content = {"message": {"role": "assistant", "content": written.text, "refusal": None}}
    end = {"logprobs": self._log_probabilities(written), "finish_reason": written.reason}
    return {"index": written.index, **content, **end}

  def first_chunks(self, index: int, prompt: str) -> list[dict[str, Any]]:
    """What stands before a streamed text."""
    if self._asked.chat:
      return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}})]
    return [self._chunk(index, {"text": prompt})] if prompt else []

  def piece(self, index: int, text: str, trace: Sequence[TracedPass] = ()) -> dict[str, Any]:
    """A piece of a streamed text; trace: the passes that committed it."""
    content = {"delta": {"content": text}} if self._asked.chat else {"text": text}
    if trace:
      cells = lambda step: [[i, round(t, 4), piece, event] for i, t, piece, event in step.cells]
      content["trace"] = [{"pass": step.number, "cells": cells(step)} for step in trace]
    return self._chunk(index, content)

  def last_chunk(self, written: Written) -> dict[str, Any]:
    """The end of a streamed text; with its log-probabilities also the text, since they are found when it is done."""
    text = written.text if self._asked.best is not None else ""
    content = {"text": text}
    if self._asked.chat:
      content = {"delta": {"content": text} if text else {}}
    return self._chunk(written.index, content, self._log_probabilities(written), written.reason)

  def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
    return {**self._head, "object": self._chunk_object, "choices": [], "usage": usage}

  @property
  def _chunk_object(self) -> str:
    return f"{self._object}.chunk" if self._asked.chat else self._object

  def _chunk(self, index: int, content: dict[str, Any], log_p: Any = None, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": index, **content, "logprobs": log_p, "finish_reason": reason}
    usage = {"usage": None} if self._asked.include_usage else {}
    return {**self._head, "object": self._chunk_object, "choices": [choice], **usage}

  def _log_probabilities(self, written: Written) -> dict[str, Any] | None:
    if self._asked.best is None:
      return None
    choices = [*written.given, *written.choices]
    if self._asked.chat:
      choices = choices[: len(written.generation.tokens)]  # of what the message has
      entries = [{**self._entry(c.token, c.log_p), "top_logprobs": [self._entry(*b) for b in c.best]} for c in choices]
      return {"content": entries, "refusal": None}
    tokens = [choice.token for choice in choices]
    beginning = self._tokenizer if written.given or written.begins else continuing(self._tokenizer)
    return {
      "tokens": [self._names(token) for token in tokens],
      "token_logprobs": [choice.log_p if choice.log_p is None else _finite(choice.log_p) for choice in choices],
      "top_logprobs": [self._best(choice) for choice in choices],
      "text_offset": self._names.offsets(tokens, beginning),
    }

  def _entry(self, token: int, log_p: float) -> dict[str, Any]:
    return {"token": self._names(token), "logprob": _finite(log_p), "bytes": self._names.bytes(token)}

  def _best(self, choice: TokenChoice) -> dict[str, float] | None:
    """By name the most probable tokens, and the one that was chosen."""
    if choice.log_p is None:
      return None
    found = {}
    for token, log_p in [*choice.best, (choice.token, choice.log_p)]:
      found.setdefault(self._names(token), _finite(log_p))  # of two with the same text the more probable
    return found


def count_usage(prompt_tokens: int, shared: int, written: Sequence[Written]) -> dict[str, Any]:
  """Tokens read and written, and passes. shared: tokens of prompts that were in memory. What mode verify did not have
  to write is `accepted_prediction_tokens`."""
  generations = [each.generation for each in written if each.generation is not None]
  completion = sum(each.tokens for each in written)
  usage = {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": completion,
    "total_tokens": prompt_tokens + completion,
    "prompt_tokens_details": {"cached_tokens": min(shared, prompt_tokens)},
    "passes": sum(generation.passes for generation in generations),
  }
  if any(generation.accepted is not None for generation in generations):
    accepted = sum(min(generation.accepted, each.tokens) for each, generation in zip(written, generations))
    usage["completion_tokens_details"] = {"accepted_prediction_tokens": accepted}
  return usage


def _finite(log_p: float) -> float:
  return max(log_p, _LEAST)

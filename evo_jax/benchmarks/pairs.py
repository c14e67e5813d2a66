"""Texts of benchmarks as token ids: pairs of context and continuation, windows of long texts, and what is cut off.

The rules are the harness's own for its `hf` models. A text begins with the begin token if the tokenizer puts it there,
and never with two. Where that leaves a context empty, it is the tokenizer's bos_token, or else its eos_token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.errors import UserError

BEGINS = ("auto", "always")


class Pair(NamedTuple):
  """Ids of a context, its first token at position 0, and of what follows it."""

  context: tuple[int, ...]
  continuation: tuple[int, ...]


class Encoder:
  """Encodes the texts of benchmarks."""

  def __init__(self, tokenizer: Tokenizer, begin: str = "auto", special: bool = False):
    """begin: "auto", or "always": the begin token of training (`Tokenizer.begin_id`) in front of every text, also where
    the tokenizer does not put it there. special: whether special tokens in texts are meant as such, as those of chat
    templates are. Raises UserError."""
    if begin not in BEGINS:
      raise UserError(f"--begin={begin}: is not one of {', '.join(BEGINS)}")
    self._tokenizer, self._special = tokenizer, special and hasattr(tokenizer, "encode_with_special")
    self.adds_begin = begin == "always" or getattr(tokenizer, "adds_begin", True)
    self.prefix_id = tokenizer.begin_id
    if not self.adds_begin:
      named = (tokenizer.special.get(tokenizer.named.get(name)) for name in ("bos_token", "eos_token"))
      self.prefix_id = next((id_ for id_ in named if id_ is not None), tokenizer.begin_id)

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with the begin token where it has one."""
    ids = self._plain(text)
    begin = self._tokenizer.begin_id
    return [begin, *ids] if self.adds_begin and ids[:1] != [begin] else ids

  def _plain(self, text: str) -> list[int]:
    if self._special:
      (ids,) = self._tokenizer.encode_with_special(text, {})
      return ids
    return self._tokenizer.encode(text).tolist()

  def encode_context(self, text: str) -> list[int]:
    """Ids of a text that is continued: one or more."""
    return self.encode(text) or [self.prefix_id]

  def continue_text(self, text: str) -> list[int]:
    """Ids of a text in the middle of another."""
    return continuing(self._tokenizer).encode(text).tolist()

  def pair(self, context: str, continuation: str) -> Pair:
    """A context and its continuation. White space at the context's end belongs to the continuation, and what is encoded
    is both together."""
    if not context:
      ids = self._plain(continuation)
      return (
        Pair((self.prefix_id,), tuple(ids)) if ids[:1] != [self.prefix_id] else Pair(tuple(ids[:1]), tuple(ids[1:]))
      )
    end = len(context.rstrip())
    whole, before = self.encode(context + continuation), self.encode(context[:end])
    return Pair(tuple(before) or (self.prefix_id,), tuple(whole[len(before) :]))

  def rolling(self, text: str, limit: int) -> list[Pair]:
    """A text as windows of at most `limit` tokens: each of its tokens is predicted once, behind as many as fit."""
    return windows((self.prefix_id,), self._plain(text), limit)


def windows(context: Sequence[int], ids: Sequence[int], limit: int) -> list[Pair]:
  """Windows of at most `limit` tokens, of which the first begins with `context`: each of the ids is predicted once,
  behind as many others as fit (`lm_eval.utils.get_rolling_token_windows`, with a context of one token)."""
  whole, first = (*context, *ids), len(context)
  pairs, done = [], first
  while done < len(whole):
    end = min(len(whole), limit if done == first else done + limit - 1)
    start = max(0, end - limit)
    pairs.append(Pair(whole[start:done], whole[done:end]))
    done = end
  return pairs


def fitted(pair: Pair, limit: int) -> tuple[list[Pair], bool]:
  """What of a pair fits `limit` tokens: the context is cut from the left, and a continuation that is too long itself
  becomes windows. And whether anything was cut. Nothing is left of a pair without a continuation."""
  if len(pair.context) + len(pair.continuation) <= limit:
    return ([pair] if pair.continuation else []), False
  if len(pair.continuation) < limit:
    return [Pair(pair.context[len(pair.continuation) - limit :], pair.continuation)], True
  return windows(pair.context[-1:], pair.continuation, limit), True


def fitted_prompt(ids: list[int], tokens: int, limit: int) -> tuple[list[int], int, bool]:
  """A prompt cut from the left so that `tokens` tokens may follow it within `limit`, how many may, and whether the
  prompt was cut. An answer never takes more than half of the room from a prompt that needs it."""
  room = min(tokens, max(limit - len(ids), limit // 2))
  return ids[-(limit - room) :], room, len(ids) + room > limit

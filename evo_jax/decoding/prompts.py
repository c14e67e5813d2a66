"""Prompts: encoding, gaps to be infilled, and the padded buffers of a batch."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import NamedTuple
import zlib

import numpy as np

from evo_jax.data.chat import ChatTokenizer, Message
from evo_jax.data.tokenizers import Tokenizer, continuing
from evo_jax.decoding.settings import DEFAULT_TOKENS, Sampling
from evo_jax.errors import UserError

# Messages are what a `ChatTokenizer` takes, up to an answer; ids stand behind the begin token, None in gaps.
Prompt = str | Sequence[Message] | Sequence[int | None]

_GAP = re.compile(r"\[\.\.\.([0-9]*)\]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SIZE_MULTIPLE = 32  # sizes of buffers are rounded up, so that texts of similar length share compiled code


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to be written.

  tokens: ids from position 1 on, None in gaps. max_length: positions of the finished text, with the begin token's.
  digest, repetition: the numbers that the row's key is made of, so that its draws depend on nothing else.
  """

  prompt: Prompt
  tokens: tuple[int | None, ...]
  max_length: int
  digest: int
  repetition: int

  @property
  def prompt_end(self) -> int:
    """The first position that is not given."""
    return (*self.tokens, None).index(None) + 1

  @property
  def gaps(self) -> list[int]:
    """The positions to be infilled."""
    return [position for position, token in enumerate(self.tokens, 1) if token is None]


class Buffers(NamedTuple):
  """What a batch is prefilled from. Arrays of B rows, C positions: tokens (B, C) int32, known (B, C) bool, and numbers
  (B,) by row: prompt_end, max_length int32; digest, repetition uint32."""

  tokens: np.ndarray
  known: np.ndarray
  prompt_end: np.ndarray
  max_length: np.ndarray
  digest: np.ndarray
  repetition: np.ndarray


def make_requests(
  prompts: Sequence[Prompt], num: int, infill: bool, sampling: Sampling, tokenizer: Tokenizer, context: int
) -> list[Request]:
  """`num` requests for each prompt in turn. Raises UserError as `make_request`."""
  requests, repetitions = [], {}
  for prompt in prompts:
    request = make_request(prompt, infill, sampling, tokenizer, context)
    first = repetitions.get(request.digest, 0)
    repetitions[request.digest] = first + num
    requests += [dataclasses.replace(request, repetition=first + i) for i in range(num)]
  return requests


def make_request(prompt: Prompt, infill: bool, sampling: Sampling, tokenizer: Tokenizer, context: int) -> Request:
  """The first request for a prompt. Raises UserError where it is too long or cannot be encoded."""
  if infill:
    tokens, room = _with_gaps(prompt, tokenizer, sampling.gap, context), 0
  else:
    tokens, room = encode(prompt, tokenizer, sampling.max_tokens, context)
  digest = zlib.crc32(repr(tokens).encode())
  return Request(prompt, tuple(tokens), len(tokens) + 1 + room, digest, 0)


def encode(prompt: Prompt, tokenizer: Tokenizer, max_tokens: int | None, context: int) -> tuple[list[int], int]:
  """The prompt's ids, and how many tokens may follow: max_tokens; None: DEFAULT_TOKENS, or what the context leaves.

  Raises UserError where they do not fit the context.
  """
  what = _named(prompt)
  tokens = to_ids(prompt, tokenizer)
  room = context - len(tokens)
  if max_tokens is not None and max_tokens > room:
    raise UserError(f"{what}: its {len(tokens)} tokens and {max_tokens} more do not fit the context of {context}")
  if room < 1:
    raise UserError(f"{what}: its {len(tokens)} tokens leave no room for another in the context of {context}")
  return tokens, min(room, DEFAULT_TOKENS if max_tokens is None else max_tokens)


def _with_gaps(prompt: Prompt, tokenizer: Tokenizer, gap: int, context: int) -> list[int | None]:
  if not _are_ids(prompt):
    return encode_with_gaps(prompt, tokenizer, gap, context)
  tokens = [token if token is None else _checked_id(token, tokenizer) for token in prompt]
  if len(tokens) > context:
    raise UserError(f"a text of {len(tokens)} tokens, with those of its gaps, does not fit the context of {context}")
  if None not in tokens:
    raise UserError("the text has no gap to fill")
  return tokens


def _are_ids(prompt: Prompt) -> bool:
  return not isinstance(prompt, str) and not any(isinstance(part, Mapping) for part in prompt)


def _checked_id(token: object, tokenizer: Tokenizer) -> int:
  """A prompt's id. Raises UserError for what is none."""
  if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < tokenizer.vocab_size:
    raise UserError(f"prompt: {token!r} is no id; the tokenizer has {tokenizer.vocab_size}")
  return int(token)


def _named(prompt: Prompt) -> str:
  """A prompt as a message shows it."""
  if _are_ids(prompt):
    return "prompt"
  return f"prompt {shortened(prompt if isinstance(prompt, str) else prompt[-1]['content'])}"


def encode_with_gaps(text: str, tokenizer: Tokenizer, gap: int, context: int) -> list[int | None]:
  """The text's ids, None in its gaps: n tokens for `[...n]`, `gap` for `[...]`. Raises UserError."""
  what = f"--infill {shortened(text)}"
  tokens = []
  for i, piece in enumerate(_GAP.split(text)):  # text, number, text, number, ..., text
    if i % 2 == 0:
      tokens += to_ids(piece, tokenizer if i == 0 else continuing(tokenizer), what)
      continue
    size = gap if not piece else int(piece) if len(piece) < 10 else 10**9
    if not size:
      raise UserError(f"{what}: [...{piece}] has no token to fill; a gap has one or more")
    tokens += [None] * min(size, context + 1)
    if len(tokens) > context:
      break
  if len(tokens) > context:
    raise UserError(f"{what}: its tokens, with those of the gaps, do not fit the context of {context}")
  if None not in tokens:
    raise UserError(f"{what}: has no gap to fill; mark one by [...], or by [...12] for 12 tokens")
  return tokens


def shortened(text: str) -> str:
  """The text as a message shows it: its beginning, quoted, in one line."""
  return repr(text if len(text) < 40 else text[:36] + "...")


def readable(text: str) -> str:
  """The text with U+FFFD in place of lone surrogates, for which there is no UTF-8."""
  return _SURROGATE.sub("\ufffd", text)


def to_ids(prompt: Prompt, tokenizer: Tokenizer, what: str = "") -> list[int]:
  """The ids of a prompt; what: its name in messages. Bytes that are not UTF-8, which Python reads as lone surrogates
  (surrogateescape), are kept by a tokenizer of raw bytes. Raises UserError for what the tokenizer would not give back.
  """
  what = what or _named(prompt)
  if _are_ids(prompt):
    return [_checked_id(token, tokenizer) for token in prompt]
  if not isinstance(prompt, str) and not isinstance(tokenizer, ChatTokenizer):
    raise UserError(f"{what}: is a conversation, which --chat continues")
  text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
  if surrogates := _SURROGATE.findall(text):
    if not tokenizer.binary:
      raise UserError(f"{what}: is not valid UTF-8, which the tokenizer, {tokenizer.identity}, needs")
    if any(c < "\udc80" or c > "\udcff" for c in surrogates):
      raise UserError(f"{what}: is not valid Unicode: it has half a surrogate pair")
    return tokenizer.encode(text.encode(errors="surrogateescape")).tolist()
  if lost := tokenizer.lost(text):
    raise UserError(f"{what}: the tokenizer, {tokenizer.identity}, has no {lost[0]!r}")
  return tokenizer.encode(prompt).tolist()


def pack(requests: list[Request], begin_id: int, row_multiple: int, room: int) -> tuple[Buffers, int]:
  """The buffers of a batch, and P, the positions that the prefill reads.

  Rows are a power of two, rounded up to `row_multiple`; added rows are done before they begin. room: positions behind
  the longest text, for the slots of a pass.
  """
  B = _round_up(1 << (len(requests) - 1).bit_length(), row_multiple)
  P = _round_up(max(request.prompt_end for request in requests), _SIZE_MULTIPLE)
  C = _round_up(max(P, *(request.max_length for request in requests)) + room, _SIZE_MULTIPLE)
  tokens, known = np.full((B, C), begin_id, np.int32), np.zeros((B, C), bool)
  known[:, 0] = True
  for i, request in enumerate(requests):
    tokens[i], known[i] = padded(request, begin_id, C)

  def by_row(name, dtype):
    return np.array([getattr(request, name) for request in requests] + [1] * (B - len(requests)), dtype)

  lengths = by_row("prompt_end", np.int32), by_row("max_length", np.int32)
  return Buffers(tokens, known, *lengths, by_row("digest", np.uint32), by_row("repetition", np.uint32)), P


def padded(request: Request, begin_id: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """A request's tokens (size,) int32, with the begin token, which also stands where none is given; and (size,) bool,
  which of them are given."""
  tokens, known = np.full(size, begin_id, np.int32), np.zeros(size, bool)
  end = len(request.tokens) + 1
  tokens[1:end] = [begin_id if token is None else token for token in request.tokens]
  known[0], known[1:end] = True, [token is not None for token in request.tokens]
  return tokens, known


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple

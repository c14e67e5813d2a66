"""Prompts: prompt files, encoding, gaps to be infilled, and the padded buffers of a batch."""

import dataclasses
import json
import re
import sys
from typing import NamedTuple
import zlib

import numpy as np

from evo_jax.data.tokenizers import Tokenizer
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError

_GAP = re.compile(r"\[\.\.\.(\d*)\]")
_SIZE_MULTIPLE = 32  # sizes of buffers are rounded up, so that texts of similar length share compiled code


@dataclasses.dataclass(frozen=True)
class Request:
  """A text to be written.

  tokens: ids from position 1 on, None in gaps. max_length: positions of the finished text, with the begin token's.
  digest, repetition: the numbers that the row's key is made of, so that its draws depend on nothing else.
  """

  prompt: str
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
  prompts: list[str], num: int, infill: bool, sampling: Sampling, tokenizer: Tokenizer, context: int
) -> list[Request]:
  """`num` requests for each prompt in turn. Raises UserError for a prompt that is too long or cannot be encoded."""
  requests, repetitions = [], {}
  for prompt in prompts:
    if infill:
      tokens, room = encode_with_gaps(prompt, tokenizer, sampling.gap, context), 0
    else:
      tokens, room = encode(prompt, tokenizer, sampling.max_tokens, context), sampling.max_tokens
    digest = zlib.crc32(repr(tokens).encode())
    for _ in range(num):
      repetition = repetitions.get(digest, 0)
      repetitions[digest] = repetition + 1
      requests.append(Request(prompt, tuple(tokens), len(tokens) + 1 + room, digest, repetition))
  return requests


def encode(prompt: str, tokenizer: Tokenizer, max_tokens: int, context: int) -> list[int]:
  """The prompt's ids. Raises UserError."""
  what = f"prompt {_shortened(prompt)}"
  _check_encodable(prompt, tokenizer, what)
  tokens = tokenizer.encode(prompt).tolist()
  if len(tokens) + max_tokens > context:
    raise UserError(f"{what}: its {len(tokens)} tokens and {max_tokens} more do not fit the context of {context}")
  return tokens


def encode_with_gaps(text: str, tokenizer: Tokenizer, gap: int, context: int) -> list[int | None]:
  """The text's ids, None in its gaps: n tokens for `[...n]`, `gap` for `[...]`. Raises UserError."""
  what = f"--infill {_shortened(text)}"
  _check_encodable(_GAP.sub("", text), tokenizer, what)
  tokens = []
  for i, piece in enumerate(_GAP.split(text)):  # text, number, text, number, ..., text
    tokens += [None] * int(piece or gap) if i % 2 else tokenizer.encode(piece).tolist()
  if None not in tokens:
    raise UserError(f"{what}: has no gap to fill; mark one by [...], or by [...12] for 12 tokens")
  if len(tokens) > context:
    raise UserError(f"{what}: its {len(tokens)} tokens with the gaps do not fit the context of {context}")
  return tokens


def _shortened(text: str) -> str:
  return repr(text if len(text) < 40 else text[:36] + "...")


def _check_encodable(text: str, tokenizer: Tokenizer, what: str) -> None:
  if lost := tokenizer.lost(text):
    raise UserError(f"{what}: the tokenizer, {tokenizer.identity}, has no {lost[0]!r}")


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
    end = len(request.tokens) + 1
    tokens[i, 1:end] = [begin_id if token is None else token for token in request.tokens]
    known[i, 1:end] = [token is not None for token in request.tokens]

  def by_row(name, dtype):
    return np.array([getattr(request, name) for request in requests] + [1] * (B - len(requests)), dtype)

  lengths = by_row("prompt_end", np.int32), by_row("max_length", np.int32)
  return Buffers(tokens, known, *lengths, by_row("digest", np.uint32), by_row("repetition", np.uint32)), P


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


def read_prompts(name: str) -> list[str]:
  """The prompts of a file, one per line; of a .jsonl file, each line a string or an object with "prompt" or "text"; of
  "-", standard input, one per line. Raises UserError that names file and line."""
  try:
    if name == "-":
      lines = sys.stdin.read().splitlines()
    else:
      with open(name, encoding="utf-8") as file:
        lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts={name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
  if not name.endswith(".jsonl"):
    return lines
  return [_parse_line(name, i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _parse_line(name: str, number: int, line: str) -> str:
  try:
    value = json.loads(line)
  except ValueError as error:
    raise UserError(f"--prompts={name}: line {number} is not JSON ({error})") from error
  value = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
  if not isinstance(value, str):
    raise UserError(f'--prompts={name}: line {number} is neither a string nor an object with "prompt" or "text"')
  return value

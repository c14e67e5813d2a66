"""The text field of one line of JSON: of a whole line, or of a line of any length while it is read."""

import codecs
from collections.abc import Iterable, Iterator
import json
import re
from typing import Any

DECODER = json.JSONDecoder(parse_int=float)  # a number's size does not matter, and int refuses thousands of digits
_CHARACTERS = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+')  # of a string, with whole escapes only
_SPACE = re.compile(rb"[ \t\r\n]*")
_BRACKET = re.compile(rb'["\[\]{}]')
_PLAIN = re.compile(rb"[-+.0-9A-Za-z]*")  # a number, true, false, null, NaN, Infinity
_LONGEST_ESCAPE = 6


class BadLine(ValueError):
  """A line that cannot be used; the message says why."""


def parse(line: bytes) -> Any:
  """The value of a line, which has no white space at its ends. Raises BadLine."""
  try:
    text = line.decode()
    value, end = DECODER.raw_decode(text)
  except UnicodeDecodeError as error:
    raise BadLine(f"is not UTF-8 text (byte {error.start})") from error
  except json.JSONDecodeError as error:
    raise BadLine(f"is not JSON ({error.msg})") from error
  except RecursionError as error:
    raise BadLine("is JSON that is nested too deeply") from error
  if end < len(text):
    raise BadLine("is not JSON (Extra data)")
  return value


def text_field(value: Any, field: str) -> tuple[str, bytes]:
  """The text in a field of a line's value, and its UTF-8 bytes. Raises BadLine."""
  if not isinstance(value, dict) or field not in value:
    raise BadLine(f"has no field '{field}'")
  if not isinstance(value[field], str):
    raise BadLine(f"has no string in field '{field}'")
  try:
    return value[field], value[field].encode()
  except UnicodeEncodeError as error:  # a lone surrogate, which JSON can escape
    raise BadLine(f"has a field '{field}' that is not valid Unicode") from error


def long_text_field(chunks: Iterable[bytes], field: str) -> Iterator[bytes]:
  """The text in a field of a line that comes in chunks, as UTF-8 in pieces of whole characters. Raises BadLine.

  Less is checked than of a whole line: in other fields no more than that strings and brackets end.
  """
  scanner, found = _Scanner(iter(chunks)), False
  if scanner.next() != b"{":
    raise BadLine(f"has no field '{field}'")
  while True:
    if scanner.next() != b'"':
      raise BadLine("is not JSON (Expecting property name enclosed in double quotes)")
    key = "".join(_decoded(scanner.string(), field))
    if scanner.next() != b":":
      raise BadLine("is not JSON (Expecting ':' delimiter)")
    if key == field:
      if found:
        raise BadLine(f"has the field '{field}' twice")
      if scanner.next() != b'"':
        raise BadLine(f"has no string in field '{field}'")
      found = True
      for text in _decoded(scanner.string(), field):
        try:
          yield text.encode()
        except UnicodeEncodeError as error:
          raise BadLine(f"has a field '{field}' that is not valid Unicode") from error
    else:
      scanner.skip_value()
    following = scanner.next()
    if following == b"}":
      break
    if following != b",":
      raise BadLine("is not JSON (Expecting ',' delimiter)")
  if scanner.next():
    raise BadLine("is not JSON (Extra data)")
  if not found:
    raise BadLine(f"has no field '{field}'")


def _decoded(pieces: Iterator[bytes], field: str) -> Iterator[str]:
  """The text of a string that comes in pieces of UTF-8 with whole escapes."""
  decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
  try:
    for piece in pieces:
      escaped = held + decoder.decode(piece)
      text, held = DECODER.decode(f'"{escaped}"'), ""
      if text and "\ud800" <= text[-1] <= "\udbff":  # the first escape of a pair
        text, held = text[:-1], escaped[-_LONGEST_ESCAPE:]
      yield text
    decoder.decode(b"", final=True)
  except UnicodeDecodeError as error:
    raise BadLine("is not UTF-8 text") from error
  except json.JSONDecodeError as error:
    raise BadLine(f"is not JSON ({error.msg})") from error
  if held:
    raise BadLine(f"has a field '{field}' that is not valid Unicode")


class _Scanner:
  """Reads a line from left to right; no more than two chunks of it are in memory."""

  def __init__(self, chunks: Iterator[bytes]):
    self._chunks, self._raw, self._at = chunks, b"", 0

  def next(self) -> bytes:
    """The next byte that is no space; empty at the end."""
    while True:
      self._at = _SPACE.match(self._raw, self._at).end()
      if self._at < len(self._raw):
        self._at += 1
        return self._raw[self._at - 1 : self._at]
      if not self._read():
        return b""

  def string(self) -> Iterator[bytes]:
    """The raw content of a string whose quote has been read, in pieces with whole escapes."""
    while True:
      end = _CHARACTERS.match(self._raw, self._at).end()
      if end > self._at:
        yield self._raw[self._at : end]
      self._at = end
      if self._raw[end : end + 1] == b'"':
        self._at += 1
        return
      if len(self._raw) - end >= _LONGEST_ESCAPE:
        raise BadLine("is not JSON (Invalid \\escape)")
      if not self._read():
        raise BadLine("is not JSON (Unterminated string)")

  def skip_value(self) -> None:
    first, depth = self.next(), 0
    while True:
      if first == b'"':
        for _ in self.string():
          pass
      elif first in (b"{", b"["):
        depth += 1
      elif first in (b"}", b"]"):
        depth -= 1
      elif not depth:
        self._skip_plain(first)
      if depth <= 0:
        return
      first = self._next_bracket()

  def _skip_plain(self, first: bytes) -> None:
    if not first or not _PLAIN.fullmatch(first):
      raise BadLine("is not JSON (Expecting value)")
    while True:
      self._at = _PLAIN.match(self._raw, self._at).end()
      if self._at < len(self._raw) or not self._read():
        return

  def _next_bracket(self) -> bytes:
    """The next bracket or quote."""
    while True:
      if found := _BRACKET.search(self._raw, self._at):
        self._at = found.end()
        return found[0]
      self._at = len(self._raw)
      if not self._read():
        raise BadLine("is not JSON (Expecting ',' delimiter)")

  def _read(self) -> bool:
    """Reads one more chunk; False at the end."""
    chunk = next(self._chunks, b"")
    self._raw, self._at = self._raw[self._at :] + chunk, 0
    return bool(chunk)

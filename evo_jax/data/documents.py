"""Readers: text files to documents, of which bad ones are skipped, counted and reported.

A document is a file of plain text, or the field "text" of a line of a .jsonl, .ndjson or .json file; text is UTF-8,
with or without a byte order mark.
"""

import codecs
import collections
from collections.abc import Iterator
import dataclasses
import json

from evo_jax.data import formats
from evo_jax.data.formats import shown
from evo_jax.errors import UserError

_BAD_SHARE = 0.1  # of more bad documents than this the files are probably of another kind
_EMPTY = "is empty"
_UTF32 = "is UTF-32 text; convert it to UTF-8"
_UTF16 = "is UTF-16 text; convert it to UTF-8"
_MARKS = {  # the first of UTF-32 begins as that of UTF-16 does
  codecs.BOM_UTF32_LE: _UTF32,
  codecs.BOM_UTF32_BE: _UTF32,
  codecs.BOM_UTF16_LE: _UTF16,
  codecs.BOM_UTF16_BE: _UTF16,
}
_JSON = json.JSONDecoder(parse_int=float)  # a number's size does not matter, and int refuses thousands of digits


@dataclasses.dataclass
class Reader:
  """Iterates over the documents of a source: text or, of bad ones, None.

  Bad are those that are empty files, not UTF-8, not JSON, or without text in the field. They raise UserError where
  `strict`, or where they, empty files aside, are more than a tenth of all documents; so does a source without any text,
  and a file that cannot be read as a whole. binary: plain text is given as bytes, valid UTF-8 or not.

  report: after the iteration, what was skipped; "" for nothing.
  """

  source: str
  files: list[str]
  binary: bool
  strict: bool = False
  report: str = dataclasses.field(default="", init=False)

  def __iter__(self) -> Iterator[str | bytes | None]:
    total, bad, first = 0, collections.Counter(), ""
    for file in self.files:
      for text, problem, line in _read(file, self.binary):
        total += 1
        if problem:
          first = first or f"{shown(file)}: {f'line {line} ' if line else ''}{problem}"
          bad[problem.split(" (")[0].split(";")[0]] += 1
          if self.strict:
            raise UserError(first)
        yield text
    if total == 0:
      raise UserError(f"{self.source}: no line has text")
    count = bad.total()
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in bad.most_common())
    what = f"{count:,} of {total:,} documents {{}} ({reasons}); the first: {first}"
    if count == total or count - bad[_EMPTY] > _BAD_SHARE * total:
      raise UserError(first if total == 1 else f"{self.source}: {what.format('cannot be used')}")
    if count:
      self.report = what.format("are skipped")


def _read(file: str, binary: bool) -> Iterator[tuple[str | bytes | None, str, int]]:
  """(text, "", line), or (None, its problem, line), of each document in a file; line 0 is the file as a whole."""
  raw = formats.read_content(file).removeprefix(codecs.BOM_UTF8)
  has_lines = formats.suffix_of(file)[0] in formats.LINES
  if not raw.strip():
    yield None, _EMPTY, 0
  elif problem := next((problem for mark, problem in _MARKS.items() if raw.startswith(mark)), None):
    if has_lines:  # it would count as one document
      raise UserError(f"{shown(file)}: {problem}")
    yield None, problem, 0
  elif has_lines:
    _check_lines(file, raw)
    yield from _read_lines(raw)
  else:
    text, problem = (raw, "") if binary else _decode(raw)
    yield text, problem, 0


def _check_lines(file: str, raw: bytes) -> None:
  """Raises UserError where a .json file is one JSON value, not a value for each line."""
  if formats.suffix_of(file)[0] != ".json":
    return
  text = raw.decode(errors="replace").strip()
  try:
    _, end = _JSON.raw_decode(text)
  except (ValueError, RecursionError):
    return
  if text[0] != "{" or {"\n", "\r"} & set(text[:end]):
    raise UserError(f"{shown(file)}: is one JSON value; documents are lines of JSON (.jsonl), one object each")


def _read_lines(raw: bytes) -> Iterator[tuple[str | None, str, int]]:
  """The field "text" of each line; empty lines and texts are no documents."""
  for number, line in enumerate(raw.splitlines(), 1):
    line = line.removeprefix(codecs.BOM_UTF8)
    if line.strip():
      text, problem = _decode(line)
      text, problem = (None, problem) if problem else _text_field(text)
      if text or problem:
        yield text, problem, number


def _text_field(line: str) -> tuple[str | None, str]:
  """The text of a line, or its problem."""
  try:
    value = _JSON.decode(line)
  except json.JSONDecodeError as error:
    return None, f"is not JSON ({error.msg})"
  except RecursionError:
    return None, "is JSON that is nested too deeply"
  if not isinstance(value, dict) or "text" not in value:
    return None, "has no field 'text'"
  if not isinstance(value["text"], str):
    return None, "has no string in field 'text'"
  try:
    value["text"].encode()
  except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
    return None, "has a field 'text' that is not valid Unicode"
  return value["text"], ""


def _decode(raw: bytes) -> tuple[str | None, str]:
  try:
    return raw.decode(), ""
  except UnicodeDecodeError as error:
    return None, f"is not UTF-8 text (byte {error.start})"

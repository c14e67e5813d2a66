"""Readers: files to documents, of which bad ones are skipped, counted and reported.

A document is a file of plain text, a field ("text") of a line of a .jsonl, .ndjson or .json file, or of a row of a
.parquet file; text is UTF-8, with or without a byte order mark. A line may also hold a conversation or token ids
(`conversations`).
"""

import codecs
import collections
from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from evo_jax.data import json_lines
from evo_jax.data.blocks import EMPTY, Block, read_blocks, split_lines
from evo_jax.data.conversations import MESSAGES, Conversations
from evo_jax.data.formats import shown
from evo_jax.errors import UserError

BAD_SHARE = 0.1  # of more bad documents than this the files are probably of another kind
FIELD = "text"


class Document(NamedTuple):
  """text: None where text need not be UTF-8, as of bad documents. raw: UTF-8. place: of a bad document, in its file.

  tokens: of a line that holds no text, its ids; raw is then what the line is known by.
  """

  text: str | None
  raw: bytes = b""
  problem: str = ""
  place: str = ""
  tokens: np.ndarray | None = None


@dataclasses.dataclass
class Tally:
  """Counts documents. skipped: the bad ones by reason. first: one line about the first of them."""

  documents: int = 0
  skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  first: str = ""

  def add(self, file: str, document: Document) -> None:
    self.documents += 1
    if document.problem:
      self.first = self.first or f"{shown(file)}: {document.place}{document.problem}"
      self.skipped[document.problem.split(" (")[0].split(";")[0]] += 1

  def update(self, other: "Tally") -> None:
    """Adds what was counted behind what has been."""
    self.documents += other.documents
    self.skipped.update(other.skipped)
    self.first = self.first or other.first

  def check(self, source: str, share: float, complete: bool = True) -> None:
    """Raises UserError where more than a share of the documents, empty files aside, is bad; where it is 0, any is.

    complete: whether all have been counted; a source without a good one is refused, too.
    """
    count = self.skipped.total()
    if count and not share:
      raise UserError(self.first)
    if complete and self.documents == 0:
      raise UserError(f"{source}: no line has text")
    if (complete and count == self.documents) or count - self.skipped[EMPTY] > share * self.documents:
      raise UserError(self.first if self.documents == 1 else f"{source}: {self._report('cannot be used')}")

  @property
  def report(self) -> str:
    """What was skipped, in one line; "" for nothing."""
    return self._report("are skipped") if self.skipped.total() else ""

  def _report(self, what: str) -> str:
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in self.skipped.most_common())
    return f"{self.skipped.total():,} of {self.documents:,} documents {what} ({reasons}); the first: {self.first}"


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
  field: str = FIELD
  report: str = dataclasses.field(default="", init=False)

  def __iter__(self) -> Iterator[str | bytes | None]:
    tally = Tally()
    for file in self.files:
      for document in self._read(file):
        tally.add(file, document)
        if self.strict:
          tally.check(self.source, 0, complete=False)
        yield document.text if document.text is not None or document.problem else document.raw
    tally.check(self.source, BAD_SHARE)
    self.report = tally.report

  def _read(self, file: str) -> Iterator[Document]:
    parts = []
    for block in read_blocks(file, self.field, self.binary):
      if block.form == "text" and not (block.begins and block.ends):
        parts.append(block.content)
        if block.ends:
          block, parts = dataclasses.replace(block, begins=True, content=b"".join(parts)), []
        else:
          continue
      yield from documents_of(block, self.field, self.binary)


def documents_of(
  block: Block, field: str, binary: bool, conversations: Conversations | None = None
) -> Iterator[Document]:
  """The documents of a block that holds them whole. Empty lines and texts are no documents.

  conversations: reads lines that hold no text; without it they are bad.
  """
  if block.form == "lines":
    yield from _documents_of_lines(block, field, conversations)
  elif block.form == "rows":
    yield from _documents_of_rows(block, field)
  elif block.problem:
    yield Document(None, problem=block.problem, place=f"line {block.first} " if block.first else "")
  elif block.content:
    yield Document(None, block.content) if binary else _decode(block.content)


def _documents_of_lines(block: Block, field: str, conversations: Conversations | None) -> Iterator[Document]:
  for number, line in enumerate(split_lines(block.content), block.first):
    if line := line.removeprefix(codecs.BOM_UTF8).strip():
      try:
        document = _document_of_line(json_lines.parse(line), field, conversations)
      except json_lines.BadLine as error:
        yield Document(None, problem=str(error), place=f"line {number} ")
      else:
        if document.raw:
          yield document


def _document_of_line(value: Any, field: str, conversations: Conversations | None) -> Document:
  may_be_other = isinstance(value, dict) and (field not in value or "tokens" in value or field == MESSAGES)
  found = conversations.read(value, field, FIELD) if conversations and may_be_other else None
  if found is None:
    return Document(*json_lines.text_field(value, field))
  raw, tokens = found
  return Document(None, raw, tokens=tokens)


def _documents_of_rows(block: Block, field: str) -> Iterator[Document]:
  import pyarrow

  column = pyarrow.ipc.open_stream(block.content).read_all().column(0)
  for number, value in enumerate(column, block.first):
    raw = value.as_buffer()
    if raw is None:
      document = Document(None, problem=f"has no string in column '{field}'")
    else:
      document = _decode(raw.to_pybytes())
    if document.problem:
      yield document._replace(place=f"row {number} (row group {block.row_group}) ")
    elif document.raw:
      yield document


def _decode(raw: bytes) -> Document:
  try:
    return Document(raw.decode(), raw)
  except UnicodeDecodeError as error:
    return Document(None, problem=f"is not UTF-8 text (byte {error.start})")

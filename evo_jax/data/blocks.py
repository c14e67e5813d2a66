"""Blocks: files cut, while they are read, into parts of about a megabyte that other processes can work on.

A block holds whole lines, whole rows, a whole file of text, or a part of a long document. Whatever the size of files
and documents, no more than a few blocks are in memory; of Parquet, a row group's pages must fit into it.
"""

import codecs
from collections.abc import Callable, Iterator
import dataclasses
import itertools

from evo_jax.data import formats, json_lines
from evo_jax.data.formats import shown
from evo_jax.errors import UserError

SIZE = 1 << 20  # bytes of a block, about
LONGEST_LINE = 1 << 24  # bytes; the text of a longer one is taken out while it is read
EMPTY = "is empty"
_UTF32 = "is UTF-32 text; convert it to UTF-8"
_UTF16 = "is UTF-16 text; convert it to UTF-8"
_MARKS = {  # the first of UTF-32 begins as that of UTF-16 does
  codecs.BOM_UTF32_LE: _UTF32,
  codecs.BOM_UTF32_BE: _UTF32,
  codecs.BOM_UTF16_LE: _UTF16,
  codecs.BOM_UTF16_BE: _UTF16,
}


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of a file.

  form: lines (of JSON) | rows (of Parquet, as Arrow's stream) | text (a document, or a part of one). first: number of
  the first line or row, from 1; 0: the file is one document. begins, ends: of text, whether the
  document does. problem: why the document that ends here cannot be used.
  """

  file: str
  form: str
  content: bytes
  first: int = 0
  row_group: int = 0
  begins: bool = True
  ends: bool = True
  problem: str = ""


def read_blocks(
  file: str, field: str, binary: bool, moved: Callable[[int], None] = lambda position: None
) -> Iterator[Block]:
  """The blocks of a file, in order. Raises UserError where it cannot be read as a whole.

  field: of JSON, or the column. binary: whether plain text need not be UTF-8. moved: as for `formats.read_chunks`.
  """
  formats.check_name(file)
  suffix = formats.suffix_of(file)[0]
  if suffix == formats.ROWS:
    yield from _read_rows(file, field, moved)
    return
  chunks = formats.read_chunks(file, SIZE, moved)
  first = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
  if problem := next((problem for mark, problem in _MARKS.items() if first.startswith(mark)), ""):
    if suffix in formats.LINES:  # it would count as one document
      raise UserError(f"{shown(file)}: {problem}")
    yield Block(file, "text", b"", problem=problem)
  elif suffix in formats.LINES:
    if suffix == ".json":
      _check_lines(file, first)
    yield from _read_lines(file, first, chunks, field)
  else:
    yield from _read_text(file, first, chunks, binary)


def _read_text(file: str, first: bytes, chunks: Iterator[bytes], binary: bool) -> Iterator[Block]:
  """One document; where it has more than a chunk, in parts that end at any character or, if `binary`, at any byte."""
  decoder, blank, begins, done, part = codecs.getincrementaldecoder("utf-8")(), True, True, 0, first
  for following in chunks:
    blank = blank and not part.strip()
    text, problem = (part, "") if binary else _characters(decoder, part, done)
    yield Block(file, "text", text, begins=begins, ends=bool(problem), problem=problem)
    if problem:
      return
    begins, done, part = False, done + len(part), following
  text, problem = (part, "") if binary or begins else _characters(decoder, part, done, final=True)
  yield Block(file, "text", text, begins=begins, problem=EMPTY if blank and not part.strip() else problem)


def _characters(decoder: codecs.IncrementalDecoder, raw: bytes, done: int, final: bool = False) -> tuple[bytes, str]:
  """The whole characters that are there by now, or what is wrong. done: bytes before `raw`."""
  start = done - len(decoder.getstate()[0])
  try:
    return decoder.decode(raw, final).encode(), ""
  except UnicodeDecodeError as error:
    return b"", f"is not UTF-8 text (byte {start + error.start})"


def _check_lines(file: str, raw: bytes) -> None:
  """Raises UserError where a .json file is one JSON value, not a value for each line."""
  text = raw.decode(errors="replace").strip()
  problem = f"{shown(file)}: is one JSON value; documents are lines of JSON (.jsonl), one object each"
  if text.startswith("["):
    raise UserError(problem)
  try:
    _, end = json_lines.DECODER.raw_decode(text)
  except (ValueError, RecursionError):
    return
  if text[0] != "{" or {"\n", "\r"} & set(text[:end]):
    raise UserError(problem)


def _read_lines(file: str, first: bytes, chunks: Iterator[bytes], field: str) -> Iterator[Block]:
  rest, number, empty = b"", 1, True
  for chunk in itertools.chain([first], chunks):
    raw = rest + chunk
    end = _last_line_end(raw)
    lines, rest = raw[:end], raw[end:]
    if lines:
      yield Block(file, "lines", lines, number)
      number += _count_lines(lines)
      empty = empty and not lines.strip()
    if len(rest) > LONGEST_LINE:
      line = _Line(rest, chunks)
      yield from _read_long_line(file, line, field, number)
      rest, number, empty = line.left, number + 1, False
  if rest.strip():
    yield Block(file, "lines", rest, number)
  elif empty:
    yield Block(file, "text", b"", problem=EMPTY)


def _last_line_end(raw: bytes) -> int:
  """Where the last line that is complete ends: behind a line feed, or a carriage return if there is no line feed."""
  end = raw.rfind(b"\n") + 1
  return end or raw.rfind(b"\r", 0, len(raw) - 1) + 1  # at the end it may be the first of a pair


def _count_lines(raw: bytes) -> int:
  return len(raw.splitlines()) if b"\r" in raw else raw.count(b"\n")


def split_lines(raw: bytes) -> list[bytes]:
  """As bytes.splitlines, in half of the time where lines end with a line feed; then the last may be an empty one."""
  return raw.splitlines() if b"\r" in raw else raw.split(b"\n")


class _Line:
  """Iterates over the chunks of one line. left: what was read behind its end."""

  def __init__(self, beginning: bytes, chunks: Iterator[bytes]):
    self._beginning, self._chunks, self.left = beginning, chunks, b""

  def __iter__(self) -> Iterator[bytes]:
    yield self._beginning
    for chunk in self._chunks:
      end = next((end for end in (chunk.find(b"\n"), chunk.find(b"\r")) if end >= 0), -1)
      if end >= 0:
        yield chunk[:end]
        rest = chunk[end:]
        if rest == b"\r":  # the second of a pair may be the next chunk's first
          rest += next(self._chunks, b"")
        self.left = rest[2 if rest.startswith(b"\r\n") else 1 :]
        return
      yield chunk


def _read_long_line(file: str, line: _Line, field: str, number: int) -> Iterator[Block]:
  begins, problem, chunks = True, "", iter(line)
  try:
    for text in json_lines.long_text_field(chunks, field):
      yield Block(file, "text", text, number, begins=begins, ends=False)
      begins = False
  except json_lines.BadLine as error:
    problem = str(error)
  for _ in chunks:  # what is left of it
    pass
  yield Block(file, "text", b"", number, begins=begins, problem=problem)


def _read_rows(file: str, field: str, moved: Callable[[int], None]) -> Iterator[Block]:
  import pyarrow
  from pyarrow import parquet

  try:
    with formats.open_file(file) as raw:
      table = parquet.ParquetFile(raw, buffer_size=SIZE, pre_buffer=False)
      _check_column(file, table.schema_arrow, field)
      size, first = formats.size_of(file), 1
      for row_group in range(table.num_row_groups):
        rows = _rows_of_block(table, row_group, field)
        for batch in table.iter_batches(rows, row_groups=[row_group], columns=[field]):
          batch = _without_dictionary(batch)
          stream = pyarrow.BufferOutputStream()
          with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
            writer.write_batch(batch)
          yield Block(file, "rows", stream.getvalue().to_pybytes(), first, row_group)
          first += batch.num_rows
          moved(size * (first - 1) // max(1, table.metadata.num_rows))
  except (pyarrow.ArrowException, OSError) as error:
    what = "cannot be read" if getattr(error, "errno", None) else "is damaged, or no Parquet file"
    raise UserError(f"{shown(file)}: {what}: {str(error).splitlines()[0]}") from error
  if first == 1:
    yield Block(file, "text", b"", problem=EMPTY)


def _check_column(file: str, schema, field: str) -> None:
  import pyarrow

  if field not in schema.names:
    raise UserError(f"{shown(file)}: has no column '{field}', but {', '.join(schema.names)}")
  kind = schema.field(field).type
  kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
  kinds = pyarrow.types
  if not any(test(kind) for test in (kinds.is_string, kinds.is_large_string, kinds.is_string_view)):
    raise UserError(f"{shown(file)}: column '{field}' is of type {kind}, not string")


def _without_dictionary(batch):
  """A batch of one column whose strings stand in each row."""
  import pyarrow

  column = batch.column(0)
  if pyarrow.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  return pyarrow.RecordBatch.from_arrays([column], batch.schema.names)


def _rows_of_block(table, row_group: int, field: str) -> int:
  """How many rows make about a block."""
  metadata = table.metadata.row_group(row_group)
  columns = [metadata.column(i) for i in range(metadata.num_columns)]
  size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
  return max(1, min(1 << 14, SIZE * max(1, metadata.num_rows) // max(1, size)))

"""Formats of files: what a file's name and first bytes say it is, and its content without compression.

No tokenizer, not that of bytes either, reads compressed or other binary formats as text: they are recognized by name,
in upper or lower case, and by their first bytes, and refused. All other names than those below are plain text.
"""

import bz2
from collections.abc import Callable, Iterator
import contextlib
import gzip
import importlib
import io
import lzma
import os
import re
import stat
from typing import BinaryIO
import zlib

from evo_jax.data import storage
from evo_jax.errors import UserError

LINES = (".jsonl", ".ndjson", ".json")  # a JSON object for each line
ROWS = ".parquet"  # a document for each row
_REFUSED = re.compile(
  r"\.(7z|arrow|avro|br|bmp|db|doc|docx|epub|feather|gguf|gif|h5|hdf5|jpeg|jpg|lz|lz4|mp3|mp4|npy|npz|odt"
  r"|orc|pdf|pickle|pkl|png|ppt|pptx|pt|pth|pyc|rar|safetensors|snappy|sqlite|sz|tar|tbz|tbz2"
  r"|tfrecord|tgz|txz|tzst|wav|webp|whl|xls|xlsx|z|zip|zipx)"
)
_FIRST_BYTES = {
  b"\x1f\x8b\x08": "gzip data (name it .gz)",
  b"\xfd7zXZ\x00": "xz data (name it .xz)",
  b"BZh91AY&SY": "bzip2 data (name it .bz2)",
  b"\x28\xb5\x2f\xfd": "zstd data (name it .zst)",
  b"\x04\x22\x4d\x18": "lz4 data",
  b"PK\x03\x04": "a zip archive",
  b"7z\xbc\xaf\x27\x1c": "a 7z archive",
  b"Rar!\x1a\x07": "a rar archive",
  b"PAR1\x15": "a parquet file",
  b"ARROW1\x00\x00": "an arrow file",
  b"Obj\x01": "an avro file",
  b"%PDF-1.": "a PDF file",
  b"\x93NUMPY": "a NumPy array",
  b"SQLite format 3\x00": "an SQLite file",
  b"\x89HDF\r\n\x1a\n": "an HDF5 file",
  b"\x89PNG\r\n\x1a\n": "a PNG image",
}


def shown(name: str) -> str:
  """A file's name for a line of text: quoted where it has line breaks, or bytes that are not UTF-8."""
  return name if name.isprintable() else repr(name)


def suffix_of(file: str) -> tuple[str, list[str]]:
  """The suffix without compression, and the compressions' suffixes, outermost first, in lower case."""
  stem, suffix = os.path.splitext(file.lower())
  compressions = []
  while suffix in _OPENERS:
    compressions.append(suffix)
    stem, suffix = os.path.splitext(stem)
  return suffix, compressions


def check_name(file: str) -> None:
  """Raises UserError where the file's name tells that it cannot be read here."""
  suffix, compressions = suffix_of(file)
  if _REFUSED.fullmatch(suffix):
    raise UserError(
      f"{shown(file)}: {suffix} files cannot be read; give plain text or .jsonl, also compressed ({_READABLE}), "
      "or .parquet"
    )
  if suffix == ROWS and compressions:
    raise UserError(f"{shown(file)}: is a compressed .parquet file; decompress it: its columns are compressed anyway")
  if {".zst", ".zstd"} & set(compressions):
    _require(file, "zstandard", "zstd")
  if suffix == ROWS:
    _require(file, "pyarrow", "parquet")


def _require(file: str, library: str, extra: str) -> None:
  try:
    importlib.import_module(library)
  except ImportError as error:
    raise UserError(f"{shown(file)}: needs {library}: pip install 'evo_jax[{extra}]'") from error


def size_of(file: str) -> int:
  """Bytes of a file, local or remote, as it stands. Raises UserError where it cannot be read."""
  return _status(file)[0]


def version_of(file: str) -> str:
  """Names the content that a file has now. Raises UserError where it cannot be read, or can be read only once."""
  size, version = _status(file)
  return f"{file if '://' in file else os.path.abspath(file)} {size} {version}"


def _status(file: str) -> tuple[int, str]:
  """Bytes, and what changes with the content."""
  try:
    if "://" in file:
      files, path = storage.open_filesystem(file)
      info = files.info(path)
      marks = ("etag", "ETag", "md5Hash", "generation", "blob_id", "last_commit", "mtime", "created")
      return int(info["size"]), " ".join(str(info[mark]) for mark in marks if info.get(mark))
    status = os.stat(file)
  except Exception as error:  # OSError; libraries for buckets raise others, too
    raise UserError(f"{shown(file)}: cannot be read: {storage.reason(error)}") from error
  if not stat.S_ISREG(status.st_mode):
    raise UserError(f"{shown(file)}: is a pipe, which can be read only once; training needs files")
  return status.st_size, str(status.st_mtime_ns)


def open_file(file: str) -> BinaryIO:
  """A file as it stands, local or remote."""
  if "://" not in file:
    return open(file, "rb")
  files, path = storage.open_filesystem(file)
  return files.open(path, "rb", block_size=_REMOTE_BLOCK)


def read_chunks(file: str, size: int, moved: Callable[[int], None] = lambda position: None) -> Iterator[bytes]:
  """A file's content without compression, in chunks of `size` bytes, but for the last.

  Raises UserError for what is unreadable, cut off, damaged or not text. moved: is told how many bytes of the file, as
  it stands, have been read.
  """
  check_name(file)
  with _errors(file), contextlib.ExitStack() as stack:
    raw = stack.enter_context(open_file(file))
    stream = raw if hasattr(raw, "peek") else stack.enter_context(io.BufferedReader(raw, _BUFFER))
    if stream.peek(1):
      for suffix in suffix_of(file)[1]:
        stream = stack.enter_context(io.BufferedReader(_OPENERS[suffix](stream), _BUFFER))
    checked = False
    while chunk := stream.read(size):
      if not checked:
        _check_first_bytes(file, chunk)
        checked = True
      moved(_position(raw))
      yield chunk


@contextlib.contextmanager
def _errors(file: str) -> Iterator[None]:
  """Turns what reading a file raises into a UserError that names it."""
  try:
    yield
  except (UserError, GeneratorExit):
    raise
  except EOFError as error:
    raise UserError(f"{shown(file)}: is cut off in the middle of the compressed data") from error
  except (zlib.error, lzma.LZMAError) as error:
    raise UserError(f"{shown(file)}: the compressed data is damaged ({error})") from error
  except OSError as error:
    if error.errno is None and "://" not in file:  # of gzip and bz2, that what they read is of another kind
      raise UserError(f"{shown(file)}: the compressed data is damaged ({error})") from error
    raise UserError(f"{shown(file)}: cannot be read: {storage.reason(error)}") from error


def _position(raw: BinaryIO) -> int:
  try:
    return raw.tell()
  except OSError:  # a pipe
    return 0


def _check_first_bytes(file: str, raw: bytes) -> None:
  what = next((what for first, what in _FIRST_BYTES.items() if raw.startswith(first)), None)
  what = "a tar archive" if raw[257:262] == b"ustar" else what
  if what:
    raise UserError(f"{shown(file)}: is not text, but holds {what}")


class _Zstd(io.RawIOBase):
  """The content of all frames: the library's own streams end without a word where the data is cut off."""

  def __init__(self, stream: BinaryIO):
    import zstandard

    self._new = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    self._error = zstandard.ZstdError
    self._stream, self._frame, self._complete = stream, self._new(), True
    self._content, self._raw = memoryview(b""), b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._content:
      self._raw = self._raw or self._stream.read(_ZSTD_PIECE)
      if not self._raw:
        if not self._complete:
          raise EOFError
        return 0
      try:
        self._content = memoryview(self._frame.decompress(self._raw))
      except self._error as error:
        raise OSError(str(error)) from error
      self._raw, self._complete = self._frame.unused_data, self._frame.eof
      if self._complete:
        self._frame = self._new()
    count = min(len(buffer), len(self._content))
    buffer[:count] = self._content[:count]
    self._content = self._content[count:]
    return count


_BUFFER = 1 << 17
_ZSTD_PIECE = 1 << 14  # bytes that are decompressed at a time: rarely to more than a hundred times as many
_REMOTE_BLOCK = 8 << 20
_OPENERS: dict[str, Callable[[BinaryIO], io.RawIOBase]] = {
  ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
  ".xz": lzma.LZMAFile,
  ".lzma": lzma.LZMAFile,
  ".bz2": bz2.BZ2File,
  ".zst": _Zstd,
  ".zstd": _Zstd,
}
_READABLE = ", ".join(_OPENERS)

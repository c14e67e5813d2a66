"""Formats of files: what a file's name and first bytes say it is, and its content without compression.

No tokenizer, not that of bytes either, reads compressed or other binary formats as text: they are recognized by name,
in upper or lower case, and by their first bytes, and refused. All other names than those below are plain text.
"""

import bz2
from collections.abc import Callable
import contextlib
import gzip
import io
import lzma
import os
import re
from typing import BinaryIO
import zlib

from evo_jax.errors import UserError

LINES = (".jsonl", ".ndjson", ".json")  # a JSON object for each line
_REFUSED = re.compile(
  r"\.(7z|arrow|avro|br|bmp|db|doc|docx|epub|feather|gguf|gif|h5|hdf5|jpeg|jpg|lz|lz4|mp3|mp4|npy|npz|odt"
  r"|orc|parquet|pdf|pickle|pkl|png|ppt|pptx|pt|pth|pyc|rar|safetensors|snappy|sqlite|sz|tar|tbz|tbz2"
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
      f"{shown(file)}: {suffix} files cannot be read; give plain text or .jsonl, which may be compressed ({_READABLE})"
    )
  if {".zst", ".zstd"} & set(compressions):
    try:
      import zstandard  # noqa: F401
    except ImportError as error:
      raise UserError(f"{shown(file)}: needs zstandard: pip install 'evo_jax[zstd]'") from error


def read_content(file: str) -> bytes:
  """A file's content without compression. Raises UserError for what is unreadable, cut off, damaged or not text."""
  check_name(file)
  raw = _decompressed(file)
  what = next((what for first, what in _FIRST_BYTES.items() if raw.startswith(first)), None)
  what = "a tar archive" if raw[257:262] == b"ustar" else what
  if what:
    raise UserError(f"{shown(file)}: is not text, but holds {what}")
  return raw


def _decompressed(file: str) -> bytes:
  _, compressions = suffix_of(file)
  try:
    with contextlib.ExitStack() as stack:
      stream = stack.enter_context(open(file, "rb"))
      if not stream.peek(1):
        return b""
      for suffix in compressions:
        stream = stack.enter_context(_OPENERS[suffix](stream))
      return stream.read()
  except EOFError as error:
    raise UserError(f"{shown(file)}: is cut off in the middle of the compressed data") from error
  except (zlib.error, lzma.LZMAError) as error:
    raise UserError(f"{shown(file)}: the compressed data is damaged ({error})") from error
  except OSError as error:
    if error.errno is None:  # of gzip and bz2, that what they read is of another kind
      raise UserError(f"{shown(file)}: the compressed data is damaged ({error})") from error
    raise UserError(f"{shown(file)}: cannot be read: {error.strerror or error}") from error


def _open_zstd(stream: BinaryIO) -> BinaryIO:
  """The content of all frames: the library's own streams end without a word where the data is cut off."""
  import zstandard

  new = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
  content, frame, complete = io.BytesIO(), new(), True
  try:
    while raw := stream.read(1 << 20):
      while raw:
        content.write(frame.decompress(raw))
        raw, complete = frame.unused_data, frame.eof
        frame = new() if complete else frame
  except zstandard.ZstdError as error:
    raise OSError(str(error)) from error
  if not complete:
    raise EOFError
  content.seek(0)
  return content


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
  ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
  ".xz": lzma.LZMAFile,
  ".lzma": lzma.LZMAFile,
  ".bz2": bz2.BZ2File,
  ".zst": _open_zstd,
  ".zstd": _open_zstd,
}
_READABLE = ", ".join(_OPENERS)

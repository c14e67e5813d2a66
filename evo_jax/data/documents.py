"""Readers: text files (.txt or any other name, .jsonl, both also .gz and .xz) to documents."""

from collections.abc import Iterator
import glob
import gzip
import json
import lzma
import os
from pathlib import Path
import sysconfig
import zlib

from evo_jax.errors import UserError


def find_files(pattern: str, field: str) -> list[str]:
  """The sorted files of a glob, or of "stdlib". Raises UserError, naming `field`, where there are none."""
  pattern = pattern.strip()
  if pattern == "stdlib":
    root = Path(sysconfig.get_path("stdlib"))
    # Some systems ship no tests and keep installed packages in the same folder: leave out both, everywhere.
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(str(f) for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts) and f.stat().st_size)
  else:
    files = sorted(f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if not os.path.isdir(f))
  if not files:
    raise UserError(f"{field}: no file matches {pattern!r}")
  return files


def read_documents(files: list[str], binary: bool) -> Iterator[tuple[str, str | bytes]]:
  """(name, text) of every document: a file, or a line of a .jsonl file.

  Raises UserError with the file's name (and line) for what is empty, unreadable, cut off, or not UTF-8. binary: files
  other than .jsonl are given as bytes, whatever their encoding.
  """
  for file in files:
    raw = _read_file(file)
    if not raw.strip():
      raise UserError(f"{file}: is empty")
    if any(file.endswith(".jsonl" + suffix) for suffix in ("", ".gz", ".xz")):
      yield from _jsonl_documents(file, _decode(file, raw))
    else:
      yield file, raw if binary else _decode(file, raw)


def _jsonl_documents(file: str, lines: str) -> Iterator[tuple[str, str]]:
  """The field "text" of each line; empty lines and texts are skipped."""
  for number, line in enumerate(lines.split("\n"), 1):
    if line.strip() and (text := _text_field(line, f"{file}: line {number}")):
      yield f"{file}:{number}", text


def _text_field(line: str, where: str) -> str:
  try:
    text = json.loads(line)["text"]
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON ({error.msg})") from error
  except (KeyError, TypeError) as error:
    raise UserError(f"{where} has no field 'text'") from error
  if not isinstance(text, str):
    raise UserError(f"{where}: field 'text' is not a string")
  try:
    text.encode()
  except UnicodeEncodeError as error:  # a lone surrogate, which JSON can escape
    raise UserError(f"{where}: field 'text' is not valid Unicode") from error
  return text


def _decode(file: str, raw: bytes) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from error


def _read_file(file: str) -> bytes:
  opener = gzip.open if file.endswith(".gz") else lzma.open if file.endswith(".xz") else open
  try:
    with opener(file, "rb") as stream:
      return stream.read()
  except EOFError as error:
    raise UserError(f"{file}: is cut off in the middle of the compressed data") from error
  except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
    raise UserError(f"{file}: the compressed data is damaged ({error})") from error
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error

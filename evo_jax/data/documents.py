"""Readers: files to documents."""

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
  """(name, text) of every document; with `binary`, files that are no .jsonl are bytes, whatever their encoding.

  Raises UserError with the file's name (and line) for what is empty, unreadable, cut off, or not UTF-8.
  """
  for file in files:
    raw = _read_file(file)
    if not raw.strip():
      raise UserError(f"{file}: is empty")
    is_jsonl = any(file.endswith(".jsonl" + suffix) for suffix in ("", ".gz", ".xz"))
    if binary and not is_jsonl:
      yield file, raw
      continue
    try:
      text = raw.decode()
    except UnicodeDecodeError as error:
      raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    if not is_jsonl:
      yield file, text
      continue
    for number, line in enumerate(text.split("\n"), 1):
      if not line.strip():
        continue
      try:
        value = json.loads(line)["text"]
      except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {number} is not JSON ({error.msg})") from error
      except (KeyError, TypeError) as error:
        raise UserError(f"{file}: line {number} has no field 'text'") from error
      if not isinstance(value, str):
        raise UserError(f"{file}: line {number}: field 'text' is not a string")
      try:
        value.encode()
      except UnicodeEncodeError as error:
        raise UserError(f"{file}: line {number}: field 'text' is not valid Unicode") from error
      if value:
        yield f"{file}:{number}", value


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

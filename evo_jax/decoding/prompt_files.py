"""Prompt files: a prompt per line, plain or as JSON, from files or standard input."""

import gzip
import json
import lzma
import os
import re
import sys
import zlib

from evo_jax.decoding.prompts import readable
from evo_jax.errors import UserError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks, of UTF-32 too
_OPENERS = {"gz": gzip.open, "xz": lzma.open}


def read_prompt_files(names: list[str]) -> list[str]:
  """The prompts of several files; see `read_prompts`. Raises UserError where standard input is named twice."""
  if names.count("-") > 1:
    raise UserError("--prompts=-: standard input can be read only once")
  return [prompt for name in names for prompt in read_prompts(name)]


def read_prompts(name: str) -> list[str]:
  """The prompts of a file, one per line; of a .jsonl file, each line a string or an object with "prompt" or "text"; of
  "-", standard input, one per line. Files may end in .gz or .xz, too.

  Lines end with \\n, \\r\\n or \\r, and with nothing else. Empty lines are empty prompts, in .jsonl they are skipped. A
  UTF-8 byte order mark is skipped. Bytes that are not UTF-8 are kept in plain lines, as Python keeps them in arguments
  (surrogateescape). Raises UserError that names file and line.
  """
  raw = _read(name)
  if raw.startswith(_UTF16):
    raise UserError(f"--prompts={name}: is UTF-16 or UTF-32; prompts are read as UTF-8")
  text = raw.decode(errors="surrogateescape").removeprefix("\ufeff")
  lines = re.split(r"\r\n|\r|\n", text)
  if not lines[-1]:
    lines.pop()  # what follows the last line's end
  if re.search(r"\.jsonl(\.gz|\.xz)?$", name, re.IGNORECASE):
    lines = [_parse_line(name, number, line) for number, line in enumerate(lines, 1) if line.strip()]
  if not lines:
    raise UserError(f"--prompts={name}: has no prompts")
  return lines


def _read(name: str) -> bytes:
  try:
    if name == "-":
      if sys.stdin is None:
        raise UserError("--prompts=-: standard input is closed")
      return sys.stdin.buffer.read()
    with _OPENERS.get(name.lower().rpartition(".")[2], open)(os.path.expanduser(name), "rb") as file:
      return file.read()
  except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
    raise UserError(f"--prompts={name}: the compressed data is damaged or cut off ({error})") from error
  except OSError as error:
    raise UserError(f"--prompts={name}: cannot be read: {error.strerror or error}") from error


def _parse_line(name: str, number: int, line: str) -> str:
  where = f"--prompts={name}: line {number}"
  try:
    value = json.loads(line, parse_int=float)  # no number is wanted, and Python limits the digits of an int
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON ({error})") from error
  value = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
  if not isinstance(value, str):
    raise UserError(f'{where} is neither a string nor an object with "prompt" or "text"')
  if readable(value) != value:
    raise UserError(f"{where} is not valid Unicode: it has half a surrogate pair, or bytes that are not UTF-8")
  return value

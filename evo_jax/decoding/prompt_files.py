"""Prompt files: a prompt per line, plain or as JSON, from files or standard input."""

import codecs
from collections.abc import Iterator
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import sys
from typing import Any, BinaryIO
import zlib

from evo_jax.data import formats
from evo_jax.data.chat import Message
from evo_jax.data.conversations import check_messages
from evo_jax.data.json_lines import BadLine
from evo_jax.decoding.prompts import Prompt, readable
from evo_jax.errors import UserError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks, of UTF-32 too
_OPENERS = {"gz": gzip.open, "xz": lzma.open}


def read_prompt_files(names: list[str], chat: bool = False) -> list[Prompt]:
  """The prompts of several files; see `iterate_prompts`. Raises UserError where standard input is named twice."""
  if names.count("-") > 1:
    raise UserError("--prompts=-: standard input can be read only once")
  return [prompt for name in names for _, prompt in iterate_prompts(name, chat)]


def iterate_prompts(name: str, chat: bool = False) -> Iterator[tuple[str, Prompt]]:
  """The prompts of a file, one per line, each with its place for messages; of a .jsonl file, each line a string or an
  object with "prompt" or "text"; of "-", standard input, one per line. Files may end in .gz or .xz, and be in a bucket.

  chat: whether a line of .jsonl may have "messages", of which those before the assistant's first are the prompt.

  Lines end with \\n, \\r\\n or \\r, and with nothing else. Empty lines are empty prompts, in .jsonl they are skipped. A
  UTF-8 byte order mark is skipped. Bytes that are not UTF-8 are kept in plain lines, as Python keeps them in arguments
  (surrogateescape). Raises UserError that names file and line.
  """
  is_json, number, found = re.search(r"\.jsonl(\.gz|\.xz)?$", name, re.IGNORECASE), 0, False
  with _lines(name) as lines:
    while line := _next_line(name, lines):
      line, number, where = line.removesuffix("\n"), number + 1, f"--prompts={name}: line {number + 1}"
      if not is_json or line.strip():
        found = True
        yield where, _parse_line(where, line, chat) if is_json else line
  if not found:
    raise UserError(f"--prompts={name}: has no prompts")


@contextlib.contextmanager
def _lines(name: str) -> Iterator[io.TextIOWrapper]:
  """The text of a file, in which all lines end with \\n. Raises UserError where it cannot be read."""
  with contextlib.ExitStack() as stack:
    with _errors(name):
      raw = sys.stdin and sys.stdin.buffer if name == "-" else stack.enter_context(_open(name))
      if raw is None:
        raise UserError("--prompts=-: standard input is closed")
      first = raw.peek(3)
      if first.startswith(_UTF16):
        raise UserError(f"--prompts={name}: is UTF-16 or UTF-32; prompts are read as UTF-8")
      if first.startswith(codecs.BOM_UTF8):
        raw.read(3)
    text = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape")
    stack.callback(text.detach)  # standard input stays open
    yield text


def _next_line(name: str, lines: io.TextIOWrapper) -> str:
  with _errors(name):
    return lines.readline()


def _open(name: str) -> BinaryIO:
  """A file's content without compression; it can be peeked at."""
  opener = _OPENERS.get(name.lower().rpartition(".")[2])
  if "://" in name:
    raw = io.BufferedReader(formats.open_file(name))
    return opener(raw) if opener else raw
  return (opener or open)(os.path.expanduser(name), "rb")


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
  try:
    yield
  except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
    raise UserError(f"--prompts={name}: the compressed data is damaged or cut off ({error})") from error
  except OSError as error:
    raise UserError(f"--prompts={name}: cannot be read: {error.strerror or error}") from error


def _parse_line(where: str, line: str, chat: bool) -> Prompt:
  try:
    value = json.loads(line, parse_int=float)  # no number is wanted, and Python limits the digits of an int
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is not JSON ({error})") from error
  if isinstance(value, dict):
    value = next((value[field] for field in ("prompt", "text", "messages") if field in value), None)
  if isinstance(value, list):
    value = _before_answer(where, value, chat)
  elif not isinstance(value, str):
    raise UserError(f'{where} is neither a string nor an object with "prompt" or "text"')
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  if readable(text) != text:
    raise UserError(f"{where} is not valid Unicode: it has half a surrogate pair, or bytes that are not UTF-8")
  return value


def _before_answer(where: str, messages: list[Any], chat: bool) -> list[Message]:
  """The messages before the assistant's first."""
  if not chat:
    raise UserError(f"{where} has messages, which --chat continues")
  try:
    check_messages(messages)
  except BadLine as error:
    raise UserError(f"{where} {error}") from error
  end = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
  if not end:
    raise UserError(f"{where} has a conversation that the assistant begins: there is nothing to answer")
  return messages[:end]

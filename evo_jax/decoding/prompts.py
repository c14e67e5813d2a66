"""Prompts: files and gaps."""

import json
import re
import sys

from evo_jax.errors import UserError

GAP = re.compile(r"\[\.\.\.(\d*)\]")


def read_prompts(name: str) -> list[str]:
  """The prompts of a file, one a line, or of a .jsonl file, each line a string or an object with "prompt" or "text";
  "-" is standard input, one a line. Raises UserError that names file and line."""
  try:
    if name == "-":
      lines = sys.stdin.read().splitlines()
    else:
      with open(name, encoding="utf-8") as file:
        lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts={name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
  if not name.endswith(".jsonl"):
    return lines
  prompts = []
  for i, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise UserError(f"--prompts={name}: line {i} is not JSON ({error})") from error
    value = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
    if not isinstance(value, str):
      raise UserError(f'--prompts={name}: line {i} is neither a string nor an object with "prompt" or "text"')
    prompts.append(value)
  return prompts

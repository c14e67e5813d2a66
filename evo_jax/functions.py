"""Functions of one's own from a Python file: FILE.py:NAME, where a path is asked for also FILE.py:NAME:NUMBER.

The file is run as it stands, as a configuration is; what its functions are called with, `flow/README.md` says.
"""

from collections.abc import Callable
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
import re
import sys

from evo_jax.errors import UserError
from evo_jax.flow import bound, schedules

_FORM = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?::(?P<number>[^:]*))?")


def is_own(path: str) -> bool:
  """Whether a path's name is that of a function in a file."""
  return ".py:" in path


def read_path(path: str, passes: int = 0) -> schedules.Path:
  """The path that a name stands for: of a function in a file, what it says, any other as it is.

  passes: of a path s -> t whose name has no number of passes. Raises UserError for a name that is none, and for a file
  or a function that is of no use.
  """
  if not is_own(path):
    schedules.parse_path(path)
    return path
  function, number = _read(f"path {path!r}", path)
  if number is None and passes and schedules.is_fixed(function):
    number, path = passes, f"{path}:{passes}"
  return schedules.OwnPath(function, number, path)


def digest(path: str) -> str:
  """Names the content of the file of a path of one's own."""
  file = Path(_FORM.fullmatch(path.strip())["file"]).expanduser()
  return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def read_price(name: str) -> bound.Price:
  """The price of a step by a function in a file. Raises UserError where it is of no use."""
  where = f"--price={name}"
  if not is_own(name):
    raise UserError(f"{where}: is not FILE.py:NAME, a function in a file")
  function, number = _read(where, name)
  if number is not None:
    raise UserError(f"{where}: a price takes no number")
  bound.check_price(function, where)
  return function


def _read(where: str, value: str) -> tuple[Callable, float | None]:
  """The function, and the number behind it. where: begins messages."""
  form = _FORM.fullmatch(value.strip())
  if form is None:
    raise UserError(f"{where}: is not FILE.py:NAME or FILE.py:NAME:NUMBER, a function in a file")
  number = None
  if form["number"] is not None:
    try:
      number = float(form["number"])
    except ValueError:
      raise UserError(f"{where}: {form['number']!r} is not a number") from None
  file = os.path.realpath(os.path.expanduser(form["file"]))
  try:
    modified = os.stat(file).st_mtime_ns
  except OSError as error:
    raise UserError(f"{where}: {form['file']} cannot be read: {error.strerror}") from error
  try:
    module = _load(file, modified)
  except Exception as error:  # whatever running the file raised
    problem = str(error).strip().splitlines() or [""]
    raise UserError(
      f"{where}: {form['file']} cannot be loaded: {type(error).__name__}: {problem[-1].strip()}"
    ) from error
  function = getattr(module, form["name"], None)
  if callable(function):
    return function, number
  names = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
  has = f"; it has {', '.join(names)}" if names else ""
  raise UserError(f"{where}: {form['file']} has no function {form['name']}{has}")


@functools.cache
def _load(file: str, modified: int):
  """The module of a file, one as long as it is not changed: programs are compiled by function."""
  name = f"evo_jax_file_{abs(hash((file, modified))):x}"
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # dataclasses look their module up
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module

"""Files of a source: comma-separated globs, "stdlib", links and odd names, each file once."""

from collections.abc import Iterator
import fnmatch
import os
from pathlib import Path
import stat
import sysconfig

from evo_jax.data import formats
from evo_jax.data.formats import shown
from evo_jax.errors import UserError

_COMMAS = 32  # of a file's name that are looked for


def find_sources(path: str, field: str) -> list[tuple[str, list[str]]]:
  """The sources of a comma-separated list: the pattern and the sorted files of each. Raises UserError, naming `field`.

  A pattern is the name of a file, a glob, or "stdlib", Python's standard library. What exists under a name as it stands
  is meant, though the name has commas, brackets or spaces at its ends; in a glob, `?` stands for a comma, too. `**` is
  any number of folders. As in a shell, patterns match no hidden names, and links are followed, but no folder is read
  twice. A file that can be reached by several names, or from several sources, counts once, where it comes first.
  """
  sources, seen = [], set()
  for pattern in _split(path):
    found = _standard_library() if pattern == "stdlib" else _matches(pattern, field)
    if not found:
      raise UserError(f"{field}: no file matches {pattern!r}")
    files = []
    for file in found:
      formats.check_name(file)
      if (identity := _identity(file)) not in seen:
        seen.add(identity)
        files.append(file)
    if not files:
      raise UserError(f"{field}: every file of {pattern!r} is in a source before it")
    sources.append((shown(pattern), files))
  if not sources:
    raise UserError(f"{field}: is empty; give globs of text files, as in 'dir/*.txt'")
  return sources


def _split(path: str) -> list[str]:
  """The patterns of a comma-separated list; a comma that is part of an existing file's name separates nothing."""
  pieces, patterns = path.split(","), []
  while pieces:
    joined = ((n, _as_it_stands(",".join(pieces[:n]))) for n in range(min(len(pieces), _COMMAS), 1, -1))
    count, name = next(((n, name) for n, name in joined if name), (1, None))
    patterns.append(name or _as_it_stands(pieces[0]) or pieces[0].strip())
    del pieces[:count]
  return [pattern for pattern in patterns if pattern]


def _as_it_stands(name: str) -> str | None:
  """The name, with or without spaces at its ends, under which a file exists."""
  found = (n for n in (name, name.strip()) if os.path.lexists(os.path.expanduser(n)))
  return next((n for n in found if not os.path.isdir(os.path.expanduser(n))), None)


def _standard_library() -> list[str]:
  root = Path(sysconfig.get_path("stdlib"))
  # Some systems ship no tests and keep installed packages in the same folder: leave out both, everywhere.
  skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
  files = (f for f in root.rglob("*.py") if not skip & set(f.relative_to(root).parts))
  return sorted(str(f) for f in files if f.is_file() and f.stat().st_size)


def _matches(pattern: str, field: str) -> list[str]:
  """The file or pipe of that name, or the sorted files (no folders, pipes, sockets) that match."""
  name = os.path.expanduser(pattern)
  if os.path.isdir(name):
    raise UserError(f"{field}: {pattern!r} is a folder; give the files in it, as in {os.path.join(pattern, '*.txt')!r}")
  if not _exists(name, field):
    root = os.sep if name.startswith(os.sep) else ""
    found = sorted(set(_expand(root, name.strip(os.sep).split(os.sep))))
    return [file for file in found if stat.S_ISREG(_stat(file).st_mode)]
  if not (stat.S_ISREG(_stat(name).st_mode) or stat.S_ISFIFO(_stat(name).st_mode)):
    raise UserError(f"{field}: {pattern!r} is neither a file nor a pipe")
  return [name]


def _exists(name: str, field: str) -> bool:
  try:
    os.lstat(name)
  except PermissionError as error:
    raise UserError(f"{field}: {name!r} cannot be read: {error.strerror}") from error
  except (OSError, ValueError):  # a name that no file has, or can have
    return False
  return True


def _expand(folder: str, parts: list[str]) -> Iterator[str]:
  """What matches a path's `parts` in `folder`, "" being the current one. A part with brackets that exists is a name."""
  if not parts:
    yield folder
    return
  part, *rest = parts
  path = os.path.join(folder, part)
  if part == "**":
    for below in _folders(folder):
      yield from _expand(below, rest or ["*"])
  elif not set("*?[") & set(part) or ("[" in part and os.path.lexists(path)):
    if os.path.lexists(path):
      yield from _expand(path, rest)
  elif os.path.isdir(folder or os.curdir):
    for name in fnmatch.filter(_names(folder), part):
      if part.startswith(".") or not name.startswith("."):
        yield from _expand(os.path.join(folder, name), rest)


def _folders(folder: str) -> Iterator[str]:
  """`folder` and all below it that are not hidden, each once: links may form a circle."""
  waiting, seen = [folder], set()
  while waiting:
    folder = waiting.pop()
    if os.path.isdir(folder or os.curdir) and (identity := _identity(folder or os.curdir)) not in seen:
      seen.add(identity)
      yield folder
      waiting += [os.path.join(folder, n) for n in sorted(_names(folder), reverse=True) if not n.startswith(".")]


def _names(folder: str) -> list[str]:
  try:
    return os.listdir(folder or os.curdir)
  except OSError as error:
    raise UserError(f"{shown(folder)}: cannot be read: {error.strerror or error}") from error


def _identity(file: str) -> tuple[int, int] | str:
  """What the names of one file have in common. Raises UserError where it cannot be read."""
  status = _stat(file)
  return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(file)


def _stat(file: str) -> os.stat_result:
  try:
    return os.stat(file)
  except OSError as error:
    link = " (it is a link)" if os.path.islink(file) else ""
    raise UserError(f"{shown(file)}: cannot be read{link}: {error.strerror or error}") from error

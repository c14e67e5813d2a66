"""What every command shares: --config, one clear line for bad input, and a non-zero exit."""

from collections.abc import Callable
from pathlib import Path
import re
import sys

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from evo_jax import config as config_lib
from evo_jax.errors import UserError

_SHIPPED = Path(__file__).parent / "configs"  # a link to the checkout's configs/, and a package of the wheel


def define_config() -> None:
  """Defines --config, and with it --config.SECTION.FIELD."""
  config_flags.DEFINE_config_file("config", None, "The configuration: NAME of a shipped one, or a file's path.")


def config_file(name: str) -> str:
  """The path of the configuration file that --config names: a shipped NAME, or a path. Raises UserError."""
  if not re.fullmatch(r"\w+", name):
    return name
  shipped = {file.stem: str(file) for file in sorted(_SHIPPED.glob("*.py"))}
  if name not in shipped:
    raise UserError(f"--config={name}: is not one of {', '.join(shipped)}, and not the path of a .py file")
  return shipped[name]


def read_config() -> tuple[config_lib.Config, str]:
  """The checked configuration that --config names, and its file. Raises UserError."""
  if not flags.FLAGS["config"].present:
    raise UserError("--config is needed, as in --config=tiny")
  file = config_flags.get_config_filename(flags.FLAGS["config"])
  try:
    values = dict(flags.FLAGS.config)
  except Exception as error:  # whatever running the file raised
    raise UserError(f"--config={file}: cannot be loaded: {str(error).strip().splitlines()[-1].strip()}") from error
  return config_lib.from_dict(values), file


def run(main: Callable[[], None]) -> None:
  """Parses flags, runs `main`, and turns bad input into one line on stderr and exit status 1.

  Only `UserError` and bad flags are the user's; a bug, or an unforeseen failure in a library, keeps its traceback.
  """
  logging.set_verbosity(logging.FATAL)  # libraries' messages are not for users: errors arrive as exceptions
  sys.unraisablehook = _show_unraisable
  app.run(lambda argv: _guard(lambda: _main(main, argv)), flags_parser=lambda argv: _guard(lambda: _parse(argv)))


def _show_unraisable(problem) -> None:
  """Prints an exception that a thread could not raise, but for a repeated failure to write a checkpoint.

  Orbax closes its event loop at the first failure; each of TensorStore's threads that has another to report then fails
  on the closed loop.
  """
  if not (isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"):
    sys.__unraisablehook__(problem)


def _main(main: Callable[[], None], argv: list[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}: options are given as --name=value")
  main()


def _parse(argv: list[str]) -> list[str]:
  # --show-progression is --show_progression; values, and fields of a configuration, stay as they are.
  argv = [re.sub(r"^--[a-z-]+", lambda name: "--" + name[0][2:].replace("-", "_"), a) for a in argv]
  if "config" in flags.FLAGS:
    argv = _with_config_file(argv)
  try:
    return flags.FLAGS(argv, known_only=False)
  except flags.Error as error:
    raise UserError(str(error).splitlines()[0]) from error
  except (AttributeError, KeyError) as error:  # ml_collections: --config.no.such.field
    raise UserError(_field_error(error, argv)) from error
  except (TypeError, ValueError) as error:
    raise UserError(f"bad flag or configuration file: {' '.join(str(error).split())}") from error


def _with_config_file(argv: list[str]) -> list[str]:
  """The arguments with the file's path as the value of --config."""
  argv = list(argv)
  for i, argument in enumerate(argv):
    if re.match(r"--?config=", argument):
      flag, value = argument.split("=", 1)
      argv[i] = f"{flag}={config_file(value)}"
    elif argument in ("-config", "--config") and i + 1 < len(argv):
      argv[i + 1] = config_file(argv[i + 1])
  return argv


def _field_error(error: Exception, argv: list[str]) -> str:
  text = str(error).replace("\\", "")  # "'no_such'\nDid you mean "such" instead of "no_such"?", quoted once more
  name = re.search(r"\w+", text)
  flag = next((a.split("=")[0] for a in argv if name and re.search(rf"\.{name[0]}\b", a.split("=")[0])), "--config")
  hint = re.search(r'Did you mean "(\w+)"', text)
  return f"{flag}: the configuration has no such field" + (f"; did you mean {hint[1]!r}?" if hint else "")


def _guard(body: Callable):
  try:
    return body()
  except UserError as error:
    if jax.process_count() > 1:
      print(f"evo_jax: process {jax.process_index()}: {error}", file=sys.stderr)
    else:
      print(f"evo_jax: {error}", file=sys.stderr)
    sys.exit(1)

"""What every command shares: --config, flags of meshes and processes, one clear line for what is bad, exit codes."""

from collections.abc import Callable
import contextlib
import errno
import io
from itertools import islice
import os
from pathlib import Path
import re
import signal
import sys
import threading
import traceback
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from evo_jax import config as config_lib
from evo_jax.data import storage
from evo_jax.errors import UserError
from evo_jax.parallel import distributed, sharding

_FAREWELL = 5.0  # seconds that a process that ends by an error waits for the others to end, too
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


def define_processes() -> None:
  """Defines the flags of a command that may run as several processes."""
  flags.DEFINE_bool(
    "distributed",
    None,
    "Join the cluster that JAX finds: a TPU pod, Slurm, Kubernetes, Open MPI. Default: where flags or variables speak "
    "of several processes.",
  )
  flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "Number of processes; default: what the cluster says.")
  flags.DEFINE_integer("process_id", None, "This process's number, from 0; default: what the cluster says.")
  flags.DEFINE_integer(
    "heartbeat", 60, "Of several processes: seconds of silence after which one counts as lost, and all end."
  )


def join_processes() -> None:
  """Joins the processes of which the flags, or the cluster, speak. Raises UserError."""
  args = flags.FLAGS
  distributed.initialize(args.distributed, args.coordinator, args.num_processes, args.process_id, args.heartbeat)
  sharding.all_devices()  # names a platform that is not there


def define_mesh() -> None:
  """Defines --mesh of a command that reads a trained model."""
  flags.DEFINE_string("mesh", "", "Devices along the axes, as data:1,fsdp:8; default: data, all of them.")


def make_mesh() -> jax.sharding.Mesh:
  """The mesh that --mesh describes, over all devices of all processes. Raises UserError."""
  return sharding.make_mesh(sharding.parse_mesh(flags.FLAGS.mesh, config_lib.Mesh()))


def check_output(flag: str, file: str) -> None:
  """Raises UserError, naming the flag, where a file cannot be written; in a bucket only writing shows that. Leaves
  nothing behind."""
  if "://" in file:
    return
  if problem := storage.unwritable(os.path.expanduser(file)):
    raise UserError(f"--{flag}={file}: {problem}")


def write_output(flag: str, file: str, text: str) -> None:
  """Writes a file that a flag names. Raises UserError where that fails."""
  try:
    epath.Path(file).expanduser().write_text(text)
  except Exception as error:  # OSError; libraries for buckets raise others, too
    raise UserError(f"--{flag}={file}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def run(main: Callable[[], None]) -> None:
  """Parses flags, runs `main`, and turns bad input into one line on stderr and exit status 1.

  Only `UserError` and bad flags are the user's, and output that cannot be written; a bug, or an unforeseen failure in a
  library, keeps its traceback. After Ctrl-C, and where a pipe's reader has left, as `head` does, the command ends
  without a word, with the status that the signal would give it.
  """
  logging.set_verbosity(logging.FATAL)  # libraries' messages are not for users: errors arrive as exceptions
  sys.unraisablehook = _show_unraisable
  _prepare_streams()
  try:
    try:
      app.run(lambda argv: _guard(lambda: _main(main, argv)), flags_parser=lambda argv: _guard(lambda: _parse(argv)))
    finally:
      sys.stdout.flush()  # what cannot be written fails here, not as the interpreter ends
  except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
  except _OutputError as error:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # of what is left there is no second try
    if error.errno == errno.EPIPE:
      sys.exit(128 + signal.SIGPIPE)
    _complain(f"standard output: cannot be written: {error.strerror}")
    sys.exit(1)


class _OutputError(OSError):
  """Standard output cannot be written."""


class _Output(io.FileIO):
  """Standard output, whose errors can be told from those of other files."""

  def write(self, data) -> int | None:
    try:
      return super().write(data)
    except OSError as error:
      raise _OutputError(error.errno, error.strerror) from error


def _prepare_streams() -> None:
  """Streams take any text: what a terminal cannot show is escaped. A closed one is no other file's number later, and
  what is meant for stderr does not go to stdout."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # the first free number is this one
  for number, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
  sys.stderr.reconfigure(errors="backslashreplace")
  out = sys.stdout
  raw = io.BufferedWriter(_Output(out.fileno(), "w", closefd=False))
  at_once = out.line_buffering or out.write_through  # a terminal, or python -u
  sys.stdout = io.TextIOWrapper(raw, out.encoding, "backslashreplace", line_buffering=at_once)


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
  distributed.ignore_absent_tpu()
  storage.leaving.clear()
  try:
    main()
  except jax.errors.JaxRuntimeError as error:
    if not _joined():
      raise
    # Mostly a process that is gone, for which others would wait without end, at their exit too.
    _complain(f"another process was lost ({str(error).splitlines()[0][:200]}); start the same command again")
    _exit_at_once()
  finally:
    storage.leaving.set()


def _parse(argv: list[str]) -> list[str]:
  argv = _normalized(argv)
  if "config" in flags.FLAGS:
    argv = _with_config_file(argv)
  try:
    return flags.FLAGS(argv, known_only=False)
  except flags.Error as error:
    reason, _, trace = str(error).partition("Traceback (most recent call last):")  # of what a configuration raised
    raise UserError(" ".join(f"{reason} {trace.strip().splitlines()[-1] if trace else ''}".split())) from error
  except (AttributeError, KeyError) as error:  # ml_collections: --config.no.such.field
    raise UserError(_field_error(error, argv)) from error
  except (TypeError, ValueError) as error:
    raise UserError(f"bad flag or configuration file: {' '.join(str(error).split())}") from error
  except Exception as error:  # whatever running a configuration file raises
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    file = next((a for a in argv if a.startswith("--config=")), "--config")
    raise UserError(f"{file}: {reason}") from error


def _normalized(argv: list[str]) -> list[str]:
  """The arguments with each flag and its value in one, --name=value. --show-progression is --show_progression; values,
  and fields of a configuration, stay as they are."""
  joined, rest = argv[:1], iter(argv[1:])
  for argument in rest:
    if argument == "--":
      return [*joined, argument, *rest]
    found = re.match(r"--?([a-zA-Z][\w-]*)(=|\Z)", argument)
    name = found[1].replace("-", "_") if found else ""
    if name in flags.FLAGS:
      values = [argument[found.end() :]] if found[2] else [] if flags.FLAGS[name].boolean else [*islice(rest, 1)]
      argument = "=".join([f"--{name}", *values])
    elif name.startswith("no") and name[2:] in flags.FLAGS:
      argument = f"--{name}{argument[found.end(1) :]}"
    joined.append(argument)
  return joined


def _with_config_file(argv: list[str]) -> list[str]:
  """The arguments with the file's path as the value of --config."""
  is_config = lambda argument: argument.startswith("--config=")
  return [f"--config={config_file(a.removeprefix('--config='))}" if is_config(a) else a for a in argv]


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
    _complain(str(error))
    if _joined():
      _leave_others()
    sys.exit(1)
  except Exception:
    if not _joined():
      raise
    traceback.print_exc()
    _leave_others()


def _leave_others() -> NoReturn:
  """Ends this process, one of several: in order where all come to their ends; else without the others, who would stand
  still in what they do together, and end when they miss this one."""

  def shut_down():
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

  thread = threading.Thread(target=shut_down, daemon=True)  # waits for the others, for minutes
  thread.start()
  thread.join(_FAREWELL)
  _exit_at_once()


def _exit_at_once() -> NoReturn:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def _complain(message: str) -> None:
  """Prints one line on stderr, whatever the names and values that the message has."""
  who = f"evo_jax: process {jax.process_index()}" if _joined() else "evo_jax"
  line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
  print(f"{who}: {line}", file=sys.stderr)


def _joined() -> bool:
  """Whether this is one of several processes; does not ask for devices where there is one."""
  return jax.distributed.is_initialized() and jax.process_count() > 1

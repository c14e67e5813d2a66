"""What every command shares: --config, flags of meshes and processes, one clear line for bad input, a non-zero exit."""

from collections.abc import Callable
import os
from pathlib import Path
import re
import sys

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.parallel import distributed, sharding

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
  path, problem = epath.Path(file).expanduser(), None
  if path.is_dir():
    problem = "is a folder"
  elif not path.parent.is_dir():
    problem = f"there is no folder {path.parent}"
  elif not os.access(path if path.exists() else path.parent, os.W_OK):
    problem = "cannot be written: Permission denied"
  if problem:
    raise UserError(f"--{flag}={file}: {problem}")


def write_output(flag: str, file: str, text: str) -> None:
  """Writes a file that a flag names. Raises UserError where that fails."""
  try:
    epath.Path(file).expanduser().write_text(text)
  except Exception as error:  # OSError; libraries for buckets raise others, too
    raise UserError(f"--{flag}={file}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


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
  distributed.ignore_absent_tpu()
  try:
    main()
  except jax.errors.JaxRuntimeError as error:
    if not _joined():
      raise
    # Mostly a process that is gone, for which others would wait without end, at their exit too.
    print(
      f"evo_jax: process {jax.process_index()}: another process was lost "
      f"({str(error).splitlines()[0][:200]}); start the same command again",
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)


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
    where = f"process {jax.process_index()}: " if _joined() else ""
    print(f"evo_jax: {where}{error}", file=sys.stderr)
    sys.exit(1)


def _joined() -> bool:
  """Whether this is one of several processes; does not ask for devices where there is one."""
  return jax.distributed.is_initialized() and jax.process_count() > 1

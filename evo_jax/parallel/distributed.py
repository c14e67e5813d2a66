"""How several processes find each other, and which devices one looks for."""

from collections.abc import Callable, Mapping
import glob
import importlib.util
import os
import pickle
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from evo_jax.errors import UserError
from evo_jax.parallel import sharding

# Set by users and on machines with TPUs; JAX itself sets others, as TPU_ML_PLATFORM, where libtpu is installed.
_TPU_VARIABLES = (
  "JAX_PLATFORMS",
  "JAX_FORCE_TPU_INIT",
  "MEGASCALE_",
  "TPU_ACCELERATOR_TYPE",
  "TPU_CHIPS",
  "TPU_NAME",
  "TPU_PROCESS_",
  "TPU_TOPOLOGY",
  "TPU_VISIBLE",
  "TPU_WORKER_",
)
_HINT = "give --coordinator=HOST:PORT --num_processes=N --process_id=I to each process"


def initialize(
  distributed: bool | None, coordinator: str, num_processes: int | None, process_id: int | None, heartbeat: int
) -> None:
  """Joins the processes of a run. To be called before anything else asks JAX for devices.

  distributed: True joins the cluster that JAX finds (a TPU pod of Compute Engine or Kubernetes, Slurm, Open MPI, ...),
  False joins none; None joins one where a flag or the environment speaks of several processes. coordinator: host:port
  of process 0; empty and None: what no flag says is found out from the cluster. heartbeat: seconds of silence after
  which a process counts as lost.

  Raises UserError for flags and variables that are impossible or half set, and where the others are not found.
  """
  _check_flags(coordinator, num_processes, process_id, heartbeat)
  given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  flags = [f"{name}={value}" for name, value in given.items() if value not in ("", None)]
  if distributed is False and flags:
    raise UserError(f"{flags[0]}: does not go with --nodistributed")
  reason = "--distributed" if distributed else flags[0] if flags else _sign_of_several(os.environ)
  if distributed is False or reason is None or (num_processes == 1 and not distributed):
    return
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address is not None and not coordinator and not _is_address(address):
    raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: is not HOST:PORT")
  try:
    jax.distributed.initialize(coordinator or None, num_processes, process_id, heartbeat_timeout_seconds=heartbeat)
  except Exception as error:  # ValueError, KeyError, TypeError, RuntimeError, those of requests for metadata
    detail = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    raise UserError(
      f"{reason}: JAX finds no cluster of which this process is a part ({detail[:200]}); {_HINT}, or "
      "--nodistributed for one process"
    ) from error
  if sharding.all_devices()[0].platform == "cpu":
    # A CPU program that is loaded from the compilation cache (jaxlib 0.10.2) no longer keeps its collectives in one
    # order, and processes mix up their messages: Gloo then complains of sizes that do not match.
    jax.config.update("jax_enable_compilation_cache", False)
    # Gloo waits 30 seconds for a connection, and without end on one. So processes connect here, where they are
    # together, and not behind what one of them does alone.
    multihost_utils.sync_global_devices("connected")


def broadcast(value: Any) -> Any:
  """Process 0's value, anything that can be pickled, in all processes; what the others give means nothing."""
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  mine = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    mine[:] = data
  return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())


def in_first_process(act: Callable[[], np.ndarray], like: np.ndarray, refused: str) -> np.ndarray:
  """What `act` gives in process 0, in all processes. Raises UserError in all of them where it does in that one.

  like: an array of the result's shape and dtype. refused: what the other processes say then.
  """
  problem, value = None, like
  if jax.process_index() == 0:
    try:
      value = act()
    except UserError as error:
      problem = error
  if jax.process_count() > 1:
    failed, value = multihost_utils.broadcast_one_to_all((np.array(problem is not None), value))
    if failed and problem is None:
      raise UserError(refused)
  if problem is not None:
    raise problem
  return value


def _check_flags(coordinator: str, num_processes: int | None, process_id: int | None, heartbeat: int) -> None:
  if coordinator and not _is_address(coordinator):
    raise UserError(f"--coordinator={coordinator}: is not HOST:PORT")
  if num_processes is not None and num_processes < 1:
    raise UserError(f"--num_processes={num_processes}: is not positive")
  if process_id is not None and process_id < 0:
    raise UserError(f"--process_id={process_id}: is negative")
  if None not in (num_processes, process_id) and process_id >= num_processes:
    raise UserError(f"--process_id={process_id}: is not below --num_processes={num_processes}; the first process is 0")
  if heartbeat < 1:
    raise UserError(f"--heartbeat={heartbeat}: is not positive")


def _is_address(text: str) -> bool:
  host, _, port = text.rpartition(":")
  return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 2**16


def _sign_of_several(env: Mapping[str, str]) -> str | None:
  """What in the environment speaks of several processes: JAX's own variable, a TPU pod of Kubernetes, a Slurm step of
  several tasks, Open MPI. None: nothing."""
  for name, several in (
    ("JAX_COORDINATOR_ADDRESS", lambda value: True),
    ("TPU_WORKER_HOSTNAMES", lambda value: "," in value),
    ("SLURM_STEP_NUM_TASKS", lambda value: value != "1"),
    ("OMPI_COMM_WORLD_SIZE", lambda value: value != "1"),
  ):
    if name in env and several(env[name]):
      return f"{name}={env[name]}"
  return None


def ignore_absent_tpu() -> None:
  """Keeps JAX from looking for a TPU where libtpu is installed, as `plan` needs it, and there is none: each command
  would print libtpu's complaints. Does nothing where the environment names platforms or speaks of a TPU."""
  speaks = any(name.startswith(_TPU_VARIABLES) for name in os.environ)
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  if speaks or chips or jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
    return
  gpu = os.path.exists("/dev/dxg") or bool(glob.glob("/dev/nvidia[0-9]*"))
  plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
  jax.config.update("jax_platforms", "cuda,cpu" if gpu and plugin else "cpu")

"""How several processes find each other."""

import os

import jax


def initialize(coordinator: str, num_processes: int, process_id: int, heartbeat: int) -> None:
  """Joins the processes of a run, where flags or the environment speak of several. To be called before anything else
  asks JAX for devices.

  coordinator: host:port of process 0; empty, 0 and -1: what no flag says is found out from the cluster. heartbeat:
  seconds of silence after which a process counts as lost.
  """
  if num_processes <= 1 and not _cluster_of_several():
    return
  jax.distributed.initialize(
    coordinator or None,
    num_processes or None,
    None if process_id < 0 else process_id,
    heartbeat_timeout_seconds=heartbeat,
  )
  if jax.default_backend() == "cpu":
    # A CPU program that is loaded from the compilation cache (jaxlib 0.10.2) no longer keeps its collectives in one
    # order, and processes mix up their messages: Gloo then complains of sizes that do not match.
    jax.config.update("jax_enable_compilation_cache", False)


def _cluster_of_several() -> bool:
  """Whether the environment speaks of several processes: JAX's own variable, a TPU pod, a Slurm step."""
  env = os.environ
  return (
    "JAX_COORDINATOR_ADDRESS" in env
    or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    or env.get("SLURM_STEP_NUM_TASKS", "1") != "1"
  )

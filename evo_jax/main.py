"""Trains a model.

  python -m evo_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.SECTION.FIELD=VALUE ...]

The same command with the same --workdir goes on where it was stopped.
"""

import os
from pathlib import Path
import sys

from absl import flags
import jax

from evo_jax import cli
from evo_jax import train


def main() -> None:
  args = flags.FLAGS
  config, file = cli.read_config()
  if args.num_processes > 1 or _cluster_of_several():
    # Before anything else asks JAX for devices. What no flag says is found out from the cluster.
    jax.distributed.initialize(args.coordinator or None, args.num_processes or None,
                               None if args.process_id < 0 else args.process_id,
                               heartbeat_timeout_seconds=args.heartbeat)
    if jax.default_backend() == "cpu":
      # A CPU program that is loaded from the compilation cache (jaxlib 0.10.2) no longer keeps its collectives in one
      # order, and processes mix up their messages: Gloo then complains of sizes that do not match.
      jax.config.update("jax_enable_compilation_cache", False)
  workdir = args.workdir or f"runs/{Path(file).stem}"
  try:
    train.train(config, workdir)
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    # Mostly a process that is gone, for which others would wait without end, at their exit too.
    print(f"evo_jax: process {jax.process_index()}: another process was lost "
          f"({str(error).splitlines()[0][:200]}); the same command goes on from the last checkpoint in {workdir}",
          file=sys.stderr, flush=True)
    os._exit(1)


def _cluster_of_several() -> bool:
  """Whether the environment speaks of several processes: JAX's own variable, a TPU pod, a Slurm step."""
  env = os.environ
  return ("JAX_COORDINATOR_ADDRESS" in env or "," in env.get("TPU_WORKER_HOSTNAMES", "")
          or env.get("SLURM_STEP_NUM_TASKS", "1") != "1")


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("workdir", "", "Where the run lives; default: runs/ and the configuration's name.")
  flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", 0, "Number of processes; 0: one, or what the cluster says.")
  flags.DEFINE_integer("process_id", -1, "This process's number.")
  flags.DEFINE_integer("heartbeat", 60,
                       "Of several processes: seconds of silence after which one counts as lost, and all end.")
  cli.run(main)

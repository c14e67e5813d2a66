"""Plans a run on a TPU pod without the pod: compiles the training step for it, and says what it needs and how long it
takes.

  python -m evo_jax.plan --config=configs/evo8b.py --topology=v5p:8x8x8 [--mesh=data:8,fsdp:64,tensor:1] [--json=FILE]

The compiler is the TPU's own (`pip install 'evo_jax[tpu]'`), which needs no TPU. Without it the plan holds what follows
from shapes alone. Exits with status 1 if a plan does not fit.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.parallel import sharding
from evo_jax.planning import chips, planner, report


def main() -> None:
  args = flags.FLAGS
  config, _ = cli.read_config()
  config.check_trainable()
  topologies = read_topologies(args.topology)
  if args.json:
    cli.check_output("json", args.json)
  compiles = args.compile and chips.has_compiler()
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, whatever this machine has
  config = dataclasses.replace(config, mesh=sharding.parse_mesh(args.mesh, config.mesh))
  for topology in topologies:
    sharding.mesh_sizes(config.mesh, topology.chips)  # before the first compilation
  plans = []
  for topology in topologies:
    plan = planner.make_plan(config, topology, compiles)
    if plan.fits is False and args.advice:
      plan = dataclasses.replace(plan, advice=planner.advise(config, topology, plan, compiles))
    plans.append(plan)
    print(report.report(plan, config), flush=True)
  if len(plans) > 1:
    print("\n" + report.table(plans))
  if args.json:
    cli.write_output("json", args.json, json.dumps(record(plans, config), indent=1) + "\n")
  if too_large := [plan.topology for plan in plans if plan.fits is False]:
    raise UserError("a plan does not fit" if len(plans) == 1 else f"plans do not fit: {', '.join(too_large)}")


def read_topologies(texts: list[str]) -> list[chips.Topology]:
  """The topologies of --topology. Raises UserError."""
  if not texts:
    raise UserError("--topology is needed, as in --topology=v5p:8x8x8")
  return [chips.parse_topology(text) for text in texts]


def record(plans: list[planner.Plan], config: config_lib.Config) -> dict[str, Any]:
  """Plans with the command, the configuration and the assumptions, for JSON."""
  return {
    "command": " ".join(["python -m evo_jax.plan", *(a for a in sys.argv[1:] if not a.startswith("--json"))]),
    "fields": config_lib.to_dict(config),
    "assumptions": planner.ASSUMPTIONS,
    "jax": jax.__version__,
    "plans": [dataclasses.asdict(plan) for plan in plans],
  }


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_list(
    "topology", [], "CHIP:AxB[xC], of " + ", ".join(chips.CHIPS) + "; several by commas; N*CHIP:... for N slices."
  )
  flags.DEFINE_string("mesh", "", "AXIS:SIZE,... instead of the configuration's.")
  flags.DEFINE_bool("compile", True, "Compile; else answer from shapes alone.")
  flags.DEFINE_bool("advice", True, "Look for what makes a plan fit that does not: one compilation per attempt.")
  flags.DEFINE_string("json", "", "A file to write the plans to.")
  cli.run(main)

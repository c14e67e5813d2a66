"""Plans a run on a TPU pod without the pod."""

import dataclasses
import json
import math
import sys

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
  if not args.topology:
    raise UserError("--topology is needed, as in --topology=v5p:8x8x8")
  compiles = args.compile and chips.has_compiler()
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, whatever this machine has
  config = dataclasses.replace(config, mesh=planner.parse_mesh(args.mesh, config.mesh))
  for topology in args.topology:
    sharding.mesh_sizes(config.mesh, math.prod(chips.parse_topology(topology)[1]) * chips.parse_topology(topology)[2])
  plans = []
  for topology in args.topology:
    found = planner.make_plan(config, topology, compiles)
    if found.fits is False and args.advice:
      found.advice = planner.advise(config, found, compiles)
    plans.append(found)
    print(report.report(found, config), flush=True)
  if len(plans) > 1:
    print("\n" + report.table(plans))
  if args.json:
    command = " ".join(["python -m evo_jax.plan", *(a for a in sys.argv[1:] if not a.startswith("--json"))])
    text = {
      "command": command,
      "fields": config_lib.to_dict(config),
      "assumptions": planner.ASSUMPTIONS,
      "jax": jax.__version__,
      "plans": [dataclasses.asdict(p) for p in plans],
    }
    try:
      with open(args.json, "w", encoding="utf-8") as stream:
        json.dump(text, stream, indent=1)
    except OSError as error:
      raise UserError(f"--json={args.json}: cannot be written: {error.strerror}") from error
  if any(p.fits is False for p in plans):
    raise UserError(
      "a plan does not fit"
      if len(plans) == 1
      else "plans do not fit: " + ", ".join(p.topology for p in plans if p.fits is False)
    )


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_list(
    "topology", [], "CHIP:AxB[xC], of " + ", ".join(chips.CHIPS) + "; several by commas; N*CHIP:... for N slices."
  )
  flags.DEFINE_string("mesh", "", "AXIS:SIZE,... instead of the configuration's.")
  flags.DEFINE_bool("compile", True, "Compile; else answer from shapes alone.")
  flags.DEFINE_bool("advice", True, "Look for what makes a plan fit that does not: a compilation a try.")
  flags.DEFINE_string("json", "", "A file to write the plans to.")
  cli.run(main)

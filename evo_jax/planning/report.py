"""A plan in words."""

from evo_jax import config as config_lib
from evo_jax.planning import chips, planner


def report(found: planner.Plan, config: config_lib.Config) -> str:
  """A plan in words."""
  mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
  lines = [
    f"{found.topology}: {found.chips} chips, mesh {mesh}; {found.sequences} sequences of "
    f"{config.model.context} tokens a step, in {found.microbatches} microbatches; remat {found.remat}"
  ]
  row = lambda name, text: lines.append(f"  {name:<44}{text}")
  for name, size in found.bytes.items():
    row(f"{name}, GiB a chip", chips.gib(size))
  spare = 1 - found.needed / found.hbm
  verdict = {
    True: f"fits, {spare:.0%} to spare",
    False: f"does not fit, by {chips.gib(found.needed - found.hbm)} GiB",
    None: "at least",
  }[found.fits]
  row("together, of HBM", f"{chips.gib(found.needed)} of {chips.gib(found.hbm)}: {verdict}")
  row(
    "operations a step", f"{found.operations:.3e}, of which the model's {found.model_operations / found.operations:.0%}"
  )
  if found.seconds:
    for name, size in found.traffic.items():
      row(name + ", GB a chip", f"{size / 1e9:.2f}")
    for name, seconds in found.seconds.items():
      row(name + ", s", f"{seconds:.3f}")
    row("step, s", f"{found.step_seconds:.3f}; most of it {found.bottleneck}")
    row("tokens a second", f"{found.tokens_per_second:,.0f}")
    row("MFU", f"{found.mfu:.1%}")
    row(
      f"{config.train.steps * found.sequences * config.model.context / 1e9:,.0f} billion tokens, days",
      f"{found.days:.1f}",
    )
    row(
      "compiled in, s",
      f"{found.compile_seconds:.0f}, with {chips.gib(found.compile_peak_bytes)} GiB of this machine's memory",
    )
  elif found.bytes["activations"] is None:
    lines.append(
      "  Not known without the TPU's compiler (pip install 'evo_jax[tpu]'): activations, code, collectives, time."
    )
  if found.advice:
    lines.append("  " + found.advice)
  return "\n".join(lines)


def table(plans: list[planner.Plan]) -> str:
  """Several plans side by side, a line each."""
  head = (
    f"{'topology':<14}{'chips':>6}  {'mesh':<12}{'HBM GiB':>16}{'GB sent':>9}{'step s':>9}{'tokens/s':>13}"
    f"{'MFU':>7}{'days':>8}"
  )
  lines = [head]
  for p in plans:
    known = lambda value, text: "-" if value is None else text.format(value)
    sent = None if p.traffic is None else sum(p.traffic.values()) / 1e9
    lines.append(
      f"{p.topology:<14}{p.chips:>6}  {'x'.join(str(n) for n in p.mesh.values()):<12}"
      f"{chips.gib(p.needed) + ' / ' + chips.gib(p.hbm):>16}{known(sent, '{:.1f}'):>9}"
      f"{known(p.step_seconds, '{:.3f}'):>9}{known(p.tokens_per_second, '{:,.0f}'):>13}"
      f"{known(p.mfu, '{:.1%}'):>7}{known(p.days, '{:.1f}'):>8}"
    )
  return "\n".join(lines)

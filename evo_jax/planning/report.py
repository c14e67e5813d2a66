"""Plans as text: one in full, several as a table."""

from evo_jax import config as config_lib
from evo_jax.planning import chips
from evo_jax.planning.planner import Plan


def report(plan: Plan, config: config_lib.Config) -> str:
  """A plan in full, one figure per line."""
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  rows = _memory(plan)
  rows["FLOPs per step"] = f"{plan.operations:.3e}, of which the model's {plan.model_operations / plan.operations:.0%}"
  if plan.seconds:
    rows |= _times(plan, config)
  lines = [
    f"{plan.topology}: {plan.chips} chips, mesh {mesh}; {plan.sequences} sequences of {config.model.context} tokens "
    f"per step, in {plan.microbatches} microbatches; remat {plan.remat}",
    *(f"  {name:<44}{text}" for name, text in rows.items()),
  ]
  if plan.bytes["activations"] is None:
    lines.append(
      "  Not known without the TPU's compiler (pip install 'evo_jax[tpu]'): activations, code, collectives, time."
    )
  if plan.advice:
    lines.append("  " + plan.advice)
  return "\n".join(lines)


def _memory(plan: Plan) -> dict[str, str]:
  """Lines of memory by name."""
  verdict = {
    True: f"fits, {1 - plan.needed / plan.hbm:.0%} to spare",
    False: f"does not fit, by {chips.format_gib(plan.needed - plan.hbm)} GiB",
    None: "at least",
  }[plan.fits]
  return {
    **{f"{name}, GiB per chip": chips.format_gib(size) for name, size in plan.bytes.items()},
    "together, of HBM": f"{chips.format_gib(plan.needed)} of {chips.format_gib(plan.hbm)}: {verdict}",
  }


def _times(plan: Plan, config: config_lib.Config) -> dict[str, str]:
  """Lines of collectives and times by name."""
  tokens = config.train.steps * plan.sequences * config.model.context
  return {
    **{f"{name}, GB per chip": f"{size / 1e9:.2f}" for name, size in plan.traffic.items()},
    **{f"{name}, s": f"{seconds:.3f}" for name, seconds in plan.seconds.items()},
    "step, s": f"{plan.step_seconds:.3f}; most of it {plan.bottleneck}",
    "tokens per second": f"{plan.tokens_per_second:,.0f}",
    "MFU": f"{plan.mfu:.1%}",
    f"{tokens / 1e9:,.0f} billion tokens, days": f"{plan.days:.1f}",
    "compiled in, s": f"{plan.compile_seconds:.0f}, with {chips.format_gib(plan.compile_peak_bytes)} GiB of this "
    "machine's memory",
  }


def table(plans: list[Plan]) -> str:
  """Several plans side by side, one per line."""
  lines = [
    f"{'topology':<14}{'chips':>6}  {'mesh':<12}{'HBM GiB':>16}{'GB sent':>9}{'step s':>9}{'tokens/s':>13}"
    f"{'MFU':>7}{'days':>8}"
  ]
  known = lambda value, text: "-" if value is None else text.format(value)
  for plan in plans:
    sent = None if plan.traffic is None else sum(plan.traffic.values()) / 1e9
    lines.append(
      f"{plan.topology:<14}{plan.chips:>6}  {'x'.join(str(n) for n in plan.mesh.values()):<12}"
      f"{chips.format_gib(plan.needed) + ' / ' + chips.format_gib(plan.hbm):>16}{known(sent, '{:.1f}'):>9}"
      f"{known(plan.step_seconds, '{:.3f}'):>9}{known(plan.tokens_per_second, '{:,.0f}'):>13}"
      f"{known(plan.mfu, '{:.1%}'):>7}{known(plan.days, '{:.1f}'):>8}"
    )
  return "\n".join(lines)

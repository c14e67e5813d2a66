"""What a model needs to decode by some sampling parameters: schedules of windows, drafting, room behind texts."""

from evo_jax.decoding import modes, settings, speculative
from evo_jax.decoding.modes import WindowSchedule
from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.speculative import Drafting
from evo_jax.flow import policies
from evo_jax.run import Run


def make_drafting(run: Run, sampling: Sampling) -> tuple[Drafting, bool, int, bool]:
  """How mode verify drafts: what `DraftPolicy` takes."""
  from_windows, tokens = sampling.draft_from != "text", sampling.draft_tokens
  drafting = Drafting(
    tokens=tokens,
    outcomes=speculative.every_outcome(tokens) if from_windows and sampling.draft_passes == 1 else (),
    from_text=sampling.draft_from != "windows" and sampling.draft_passes == 1,
    passes=sampling.draft_passes,
    coupling=sampling.coupling,
    reads_anchor=run.model.reads_clean_anchor,
  )
  return drafting, sampling.adapts_drafts, tokens, from_windows


def make_schedule(run: Run, sampling: Sampling) -> WindowSchedule | None:
  """The schedule of windows that the parameters describe; None in modes without windows. Raises UserError for a
  parameter that is impossible or that this model does not support."""
  config = run.config
  path = settings.check_sampling(sampling, config)
  if path is None:
    return None
  size = sampling.window or settings.default_window(sampling, config)
  clock = settings.clock_steps(sampling, path, run.statistics.warp)
  policies.check_policy(path, size, run.model.rows, config)
  policy = policies.make_policy(path, size, config.paths.rolling_width, s=clock)
  return WindowSchedule(
    policy, size, sampling.stepper, config.loss.self_conditioning > 0, full_sequence=config.diffusion_alone
  )


def room_behind(sampling: Sampling, schedule: WindowSchedule | None) -> int:
  """Positions behind the longest text that the slots of a pass may reach."""
  if schedule is None:
    return sampling.draft_tokens + 1 if sampling.mode == "verify" else 1
  return 2 * schedule.size + modes.uncached_slots(schedule.size, infill=True)

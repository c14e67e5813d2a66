"""Settings of decoding, checked."""

import dataclasses

import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.errors import UserError
from evo_jax.flow import schedules, steppers
from evo_jax.flow import warp as warp_lib

MODES = ("ar", "flow", "adaptive", "verify")
_GRIDS = ("time", "precision")
DEFAULT_PATH = {"flow": "diagonal", "adaptive": "spread"}
_STEPS_PATHS = ("diagonal", "rolling", "random", "learned")  # whose number is Sampling.steps
_THRESHOLD_PATHS = ("spread", "entropy", "confidence", "maturity")  # whose number is Sampling.threshold
_MANY_PASSES = 0.3  # bits; up to this threshold windows as in training do (experiments/decode_speed.py)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How texts are written. Flags of the command have the same names."""

  mode: str = "ar"
  max_tokens: int = 200  # of each text; of a gap without a number, `gap`
  temperature: float = 1.0
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  greedy: bool = False
  stop: tuple[str, ...] = ()  # a text ends before the first of these strings
  steps: int = 8  # flow: passes a window
  path: str = ""  # flow: diagonal, or any that evaluate prices; adaptive: spread, entropy, confidence or maturity
  grid: str = "time"  # flow, of the clock: steps even in time, in log-precision, or t after each pass, as 0.8,0.5,0.2
  stepper: str = "ode"  # flow, adaptive: ode, ode2 (second order) or ancestral
  threshold: float = 0.25  # adaptive
  window: int = 0  # flow, adaptive: tokens of a window; 0: `default_window`
  draft: int = 4  # verify: tokens proposed a pass at most; each text proposes as many as are often accepted
  draft_passes: int = 1  # verify: passes of a round; 1 judges and proposes in one
  gap: int = 16  # infill: tokens of a gap without a number
  endless: bool = False  # the document's end is ruled out: every text gets max_tokens tokens
  batch_size: int = 64  # texts that are written at once


def default_window(sampling: Sampling, config: config_lib.Config) -> int:
  """The tokens of a window where nothing says how many: as in training.

  `adaptive` takes up to four times as many, as far as texts fill them, where its threshold asks for few passes: the
  tokens that jump together are then so many that a window of training has no places for them that are far apart.
  """
  size = config.window.size
  if sampling.mode != "adaptive" or sampling.path not in ("", "spread") or sampling.threshold <= _MANY_PASSES:
    return size
  return min(max(sampling.max_tokens, size), 4 * size, config.model.context)


def check_sampling(sampling: Sampling, config: config_lib.Config) -> str | None:
  """Raises UserError, naming the flag, for settings that are impossible or that the model does not have. Returns the
  path that windows take, with its number; None for modes without one."""

  def need(condition: bool, flag: str, problem: str) -> None:
    if not condition:
      raise UserError(f"--{flag}={getattr(sampling, flag)}: {problem}")

  need(sampling.mode in MODES, "mode", f"is not one of {', '.join(MODES)}")
  for flag in ("max_tokens", "steps", "draft", "draft_passes", "gap", "batch_size"):
    need(getattr(sampling, flag) >= 1, flag, "is not positive")
  need(sampling.temperature > 0, "temperature", "is not positive; for the most probable tokens use --greedy")
  need(sampling.top_k >= 0, "top_k", "is negative")
  need(0 < sampling.top_p <= 1, "top_p", "is not in (0, 1]")
  need(sampling.window >= 0, "window", "is negative")
  need(sampling.window <= config.model.context, "window", f"is more than the context of {config.model.context}")
  need(sampling.draft <= 16, "draft", "is more than 16: a pass has a window for every proposal")
  need(sampling.stepper in steppers.STEPPERS, "stepper", f"is not one of {', '.join(steppers.STEPPERS)}")
  need(all(sampling.stop), "stop", "is empty")
  if config.diffusion_alone:
    need(sampling.mode == "flow", "mode", "the model is of diffusion alone (loss.ar_weight = 0): --mode=flow")
    need(sampling.window in (0, config.window.size), "window", f"the model knows only windows of {config.window.size}")
  if sampling.mode not in DEFAULT_PATH:
    need(not sampling.path, "path", f"goes with --mode=flow or --mode=adaptive, not with {sampling.mode}")
    return None
  path = sampling.path or DEFAULT_PATH[sampling.mode]
  if sampling.mode == "adaptive":
    need(path in _THRESHOLD_PATHS, "path", f"is not one of {', '.join(_THRESHOLD_PATHS)}, whose number is --threshold")
    try:
      return _full(f"{path}:{sampling.threshold}")
    except UserError:
      most = schedules.LIMITS[path]
      raise UserError(f"--threshold={sampling.threshold}: is not in [0, {most:g}], which {path} needs") from None
  path = f"{path}:{sampling.steps}" if path in _STEPS_PATHS else path
  name, _ = schedules.parse_path(path)
  need(name != "ar", "path", "has a mode of its own, --mode=ar")
  need(
    name != "learned" or config.model.progression == "learned",
    "path",
    "the model has a shared clock (model.progression)",
  )
  _clock_times(sampling)
  need(sampling.grid == "time" or name in ("diagonal", "rolling"), "grid", f"does not go with --path={path}")
  return path


def _full(path: str) -> str:
  """confidence:t is a probability that has to be exceeded; as a threshold, 0 must be autoregression: 1 - t."""
  name, _, number = path.partition(":")
  path = f"{name}:{1.0 - float(number)}" if name == "confidence" else path
  schedules.parse_path(path)
  return path


def _clock_times(sampling: Sampling) -> list[float] | None:
  """The times after each pass that `grid` gives, but for the last 0; None where it names a rule. Raises UserError."""
  if sampling.grid in _GRIDS:
    return None
  try:
    times = [float(t) for t in sampling.grid.split(",")]
  except ValueError:
    times = []
  if not times or any(a <= b for a, b in zip([1.0] + times, times + [0.0])):
    raise UserError(
      f"--grid={sampling.grid}: is neither {' nor '.join(_GRIDS)}, nor times that fall from 1 to 0, as 0.8,0.5,0.2"
    )
  return times


def clock_steps(sampling: Sampling, path: str, warp: warp_lib.Warp) -> jax.Array | None:
  """The clock (K + 1,) of a grid's passes; None: even steps.

  "precision": steps even in the logarithm of the diagonal's precision, between t = 0.98 and t = 0.02.
  """
  if sampling.grid == "time" or sampling.mode != "flow":
    return None
  times = _clock_times(sampling)
  if times is None:
    K = int(schedules.parse_path(path)[1])
    ends = jnp.log(warp.precision(jnp.array([1.0 - schedules.END, schedules.END])))
    times = warp.time(jnp.exp(jnp.linspace(ends[0], ends[1], max(K - 1, 1))))[: K - 1]
  return jnp.concatenate([jnp.zeros(1), 1.0 - jnp.asarray(times, jnp.float32), jnp.ones(1)])

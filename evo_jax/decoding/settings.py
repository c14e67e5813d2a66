"""Sampling parameters: how texts are generated, checked against the model."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax import functions
from evo_jax.errors import UserError
from evo_jax.flow import schedules, steppers
from evo_jax.flow.schedules import Path
from evo_jax.flow.warp import Warp

MODES = ("ar", "flow", "adaptive", "verify")
DEFAULT_PATH = {"flow": "diagonal", "adaptive": "spread"}  # of the modes that decode windows along a path
MAX_DRAFT = 16
DEFAULT_DRAFT = 4  # drafted tokens, where they are neither given nor adapted
COUPLINGS = ("gumbel", "rejection")
DRAFT_SOURCES = ("both", "windows", "text")
DEFAULT_TOKENS = 200  # of a text at most, where `Sampling.max_tokens` is None
_GRIDS = ("time", "precision")
STEPS_PATHS = ("diagonal", "rolling", "random", "learned")  # whose number is Sampling.steps
_THRESHOLD_PATHS = ("spread", "entropy", "confidence", "maturity")  # whose number is Sampling.threshold
_MANY_PASSES = 0.3  # bits; up to this threshold windows of the training size do (experiments/decode_speed.py)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling parameters. The flags of `evo_jax.generate` have the same names."""

  mode: str = "ar"
  max_tokens: int | None = None  # of each text; None: 200, or what the context leaves. Gaps have sizes of their own
  temperature: float = 1.0
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  greedy: bool = False
  stop: tuple[str, ...] = ()  # what is written ends before the first of these strings; given text is not searched
  steps: int = 8  # flow: passes per window
  # flow: diagonal, or any that evaluation knows, also one's own; adaptive: spread, entropy, confidence or maturity
  path: Path = ""
  grid: str = "time"  # flow: steps even in time, in log-precision, or t after each pass, as 0.8,0.5,0.2
  stepper: str = "ode"  # flow, adaptive: ode, ode2 (second order) or ancestral
  threshold: float = 0.25  # adaptive
  window: int = 0  # flow, adaptive: tokens of a window; 0: `default_window`
  draft: int = 0  # verify: drafted tokens per round, with windows for all outcomes; 0: by measured speed
  draft_passes: int = 1  # verify: passes per round; with 1, a pass verifies and drafts
  draft_from: str = "both"  # verify: windows, text (its own repetitions), or both: the better bet
  coupling: str = "gumbel"  # verify: gumbel (the text is ar's with the seed) or rejection (its distribution is ar's)
  gap: int = 16  # infilling: tokens of a gap without a number
  endless: bool = False  # tokens that end a text are ruled out: every text gets max_tokens (but for half a character)
  batch_size: int = 64  # texts that are decoded at once

  @property
  def adapts_drafts(self) -> bool:
    """Whether measured speed says how mode verify drafts. Not with rejection: texts would depend on it."""
    return self.mode == "verify" and not self.draft and self.draft_passes == 1 and self.coupling == "gumbel"

  @property
  def draft_tokens(self) -> int:
    """Tokens of mode verify's drafts: of all, or of the longest where they are adapted."""
    return MAX_DRAFT if self.adapts_drafts else self.draft or DEFAULT_DRAFT


def default_window(sampling: Sampling, config: config_lib.Config) -> int:
  """Tokens of a window where `Sampling.window` is 0: as in training.

  `adaptive` takes four times as many, as far as the model can read them, where its threshold asks for few passes: then
  so many tokens jump together that a window of the training size has no room for distance between them.
  """
  size = config.window.size
  if sampling.mode != "adaptive" or sampling.path not in ("", "spread") or sampling.threshold <= _MANY_PASSES:
    return size
  return min(4 * size, config.model.position_limit)


def shared_threshold(sampling: Sampling) -> float:
  """A threshold of mode adaptive with the same default window: a program that has the one has the other."""
  wide = not sampling.window and sampling.path in ("", "spread") and sampling.threshold > _MANY_PASSES
  return 1.0 if wide else Sampling.threshold


def of_all_thresholds(sampling: Sampling) -> list[Sampling]:
  """The parameters, in mode adaptive with each threshold whose programs differ."""
  if sampling.mode != "adaptive":
    return [sampling]
  values = {shared_threshold(dataclasses.replace(sampling, threshold=threshold)) for threshold in (0.0, 1.0)}
  return [dataclasses.replace(sampling, threshold=value) for value in sorted(values)]


def check_sampling(sampling: Sampling, config: config_lib.Config) -> Path | None:
  """The path, with its number, that windows take; None in modes without a path.

  Raises UserError, naming the flag, for parameters that are impossible or that the model does not support.
  """
  _check_ranges(sampling)
  _check_model(sampling, config)
  if sampling.mode not in DEFAULT_PATH:
    _require(sampling, not sampling.path, "path", f"goes with --mode=flow or --mode=adaptive, not with {sampling.mode}")
    return None
  return _adaptive_path(sampling) if sampling.mode == "adaptive" else _flow_path(sampling, config)


def _require(sampling: Sampling, condition: bool, flag: str, problem: str) -> None:
  if not condition:
    raise UserError(f"--{flag}={getattr(sampling, flag)}: {problem}")


def _check_ranges(sampling: Sampling) -> None:
  """Checks each parameter by itself."""
  s = sampling
  _require(s, s.mode in MODES, "mode", f"is not one of {', '.join(MODES)}")
  for flag in ("max_tokens", "steps", "draft_passes", "gap", "batch_size"):
    _require(s, getattr(s, flag) is None or getattr(s, flag) >= 1, flag, "is not positive")
  for flag in ("temperature", "top_p", "threshold"):
    _require(s, math.isfinite(getattr(s, flag)), flag, "is not a finite number")
  _require(s, s.temperature > 0, "temperature", "is not positive; for the most probable tokens use --greedy")
  _require(s, s.top_k >= 0, "top_k", "is negative")
  _require(s, 0 < s.top_p <= 1, "top_p", "is not in (0, 1]")
  _require(s, s.window >= 0, "window", "is negative")
  _require(s, s.steps <= schedules.MOST, "steps", f"is more than {schedules.MOST}")
  _check_draft(s)
  _require(s, s.stepper in steppers.STEPPERS, "stepper", f"is not one of {', '.join(steppers.STEPPERS)}")
  _check_stop(s.stop)


def _check_draft(s: Sampling) -> None:
  _require(s, s.draft >= 0, "draft", "is negative")
  _require(s, s.draft <= MAX_DRAFT, "draft", f"is more than {MAX_DRAFT}: a pass has a window for every drafted token")
  problem = f"is more than the {s.draft_tokens} tokens of --draft and one: each pass but the last drafts one or more"
  _require(s, s.draft_passes <= s.draft_tokens + 1, "draft_passes", problem)
  _require(s, s.draft_from in DRAFT_SOURCES, "draft_from", f"is not one of {', '.join(DRAFT_SOURCES)}")
  _require(s, s.coupling in COUPLINGS, "coupling", f"is not one of {', '.join(COUPLINGS)}")
  problem = "goes with --draft_passes=1; only windows draft in passes of their own"
  _require(s, s.draft_passes == 1 or s.draft_from != "text", "draft_from", problem)


def _check_stop(stop: tuple[str, ...]) -> None:
  if isinstance(stop, str):
    raise UserError(f"--stop: {stop!r} is one string; a tuple of strings is wanted")
  for string in stop:
    if not string:
      raise UserError("--stop: is empty")
    if re.search("[\ud800-\udfff]", string):
      raise UserError(f"--stop={string}: is not valid UTF-8, as the text that it is looked for in")


def _check_model(sampling: Sampling, config: config_lib.Config) -> None:
  """Checks what depends on the model."""
  context, size = config.model.position_limit, config.window.size
  _require(sampling, sampling.window <= context, "window", f"is more than the context of {context}")
  if config.diffusion_alone:
    problem = "the model is of diffusion alone (loss.ar_weight = 0): --mode=flow"
    _require(sampling, sampling.mode == "flow", "mode", problem)
    _require(sampling, sampling.window in (0, size), "window", f"the model has only windows of {size}")


def _adaptive_path(sampling: Sampling) -> str:
  name, number = sampling.path or DEFAULT_PATH["adaptive"], sampling.threshold
  problem = f"is not one of {', '.join(_THRESHOLD_PATHS)}, whose number is --threshold"
  _require(sampling, name in _THRESHOLD_PATHS, "path", problem)
  # confidence:p asks for a probability above p; as a threshold, 0 must be autoregression: 1 - p.
  path = f"{name}:{1.0 - number if name == 'confidence' else number}"
  try:
    schedules.parse_path(path)
  except UserError:
    problem = f"is not in [0, {schedules.LIMITS[name]:g}], which {name} needs"
    raise UserError(f"--threshold={number}: {problem}") from None
  return path


def _flow_path(sampling: Sampling, config: config_lib.Config) -> Path:
  path = sampling.path or DEFAULT_PATH["flow"]
  path = f"{path}:{sampling.steps}" if path in STEPS_PATHS else path
  path = functions.read_path(path, sampling.steps) if isinstance(path, str) else path
  name, _ = schedules.parse_path(path)
  _require(sampling, name != "ar", "path", "has a mode of its own, --mode=ar")
  learned = config.model.progression == "learned"
  _require(sampling, name != "learned" or learned, "path", "the model has a shared clock (model.progression)")
  _grid_times(sampling)
  has_clock = name in ("diagonal", "rolling")
  _require(sampling, sampling.grid == "time" or has_clock, "grid", f"does not go with --path={path}")
  return path


def _grid_times(sampling: Sampling) -> list[float] | None:
  """The times after each pass but the last that `grid` lists; None where it names a rule. Raises UserError."""
  if sampling.grid in _GRIDS:
    return None
  try:
    times = [float(t) for t in sampling.grid.split(",")]
  except ValueError:
    times = []
  if not times or not all(a > b for a, b in zip([1.0] + times, times + [0.0])):
    raise UserError(
      f"--grid={sampling.grid}: is neither {' nor '.join(_GRIDS)}, nor times that fall from 1 to 0, as 0.8,0.5,0.2"
    )
  return times


def clock_steps(sampling: Sampling, path: Path, warp: Warp) -> jax.Array | None:
  """The clock (K + 1,) float32 of a path's K passes; None: even steps.

  "precision": steps even in the logarithm of the diagonal's precision, between t = 0.98 and t = 0.02.
  """
  if sampling.grid == "time" or sampling.mode != "flow":
    return None
  times = _grid_times(sampling)
  if times is None:
    K = int(schedules.parse_path(path)[1])
    ends = jnp.log(warp.precision(jnp.array([1.0 - schedules.END, schedules.END])))
    times = warp.time(jnp.exp(jnp.linspace(ends[0], ends[1], max(K - 1, 1))))[: K - 1]
  return jnp.concatenate([jnp.zeros(1), 1.0 - jnp.asarray(times, jnp.float32), jnp.ones(1)])

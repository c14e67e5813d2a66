"""Paths from t = 1 to t = 0: their names, clocks and time grids, and low-discrepancy draws. Pure arrays, no network.

A shared clock s runs from 0 to 1. On every path but the learned one token i keeps t = 1 until its start, then
falls linearly, and is known after `width`:

    t_i(s) = clip(1 - (s - start_i) / width, 0, 1)

    diagonal      start 0, width 1: all tokens together; the limit of many steps is diffusion
    rolling       starts evenly spread in order, width r: a wave from left to right
    independent   starts drawn at random, width r: tokens in any order and at any distance
    staircase     start i / T, width 1 / T, on a grid of T steps: plain jumps one after another, autoregression
    streams       n staircases side by side, one in each n-th of the window: tokens that jump together are far apart
    scaffold      the diagonal to some t in K passes, then n staircases: tokens that jump read evidence ahead of them

A learned clock gives each token a delay m and a sharpness b instead: t_i(s) = sigmoid(b_i (m_i - logit s)). m = 0 and
b = 1 is the diagonal; a large b is a jump, at the clock's time sigmoid(m).

Letters in names: T tokens of a window, K steps.
"""

from collections.abc import Callable, Hashable
import dataclasses
import inspect
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.errors import UserError

_PASSES = ("diagonal", "rolling", "random", "learned")  # name:K, K passes per window
_TOKENS = ("left", "certain", "streams")  # name:n, n tokens per pass
# name:threshold, and its largest value
LIMITS = {"entropy": 64.0, "confidence": 1.0, "maturity": 1.0, "spread": 64.0, "error": 64.0}
_FORMS = "ar, staircase, " + ", ".join(
  [f"{n}:K" for n in _PASSES] + [f"{n}:n" for n in _TOKENS] + ["scaffold:K:n:t"] + [f"{n}:threshold" for n in LIMITS]
)
_SCAFFOLD_TIME = 0.5  # t at the scaffold's end where a path's name does not say
MOST = 65_536  # passes of a window, or tokens of a pass, that a path's name can ask for
_ROUNDING = 1e-5  # by which times of a path of one's own may miss its ends
END = 0.02  # on a learned clock a token whose time falls below this jumps, and one above 1 - this waits


@flax.struct.dataclass
class LinearClock:
  """t_i(s) by start and width; both (..., T) or broadcast to it."""

  start: jax.Array
  width: jax.Array

  def __call__(self, s: jax.Array) -> jax.Array:
    """Progression t in [0, 1] at clock s; s broadcasts against (..., T)."""
    return jnp.clip(1.0 - (s - self.start) / self.width, 0.0, 1.0)


def linear_clock(name: str, tokens: int, rolling_width: float, uniform: jax.Array | None = None) -> LinearClock:
  """The clock of a path over `tokens` tokens; `uniform` (..., T) in [0, 1) gives the starts of "independent"."""
  order = jnp.arange(tokens, dtype=jnp.float32)
  if name == "diagonal":
    return LinearClock(jnp.zeros(tokens), jnp.ones(tokens))
  if name == "rolling":
    return LinearClock((1.0 - rolling_width) * order / max(tokens - 1, 1), jnp.full(tokens, rolling_width))
  if name == "independent":
    return LinearClock((1.0 - rolling_width) * uniform, jnp.full(tokens, rolling_width))
  if name == "staircase":
    return LinearClock(order / tokens, jnp.full(tokens, 1.0 / tokens))
  raise ValueError(f"no path named {name!r}")


def learned_clock(delay: jax.Array, sharpness: jax.Array, s: jax.Array) -> jax.Array:
  """t = sigmoid(sharpness (delay - logit s)) (...), differentiable in both; exactly 1 and 0 within END of the ends,
  where tokens wait and jump. s in [0, 1] broadcasts."""
  inside = (s > 0.0) & (s < 1.0)
  s_inside = jnp.where(inside, s, 0.5)
  time = jax.nn.sigmoid(sharpness * (delay - jnp.log(s_inside) + jnp.log1p(-s_inside)))
  time = jnp.where(time > 1.0 - END, 1.0, jnp.where(time < END, 0.0, time))
  return jnp.where(inside, time, (s <= 0.0).astype(time.dtype))


def is_fixed(function: Callable) -> bool:
  """Whether a function of one's own is a path, function(s, tokens), by the name of its first parameter: of a policy,
  function(observation), it is `observation`."""
  return next(iter(_parameters(function)), None) == "s"


@dataclasses.dataclass(frozen=True)
class OwnPath:
  """A path of one's own by a pure function. Raises UserError for a function or a number that is of no use.

  function: one of two kinds, which the name of the first parameter tells apart:
    function(s, tokens)       a path that is fixed beforehand: the times (tokens,), or broadcast to it, at the shared
                              clock s () float32: 1 at s = 0, 0 at s = 1, never rising
    function(observation), function(observation, number)
                              a policy, as `policies.Policy`; what it asks for is made good as `policies.OwnPolicy` says
  number: of a path its passes K; of a policy with a number that number, float32. name: in tables and messages; default:
  the function's, and the number.
  """

  function: Callable
  number: float | None = None
  name: str = ""

  def __post_init__(self):
    parameters = _parameters(self.function)
    kind = next(iter(parameters), None)
    if kind not in ("s", "observation"):
      takes = f"takes ({', '.join(parameters)})" if callable(self.function) else "is no function"
      raise self.error(f"{takes}; a path takes (s, tokens), a policy (observation) or (observation, number)")
    if not isinstance(self.function, Hashable):
      raise self.error("has no hash, by which compiled programs are found: a function is wanted")
    arguments = (None, None) if kind == "s" or self.number is not None else (None,)
    try:
      inspect.signature(self.function).bind(*arguments)
    except TypeError as error:
      wanted = "(s, tokens)" if kind == "s" else "(observation, number)" if len(arguments) > 1 else "(observation)"
      hint = "" if kind == "s" or len(arguments) > 1 else "; a number goes behind the name, as in FILE.py:NAME:0.5"
      raise self.error(f"takes ({', '.join(parameters)}), but is called with {wanted}{hint}") from error
    if kind == "s" and not (self.number and 1 <= self.number <= MOST and self.number == int(self.number)):
      raise self.error(
        f"needs a number of passes from 1 to {MOST}, as in FILE.py:{getattr(self.function, '__name__', 'NAME')}:16"
      )
    if self.number is not None and not np.isfinite(self.number):
      raise self.error("its number is not finite")

  @property
  def fixed(self) -> bool:
    """Whether it is fixed beforehand, not a policy."""
    return is_fixed(self.function)

  def __str__(self) -> str:
    number = "" if self.number is None else f":{self.number:g}"
    return self.name or f"{getattr(self.function, '__name__', type(self.function).__name__)}{number}"

  def error(self, problem: str) -> UserError:
    """The error to raise for it."""
    return UserError(f"path {str(self)!r}: {problem}")

  def call(self, function: Callable, *args: Any) -> Any:
    """function(*args), which calls this path's. Raises UserError for whatever it raises."""
    try:
      return function(*args)
    except Exception as error:
      raise self.error(failure(error)) from error


Path = str | OwnPath  # a path's name, or one's own


def failure(error: Exception) -> str:
  """What to say of a function of one's own that raised an exception: one line."""
  return f"fails: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _parameters(function: Any) -> list[str]:
  """Names of a function's parameters; [] of what is none."""
  try:
    return list(inspect.signature(function).parameters)
  except (TypeError, ValueError):
    return []


def parse_path(path: Path) -> tuple[str, float]:
  """Splits 'diagonal:16' into ('diagonal', 16); the number is 0 where there is none, the name "" where the path is
  one's own. Raises UserError."""
  if isinstance(path, OwnPath):
    return "", path.number or 0
  name, colon, text = path.strip().partition(":")
  if name not in ("ar", "staircase", "scaffold", *_PASSES, *_TOKENS, *LIMITS):
    raise UserError(f"path {path!r}: not one of {_FORMS}")
  if name == "scaffold":
    return name, parse_scaffold(path)[0]
  if name in ("ar", "staircase"):
    if colon:
      raise UserError(f"path {path!r}: {name} takes no number")
    return name, 0
  if name in LIMITS:
    try:
      number = float(text)
    except ValueError:
      number = -1.0
    if not 0.0 <= number <= LIMITS[name]:
      raise UserError(f"path {path!r}: needs a threshold from 0 to {LIMITS[name]:g}, as in {name}:0.5")
    return name, number
  number = int(text) if re.fullmatch(r"[1-9][0-9]{0,9}", text) else MOST + 1
  if number > MOST:
    what = "passes" if name in _PASSES else "tokens per pass"
    example = f"{name}:{16 if name in _PASSES else 2}"
    raise UserError(f"path {path!r}: needs a number of {what} from 1 to {MOST}, as in {example}")
  return name, number


def parse_scaffold(path: str) -> tuple[int, int, float]:
  """Of 'scaffold:K:n:t' K, the passes of the scaffold, n, the tokens of a later pass, and t, where the scaffold ends.

  n may be left out (1), and t (0.5). Raises UserError.
  """
  form = re.fullmatch(r"scaffold:([1-9][0-9]{0,9})(?::([1-9][0-9]{0,9}))?(?::(0?\.[0-9]+))?", path.strip())
  passes, streams, time = (form and form[i] for i in (1, 2, 3))
  result = int(passes or 0), int(streams or 1), float(time or _SCAFFOLD_TIME)
  if not 1 <= result[0] <= MOST or result[1] > MOST or result[2] <= 0.0:
    raise UserError(
      f"path {path!r}: needs a number of passes from 1 to {MOST}, then may have one of tokens per pass, and a t "
      "below 1, as in scaffold:4, scaffold:4:2 or scaffold:4:2:0.5"
    )
  return result


def time_grid(path: str, tokens: int, rolling_width: float, s: jax.Array | None = None) -> jax.Array:
  """Times (K+1, T) float32 of a path's K passes (diagonal:K, rolling:K, streams:n, staircase, scaffold:K:n:t), row k
  before pass k, the last row all zero. s: (K+1,) the clock of diagonal and rolling, from 0 to 1; None: even steps."""
  name, steps = parse_path(path)
  if name == "scaffold":
    steps, streams, end = parse_scaffold(path)
    down = 1.0 - (1.0 - end) * jnp.arange(steps) / steps
    rest = time_grid(f"streams:{streams}", tokens, rolling_width)
    return jnp.concatenate([jnp.broadcast_to(down[:, None], (steps, tokens)), end * rest])
  if name in ("staircase", "streams"):  # exact, where the clock's division would round
    length = -(-tokens // max(steps, 1))
    return (jnp.arange(tokens)[None, :] % length >= jnp.arange(length + 1)[:, None]).astype(jnp.float32)
  s = jnp.arange(steps + 1) / steps if s is None else jnp.asarray(s)
  times = linear_clock(name, tokens, rolling_width)(s[:, None])
  return times.at[-1].set(0.0)  # the end is exact, whatever the rounding


def own_grid(path: OwnPath, tokens: int) -> jax.Array:
  """Times (K+1, T) float32 of a path of one's own that is fixed beforehand. Raises UserError where they are not those
  of a path."""
  K = int(path.number)
  at = lambda s: jnp.broadcast_to(jnp.asarray(path.function(s, tokens), jnp.float32), (tokens,))
  times = np.asarray(path.call(jax.vmap(at), jnp.arange(K + 1, dtype=jnp.float32) / K))
  if not np.isfinite(times).all() or times.min() < -_ROUNDING or times.max() > 1.0 + _ROUNDING:
    raise path.error("gives times that are not in [0, 1]")
  if abs(times[0] - 1.0).max() > _ROUNDING or abs(times[-1]).max() > _ROUNDING:
    raise path.error("must be 1 at s = 0 and 0 at s = 1, for all tokens")
  if (rises := np.diff(times, axis=0).max(axis=1) > _ROUNDING).any():
    raise path.error(f"rises between s = {rises.argmax() / K:g} and {(rises.argmax() + 1) / K:g}; times only fall")
  times = np.minimum.accumulate(np.clip(times, 0.0, 1.0))
  return jnp.asarray(np.where(times < _ROUNDING, 0.0, np.where(times > 1.0 - _ROUNDING, 1.0, times)), jnp.float32)


def rank(values: jax.Array) -> jax.Array:
  """Each value's rank in ascending order over the last axis, int32 from 0; of uniform draws, a random order."""
  return jnp.argsort(jnp.argsort(values, axis=-1), axis=-1)


def low_discrepancy(key: jax.Array, count: int, dimensions: int) -> jax.Array:
  """(count, dimensions) float32 in [0, 1): a randomly shifted Kronecker lattice.

  Every coordinate of every point is uniform, and together the points cover the cube far more evenly than independent
  draws. Directions after Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018. The arithmetic is
  in uint32, exact for any count.
  """
  root = 2.0
  for _ in range(64):  # x^(dimensions + 1) = x + 1
    root = (1.0 + root) ** (1.0 / (dimensions + 1))
  steps = np.array([(root ** -(d + 1)) % 1.0 for d in range(dimensions)])
  directions = jnp.asarray((steps * 2**32).astype(np.uint64).astype(np.uint32))
  shift = jax.random.bits(key, (dimensions,), jnp.uint32)
  points = jnp.arange(count, dtype=jnp.uint32)[:, None] * directions + shift
  return (points >> 8).astype(jnp.float32) * (1.0 / 2**24)

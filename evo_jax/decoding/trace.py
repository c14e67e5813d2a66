"""Traces: how a text was decoded, tokens across, passes down, as a self-contained page (.html) or a picture (.png)."""

import dataclasses
import html
import importlib.util
import io
import json
import math
import warnings

import numpy as np

from evo_jax.data import storage
from evo_jax.decoding.trace_page import PAGE
from evo_jax.errors import UserError

NONE, JUMP, DRAFT, CORRECTION = range(4)
_VISIBLE = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}  # stand for white space
# A picture with more tokens or passes than these has no room for text in its cells.
_PICTURE_TOKENS, _PICTURE_PASSES = 64, 64


@dataclasses.dataclass(frozen=True)
class Trace:
  """How one text was decoded, in K passes over T written tokens.

  prompt: the text before. text: what follows it in the end. mode: the mode and its setting, for the title. time: (K, T)
  float, t of each token after each pass; NaN where a token was not in play yet. pieces: K lists of T strings, the
  committed or the most probable token; "" where not in play. event: (K, T) int8: JUMP, committed by this pass;
  CORRECTION, committed by this pass as another token than was most probable or drafted before; DRAFT, drafted by this
  pass; NONE.
  """

  prompt: str
  text: str
  mode: str
  time: np.ndarray
  pieces: list[list[str]]
  event: np.ndarray

  @property
  def committed(self) -> np.ndarray:
    """(K,) tokens that each pass committed."""
    return ((self.event == JUMP) | (self.event == CORRECTION)).sum(axis=1)


def check_trace_file(path: str) -> None:
  """Raises UserError where `write_trace` could not write; changes nothing."""
  problem = storage.unwritable(path)
  if not path.lower().endswith((".html", ".png")):
    problem = "ends neither in .html nor in .png"
  elif not problem and path.lower().endswith(".png") and importlib.util.find_spec("matplotlib") is None:
    problem = "needs matplotlib: pip install 'evo_jax[plot]'"
  if problem:
    raise UserError(f"--trace={path}: {problem}")


def write_trace(trace: Trace, path: str) -> None:
  """Writes the page or the picture, by the file's name. Raises UserError as `check_trace_file`, or if writing fails."""
  check_trace_file(path)
  # Drawn first: a file that is there is not lost to an error.
  if path.lower().endswith(".html"):
    content = render_page(trace).encode(errors="replace")
  else:
    picture = io.BytesIO()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)  # of characters that the font does not have, and of empty axes
      _picture(trace).savefig(picture, dpi=110)
    content = picture.getvalue()
  try:
    with open(path, "wb") as file:
      file.write(content)
  except OSError as error:
    raise UserError(f"--trace={path}: cannot be written: {error.strerror or error}") from error


def render_page(trace: Trace) -> str:
  """The page: the numbers as JSON, and a short script that draws them."""
  pieces = sorted({piece for row in trace.pieces for piece in row} - {""})
  number = {piece: i for i, piece in enumerate(pieces)}
  # A cell in play is [token, percent of t, piece, event]; a committed token has a cell only in the pass of its event.
  rows, was_known = [], np.zeros(trace.time.shape[1:], bool)
  for time, shown, event in zip(trace.time, trace.pieces, trace.event):
    known = time <= 0.0
    cells = [i for i in np.flatnonzero(~np.isnan(time) & ~(known & was_known)) if shown[i]]
    rows.append([[int(i), math.ceil(100 * float(time[i])), number[shown[i]], int(event[i])] for i in cells])
    was_known = known
  data = {"tokens": trace.time.shape[1], "pieces": pieces, "rows": rows, "settled": trace.committed.tolist()}
  passes, tokens = trace.time.shape
  fill = {
    "TITLE": html.escape(f"How a text matured: {trace.mode}"),
    "FACTS": html.escape(f"{tokens} tokens in {passes} passes, {tokens / max(passes, 1):.2f} tokens per pass"),
    "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    "PROMPT": html.escape(trace.prompt),
    "TEXT": html.escape(trace.text),
  }
  parts = PAGE.split("@@")  # text, name, text, name, ..., text
  return "".join(fill[part] if i % 2 else part for i, part in enumerate(parts))


def _picture(trace: Trace):
  """The same as a matplotlib figure; of long texts the first tokens and passes, which the title says."""
  import matplotlib
  from matplotlib import figure as figures  # not pyplot: a notebook's backend stays what it is

  K, T = trace.time.shape
  passes, tokens = min(K, 4 * _PICTURE_PASSES), min(T, 3 * _PICTURE_TOKENS)
  time, pieces = trace.time[:passes, :tokens], [row[:tokens] for row in trace.pieces[:passes]]
  event, with_text = trace.event[:passes, :tokens], passes <= _PICTURE_PASSES and tokens <= _PICTURE_TOKENS
  longest = max((len(piece) for row in pieces for piece in row), default=1)
  letters = min(max(longest, 2), 8)  # of a token, for which its cell has room
  cell = 0.21 if with_text else 0.07
  width = max(tokens * (cell * (1 + 0.35 * (letters - 2)) if with_text else cell), 5)
  figure = figures.Figure(figsize=(width + 2.9, max(passes * cell, 2.4) + 1.3), layout="constrained")
  axes, side = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [width, 1.4]})
  colors = matplotlib.colormaps["YlOrRd"].with_extremes(bad="white")
  image = axes.imshow(
    np.ma.masked_invalid(time), cmap=colors, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest"
  )
  if with_text:
    _draw_pieces(axes, time, pieces, event, letters)
  _draw_events(axes, event, 1.2 if with_text else 0.6)
  axes.set_xlabel("token")
  axes.set_ylabel("pass")
  axes.set_yticks(*_ticks(passes))
  axes.set_xticks(*_ticks(tokens))
  per_pass = T / max(K, 1)
  side.barh(np.arange(passes), trace.committed[:passes], color="tab:blue", height=0.8)
  side.axvline(per_pass, color="black", lw=1, ls=":")
  side.set_xlabel(f"tokens committed,\n{per_pass:.2f} per pass")
  figure.colorbar(image, ax=side, label="t: 1 nothing known, 0 committed", fraction=0.3, pad=0.12)
  cut = "" if (passes, tokens) == (K, T) else f" (the first {tokens} of {T} tokens, {passes} of {K} passes)"
  figure.suptitle(f"How a text matured: {trace.mode}{cut}", fontsize=10)
  return figure


def _draw_pieces(axes, time: np.ndarray, pieces: list[list[str]], event: np.ndarray, letters: int) -> None:
  """The first letters of each cell's token: bold where it is committed, gray from then on."""
  for k, i in np.argwhere(~np.isnan(time)):
    committed_before = time[k, i] <= 0.0 and event[k, i] == NONE
    axes.text(
      i,
      k,
      "".join(_VISIBLE.get(c, c if c.isprintable() else "\ufffd") for c in pieces[k][i])[:letters],
      parse_math=False,
      ha="center",
      va="center",
      fontsize=7,
      family="DejaVu Sans Mono",
      clip_on=True,
      color="#aaaaaa" if committed_before else "white" if time[k, i] > 0.6 else "black",
      weight="bold" if event[k, i] in (JUMP, CORRECTION) else "normal",
    )


def _draw_events(axes, event: np.ndarray, linewidth: float) -> None:
  """A frame around each event's cell, and the legend."""
  from matplotlib import patches

  for kind, color, label in (
    (JUMP, "tab:blue", "committed"),
    (DRAFT, "tab:gray", "drafted"),
    (CORRECTION, "tab:green", "corrected"),
  ):
    for j, (k, i) in enumerate(np.argwhere(event == kind)):
      frame = dict(fill=False, edgecolor=color, linewidth=linewidth, label=None if j else label)
      axes.add_patch(patches.Rectangle((i - 0.5, k - 0.5), 1, 1, **frame))
  if axes.get_legend_handles_labels()[0]:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8, frameon=False, borderaxespad=0.1)


def _ticks(count: int) -> tuple[list[int], list[int]]:
  """Ticks: their positions from 0, and their labels from 1."""
  every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if count / n <= 20 or n == 100)
  numbers = [1] + [n for n in range(every, count + 1, every) if n > 1]
  return [n - 1 for n in numbers], numbers

"""How a text matured: tokens across, passes down, as a page that needs nothing else (.html) or a picture (.png)."""

import dataclasses
import html
import importlib.util
import json
import math
import os

import numpy as np

from evo_jax.errors import UserError

NONE, JUMP, DRAFT, CORRECTION = range(4)
_MARKS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}  # what is seen of white space
_PICTURE_TOKENS, _PICTURE_PASSES = 64, 64  # more cells than these have no room for their text


@dataclasses.dataclass(frozen=True)
class Trace:
  """How one text matured in K passes over T written tokens.

  prompt: the text before. mode: what wrote it, for the title. time: (K, T) t of each token after each pass; NaN where
  a token was not in play yet. believed: K lists of T strings, the token that was believed most, or is settled; ""
  where not in play. event: (K, T) int8: NONE; JUMP, settled by this pass; DRAFT, proposed by this pass; CORRECTION,
  settled by this pass as another token than was believed or proposed before.
  """

  prompt: str
  mode: str
  time: np.ndarray
  believed: list[list[str]]
  event: np.ndarray

  @property
  def settled(self) -> np.ndarray:
    """(K,) tokens that each pass settled."""
    return ((self.event == JUMP) | (self.event == CORRECTION)).sum(axis=1)

  @property
  def text(self) -> str:
    """What was written."""
    return "".join(self.believed[-1]) if self.believed else ""


def check_trace_file(path: str) -> None:
  """Raises UserError where `write` could not write, and leaves everything as it is."""
  problem = None
  folder = os.path.dirname(path) or "."
  if not path.endswith((".html", ".png")):
    problem = "ends neither in .html nor in .png"
  elif not os.path.isdir(folder):
    problem = f"there is no folder {folder}"
  elif os.path.isdir(path):
    problem = "is a folder"
  elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
    problem = "cannot be written: permission denied"
  elif path.endswith(".png") and importlib.util.find_spec("matplotlib") is None:
    problem = "needs matplotlib: pip install 'evo_jax[plot]'"
  if problem:
    raise UserError(f"--trace={path}: {problem}")


def write_trace(trace: Trace, path: str) -> None:
  """Writes the page or the picture, by the file's name. Raises UserError as `check`, and where the disk refuses."""
  check_trace_file(path)
  try:
    if path.endswith(".html"):
      with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(page(trace))
    else:
      _picture(trace).savefig(path, dpi=110)
  except OSError as error:
    raise UserError(f"--trace={path}: cannot be written: {error.strerror or error}") from error


def _shown(piece: str) -> str:
  return "".join(_MARKS.get(c, c) for c in piece)


def page(trace: Trace) -> str:
  """The page: the numbers as JSON, and a few lines of script that draw them."""
  pieces = sorted({piece for row in trace.believed for piece in row} - {""})
  number = {piece: i for i, piece in enumerate(pieces)}
  # A cell in play is [place, percent of t, piece, event]; a settled token is told once, by its event.
  rows, was = [], np.zeros(trace.time.shape[1:], bool)
  for time, believed, event in zip(trace.time, trace.believed, trace.event):
    known = time <= 0.0
    rows.append(
      [
        [int(i), math.ceil(100 * float(time[i])), number[believed[i]], int(event[i])]
        for i in np.flatnonzero(~np.isnan(time) & ~(known & was))
        if believed[i]
      ]
    )
    was = known
  data = {"tokens": trace.time.shape[1], "pieces": pieces, "rows": rows, "settled": trace.settled.tolist()}
  embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
  passes, tokens = trace.time.shape
  facts = f"{tokens} tokens in {passes} passes, {tokens / max(passes, 1):.2f} tokens a pass"
  fill = {
    "TITLE": html.escape(f"How a text matured: {trace.mode}"),
    "FACTS": html.escape(facts),
    "DATA": embedded,
    "PROMPT": html.escape(trace.prompt),
    "TEXT": html.escape(trace.text),
  }
  parts = _PAGE.split("@@")  # text, name, text, name, ..., text
  return "".join(fill[part] if i % 2 else part for i, part in enumerate(parts))


def _picture(trace: Trace):
  """The same as a matplotlib figure; of long texts the first tokens and passes, which is said in the title."""
  import matplotlib
  from matplotlib import figure as figures  # not pyplot: a notebook's backend stays what it is
  from matplotlib import patches

  K, T = trace.time.shape
  passes, tokens = min(K, 4 * _PICTURE_PASSES), min(T, 3 * _PICTURE_TOKENS)
  time, event = trace.time[:passes, :tokens], trace.event[:passes, :tokens]
  fine = passes <= _PICTURE_PASSES and tokens <= _PICTURE_TOKENS
  longest = max((len(piece) for row in trace.believed[:passes] for piece in row[:tokens]), default=1)
  letters = min(max(longest, 2), 8) if fine else 1  # of a token, that its cell has room for
  cell = 0.21 if fine else 0.07
  width = cell * (1 + 0.35 * (letters - 2) if fine else 1)
  size = (max(tokens * width, 5) + 2.9, max(passes * cell, 2.4) + 1.3)
  figure = figures.Figure(figsize=size, layout="constrained")
  axes, side = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [max(tokens * width, 5), 1.4]})
  colors = matplotlib.colormaps["YlOrRd"].with_extremes(bad="white")
  image = axes.imshow(
    np.ma.masked_invalid(time), cmap=colors, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest"
  )
  if fine:
    for k, i in np.argwhere(~np.isnan(time)):
      late = time[k, i] <= 0.0 and event[k, i] == NONE
      axes.text(
        i,
        k,
        _shown(trace.believed[k][i])[:letters],
        parse_math=False,
        ha="center",
        va="center",
        fontsize=7,
        family="DejaVu Sans Mono",
        clip_on=True,
        color="#aaaaaa" if late else "white" if time[k, i] > 0.6 else "black",
        weight="bold" if event[k, i] in (JUMP, CORRECTION) else "normal",
      )
  marks = ((JUMP, "tab:blue", "settled"), (DRAFT, "tab:gray", "proposed"), (CORRECTION, "tab:green", "corrected"))
  for kind, color, label in marks:
    for j, (k, i) in enumerate(np.argwhere(event == kind)):
      axes.add_patch(
        patches.Rectangle(
          (i - 0.5, k - 0.5),
          1,
          1,
          fill=False,
          edgecolor=color,
          linewidth=1.2 if fine else 0.6,
          label=None if j else label,
        )
      )
  axes.set_xlabel("token")
  axes.set_ylabel("pass")
  axes.set_yticks(*_ticks(passes))
  axes.set_xticks(*_ticks(tokens))
  if len(axes.get_legend_handles_labels()[0]):
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, fontsize=8, frameon=False, borderaxespad=0.1)
  side.barh(np.arange(passes), trace.settled[:passes], color="tab:blue", height=0.8)
  side.axvline(T / max(K, 1), color="black", lw=1, ls=":")
  side.set_xlabel(f"tokens settled,\n{T / max(K, 1):.2f} a pass")
  figure.colorbar(image, ax=side, label="t: 1 nothing known, 0 settled", fraction=0.3, pad=0.12)
  left_out = "" if (passes, tokens) == (K, T) else f" (the first {tokens} of {T} tokens, {passes} of {K} passes)"
  figure.suptitle(f"How a text matured: {trace.mode}{left_out}", fontsize=10)
  return figure


def _ticks(count: int) -> tuple[list[int], list[int]]:
  """Places from 0, and their numbers from 1."""
  every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if count / n <= 20 or n == 100)
  numbers = [1] + [n for n in range(every, count + 1, every) if n > 1]
  return [n - 1 for n in numbers], numbers


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>@@TITLE@@</title><style>
:root{--bg:#fff;--ink:#1a1a1a;--dim:#888;--line:#d8d8d8;--jump:#1f6fd0;--fix:#128a3f;--hot:200,60,30;--soft:#f3f3f3}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e8e8e8;--dim:#8b8f96;--line:#353a40;--jump:#6cb0ff;--fix:#4fd07f;--hot:235,105,60;--soft:#1e2125}}
body{background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif;margin:1.2em auto;max-width:1500px;padding:0 1em}
h1{font-size:1.25em;margin:.2em 0}p{margin:.4em 0;max-width:75em}.dim{color:var(--dim)}
#legend span{margin-right:1.4em;white-space:nowrap}#legend i{display:inline-block;width:1.1em;height:1.1em;vertical-align:-.2em;margin-right:.35em;box-sizing:border-box;border:1px solid var(--line)}
#legend i.scale{width:7em;background:linear-gradient(90deg,var(--bg),rgb(var(--hot)))}
.jump{border:2px solid var(--jump)!important;font-weight:700}.fix{border:2px solid var(--fix)!important;font-weight:700}.draft{border:1px dashed var(--dim)!important}
#box{overflow:auto;max-height:70vh;border:1px solid var(--line);margin:.8em 0}
table{border-collapse:separate;border-spacing:0;font:12px/1 ui-monospace,Menlo,Consolas,monospace}
td,th{min-width:1.55em;height:1.6em;padding:0 2px;text-align:center;box-sizing:border-box;border:1px solid transparent;white-space:pre}
th{background:var(--soft);font-weight:400;color:var(--dim);position:sticky;z-index:1}thead th{top:0}tbody th{left:0;text-align:right;padding-right:.5em}
thead th:first-child{left:0;z-index:2}.bar{display:inline-block;height:.75em;background:var(--jump);opacity:.75;vertical-align:middle}
td.old{color:var(--dim)}pre{white-space:pre-wrap;background:var(--soft);padding:.7em;border-radius:4px}pre b{font-weight:400;color:var(--dim)}
</style></head><body>
<h1>@@TITLE@@</h1>
<p>Every row is one pass of the network over the text, every column a token. A cell shows the token that was believed most
after that pass; its colour is t, what is still unknown of it. A token that is settled stays as it is. @@FACTS@@.</p>
<p id="legend"><span><i class="scale"></i>t from 0 (settled) to 1 (nothing known)</span><span><i class="jump"></i>settled by this pass</span>
<span><i class="draft"></i>proposed</span><span><i class="fix"></i>settled as another token than was believed</span></p>
<div id="box"><table><thead></thead><tbody></tbody></table></div>
<pre><b>@@PROMPT@@</b>@@TEXT@@</pre>
<script type="application/json" id="data">@@DATA@@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const show = piece => piece.replace(/ /g, "\\u2423").replace(/\\n/g, "\\u23ce").replace(/\\t/g, "\\u21e5");
const make = (parent, tag, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; parent.append(e); return e; };
const head = make(document.querySelector("thead"), "tr");
make(head, "th", "pass");
make(head, "th", "tokens settled");
for (let i = 1; i <= data.tokens; i++) make(head, "th", i % 5 == 0 || i == 1 ? i : "");
const most = Math.max(1, ...data.settled), settled = new Array(data.tokens).fill("");
data.rows.forEach((cells, k) => {
  const row = make(document.querySelector("tbody"), "tr"), found = new Map(cells.map(c => [c[0], c]));
  make(row, "th", k + 1);
  const count = make(row, "td");
  count.style.textAlign = "left";
  const bar = make(count, "span");
  bar.className = "bar";
  bar.style.width = 5 * data.settled[k] / most + "em";
  make(count, "span", " " + data.settled[k]);
  for (let i = 0; i < data.tokens; i++) {
    const cell = make(row, "td"), c = found.get(i);
    if (!c) { if (settled[i]) { cell.textContent = show(settled[i]); cell.className = "old"; } continue; }
    const [, percent, piece, event] = c;
    cell.textContent = show(data.pieces[piece]);
    cell.className = ["", "jump", "draft", "fix"][event];
    cell.style.background = `rgba(var(--hot),${(percent / 100).toFixed(2)})`;
    cell.title = `pass ${k + 1}, token ${i + 1}: ${JSON.stringify(data.pieces[piece])}, t = ${(percent / 100).toFixed(2)}`;
    if (percent == 0) settled[i] = data.pieces[piece];
  }
});
</script></body></html>
"""

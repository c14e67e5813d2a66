"""Draws the README's figure: how a window's tokens move from t = 1 to t = 0 on each path.

pip install -e '.[plot]' && python -m experiments.paths_figure
"""

from pathlib import Path

from absl import flags
import numpy as np

from evo_jax import cli
from evo_jax.flow import schedules
from experiments import common

PANELS = (
  ("staircase", "staircase: autoregression", "one token jumps per pass"),
  ("rolling:12", "rolling", "a wave from left to right"),
  ("diagonal:8", "diagonal: diffusion", "all tokens together"),
  ("diagonal:1", "one parallel jump", "a single pass"),
)


def main() -> None:
  file = common.RESULTS / "paths.png"
  draw(flags.FLAGS.tokens, file)
  print(file)


def draw(tokens: int, file: Path) -> None:
  """Draws t of each token of a window (columns) after each pass (rows), a panel for each path."""
  figure, axes = common.pyplot().subplots(1, len(PANELS), figsize=(12, 3.6), layout="constrained")
  for axis, (path, title, note) in zip(axes, PANELS):
    times = np.asarray(schedules.time_grid(path, tokens, 0.5))
    image = axis.imshow(times, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_title(f"{title}\n{note}", fontsize=10)
    axis.set_xlabel("token of the window")
    axis.set_xticks([0, tokens - 1], [1, tokens])
    axis.set_yticks([0, len(times) - 1], ["0", f"{len(times) - 1}"])
  axes[0].set_ylabel("passes so far (downwards)")
  bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1])
  bar.ax.set_yticklabels(["0: known", "t", "1: nothing known"])
  figure.savefig(file, dpi=110)


if __name__ == "__main__":
  flags.DEFINE_integer("tokens", 12, "Tokens of the window.")
  cli.run(main)

"""Trains a model.

  python -m evo_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.SECTION.FIELD=VALUE ...]

The same command with the same --workdir goes on where it was stopped. From Python: `main.train(config, workdir)`.
"""

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import signal
import sys

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import settings
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib
from evo_jax.flow import bound, windows
from evo_jax.training import files, loop, step
from evo_jax.training.state import TrainState


def train(
  config: config_lib.Config, workdir: str, redraw: windows.Redraw | None = None, price: bound.Price | None = None
) -> None:
  """Trains, or goes on training, in `workdir`; then prints and writes a table of held-out bits, and samples.

  redraw, price: pure functions that change a step's windows and the price of a bound's step (`step.OwnFunctions`). The
  work directory does not know of them: to go on, call with the same. Raises UserError.
  """
  if price is not None:
    bound.check_price(price, "price")
    if config.loss.integrand != "step":
      raise UserError(f"config.loss.integrand: {config.loss.integrand!r} does not go with a price of one's own")
  with loop.prepare(config, workdir) as setup:
    evaluator = paths_lib.Evaluator(setup.model, config, setup.tokenizer, setup.mesh)
    count = len(setup.held_out.tokens)
    some = setup.held_out.rows(slice(None, None, -(-count // config.eval.train_sequences)))

    def evaluate(params, statistics):
      table = evaluator(params, statistics, some, config.eval.train_paths)
      return {f"valid_{entry['path']}": entry["bits"] for entry in table}

    state = loop.train(setup, evaluate, step.OwnFunctions(redraw, price))
    if state is not None:
      _finish(setup, state, evaluator)


def _finish(setup: loop.Setup, state: TrainState, evaluator: paths_lib.Evaluator) -> None:
  """Writes and prints the final table and samples."""
  config, count = setup.config, len(setup.held_out.tokens)
  run = run_lib.Run(config, setup.tokenizer, setup.model, state.averaged, state.statistics, int(state.step))
  table = evaluator(run.params, run.statistics, setup.held_out, config.eval.paths)
  text = paths_lib.format_table(table)
  _write(setup, {"table.json": json.dumps(table, indent=2), "table.txt": text})
  loop.say(f"\nheld-out text, {count} sequences of {config.model.context} tokens\n{text}")
  samples = final_samples(run, setup.mesh)
  _write(setup, {"samples.txt": samples})
  loop.say("\n" + samples)


def _write(setup: loop.Setup, texts: dict[str, str]) -> None:
  """Writes texts into the work directory. Raises UserError if another run has taken it over, or it is full."""
  setup.lease.check()
  if jax.process_index() == 0:
    for name, text in texts.items():
      files.write_file(setup.folder / name, text.encode() + b"\n")


def final_samples(run: run_lib.Run, mesh: jax.sharding.Mesh) -> str:
  """A few texts in two modes, unprompted."""
  config, parts = run.config, []
  for mode in () if not config.eval.samples else ("flow",) if config.diffusion_alone else ("ar", "flow"):
    sampling = settings.Sampling(
      mode=mode, max_tokens=min(config.eval.sample_tokens, config.model.context), steps=config.eval.flow_steps
    )
    found = sampler_lib.Sampler(run, sampling, mesh)([""], config.eval.samples, config.train.seed)
    passes = (
      "one token per pass" if mode == "ar" else f"{config.eval.flow_steps} passes for {config.window.size} tokens"
    )
    parts += [f"--- {mode} ({passes})\n{generation.text}" for generation in found]
  return "\n".join(parts)


def default_workdir(file: str) -> str:
  """Where a configuration's run lives: in runs/, under its name; or beside the file, if that is a work directory."""
  folder = Path(file).parent
  return str(folder) if (folder / "config.json").exists() else f"runs/{Path(file).stem}"


def main() -> None:
  args = flags.FLAGS
  config, file = cli.read_config()
  cli.join_processes()
  with _ended_by_sigterm():
    train(config, default_workdir(file) if args.workdir is None else args.workdir)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
  """SIGTERM outside of the steps, which save first, ends a command as an error does: the work directory is released.

  Of several processes the others would not hear of it; there JAX's preemption service takes it.
  """
  if jax.process_count() > 1:
    yield
    return
  before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string(
    "workdir", None, "Where the run lives; default: runs/ and the configuration's name, or its work directory."
  )
  cli.define_processes()
  cli.run(main)

"""Trains a model.

  python -m evo_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.SECTION.FIELD=VALUE ...]

The same command with the same --workdir goes on where it was stopped. From Python: `main.train(config, workdir)`.
"""

from pathlib import Path

from absl import flags
import jax

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding import sampler as sampler_lib
from evo_jax.decoding import settings
from evo_jax.evaluation import paths as paths_lib
from evo_jax.training import checkpoint, loop


def train(config: config_lib.Config, workdir: str) -> None:
  """Trains, or goes on training, in `workdir`; then prints and writes a table of held-out bits, and samples."""
  setup = loop.prepare(config, workdir)
  evaluator = paths_lib.Evaluator(setup.model, config, setup.tokenizer, setup.mesh)
  count = len(setup.held_out.tokens)
  some = setup.held_out.rows(slice(None, None, -(-count // config.eval.train_sequences)))

  def evaluate(params, statistics):
    table = evaluator(params, statistics, some, config.eval.train_paths)
    return {f"valid_{entry['path']}": entry["bits"] for entry in table}

  state = loop.train(setup, evaluate)
  if state is None:
    return
  run = run_lib.Run(config, setup.tokenizer, setup.model, state.averaged, state.statistics, config.train.steps)
  table = evaluator(run.params, run.statistics, setup.held_out, config.eval.paths)
  text = paths_lib.format_table(table)
  loop.say(f"\nheld-out text, {count} sequences of {config.model.context} tokens\n{text}")
  samples = final_samples(run, setup.mesh)
  loop.say("\n" + samples)
  if jax.process_index() == 0:
    checkpoint.write_json(setup.folder / "table.json", table)
    (setup.folder / "table.txt").write_text(text + "\n")
    (setup.folder / "samples.txt").write_text(samples + "\n")


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
  train(config, args.workdir or default_workdir(file))


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string(
    "workdir", "", "Where the run lives; default: runs/ and the configuration's name, or its work directory."
  )
  cli.define_processes()
  cli.run(main)

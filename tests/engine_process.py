"""A process of an engine, which engine_test starts several of: number 0 submits, and prints the texts as JSON."""

import json

from absl import flags
import jax

from evo_jax import cli
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.settings import Sampling
from evo_jax.run import load_run


def main():
  cli.join_processes()
  mesh = cli.make_mesh()
  engine = Engine(load_run(flags.FLAGS.workdir, mesh=mesh), rows=4, page=16, mesh=mesh, paths=["left:3"])
  if jax.process_index():
    engine.follow()
    return
  with engine:
    handles = [engine.submit("the", Sampling(max_tokens=8 + i, endless=True), number=i) for i in range(6)]
    engine.submit("a", Sampling(max_tokens=9)).cancel()
    scores = [engine.score("the", " a", path).total for path in ("ar", "left:3")]
    print(json.dumps([[handle.result().text for handle in handles], scores]))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  cli.define_mesh()
  cli.define_processes()
  cli.run(main)

"""A process of several, of which number 1 fails with bad input, and the others wait for it without end."""

import jax
from jax.experimental import multihost_utils

from evo_jax import cli
from evo_jax.errors import UserError


def main():
  cli.join_processes()
  if jax.process_index() == 1:
    raise UserError("text.jsonl: is damaged")
  multihost_utils.sync_global_devices("what process 1 never comes to")


if __name__ == "__main__":
  cli.define_processes()
  cli.run(main)

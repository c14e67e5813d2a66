"""A process of several, of which number 0 comes to what they do together later than Gloo waits for a connection."""

import time

import numpy as np

from evo_jax import cli
from evo_jax.parallel import distributed

LATE = 33  # seconds; Gloo's limit is 30


def act():
  time.sleep(LATE)
  return np.array(7)


def main():
  cli.join_processes()
  print(distributed.in_first_process(act, np.array(0), "process 0 cannot"))


if __name__ == "__main__":
  cli.define_processes()
  cli.run(main)

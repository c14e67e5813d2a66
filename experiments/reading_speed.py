"""Speed and memory of reading prepared text, and seconds from the command to the first step, beside its size.

  python -m experiments.reading_speed [--sizes=0.1,1,10] [--seconds=10] [--scratch=DIR] [--output=reading_speed]

A data set of random bytes is made for each of --sizes, in GB of text (of twice as many bytes on disk). Each is read as
training reads it, in a process of its own, in batches of 8 sequences of 4,096 tokens, the share of a host of evo8b on
128 hosts, once right after its files were dropped from the page cache ("cold"), and once more ("warm"). Memory is what
the process has at the end above what it had before it opened the data set. A host of evo8b on v5p:8x8x8 takes about
18,000 tokens per second.
"""

import json
import os
from pathlib import Path
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from absl import flags
import numpy as np

from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import shards, tokenizers
from evo_jax.data.storage import Folder
from experiments import common

LENGTH, ROWS, SHARD = 4096, 8, 1 << 27
NEEDED = 18_000  # tokens per second and host


def make_data_set(path: Path, size: int) -> None:
  """Writes a data set of `size` random bytes of text for training, and a little more for validation."""
  folder, rng, tokenizer = Folder(str(path)), np.random.default_rng(0), tokenizers.Bytes()
  block = rng.integers(1, 257, 1 << 22, np.uint16)
  splits = {}
  for split, total in (("train", size), ("valid", 1 << 20)):
    written = []
    for number, start in enumerate(range(0, total, SHARD)):
      count = min(SHARD, total - start)
      with shards.shard_writer(folder, f"{number:05d}.{split}", block.dtype) as writer:
        for first in range(0, count, len(block)):
          writer.append(np.roll(block, rng.integers(len(block)))[: count - first])
        written.append(writer.finish(1, count))
    splits[split] = shards.Split(tuple(written))
  source = shards.Source("random bytes", 1, size, "", splits, {}, "", 0)
  fields = dict(version=shards.VERSION, dtype="uint16", record=shards.RECORD, sources=(source,), flags={})
  ids = dict(begin_id=tokenizer.begin_id, separator_id=tokenizer.separator_id, vocab_size=tokenizer.vocab_size)
  manifest = shards.Manifest(**fields, **ids, tokenizer="bytes", tokenizer_identity=tokenizer.identity, fingerprint="")
  folder.write_all(shards.MANIFEST, manifest.to_json().encode())


def drop_from_cache(path: Path) -> None:
  for file in path.iterdir():
    with file.open("rb") as stream:
      os.fsync(stream.fileno())
      os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: str, seconds: float) -> dict[str, float]:
  """Opens a data set and reads it for a while."""
  before, began = memory(), time.perf_counter()
  config = config_lib.Data(path=path, batch_size=128 * ROWS)
  text = batches_lib.TrainingText(corpora_lib.load_corpora(config, tokenizers.Bytes()), config, LENGTH)
  iterator = text.batches(range(ROWS))
  next(iterator)
  opened, count, cpu = time.perf_counter(), 0, time.process_time()
  while (now := time.perf_counter()) < opened + seconds:
    next(iterator)
    count += ROWS
  result = {
    "seconds_to_first_batch": opened - began,
    "sequences_per_second": count / (now - opened),
    "sequences_per_cpu_second": count / (time.process_time() - cpu),
    "times_needed": count * LENGTH / (now - opened) / NEEDED,
    "memory_mb": (memory() - before) / 1e6,
  }
  iterator.close()
  return result


def memory() -> int:
  """Bytes of this process in memory."""
  return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def first_step(path: Path, workdir: Path) -> dict[str, float]:
  """Seconds, and of CPU time, which other work on the machine changes less, from the command to the first row in its
  log, of `tiny`, with the programs that an earlier run has compiled."""
  fields = {"data.path": path, "train.log_every": 1, "train.eval_every": 0, "eval.sequences": 128}
  command = [sys.executable, "-m", "evo_jax.main", "--config=tiny", f"--workdir={workdir}"]
  command += [f"--config.{k}={v}" for k, v in fields.items()]
  compiled = {
    "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  began, cpu_began = time.perf_counter(), children_cpu()
  process = subprocess.Popen(command, env={**os.environ, **compiled}, **quiet)
  log = workdir / "metrics.jsonl"
  while not (log.exists() and log.stat().st_size) and process.poll() is None:
    time.sleep(0.02)
  seconds = time.perf_counter() - began
  process.kill()
  process.wait()
  shutil.rmtree(workdir)
  return {"seconds_to_first_step": seconds, "cpu_seconds_to_first_step": children_cpu() - cpu_began}


def children_cpu() -> float:
  """Seconds of CPU time of child processes that have ended."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def measure(size: float, scratch: Path) -> dict[str, float]:
  path = scratch / f"{size:g}"
  make_data_set(path, round(size * 1e9))
  result = {"gb": size}
  for kind in ("cold", "warm"):
    if kind == "cold":
      drop_from_cache(path)
    command = [sys.executable, "-m", "experiments.reading_speed", f"--read={path}", f"--seconds={flags.FLAGS.seconds}"]
    result[kind] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if not (scratch / "jax").exists():
      first_step(path, scratch / "run")
    if kind == "cold":
      drop_from_cache(path)
    result[kind] |= first_step(path, scratch / "run")
  shutil.rmtree(path)
  return result


def main() -> None:
  args = flags.FLAGS
  if args.read:
    print(json.dumps(read(args.read, args.seconds)))
    return
  results = []
  with tempfile.TemporaryDirectory(dir=args.scratch or None) as scratch:
    for size in args.sizes:
      results.append(measure(float(size), Path(scratch)))
      print(json.dumps(results[-1], indent=2), flush=True)
  if args.output:
    common.write_result(args.output, results)


if __name__ == "__main__":
  flags.DEFINE_list("sizes", ["0.1", "1", "10"], "GB of text.")
  flags.DEFINE_float("seconds", 10.0, "For which each data set is read.")
  flags.DEFINE_string("scratch", "", "Folder for data sets; default: the system's for temporary files.")
  flags.DEFINE_string("output", "", "Name of the result in experiments/results.")
  flags.DEFINE_string("read", "", "Only reads this data set.")
  cli.run(main)

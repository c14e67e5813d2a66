"""Memory and speed of evo_jax.prepare, beside the tokenizer library's own batch encoding of the same text in memory.

  pip install -e '.[zstd]' && python -m experiments.prepare_speed --text='dir/*.jsonl' --sizes=0.1,1
      [--tokenizer=sentencepiece --tokenizer_path=DIR] [--workers=2] [--document=0.5] [--save]

The text is repeated, each copy of a document with another number in front, in one .jsonl.zst of each of --sizes, in GB.
Memory is the sum over all processes of their share (PSS), sampled five times a second; its peak should not depend on
the size. Speed is of bytes of text, in one run on one machine:

  prepare    all of the command, with its start
  library    encoding in batches by the library's own threads, as many as --workers, of up to 64 MB of text in memory;
             for bytes, reading and parsing the JSON alone, in one process

Both are also given per second of CPU time, of all threads and processes: that can be compared where the machine is
shared with others.

--document makes one plain text file of so many GB, which is one document.
"""

from collections.abc import Iterator
import itertools
import json
import os
from pathlib import Path
import resource
import subprocess
import sys
import tempfile
import time

from absl import flags

from evo_jax import cli
from evo_jax.data import documents as documents_lib
from evo_jax.data import files as files_lib
from evo_jax.data import formats, tokenizers
from experiments import common

FLAGS = flags.FLAGS
BATCH_BYTES = 64_000_000


def numbered(texts: list[str]) -> Iterator[str]:
  """The texts again and again, each time with another number in front."""
  for copy in itertools.count():
    for i, text in enumerate(texts):
      yield f"{copy}.{i} {text}"


def write_lines(texts: list[str], size: int, file: Path) -> int:
  """Writes `size` bytes of text, or a little more, as compressed lines of JSON. Returns the bytes of text."""
  import zstandard

  written = 0
  with file.open("wb") as raw, zstandard.ZstdCompressor(threads=2).stream_writer(raw) as stream:
    for text in numbered(texts):
      stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
      written += len(text.encode())
      if written >= size:
        return written
  return written


def write_document(texts: list[str], size: int, file: Path) -> int:
  """Writes one plain text."""
  written = 0
  with file.open("wb") as stream:
    for text in numbered(texts):
      written += stream.write(text.encode() + b"\n\n")
      if written >= size:
        return written
  return written


def memory(pid: int) -> int:
  """Bytes that a process and its children have in memory, shared ones in proportion."""
  total = 0
  try:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    total += next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():
      if task.name != str(pid):
        children += (task / "children").read_text().split()
  except OSError:  # ended meanwhile
    return total
  return total + sum(memory(int(child)) for child in children)


def prepare(file: Path, text_bytes: int, output: Path) -> dict[str, float]:
  """Runs the command. Returns peak memory in MB, seconds, MB of text per second, and tokens."""
  command = [sys.executable, "-m", "evo_jax.prepare", f"--input={file}", f"--output={output}"]
  command += [
    f"--tokenizer={FLAGS.tokenizer}",
    f"--tokenizer_path={FLAGS.tokenizer_path}",
    f"--workers={FLAGS.workers}",
  ]
  begun, cpu_begun, peak = time.monotonic(), children_cpu(), 0
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  while process.poll() is None:
    peak = max(peak, memory(process.pid))
    time.sleep(0.2)
  if process.returncode:
    sys.exit(process.returncode)
  seconds, cpu = time.monotonic() - begun, children_cpu() - cpu_begun
  manifest = json.loads((output / "manifest.json").read_text())
  tokens = sum(shard["tokens"] for split in manifest["sources"][0]["splits"].values() for shard in split["shards"])
  speeds = {"mb_per_second": text_bytes / 1e6 / seconds, "mb_per_cpu_second": text_bytes / 1e6 / cpu}
  return {"peak_mb": peak / 1e6, "seconds": seconds, **speeds, "tokens": tokens}


def children_cpu() -> float:
  """Seconds of CPU time that ended child processes took."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def library_speed(file: Path) -> dict[str, float]:
  """MB of text per second of the library's batch encoding; for bytes, of reading and parsing."""
  begun, cpu_begun = time.monotonic(), time.process_time()
  texts, size = [], 0
  lines = (line for chunk in _whole_lines(file) for line in chunk.splitlines())
  for line in lines:
    text = json.loads(line)["text"]
    size += len(text.encode())
    if FLAGS.tokenizer != "bytes":
      texts.append(text)
      if size >= BATCH_BYTES:
        break
  if FLAGS.tokenizer != "bytes":
    begun, cpu_begun = time.monotonic(), time.process_time()
    encode_batches(texts)
  return {
    "library_mb_per_second": size / 1e6 / (time.monotonic() - begun),
    "library_mb_per_cpu_second": size / 1e6 / (time.process_time() - cpu_begun),
  }


def encode_batches(texts: list[str]) -> None:
  if FLAGS.tokenizer == "sentencepiece":
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizers.load_tokenizer("sentencepiece", FLAGS.tokenizer_path).proto)
    processor.Encode(texts, num_threads=FLAGS.workers)
  else:
    os.environ["RAYON_NUM_THREADS"] = str(FLAGS.workers)
    import tokenizers as library

    encoder = library.Tokenizer.from_file(f"{FLAGS.tokenizer_path}/tokenizer.json")
    for i in range(0, len(texts), 1000):
      encoder.encode_batch(texts[i : i + 1000], add_special_tokens=False)


def _whole_lines(file: Path) -> Iterator[bytes]:
  rest = b""
  for chunk in formats.read_chunks(str(file), 1 << 20):
    raw = rest + chunk
    end = raw.rfind(b"\n") + 1
    rest = raw[end:]
    yield raw[:end]


def main() -> None:
  texts = []
  for name, files in files_lib.find_sources(FLAGS.text, "--text"):
    texts += [text for text in documents_lib.Reader(name, files, binary=False) if text]
  results = {"tokenizer": FLAGS.tokenizer, "workers": FLAGS.workers, "runs": []}
  kinds = [("lines", float(size)) for size in FLAGS.sizes] + [("document", size) for size in FLAGS.document or []]
  for kind, size in kinds:
    with tempfile.TemporaryDirectory(dir=FLAGS.scratch) as folder:
      file = Path(folder) / ("a.jsonl.zst" if kind == "lines" else "a.txt")
      text_bytes = (write_lines if kind == "lines" else write_document)(texts, int(size * 1e9), file)
      run = {"text": kind, "gb": size, **prepare(file, text_bytes, Path(folder) / "tokens")}
      if kind == "lines":
        run |= library_speed(file)
        run["share"] = run["mb_per_second"] / run["library_mb_per_second"]
        run["cpu_share"] = run["mb_per_cpu_second"] / run["library_mb_per_cpu_second"]
    results["runs"].append(run)
    print({name: round(value, 3) if isinstance(value, float) else value for name, value in run.items()}, flush=True)
  if FLAGS.save:
    common.write_result(f"prepare_speed_{FLAGS.tokenizer}", results)


if __name__ == "__main__":
  flags.DEFINE_string("text", None, "Globs of the text that is repeated.", required=True)
  flags.DEFINE_list("sizes", ["0.1", "1"], "GB of text in compressed lines of JSON.")
  flags.DEFINE_multi_float("document", None, "GB of text as one document.")
  flags.DEFINE_string("tokenizer", "bytes", "As for evo_jax.prepare.")
  flags.DEFINE_string("tokenizer_path", "", "As for evo_jax.prepare.")
  flags.DEFINE_integer("workers", 2, "As for evo_jax.prepare.")
  flags.DEFINE_string("scratch", None, "Folder for text and tokens, which are removed.")
  flags.DEFINE_bool("save", False, "Whether the results become a file in experiments/results.")
  cli.run(main)

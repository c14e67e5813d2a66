"""Tokenizes text into a data set that training reads from any disk or bucket, or shows what one holds.

python -m evo_jax.prepare --input='dir/**/*.jsonl.zst' --tokenizer=sentencepiece --tokenizer_path=DIR --output=TOKENS
python -m evo_jax.prepare --chat --input='dir/*.jsonl' --tokenizer=huggingface --tokenizer_path=DIR --output=CHATS
python -m evo_jax.prepare --inspect=TOKENS
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import sys
import time

from absl import flags

from evo_jax.data import inspection, preparation, shards, tokenizers
from evo_jax.data.plan import Job
from evo_jax.errors import UserError


def main() -> None:
  args = flags.FLAGS
  if args.inspect:
    inspect(args.inspect, args.documents)
    return
  if not args.input or not args.output:
    raise UserError("--input and --output are needed, as in --input='dir/*.txt' --output=DIR; or --inspect=DIR")
  if not 0 <= args.host < args.hosts:
    raise UserError(f"--host={args.host}: is not one of the {args.hosts} of --hosts, counted from 0")
  if args.tokenizer not in ("bytes", "chars27") and not args.tokenizer_path:
    raise UserError(f"--tokenizer_path: is empty; --tokenizer={args.tokenizer} needs the folder that holds it")
  if args.last_answer and not args.chat:
    raise UserError("--last_answer: is of conversations, and needs --chat")
  if args.chat and args.tokenizer != "huggingface":
    raise UserError(f"--chat: --tokenizer={args.tokenizer} has no chat template; --tokenizer=huggingface may have one")
  tokenizer = tokenizers.load_tokenizer(args.tokenizer, args.tokenizer_path)
  values = {name: getattr(args, name) for name in Job.__dataclass_fields__ if name != "chat"}
  job = Job(**values, chat=("last" if args.last_answer else "answers") if args.chat else "")
  workers = args.workers or _cpus()
  try:
    with _progress_bar() as show:
      manifest = preparation.prepare(job, tokenizer, args.tokenizer, args.output, workers, args.hosts, args.host, show)
  except KeyboardInterrupt as error:
    raise UserError("interrupted; what is complete is kept, and the same command goes on") from error
  if manifest is None:
    print(f"{args.output}: host {args.host} is done; the last of the {args.hosts} hosts writes the manifest")
  else:
    print("\n".join(inspection.table(manifest)))
    print(f"{args.output}: train with --config.data.path={args.output}")


def inspect(path: str, count: int) -> None:
  """Prints what a data set holds and what is wrong with it. Raises UserError where a shard is damaged."""
  manifest = shards.read_manifest(path)
  print("\n".join(inspection.table(manifest)))
  tokenizer = tokenizers.load_tokenizer(manifest.tokenizer, f"{path.rstrip('/')}/{shards.TOKENIZER}")
  problems, checked = [], 0
  for source in manifest.sources:
    for name, split in source.splits.items():
      stream = shards.open_stream(path, manifest, source, name)
      streams = [stream, *([shards.open_index(path, manifest, source, name)] if manifest.chat else [])]
      found = [problem for one in streams for _, problem in one.check() if problem]
      problems, checked = problems + found, checked + len(split.shards) + len(split.index)
      print(f"\n{name} of {source.name}")
      if not found:
        for line in _describe(streams, split, manifest, tokenizer, count):
          print(line)
  for problem in problems[:20]:
    print(problem)
  if problems:
    raise UserError(f"{path}: {len(problems)} of {checked} shards are damaged or missing; the first: {problems[0]}")
  print(f"\nall checksums of {checked} shards are right")


def _describe(streams, split: shards.Split, manifest: shards.Manifest, tokenizer, count: int) -> Iterator[str]:
  """Lines about a split. streams: of its tokens, and, of conversations, its index."""
  if manifest.chat:
    yield from inspection.chat_statistics(*streams, split)
    yield from inspection.conversations(*streams, tokenizer, count)
  else:
    yield from inspection.statistics(*streams, split, manifest, tokenizer)
    yield from inspection.documents(*streams, manifest, tokenizer, count)


def _cpus() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress_bar():
  """Yields a function that is told bytes done and in all: a bar in a terminal, else a line every minute."""
  if sys.stderr.isatty():
    from rich import console, progress

    columns = [
      progress.BarColumn(),
      progress.DownloadColumn(),
      progress.TransferSpeedColumn(),
      progress.TimeRemainingColumn(),
    ]
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
      task = bar.add_task("", total=None)
      yield lambda done, total: bar.update(task, completed=done, total=total)
  else:
    yield _lines()


def _lines() -> Callable[[int, int], None]:
  begun = said = time.monotonic()
  first = None

  def show(done: int, total: int) -> None:
    nonlocal said, first
    now = time.monotonic()
    first = done if first is None else first
    if now - said >= 60:
      said = now
      speed = (done - first) / (now - begun)
      left = f", {(total - done) / speed / 60:,.0f} minutes left" if speed else ""
      print(
        f"evo_jax: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s{left}",
        file=sys.stderr,
        flush=True,
      )

  return show


def _define_flags() -> None:
  flags.DEFINE_string(
    "input", None, "Comma-separated globs of text files: local, gs://..., hf://datasets/OWNER/NAME/..."
  )
  flags.DEFINE_string("valid", "", "Globs of files for validation; then nothing else is held out.")
  flags.DEFINE_string("test", "", "Globs of files for testing; then nothing else is held out.")
  field = "Field of .jsonl, column of .parquet, that holds the text; a line of .jsonl without it may have messages."
  flags.DEFINE_string("field", "text", field)
  flags.DEFINE_bool(
    "chat", False, "Whether lines are conversations (messages, or prompt and completion), to train on their answers."
  )
  flags.DEFINE_bool("last_answer", False, "With --chat: whether the last answer of a conversation alone is trained on.")
  flags.DEFINE_enum("tokenizer", "bytes", config_lib.TOKENIZERS, "As data.tokenizer.")
  flags.DEFINE_string("tokenizer_path", "", "As data.tokenizer_path.")
  flags.DEFINE_string("output", None, "Folder for the tokens, local or gs://...; what is complete there is kept.")
  flags.DEFINE_float("valid_share", 0.05, "Share of the documents that is held out for validation.")
  flags.DEFINE_float("test_share", 0.05, "Share of the documents that is held out for testing.")
  flags.DEFINE_float(
    "max_skipped", 0.1, "Share of documents that may be bad, and are skipped; empty files do not count."
  )
  flags.DEFINE_bool("deduplicate", False, "Whether documents that are the same as one before them are left out.")
  flags.DEFINE_integer("workers", 0, "Processes that tokenize; 0: one per CPU.", lower_bound=0)
  flags.DEFINE_integer("hosts", 1, "Number of hosts that share the work; all write to one --output.", lower_bound=1)
  flags.DEFINE_integer("host", 0, "This host's number, from 0.")
  flags.DEFINE_string("inspect", None, "Folder of tokens to be shown and checked; nothing else is done.")
  flags.DEFINE_integer("documents", 3, "With --inspect: documents that are shown of each split.", lower_bound=0)


if __name__ == "__main__":
  from evo_jax import cli  # here, since worker processes import this module, and do without JAX
  from evo_jax import config as config_lib

  _define_flags()
  cli.run(main)

"""Trains a SentencePiece tokenizer.

python -m evo_jax.tokenizer --input='dir/*.txt' --vocab_size=8000 --output=DIR
"""

from collections.abc import Iterator
import sys

from absl import flags

from evo_jax import cli
from evo_jax.data import documents as documents_lib
from evo_jax.data import files as files_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError


def main() -> None:
  args = flags.FLAGS
  if not args.input or not args.output:
    raise UserError("--input and --output are needed, as in --input='dir/*.txt' --output=DIR")
  sources = files_lib.find_sources(args.input, "--input")
  tokenizer = tokenizers.train_sentencepiece(_texts(sources, args.strict), args.vocab_size, args.output)
  print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces")


def _texts(sources: list[tuple[str, list[str]]], strict: bool) -> Iterator[str]:
  """The documents of all sources; what is skipped is printed, a line for each source."""
  for name, files in sources:
    reader = documents_lib.Reader(name, files, binary=False, strict=strict)
    yield from (text for text in reader if text is not None)
    if reader.report:
      print(f"evo_jax: {name}: {reader.report}", file=sys.stderr)


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "Comma-separated globs of text files, as for config.data.path.")
  flags.DEFINE_integer("vocab_size", 8000, "Number of pieces, including the special one and the bytes.")
  flags.DEFINE_string("output", None, "Folder for the model.")
  flags.DEFINE_bool("strict", False, "Whether a document that cannot be used is an error, instead of skipped.")
  cli.run(main)

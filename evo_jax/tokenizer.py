"""Trains a SentencePiece tokenizer.

python -m evo_jax.tokenizer --input='dir/*.txt' --vocab_size=8000 --output=DIR
"""

from absl import flags

from evo_jax import cli
from evo_jax.data import documents as documents_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError


def main() -> None:
  args = flags.FLAGS
  if not args.input or not args.output:
    raise UserError("--input and --output are needed, as in --input='dir/*.txt' --output=DIR")
  files = [file for pattern in args.input.split(",") for file in documents_lib.find_files(pattern, "--input")]
  tokenizer = tokenizers.train_sentencepiece(
    (text for _, text in documents_lib.read_documents(files, binary=False)), args.vocab_size, args.output
  )
  print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "Comma-separated globs of text files (.txt, .jsonl, also .gz and .xz).")
  flags.DEFINE_integer("vocab_size", 8000, "Number of pieces, including the special one and the bytes.")
  flags.DEFINE_string("output", None, "Folder for the model.")
  cli.run(main)

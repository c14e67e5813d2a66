"""What a prepared data set holds: its manifest as a table, some documents, statistics of tokens."""

from collections.abc import Iterator
import itertools

import numpy as np

from evo_jax.data import answers, shards
from evo_jax.data.shards import SPLITS, Manifest, TokenStream
from evo_jax.data.tokenizers import Tokenizer, continuing, special_ids, structural_ids

_SAMPLE = 1 << 20  # tokens of a split that statistics are taken from
_SHOWN = 300  # characters of a document


def table(manifest: Manifest) -> Iterator[str]:
  """Lines: what was prepared how, and for each source and split the documents, tokens and bytes."""
  yield f"fingerprint {manifest.fingerprint}; tokens of {manifest.tokenizer_identity} as {manifest.dtype}"
  yield f"vocabulary of {manifest.vocab_size:,}, begin {manifest.begin_id}, separator {manifest.separator_id}"
  flags = [f"--{name}={value}" for name, value in manifest.flags.items() if value != "" and name != "chat"]
  yield "flags: " + " ".join([*flags, *shards.CHAT_FLAGS[manifest.chat]])
  answers_head = f"{'of answers':>18}" if manifest.chat else ""
  yield f"{'split':6}{'documents':>14}{'tokens':>18}{answers_head}{'bytes of text':>18}{'shards':>8}  source"
  for source in manifest.sources:
    for name in SPLITS:
      if split := source.splits.get(name):
        of_answers = f"{split.answers:>18,}" if manifest.chat else ""
        yield (
          f"{name:6}{split.documents:>14,}{split.tokens:>18,}{of_answers}{split.text_bytes:>18,}"
          f"{len(split.shards):>8,}  {source.name}"
        )
        if split.conversations > split.documents:
          yield (
            f"{source.name}: the chat template rewrites earlier turns: {split.documents:,} lines are "
            f"{split.conversations:,} conversations, each up to answers that stand as they were written"
          )
    if source.duplicates:
      yield f"{source.name}: {source.duplicates:,} copies of documents before them are left out"
    if source.report:
      yield f"{source.name}: {source.report}"


def chat_statistics(stream: TokenStream, index: TokenStream, split: shards.Split) -> Iterator[str]:
  """Lines about a split of conversations: their lengths, and the share of answers."""
  lengths = index.read(0, min(index.length, 2 * _SAMPLE)).reshape(-1, 2)[:, 0]
  low, middle, high = np.percentile(lengths, [5, 50, 95]).astype(int)
  longest = lengths.max()
  yield f"  tokens per conversation: 5 % have at most {low:,}, half {middle:,}, 95 % {high:,}; longest {longest:,}"
  yield f"  {100 * split.answers / stream.length:.1f} % of the tokens are of answers"


def conversations(stream: TokenStream, index: TokenStream, tokenizer: Tokenizer, count: int) -> Iterator[str]:
  """Lines: `count` conversations, spread over the stream, in parts: "read", and "answer", which training counts."""
  lengths = index.read(0, index.length).reshape(-1, 2)[:, 0].astype(np.int64)
  starts, count = np.cumsum(lengths) - lengths, min(count, len(lengths))
  special = {id_: text for text, id_ in tokenizer.special.items()}
  for i in (len(lengths) * j // count for j in range(count)):
    numbers = stream.read(int(starts[i]), int(lengths[i]))
    ids, answered = answers.ids_of(numbers), answers.are_answers(numbers)
    yield f"  conversation {i + 1:,}: {lengths[i]:,} tokens, {answered.sum():,} of answers"
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(answered)) + 1):
      name = "answer" if answered[part[0]] else "read"
      yield f"    {name:7}{_shortened(_with_special(tokenizer, special, ids[part]))}"


def _with_special(tokenizer: Tokenizer, special: dict[int, str], ids: np.ndarray) -> str:
  """The text of ids (n,), special tokens by their names."""
  texts = itertools.groupby(ids.tolist(), lambda id_: special.get(id_))
  decode = continuing(tokenizer).decode
  return "".join(name * len([*some]) if name else decode(np.array([*some])) for name, some in texts)


def _shortened(text: str) -> str:
  """A text, without what is in the middle of a long one."""
  return repr(text) if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]!r} ... {text[-_SHOWN // 2 :]!r}"


def statistics(stream: TokenStream, split: shards.Split, manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
  """Lines about a split of a source: lengths of documents, bytes per token, byte and unknown tokens."""
  tokens = stream.read(0, min(stream.length, _SAMPLE))
  ends = np.flatnonzero(tokens == manifest.separator_id)
  lengths = np.diff(np.concatenate([[-1], ends])) - 1
  if len(lengths):
    low, middle, high = np.percentile(lengths, [5, 50, 95]).astype(int)
    yield f"  tokens per document: 5 % have at most {low:,}, half {middle:,}, 95 % {high:,}; longest {lengths.max():,}"
  yield f"  bytes of text per token: {split.text_bytes / max(1, split.tokens - split.documents):.3f}"
  counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
  counts[structural_ids(tokenizer)] = 0
  unknown = tokenizer.lengths() == 0
  in_part = np.array([count and "\ufffd" in tokenizer.decode([i]) for i, count in enumerate(counts)], bool)
  total = max(1, counts.sum())
  yield (
    f"  of the first {len(tokens):,} tokens {100 * counts[in_part].sum() / total:.3f} % are bytes of a character, "
    f"{100 * counts[unknown].sum() / total:.3f} % unknown; {np.count_nonzero(counts):,} different ones"
  )


def documents(stream: TokenStream, manifest: Manifest, tokenizer: Tokenizer, count: int) -> Iterator[str]:
  """Lines: the beginnings of `count` documents, from places spread over the stream."""
  for i in range(count):
    start = stream.length * i // count
    tokens = stream.read(start, min(8192, stream.length - start))
    if start:  # in the middle of a document: the next one
      ends = np.flatnonzero(tokens == manifest.separator_id)
      tokens = tokens[ends[0] + 1 :] if len(ends) and ends[0] + 1 < len(tokens) else tokens
    end = np.flatnonzero(tokens == manifest.separator_id)
    tokens = tokens[: end[0]] if len(end) else tokens
    text = tokenizer.decode(tokens[~np.isin(tokens, special_ids(tokenizer))])  # which end turns of a conversation
    yield f"  {text[:_SHOWN]!r}{' ...' if len(text) > _SHOWN else ''}"

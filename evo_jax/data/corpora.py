"""Corpora: sources of text as streams of tokens by split, from prepared data sets or from text files.

A data set that `python -m evo_jax.prepare` wrote is read where it stands, and at the start no more of it than its
manifest. Text files become a data set in the cache first (`cache`).
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import itertools
import os
import sys
from typing import Protocol

import numpy as np

from evo_jax import config as config_lib
from evo_jax.data import cache, documents, files, shards, tokenizers
from evo_jax.data.plan import WORK, Job
from evo_jax.data.shards import SPLITS, Manifest, Source
from evo_jax.data.storage import Folder
from evo_jax.errors import UserError


class Stream(Protocol):
  """Tokens with random access; threads may share it."""

  length: int

  def read(self, start: int, count: int) -> np.ndarray: ...  # (count,) unsigned ints; raises UserError


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The token streams of one source.

  streams: by split; documents with a separator behind each. fingerprint: of all tokens. begin_id, separator_id,
  vocab_size: the tokenizer's, for sequences and their documents. indexes: of conversations, by split; then a stream's
  numbers say which tokens are answers (`answers`), and it has no separators. None: it is text.
  """

  name: str
  streams: dict[str, Stream]
  fingerprint: str
  begin_id: int
  separator_id: int
  vocab_size: int
  indexes: dict[str, Stream] | None = None


def load_tokenizer(config: config_lib.Data) -> tokenizers.Tokenizer:
  """The tokenizer of the configuration, which a prepared data set brings with it. Raises UserError."""
  folder = config.tokenizer_path
  for pattern in files.split_patterns(config.path):
    if _is_prepared(pattern, "config.data.path"):
      name = shards.read_manifest(pattern).tokenizer
      if name != config.tokenizer:
        raise UserError(f"config.data.tokenizer: {config.tokenizer!r} is not that of {pattern}, {name!r}")
      folder = folder or f"{os.path.expanduser(pattern).rstrip('/')}/{shards.TOKENIZER}"
  return tokenizers.load_tokenizer(config.tokenizer, folder)


def load_corpora(config: config_lib.Data, tokenizer: tokenizers.Tokenizer) -> list[Corpus]:
  """The corpora of data.path's sources, in order, and behind them those of held-out files.

  Raises UserError. Prints a line for each source with documents that are skipped, and one if the cache cannot be used.
  """
  named = {"config.data.valid": config.valid, "config.data.test": config.test}
  shares = dict(valid_share=config.valid_share, test_share=config.test_share)
  return _load(config.path, "config.data.path", named, shares, config, tokenizer)


def load_text(path: str, field: str, config: config_lib.Data, tokenizer: tokenizers.Tokenizer) -> list[Corpus]:
  """The corpora of comma-separated sources that a run knows nothing of: all of a text file is in each split.

  config: of the run; field: that names `path` in errors. Raises UserError, and prints, as `load_corpora` does.
  """
  return _load(path, field, {}, dict(valid_share=0.0, test_share=0.0), config, tokenizer)


def _load(
  path: str,
  field: str,
  named: dict[str, str],
  shares: dict[str, float],
  config: config_lib.Data,
  tokenizer: tokenizers.Tokenizer,
) -> list[Corpus]:
  patterns = files.split_patterns(path)
  is_prepared = [_is_prepared(pattern, field) for pattern in patterns]
  text = ",".join(pattern for pattern, prepared in zip(patterns, is_prepared) if not prepared)
  held_out, inputs = [], []
  if text or not patterns:
    count = is_prepared.count(False)
    corpora = _from_text({**named, field: text}, shares, config, tokenizer)
    held_out, inputs = corpora[:-count], corpora[-count:]
  elif given := next((name for name, value in named.items() if value), None):
    raise UserError(f"{given}: is for text files; {path} is prepared, and has its own held-out text")
  corpora = []
  for pattern, prepared in zip(patterns, is_prepared):
    corpora += _open(pattern, field, config, tokenizer) if prepared else [inputs.pop(0)]
  return _named_apart(corpora + held_out)


def _is_prepared(pattern: str, field: str) -> bool:
  """Whether a pattern is the folder of a prepared data set. Raises UserError for one that is not finished."""
  if "://" in pattern:
    return not set("*?[") & set(pattern) and Folder(pattern).exists(shards.MANIFEST)
  if not os.path.isdir(os.path.expanduser(pattern)):
    return False
  folder = Folder(pattern)
  if not folder.exists(shards.MANIFEST) and folder.exists(f"{WORK}/flags.json"):
    raise UserError(f"{field}: {pattern} is not prepared to the end: the same evo_jax.prepare command goes on there")
  return folder.exists(shards.MANIFEST)


def _open(path: str, field: str, config: config_lib.Data, tokenizer: tokenizers.Tokenizer) -> list[Corpus]:
  """The corpora of a prepared data set."""
  manifest = shards.read_manifest(path)
  if manifest.tokenizer_identity != tokenizer.identity:
    raise UserError(f"{field}: {path} has the tokens of {manifest.tokenizer_identity}, not of {tokenizer.identity}")
  if config.chat and manifest.chat != config.chat:
    found = " ".join(shards.CHAT_FLAGS[manifest.chat]) or "text"
    raise UserError(f"config.data.chat: {config.chat!r} is not what {path} was prepared as: {found}")
  return _corpora(path, manifest, config.strict, lambda stream: stream)


def _from_text(
  patterns: dict[str, str], shares: dict[str, float], config: config_lib.Data, tokenizer: tokenizers.Tokenizer
) -> list[Corpus]:
  """The corpora of text files: those of held-out files, then the others. patterns: by field, held-out files first."""
  *named, (field, text) = patterns.items()
  fields = dict(zip(("valid", "test"), (name for name, _ in named))) | {"train": field}
  max_skipped = 0.0 if config.strict else documents.BAD_SHARE
  job = Job(text, *(value for _, value in named), **shares, max_skipped=max_skipped, chat=config.chat)
  folder = cache.prepared(job, tokenizer, config.tokenizer, fields)
  in_cache = functools.partial(cache.CachedStream, folder)
  corpora = _corpora(folder, shards.read_manifest(folder), config.strict, in_cache)  # held-out text first
  return corpora if named else [_in_all_splits(corpus) for corpus in corpora]


def _in_all_splits(corpus: Corpus) -> Corpus:
  """The corpus with all that it trains on in each split."""
  whole = lambda streams: streams and dict.fromkeys(SPLITS, streams["train"])
  return dataclasses.replace(corpus, streams=whole(corpus.streams), indexes=whole(corpus.indexes))


def _corpora(path: str, manifest: Manifest, strict: bool, wrap: Callable[[Stream], Stream]) -> list[Corpus]:
  corpora = []
  for source in [*_held_out(manifest), *(source for source in manifest.sources if not _is_held_out(source))]:
    if source.report:
      if strict:
        raise UserError(f"{source.name}: {source.report}")
      print(f"evo_jax: {source.name}: {source.report}", file=sys.stderr)
    fingerprint = shards.fingerprint(manifest.dtype, (source,))
    ids = (manifest.begin_id, manifest.separator_id, manifest.vocab_size)
    streams = {split: wrap(shards.open_stream(path, manifest, source, split)) for split in SPLITS}
    indexes = {split: wrap(shards.open_index(path, manifest, source, split)) for split in SPLITS}
    corpora.append(Corpus(source.name, streams, fingerprint, *ids, indexes if manifest.chat else None))
  return corpora


def _is_held_out(source: Source) -> bool:
  """Whether all of it is: whether --valid or --test gave it."""
  return "train" not in source.splits and len(source.splits) == 1


def _held_out(manifest: Manifest) -> list[Source]:
  """All files that --valid gave as one source, and all that --test gave: they are measured as one text."""
  merged = []
  for split in ("valid", "test"):
    if sources := [source for source in manifest.sources if _is_held_out(source) and split in source.splits]:
      parts = [source.splits[split] for source in sources]
      whole = shards.Split(
        tuple(shard for part in parts for shard in part.shards),
        tuple(shard for part in parts for shard in part.index),
        sum(part.answers for part in parts),
      )
      report = "; ".join(source.report for source in sources if source.report)
      merged.append(dataclasses.replace(sources[0], name=split, splits={split: whole}, report=report))
  return merged


def _named_apart(corpora: Iterable[Corpus]) -> list[Corpus]:
  """Corpora of different names: those that have the same are numbered."""
  named = {}
  for corpus in corpora:
    names = (f"{corpus.name}{f' ({i})' if i else ''}" for i in itertools.count())
    name = next(name for name in names if name not in named)
    named[name] = dataclasses.replace(corpus, name=name)
  return list(named.values())

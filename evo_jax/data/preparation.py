"""Preparation: files of text to a data set of tokens (`shards`), by several processes and hosts.

The files of each source are divided into groups of about 256 MB, in sorted order, and the text of each group into
pieces of about 256 MB. A piece gives one shard for each split. So shards depend on the files alone: they are the same,
byte for byte, for any number of processes and hosts. Each host does its groups. In the output folder, .work/ has a
record for each piece that is complete: a preparation that is started again goes on behind it. It has one for each
group, too: the host that completes the last group finds all of them there, writes the manifest and removes .work/.

Held out for validation and testing are, of --input: documents by a hash of their content; or, of a source of less than
100 documents, the end of each; or nothing, where files of their own are given.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import tempfile
import threading
from typing import Any

import numpy as np

from evo_jax.data import answers, blocks, conversations, duplicates, encoding, formats, items, shards
from evo_jax.data import documents as documents_lib
from evo_jax.data import passes as passes_lib
from evo_jax.data.chat import ChatTemplate
from evo_jax.data.documents import Tally
from evo_jax.data.plan import GROUP, WORK, Group, Job, Plan, make_plan
from evo_jax.data.shards import SPLITS, Shard
from evo_jax.data.storage import Folder
from evo_jax.data.tokenizers import Tokenizer
from evo_jax.errors import UserError

PIECE = 1 << 28  # bytes of text
_SURE = 10_000  # documents: after so many the share of bad ones is known before the end


def prepare(
  job: Job,
  tokenizer: Tokenizer,
  tokenizer_name: str,
  output: str,
  workers: int = 1,
  hosts: int = 1,
  host: int = 0,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> shards.Manifest | None:
  """Prepares this host's share of the text, and writes the manifest if all others are done; otherwise returns None.

  Raises UserError for what cannot be read or written, and where too many documents are bad; what is complete by then is
  kept. workers: processes. progress: is told bytes of this host's files, as they stand: read, and altogether.
  """
  plan = make_plan(job, tokenizer.binary, output)
  folder = Folder(output)
  flags = {**dataclasses.asdict(job), "tokenizer": tokenizer_name, "tokenizer_identity": tokenizer.identity}
  if job.chat:
    ChatTemplate(tokenizer)  # which names a tokenizer without one
  else:
    del flags["chat"]  # as data sets of text were written down before there were others
  if template := conversations.template_identity(tokenizer):
    flags["chat_template"] = template
  if manifest := _complete(folder, flags, plan):
    return manifest
  _begin(folder, flags)
  encoder = encoding.Encoder(tokenizer, job.read_field, job.valid_share, job.test_share, job.chat)
  mine = plan.share(hosts, host)
  passes = 2 if job.deduplicate else 1
  with passes_lib.Passes(encoder, workers, passes * sum(group.size for group in mine), progress) as run:
    compared = duplicates.find(run, folder, plan, mine, hosts, host) if job.deduplicate else ""
    tallies = Tallies(plan.names, job.max_skipped)
    run.each(mine, lambda group: _prepare_group(run, folder, group, tallies, compared))
  return _join(folder, plan, flags, encoder)


def _complete(folder: Folder, flags: dict[str, Any], plan: Plan) -> shards.Manifest | None:
  """The manifest of the same preparation, if it is complete. Raises UserError where it is of another."""
  if not folder.exists(shards.MANIFEST):
    return None
  manifest = shards.read_manifest(folder.path)
  _check_flags(folder, manifest.flags, flags)
  if [source.inputs for source in manifest.sources] != [_inputs(plan, i) for i in range(len(plan.names))]:
    raise UserError(f"{folder.path}: holds the tokens of other files, or of these before they changed; use another one")
  for i, source in enumerate(manifest.sources):
    if source.versions not in ("", _versions(plan, i)):
      print(
        f"evo_jax: warning: {plan.names[i]}: files were written anew, of the same sizes, since {folder.path} was made; "
        "where their text has changed, prepare it into another folder",
        file=sys.stderr,
        flush=True,
      )
  return manifest


def _begin(folder: Folder, flags: dict[str, Any]) -> None:
  """Writes down what is being prepared. Raises UserError where the folder holds the beginning of something else."""
  version = shards.version_of(flags["tokenizer"], flags.get("chat", ""))
  name, begun = f"{WORK}/flags.json", {**flags, "version": [version, GROUP, PIECE, encoding.PART]}
  try:
    earlier = json.loads(folder.read(name))
  except FileNotFoundError:
    folder.write_all(name, json.dumps(begun).encode())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{folder.shown(name)}: is damaged; remove {folder.shown(WORK)}") from error
  else:
    if earlier.get("version") != begun["version"]:
      raise UserError(f"{folder.path}: was begun by another version of evo_jax; use another one, or remove it")
    _check_flags(folder, earlier, begun)


def _check_flags(folder: Folder, earlier: dict[str, Any], flags: dict[str, Any]) -> None:
  chat = earlier.get("chat", "")
  if chat != flags.get("chat", ""):
    how = f"with {' '.join(shards.CHAT_FLAGS[chat])}" if chat else "without --chat"
    raise UserError(f"{folder.path}: was begun {how}; use another one, or remove it")
  for name, value in flags.items():
    if name != "max_skipped" and earlier.get(name) != value:
      raise UserError(
        f"{folder.path}: was begun with --{name}={earlier.get(name)}, not {value}; use another one, or remove it"
      )


class Tallies:
  """Counts the documents of each source over all threads. Raises UserError where too many are bad."""

  def __init__(self, names: tuple[str, ...], share: float):
    self._names, self._share = names, share
    self._tallies, self._lock = [Tally() for _ in names], threading.Lock()

  def update(self, source: int, tally: Tally) -> None:
    with self._lock:
      total = self._tallies[source]
      total.update(tally)
      if total.documents >= _SURE or not self._share:
        total.check(self._names[source], self._share, complete=False)


def _prepare_group(run: passes_lib.Passes, folder: Folder, group: Group, tallies: Tallies, compared: str) -> None:
  """Prepares what is left of a group, and writes its record. compared: what `duplicates.find` gave; "": copies stay."""
  versions, name = [*group.versions(), *filter(None, [compared])], f"{WORK}/{group.name}.json"
  if record := _read_record(folder, name, versions):
    for piece in record["pieces"]:
      tallies.update(group.source, _tally_of(piece))
    run.skip(group)
    return
  left_out = duplicates.read(folder, group, compared) if compared else duplicates.NONE
  pieces = []
  for number, piece in enumerate(_pieces(run.read(group))):
    piece_name = f"{WORK}/{group.name}-{number:04d}.json"
    record = _read_record(folder, piece_name, versions)
    if record:
      tallies.update(group.source, _tally_of(record))
      collections.deque(piece, maxlen=0)
    else:
      record = _Piece(run, folder, group, number, tallies, left_out).prepare(piece)
      if group.versions() != versions[: len(group.files)]:
        raise UserError(f"{formats.shown(group.files[0])}: or a file after it was changed while it was read")
      _write_record(folder, piece_name, versions, record)
    pieces.append(record)
  record = {"pieces": pieces, "sizes": group.sizes, "files": group.files, "compared": compared}
  _write_record(folder, name, versions, record)


def _pieces(all_items: Iterator[items.Item]) -> Iterator[Iterator[items.Item]]:
  """The items of each piece, which must be taken before the next is asked for."""
  following = next(all_items, None)

  def piece() -> Iterator[items.Item]:
    nonlocal following
    size = 0
    while following is not None:
      item, following = following, next(all_items, None)
      size += item.size
      yield item
      if size >= PIECE and item.ends_document:
        return

  while following is not None:
    yield piece()


class _Piece:
  """One piece of a group while it is prepared."""

  def __init__(
    self,
    run: passes_lib.Passes,
    folder: Folder,
    group: Group,
    number: int,
    tallies: Tallies,
    left_out: duplicates.Copies,
  ):
    self._run, self._folder, self._group, self._left_out = run, folder, group, left_out
    self._name, self._tallies = f"{group.name}-{number:04d}", tallies
    self._total = encoding.Encoded()
    self._conversations, self._answers = collections.Counter(), collections.Counter()  # by split; of answers, tokens

  def prepare(self, piece: Iterator[items.Item]) -> dict[str, Any]:
    """Writes the shards of its items. Returns its record."""
    dtype = self._run.encoder.dtype
    with contextlib.ExitStack() as stack:
      open_writer = lambda name, dtype: stack.enter_context(shards.shard_writer(self._folder, name, dtype))
      writers = {split: open_writer(f"{self._name}.{split}", dtype) for split in SPLITS}
      indexes = {split: open_writer(f"{self._name}.{split}.index", answers.DTYPE) for split in SPLITS}
      spool = _Spool(stack.enter_context(tempfile.TemporaryFile(dir=self._folder.scratch())), dtype)
      for item, result in self._run.results(piece, self._submit):
        done = result
        if item.part is not None:
          spool.append(result)
          if not item.part.last:
            continue
          done = self._long_document(item, spool)
        for split, tokens in done.tokens.items():
          for part in tokens:
            writers[split].append(part)
            if self._run.encoder.chat:
              index = answers.index_of(part)
              indexes[split].append(index.reshape(-1))
              self._conversations[split] += len(index)
              self._answers[split] += int(answers.are_answers(part).sum())
        self._count(done)
      total = self._total
      written = [writers[split].finish(total.documents[split], total.text_bytes[split]) for split in SPLITS]
      of_index = [indexes[split].finish(self._conversations[split], 0) for split in SPLITS]
    by_split = lambda some: {split: dataclasses.asdict(shard) for split, shard in zip(SPLITS, some) if shard}
    return {
      "shards": by_split(written),
      "index": by_split(of_index),
      "answers": self._answers,
      "tally": {**vars(total.tally), "skipped": dict(total.tally.skipped)},
      "duplicates": total.duplicates,
    }

  def _submit(self, item: items.Item) -> Callable[[], Any] | None:
    if item.part is None:
      left_out = self._left_out.of(item.number)
      return self._run.submit(encoding.encode, item.blocks, self._group.rule, left_out)
    return None if item.part.last else self._run.submit(encoding.encode_part, item.part.text, item.part.begins)

  def _long_document(self, item: items.Item, spool: "_Spool") -> encoding.Encoded:
    """What becomes of a document whose tokens are in the spool, which is emptied as its tokens are taken."""
    part, encoder, done = item.part, self._run.encoder, encoding.Encoded()
    if encoder.chat and not part.problem:
      part = dataclasses.replace(part, problem=f"is longer than {blocks.LONGEST_LINE:,} bytes")
    if part.problem or part.text_bytes:
      place = f"line {part.line} " if part.line else ""
      done.tally.add(part.file, documents_lib.Document(None, problem=part.problem, place=place))
    count = spool.close()
    if part.problem or not part.text_bytes:
      return done
    if self._left_out.of(item.number):
      done.duplicates = 1
      return done
    for split, (a, b) in encoder.ranges(self._group.rule, part.digest, count).items():
      done.tokens[split] = spool.read(a, b, encoder.tokenizer.separator_id)
      done.documents[split] = 1
      done.text_bytes[split] = part.text_bytes * b // count - part.text_bytes * a // count
    return done

  def _count(self, done: encoding.Encoded) -> None:
    total = self._total
    for split in SPLITS:
      total.documents[split] += done.documents[split]
      total.text_bytes[split] += done.text_bytes[split]
    total.duplicates += done.duplicates
    total.tally.update(done.tally)
    self._tallies.update(self._group.source, done.tally)


class _Spool:
  """The tokens of one document, in a file: only at its end it is known where they belong."""

  def __init__(self, file, dtype: np.dtype):
    self._file, self._dtype, self._count = file, dtype, 0

  def append(self, tokens: np.ndarray | None) -> None:
    if tokens is not None:
      self._file.write(tokens.tobytes())
      self._count += len(tokens)

  def close(self) -> int:
    """Ends the document, and begins another behind it. Returns the number of its tokens."""
    self._file.flush()
    count, self._count = self._count, 0
    self._file.seek(0)
    return count

  def read(self, start: int, stop: int, separator_id: int) -> Iterator[np.ndarray]:
    """Tokens [start, stop) of the document that was ended last, and the separator."""
    for at in range(start, stop, encoding.PART):
      self._file.seek(at * self._dtype.itemsize)
      size = min(encoding.PART, stop - at) * self._dtype.itemsize
      yield np.frombuffer(self._file.read(size), self._dtype)
    self._file.seek(0)
    yield np.full(1, separator_id, self._dtype)


def _read_record(folder: Folder, name: str, versions: list[str]) -> dict[str, Any] | None:
  """What was written down about files as they are now; None where there is nothing."""
  try:
    record = json.loads(folder.read(name))
  except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
    return None
  return record if record.pop("versions", None) == versions else None


def _write_record(folder: Folder, name: str, versions: list[str], record: dict[str, Any]) -> None:
  folder.write_all(name, json.dumps({**record, "versions": versions}).encode())


def _tally_of(record: dict[str, Any]) -> Tally:
  return Tally(**{**record["tally"], "skipped": collections.Counter(record["tally"]["skipped"])})


def _join(folder: Folder, plan: Plan, flags: dict[str, Any], encoder: encoding.Encoder) -> shards.Manifest | None:
  """Writes the manifest, if all groups are done. Raises UserError where too many documents are bad."""
  names = [f"{WORK}/{group.name}.json" for group in plan.groups]
  if not set(names) <= set(folder.names(WORK)):
    if folder.exists(shards.MANIFEST):  # another host was faster
      return shards.read_manifest(folder.path)
    return None
  try:
    records = [json.loads(raw) for raw in folder.read_all(names)]
  except FileNotFoundError:
    return shards.read_manifest(folder.path)
  if len({record.get("compared") for record in records}) > 1:
    raise UserError(f"{folder.path}: files changed while hosts looked for copies; start the same commands again")
  for group, record in zip(plan.groups, records):
    if record["files"] != list(group.files) or record["sizes"] != list(group.sizes):
      raise UserError(f"{folder.path}: hosts have different files, or files have changed: {group.files[0]} and others")
  sources = tuple(_source(plan, i, records, flags["max_skipped"]) for i in range(len(plan.names)))
  tokenizer, dtype = encoder.tokenizer, encoder.dtype.name
  manifest = shards.Manifest(
    version=shards.version_of(flags["tokenizer"], encoder.chat),
    fingerprint=shards.fingerprint(dtype, sources),
    tokenizer=flags["tokenizer"],
    tokenizer_identity=tokenizer.identity,
    vocab_size=tokenizer.vocab_size,
    begin_id=tokenizer.begin_id,
    separator_id=tokenizer.separator_id,
    dtype=dtype,
    record=shards.RECORD,
    sources=sources,
    flags=flags,
  )
  for name, content in tokenizer.files().items():
    folder.write_all(f"{shards.TOKENIZER}/{name}", content)
  folder.write_all(shards.MANIFEST, manifest.to_json().encode())
  _clean(folder, manifest)
  return manifest


def _source(plan: Plan, source: int, records: list[dict[str, Any]], max_skipped: float) -> shards.Source:
  mine = [(group, record) for group, record in zip(plan.groups, records) if group.source == source]
  pieces = [piece for _, record in mine for piece in record["pieces"]]
  tally = Tally()
  for piece in pieces:
    tally.update(_tally_of(piece))
  tally.check(plan.names[source], max_skipped)
  of = lambda kind, split: [piece[kind][split] for piece in pieces if split in piece.get(kind, ())]
  shards_of = lambda kind, split: tuple(Shard(**values) for values in of(kind, split))
  splits = {
    split: shards.Split(shards_of("shards", split), shards_of("index", split), sum(of("answers", split)))
    for split in SPLITS
  }
  return shards.Source(
    name=plan.names[source],
    files=sum(len(group.files) for group, _ in mine),
    file_bytes=sum(group.size for group, _ in mine),
    inputs=_inputs(plan, source),
    splits={name: split for name, split in splits.items() if split.shards},
    skipped=dict(tally.skipped),
    report=tally.report,
    duplicates=sum(piece["duplicates"] for piece in pieces),
    versions=_versions(plan, source),
  )


def _inputs(plan: Plan, source: int) -> str:
  """Fingerprint of the names and sizes of a source's files."""
  return _fingerprint([group.files, group.sizes] for group in plan.groups if group.source == source)


def _versions(plan: Plan, source: int) -> str:
  """Fingerprint of the versions of a source's files."""
  return _fingerprint(group.versions() for group in plan.groups if group.source == source)


def _fingerprint(values: Iterable[Any]) -> str:
  digest = hashlib.sha256()
  for value in values:
    digest.update(json.dumps(value).encode())
  return digest.hexdigest()[:16]


def _clean(folder: Folder, manifest: shards.Manifest) -> None:
  """Removes what belongs to no manifest: records, and files of attempts that were killed or of files that changed."""
  folder.remove(WORK)
  used = {shard.file for shard in manifest.shards}
  for name in folder.names():
    if name not in used and re.fullmatch(
      rf"(\d{{3}}-\d{{5}}-\d{{4}}\.({'|'.join(SPLITS)})(\.index)?|\.\d{{3}}-.*\.[0-9a-f]{{32}})", name
    ):
      folder.remove(name)

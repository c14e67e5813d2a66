"""Tokens to batches: prepared sets and the cache, order, mixtures, and one clear line for each kind of bad input."""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import shutil

from conftest import assert_refused, call, train_flags
import jax
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import order, tokenizers
from evo_jax.data.shards import SPLITS
from evo_jax.errors import UserError
from evo_jax.evaluation import paths as paths_lib

BYTES = tokenizers.Bytes()


def write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


class Separated(tokenizers.Bytes):
  identity = "separated"
  begin_id, separator_id = 7, 1


def load(path, tokenizer=BYTES, **changes):
  return corpora_lib.load_corpora(config_lib.Data(path=str(path), **changes), tokenizer)


def tokens(corpus, split="train"):
  stream = corpus.streams[split]
  return stream.read(0, stream.length)


def test_text_is_tokenized_once(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", "some text " * 100)
  first = load(path)[0]
  assert [first.streams[split].length for split in SPLITS] == [901, 51, 51]
  monkeypatch.setattr(Separated, "encode", None)
  with pytest.raises(TypeError):
    load(path, Separated())
  monkeypatch.setattr(tokenizers.Bytes, "encode", None)
  assert load(path)[0].fingerprint == first.fingerprint
  monkeypatch.undo()
  write(tmp_path / "a.txt", "other text " * 100)
  assert load(path)[0].fingerprint != first.fingerprint


def cached(path):
  """The folder of the one source that is in the cache."""
  (manifest,) = path.glob("evo_jax/tokens/*/manifest.json")
  return manifest.parent


def flip(file, place=2000):
  raw = file.read_bytes()
  file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])


@pytest.mark.parametrize(
  "damage",
  [
    lambda entry: (entry / "000-00000-0000.train").unlink(),
    lambda entry: (entry / "000-00000-0000.train").write_bytes(b""),
    lambda entry: (entry / "000-00000-0000.valid").write_bytes((entry / "000-00000-0000.valid").read_bytes()[:-1]),
    lambda entry: (entry / "manifest.json").write_text('{"version": '),
    lambda entry: (entry / "manifest.json").write_text("[]"),
    lambda entry: (entry / "manifest.json").unlink(),  # as a preparation that was killed leaves it
  ],
)
def test_a_damaged_cache_is_mended_for_good(tmp_path, monkeypatch, capfd, damage):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = write(tmp_path / "a.txt", "some text " * 1000)
  sound = {split: tokens(load(path)[0], split) for split in SPLITS}
  damage(cached(tmp_path / "cache"))
  for split, want in sound.items():
    np.testing.assert_array_equal(tokens(load(path)[0], split), want)
  monkeypatch.setattr(tokenizers.Bytes, "encode", None)  # a sound cache is not made again
  assert tokens(load(path)[0]).size == 9001 and capfd.readouterr().err == ""


def test_damage_in_the_cache_is_never_trained_on(tmp_path, monkeypatch):
  """It is found when it is read, through threads that read ahead; the next start mends it."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = write(tmp_path / "a.txt", "some text " * 1000)
  (sound,) = load(path)
  want = tokens(sound)
  flip(cached(tmp_path / "cache") / "000-00000-0000.train", 9000)
  (damaged,) = load(path)
  with pytest.raises(UserError, match=r"0000\.train: record 4 is damaged: .*the same command tokenizes the text again"):
    take(stream(corpora=[damaged]), 200)
  (mended,) = load(path)
  np.testing.assert_array_equal(tokens(mended), want)


def test_a_cache_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  write(tmp_path / "cache/evo_jax", "")
  for name in ("a.txt", "b.txt"):
    write(tmp_path / name, name * 20)
  corpora = load(f"{tmp_path}/a.txt,{tmp_path}/b.txt")
  assert [corpus.streams["train"].length for corpus in corpora] == [91, 91]
  np.testing.assert_array_equal(tokens(corpora[0])[:5], BYTES.encode("a.txt"))
  assert capfd.readouterr().err.splitlines() == [
    f"evo_jax: tokens are kept in memory: {tmp_path}/cache/evo_jax/tokens cannot be used (Not a directory)"
  ]
  assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [tmp_path / "cache/evo_jax"]


def test_processes_that_tokenize_the_same_text_do_not_disturb_each_other(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = write(tmp_path / "a.txt", "some text " * 100)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: load(path)[0], range(16)))
  assert len({corpus.fingerprint for corpus in found}) == 1 and capfd.readouterr().err == ""
  assert len({int(tokens(corpus).sum()) for corpus in found}) == 1


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
  class Slow(tokenizers.Bytes):
    identity = "slow"

    def encode(self, text, begins=True):
      write(tmp_path / "a.txt", text + b"more")
      return super().encode(text)

  with pytest.raises(UserError, match=r"a\.txt: .*was changed while it was read"):
    load(write(tmp_path / "a.txt", "text"), Slow())
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="pipe: is a pipe, which can be read only once"):
    load(tmp_path / "pipe")


def test_skipped_documents_are_reported_at_every_start_and_move_no_other(tmp_path, capfd):
  lines = [json.dumps({"text": chr(65 + i) * 3}) for i in range(40)]
  path = write(tmp_path / "a.jsonl", "\n".join(lines))
  whole = tokens(load(path)[0])
  assert capfd.readouterr().err == ""
  lines[3], lines[29] = "{}", '{"text": "'
  write(tmp_path / "a.jsonl", "\n".join(lines))
  for _ in range(2):
    part = tokens(load(path)[0])
    report = capfd.readouterr().err
    assert report.count("\n") == 1 and report.startswith(f"evo_jax: {path}: 2 of 40 documents are skipped (")
    assert report.endswith(f"the first: {path}: line 4 has no field 'text'\n")
  documents = np.split(whole, np.flatnonzero(whole == 0) + 1)
  np.testing.assert_array_equal(part, np.concatenate([d for i, d in enumerate(documents) if i not in (3, 29)]))
  for strict in (load, load_text):
    with pytest.raises(UserError, match="line 4 has no field 'text'"):
      strict(path, strict=True)


def load_text(path, tokenizer=BYTES, **changes):
  return corpora_lib.load_text(str(path), "--data", config_lib.Data(**changes), tokenizer)


def test_held_out_files_are_named(tmp_path):
  for i in range(30):
    write(tmp_path / f"{i:02d}.txt", chr(65 + i) * 50)
  letters = lambda corpora, split: {chr(t - 1) for c in corpora for t in np.unique(tokens(c, split)) if t}
  named = load(tmp_path / "*.txt", valid=f"{tmp_path}/0[34].txt", test=f"{tmp_path}/05.txt")
  assert letters(named, "valid") == {"D", "E"} and letters(named, "test") == {"F"}
  assert len(letters(named, "train")) == 27 and len(batches_lib.TrainingText(named, config_lib.Data(), 8).corpora) == 1
  for field in ("valid", "test"):
    with pytest.raises(UserError, match=rf"config\.data\.{field}: no file matches"):
      load(tmp_path / "*.txt", **{field: "none*"})


@pytest.fixture
def prepared(tmp_path):
  """Two prepared data sets: of two sources, and of one."""
  folders = []
  for name, sources in (("one", "ab"), ("two", "c")):
    for source in sources:
      write(tmp_path / f"{source}.txt", f"{source} {name} " * 500)
    inputs = ",".join(f"{tmp_path}/{source}.txt" for source in sources)
    done = call("evo_jax.prepare", f"--input={inputs}", f"--output={tmp_path / name}", "--workers=1")
    assert done.returncode == 0, done.stderr
    folders.append(tmp_path / name)
  return folders


def test_prepared_data_sets_and_text_files_are_sources_side_by_side(prepared, tmp_path, capfd):
  one, two = prepared
  path = write(tmp_path / "d.txt", "d text " * 100)
  corpora = load(f"{one},{path},{two}")
  assert [chr(tokens(corpus)[0] - 1) for corpus in corpora] == ["a", "b", "d", "c"]
  direct = load(f"{tmp_path}/a.txt")[0]
  assert corpora[0].fingerprint == direct.fingerprint  # prepared or not
  with pytest.raises(UserError, match=r"config\.data\.weights: \(1\.0, 2\.0\) must have one weight for each of the 4"):
    stream(corpora=corpora, weights=(1.0, 2.0))
  again = load(f"{one},{one}")
  assert [corpus.name for corpus in again[2:]] == [f"{corpus.name} (1)" for corpus in again[:2]]
  assert capfd.readouterr().err == ""


def test_a_start_reads_no_more_than_the_manifest(prepared, tmp_path):
  for file in prepared[0].iterdir():
    if file.name != "manifest.json":
      file.unlink()
  (first, *_) = corpora = load(prepared[0])
  text = batches_lib.TrainingText(corpora, config_lib.Data(batch_size=8), 8)
  assert text.tokens == 2 * 2701 and first.streams["valid"].length == 151
  with pytest.raises(UserError, match=r"one/000-00000-0000\.train: is missing"):
    take(text.batches(), 1)


def test_a_data_set_brings_its_tokenizer(prepared, tmp_path):
  model = tokenizers.train_sentencepiece(["some text, and more words"] * 9, 274, str(tmp_path / "model"))
  path = write(tmp_path / "a.txt", "some text " * 500)
  flags = (f"--input={path}", "--tokenizer=sentencepiece", f"--tokenizer_path={tmp_path}/model")
  assert call("evo_jax.prepare", *flags, f"--output={tmp_path}/pieces", "--workers=1").returncode == 0
  shutil.rmtree(tmp_path / "model")
  config = config_lib.Data(path=f"{tmp_path}/pieces/", tokenizer="sentencepiece")
  tokenizer = corpora_lib.load_tokenizer(config)
  (corpus,) = corpora_lib.load_corpora(config, tokenizer)
  assert tokenizer.identity == model.identity and tokenizer.decode(tokens(corpus)[:20]).startswith("some text some")
  for path, name, own in ((f"{tmp_path}/pieces", "bytes", "sentencepiece"), (prepared[0], "sentencepiece", "bytes")):
    with pytest.raises(UserError, match=f"config.data.tokenizer: '{name}' is not that of {path}, '{own}'"):
      corpora_lib.load_tokenizer(config_lib.Data(path=str(path), tokenizer=name))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(tokenizer=Separated()), "has the tokens of bytes, not of separated"),
    (dict(valid="*.txt"), "config.data.valid: is for text files"),
    (dict(test="*.txt"), "config.data.test: is for text files"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is damaged"),
    (lambda folder: (folder / "manifest.json").write_text('{"version": 99}'), "version 99 of the format"),
    (lambda folder: (folder / "manifest.json").unlink(), "config.data.path: .* is a folder"),
    (
      lambda folder: [(folder / "manifest.json").unlink(), write(folder / ".work/flags.json", "{}")],
      "config.data.path: .* is not prepared to the end",
    ),
  ],
)
def test_data_sets_that_do_not_fit_are_named(prepared, change, message):
  if callable(change):
    change(prepared[0])
    change = {}
  with pytest.raises(UserError, match=message):
    load(prepared[0], **change)


class Memory:
  """A stream of tokens in memory."""

  def __init__(self, tokens):
    self.tokens, self.length = np.asarray(tokens, np.uint32), len(tokens)

  def read(self, start, count):
    assert 0 <= start <= start + count <= self.length
    return self.tokens[start : start + count]


def corpus(count, name="made", first=1):
  stream = Memory(np.arange(first, first + count))
  return corpora_lib.Corpus(name, dict.fromkeys(SPLITS, stream), "", begin_id=0, separator_id=0, vocab_size=2**31)


def take(batches, count):
  """The tokens of the first batches."""
  found = [next(batches).tokens for _ in range(count)]
  batches.close()
  return found


def stream(rows=None, corpora=None, start=0, segments=False, batch_size=8, **changes):
  config = config_lib.Data(batch_size=batch_size, **changes)
  return batches_lib.TrainingText(corpora or [corpus(107)], config, 8).batches(rows, start, segments)


def take_over_processes(corpora, batches, stops, **changes):
  """The tokens of the first batches, (batches, 30, 9), read by 1, 2, 3 and 5 processes in turn, between `stops`."""
  found = []
  for i, (start, stop) in enumerate(itertools.pairwise([0, *stops, batches])):
    shares = np.split(np.arange(30), (1, 2, 3, 5)[i % 4])
    parts = [take(stream(rows, corpora, start, batch_size=30, **changes), stop - start) for rows in shares]
    found += np.concatenate([np.stack(part) for part in parts], axis=1).tolist()
  return np.array(found)


@pytest.mark.parametrize("size", [240, 241, 107, 8, 5, 1])
def test_an_epoch_reads_each_token_once(size):
  """And the next begins at other borders, in another order: for any number of processes, whenever they change."""
  turns = 8 // math.gcd(size, 8)  # after which all tokens have been read equally often
  sequences = turns * size // 8
  periods = max(2, 90 // sequences)
  batches = -(-periods * sequences // 30)
  found = take_over_processes([corpus(size)], batches, sorted({1, batches // 2, batches - 1}))
  np.testing.assert_array_equal(found, np.stack(take(stream(corpora=[corpus(size)], batch_size=30), batches)))
  found = found.reshape(-1, 9)[: periods * sequences].reshape(periods, sequences, 9)
  assert (found[..., 0] == 0).all() and ((np.diff(found[..., 1:]) - 1) % size == 0).all()
  for period in found:
    assert (np.bincount(period[:, 1:].ravel(), minlength=size + 1)[1:] == turns).all()
  if size > 100:
    first, second = found.reshape(-1, 9)[: 2 * (size // 8), 1].reshape(2, -1)
    assert len(set(first)) == len(first) and list(first) != sorted(first) and list(first) != list(second)
    assert not set(first[:-1]) & set(second[1:])


def test_batches_depend_on_the_seed():
  orders = [np.concatenate(take(stream(seed=seed), 13)) for seed in (0, 1)]
  assert not np.array_equal(*orders) and {tuple(row) for row in orders[0]} != {tuple(row) for row in orders[1]}


def test_orders_of_trillions_of_tokens_take_no_memory():
  ring = order.Ring(10**13, 128, (0, 0))
  starts = [ring.start(k) for k in range(2000)]
  assert len(set(starts)) == 2000 and len({start % 128 for start in starts}) == 1
  assert 0.45 < np.mean(starts) / 10**13 < 0.55 and abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("count", [5, 100])
def test_all_orders_are_about_equally_likely(count):
  """Chi-squared tests over seeds: of what comes first, and of the distance between the first two."""
  starts = np.array([[order.Ring(count, 1, (seed,)).start(k) for k in (0, 1)] for seed in range(1000)])
  distances = (starts[:, 1] - starts[:, 0]) % count
  for values, freedom in ((starts[:, 0], count), (distances - 1, count - 1)):
    found, expected = np.bincount(values, minlength=freedom), 1000 / freedom
    assert ((found - expected) ** 2 / expected).sum() / (freedom - 1) < 1 + 4 * np.sqrt(2 / (freedom - 1))


def of_source(batches):
  """The source of each sequence of corpora whose tokens are about 1,000, 2,000, ..., and how often each is there."""
  sources = np.stack(batches)[..., 1] // 1000 - 1
  return sources, np.bincount(sources.ravel(), minlength=3)


SOURCES = [corpus(50, "a", 1000), corpus(500, "b", 2000), corpus(300, "c", 3000)]


def test_sources_are_mixed_by_weight():
  _, counts = of_source(take(stream(corpora=SOURCES, weights=(3.0, 1.0, 0.0)), 50))
  assert counts.tolist() == [300, 100, 0]
  sources, counts = of_source(take(stream(corpora=SOURCES), 85))
  np.testing.assert_allclose(counts, 680 * np.array([50, 500, 300]) / 850, atol=2)
  for first in range(0, 85, 5):  # everywhere alike
    np.testing.assert_allclose(
      np.bincount(sources[first : first + 5].ravel()), np.array([50, 500, 300]) * 40 / 850, atol=2
    )


def test_weights_change_at_steps():
  """Sources go on where they were; what was read before a change does not depend on it."""
  changes = dict(weights=(1.0, 1.0, 0.0), weight_changes="4:0,1,3;10:0,0,1")
  batches = take(stream(corpora=SOURCES, **changes), 20)
  for first, last, want in ((0, 4, [16, 16, 0]), (4, 10, [0, 12, 36]), (10, 20, [0, 0, 80])):
    assert of_source(batches[first:last])[1].tolist() == want
  starts = [row[1] for row in np.concatenate(batches) if row[1] >= 3000]
  assert len(set(starts[:37])) == 37  # of an epoch of 37.5 sequences
  np.testing.assert_array_equal(batches[:4], take(stream(corpora=SOURCES, weights=(1.0, 1.0, 0.0)), 4))
  np.testing.assert_array_equal(batches[7:], take(stream(corpora=SOURCES, start=7, **changes), 13))
  text = batches_lib.TrainingText(SOURCES, config_lib.Data(batch_size=8, **changes), 8)
  assert text.epochs(0) == {"a": 0, "b": 0, "c": 0}
  for names, shown in (
    (["gs://b/x/*.txt"], ["*.txt"]),
    (["/x/a/*.txt", "/x/b/*.txt", "stdlib"], ["a/*.txt", "b/*.txt", "stdlib"]),
    (["/x/*", "/x/* (1)"], ["*", "* (1)"]),
    (["a/b", "b"], ["a/b", "b"]),
  ):
    named = [corpus(9, name) for name in names]
    assert list(batches_lib.TrainingText(named, config_lib.Data(), 8).epochs(1)) == shown
  assert text.epochs(4) == {"a": 16 * 8 / 50, "b": 16 * 8 / 500, "c": 0}
  assert text.epochs(20) == {"a": 16 * 8 / 50, "b": 28 * 8 / 500, "c": 116 * 8 / 300}


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(weights=(0.0, 0.0)), r"weights: \(0\.0, 0\.0\) must be positive"),
    (dict(weights=(1.0, -1.0)), "weights: .* must be positive"),
    (dict(weight_changes="soon"), "weight_changes: 'soon' is not STEP:WEIGHT,WEIGHT"),
    (dict(weight_changes="5:1,x"), "weight_changes: '5:1,x' is not STEP:WEIGHT,WEIGHT"),
    (dict(weight_changes="-5:1"), "weight_changes: '-5:1' must have ascending steps above 0"),
    (dict(weight_changes="5:nan"), "weight_changes: '5:nan': weights must be positive"),
    (dict(weight_changes="5:0,0"), "weight_changes: '5:0,0': weights must be positive"),
    (dict(weight_changes="0:1,1"), "weight_changes: '0:1,1' must have ascending steps above 0"),
    (dict(weight_changes="5:1,1;5:1,2"), "weight_changes: .* must have ascending steps"),
    (dict(weights=(1.0,), weight_changes="5:1,1"), "weight_changes: '5:1,1' must have one weight for each source"),
    (dict(valid_share=0.5, test_share=0.5), "valid_share: 0.5 with data.test_share leaves nothing"),
    (dict(valid_share=-0.1), r"valid_share: -0.1 is not in \[0, 1\]"),
  ],
)
def test_mixtures_that_cannot_be_are_named(fields, message):
  with pytest.raises(UserError, match=rf"config\.data\.{message}"):
    config_lib.Data(**fields).check()


def test_weights_go_with_sources():
  with pytest.raises(
    UserError, match=r"config\.data\.weights: \(1\.0,\) must have one weight for each of the 3 sources"
  ):
    stream(corpora=SOURCES, weights=(1.0,))
  with pytest.raises(UserError, match=r"config\.data\.weight_changes: '3:1' must have one .* data\.path: a, b, c"):
    stream(corpora=SOURCES, weight_changes="3:1")


def empty(name="made"):
  return dataclasses.replace(corpus(1, name), streams=dict.fromkeys(SPLITS, Memory([])))


def test_empty_and_foreign_corpora_are_named():
  with pytest.raises(UserError, match="made: there is no text to train on"):
    stream(corpora=[empty()])
  with pytest.raises(UserError, match=r"made: the valid split has no text \(config\.data\.valid_share"):
    batches_lib.held_out([empty()], "valid", 8)
  with pytest.raises(UserError, match=r"made: token \d+ is outside the vocabulary of 100"):
    take(stream(corpora=[dataclasses.replace(corpus(107), vocab_size=100)]), 13)


def test_held_out_sequences_are_consecutive():
  batch = batches_lib.held_out([corpus(107)], "valid", 8)
  assert batch.tokens.shape == (13, 9) and (batch.tokens[:, 0] == 0).all()
  assert batch.counted is None and batch.segments is None
  np.testing.assert_array_equal(batch.tokens[:, 1:].reshape(-1), np.arange(1, 105))
  few = batches_lib.held_out([corpus(107)], "valid", 8, 3)
  np.testing.assert_array_equal(few.tokens, batch.rows([0, 6, 12]).tokens)


def special(separator_id, tokens=None):
  """A corpus of a tokenizer whose begin token is 90."""
  tokens = [4, 5, separator_id, 6, separator_id, separator_id, 7, 8] if tokens is None else tokens
  return corpora_lib.Corpus("special", dict.fromkeys(SPLITS, Memory(tokens)), "", 90, separator_id, 100)


@pytest.mark.parametrize("separator_id", [90, 91])
def test_batches_say_which_document_a_token_belongs_to(separator_id):
  batch = batches_lib.held_out([special(separator_id)], "test", 8, segments=True)
  assert batch.tokens.tolist() == [[90, 4, 5, separator_id, 6, separator_id, separator_id, 7, 8]]
  assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4, 4]] and batch.segments.dtype == np.int32
  training = next(stream(corpora=[special(separator_id)], segments=True))
  np.testing.assert_array_equal(
    training.segments, batches_lib.segment_numbers(training.tokens, 90, separator_id).astype(np.int32)
  )
  assert training.rows(slice(2)).segments.shape == (2, 9) and training.rows([1]).counted is None


def test_the_tokenizers_separator_stands_after_each_document(tmp_path):
  for i in range(20):
    write(tmp_path / f"{i:02d}.txt", "ab")
  (corpus,) = load(tmp_path / "*.txt", Separated(), valid_share=0.0, test_share=0.0)
  assert corpus.begin_id == 7 and tokens(corpus).tolist() == [98, 99, 1] * 20
  (everything,) = load_text(tmp_path / "0*.txt", Separated())
  assert everything.separator_id == 1
  for split in SPLITS:
    assert tokens(everything, split).tolist() == [98, 99, 1] * 10


def test_a_source_without_text_is_named(tmp_path):
  write(tmp_path / "a.jsonl", '{"text": ""}\n')
  with pytest.raises(UserError, match=r"a\.jsonl: no line has text"):
    load(tmp_path / "a.jsonl")


def test_short_text_is_padded_where_it_is_measured_and_repeated_where_it_is_trained_on():
  short = special(91, [4, 5, 91])
  batch = batches_lib.held_out([short], "test", 8, segments=True)
  assert batch.tokens.tolist() == [[90, 4, 5, 91, 91, 91, 91, 91, 91]]
  assert batch.counted.tolist() == [[True] * 4 + [False] * 5] and batch.segments[0, :4].tolist() == [1, 1, 1, 2]
  both = batches_lib.held_out([short, short], "test", 8)
  assert both.tokens.shape == (2, 9) and both.segments is None
  longer = batches_lib.held_out([short, special(91)], "test", 8)  # a remainder is dropped as ever
  assert longer.counted is None and len(longer.tokens) == 1
  training = next(stream(corpora=[short]))
  assert training.counted is None and {tuple(row[1:4]) for row in training.tokens.tolist()} == {
    (4, 5, 91),
    (5, 91, 4),
    (91, 4, 5),
  }
  assert (training.tokens[:, 1:6] == training.tokens[:, 4:]).all()


def test_held_out_text_may_be_shorter_than_a_sequence(tmp_path):
  corpora = load(write(tmp_path / "a.txt", "a text of forty letters, more or less..."))
  assert next(batches_lib.TrainingText(corpora, config_lib.Data(batch_size=2), 128).batches()).tokens.shape == (2, 129)
  for split, text in (("valid", "s."), ("test", "..")):
    held_out = batches_lib.held_out(corpora, split, 128)
    assert held_out.tokens.shape == (1, 129) and held_out.counted[:, 1:].sum() == 3
    assert BYTES.decode(held_out.tokens[0, 1:]) == text


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
  """A run on one document of 30 bytes: 27 for training, 1 for validation; its context is 32."""
  folder = tmp_path_factory.mktemp("short")
  path = write(folder / "a.txt", "a short text of 30 characters.")
  changes = dict(train__steps=2, eval__samples=0, eval__paths=("ar",), window__count=0)
  done = call("evo_jax.main", *train_flags(folder / "run", path, **changes))
  assert done.returncode == 0 and "28 training tokens" in done.stdout, done.stderr
  return folder


@pytest.mark.slow
def test_a_text_shorter_than_a_sequence_is_trained_on(short_run):
  rows = [json.loads(line) for line in (short_run / "run/metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2] and all(0 < row["bits"] < 12 for row in rows)
  assert 0 < json.loads((short_run / "run/table.json").read_text())[0]["bits"] < 30


@pytest.mark.slow
def test_short_text_has_the_bits_that_it_has_in_front_of_any_other(short_run):
  run = run_lib.load_run(str(short_run / "run"))
  evaluator = paths_lib.Evaluator(run.model, run.config, run.tokenizer, run.mesh)
  texts = ("a short text", "a short text" + "x" * 30)
  corpora = [load_text(write(short_run / f"{len(text)}.txt", text))[0] for text in texts]
  short, longer = (batches_lib.held_out([corpus], "test", 32) for corpus in corpora)

  def nll(batch, path):
    with jax.set_mesh(run.mesh):
      return evaluator.token_nll(run.params, run.statistics, batch, path)[0][0]

  for path, same in (("ar", 12), ("diagonal:4", 8)):  # of two windows of 8 the second has padding
    np.testing.assert_allclose(nll(short, path)[:same], nll(longer, path)[:same], rtol=1e-5)
  (entry,) = evaluator(run.params, run.statistics, short, ("ar",))
  assert entry["bits"] == pytest.approx(nll(short, "ar")[:13].sum() / np.log(2) / 12, rel=1e-6)  # with the separator


@pytest.mark.slow
def test_evaluate_says_that_text_has_changed(short_run):
  flags = (f"--workdir={short_run / 'run'}", "--paths=ar")
  same = call("evo_jax.evaluate", *flags)
  assert same.returncode == 0 and same.stderr == "" and "1 sequence" in same.stdout, same.stderr
  file = short_run / "table.json"
  refused = call("evo_jax.evaluate", *flags, f"--json={file}", f"--data={write(short_run / 'empty.txt', '')}")
  assert_refused(refused, "empty.txt: is empty")
  assert not file.exists()
  write(short_run / "a.txt", "another short text of 38 characters...")
  other = call("evo_jax.evaluate", *flags)
  assert other.returncode == 0 and other.stderr.count("\n") == 1 and "has changed since training" in other.stderr

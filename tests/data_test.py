"""Documents to batches: splits, the cache, order, padding, and one clear line for each kind of bad input."""

import concurrent.futures
import errno
import json
import os
from unittest import mock

from conftest import assert_refused, call, train_flags
import jax
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import tokenizers
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


def test_many_documents_are_split_by_number_few_by_place(tmp_path):
  for i in range(40):
    write(tmp_path / f"{i:02d}.txt", chr(65 + i) * 50)
  many = load(tmp_path / "*.txt")[0].tokens
  letters = lambda split: {chr(t - 1) for t in np.unique(many[split]) if t}
  assert letters("valid") == {chr(65 + 9), chr(65 + 29)} and letters("test") == {chr(65 + 19), chr(65 + 39)}
  assert len(letters("train")) == 36
  write(tmp_path / "one.text", bytes(range(100)) * 10)
  few = load(tmp_path / "one.text")[0].tokens
  assert [len(few[s]) - 1 for s in corpora_lib.SPLITS] == [900, 50, 50]
  assert few["valid"][0] == 1 and few["test"][0] == 51  # byte 0, byte 50


def test_tokens_are_cached_and_mapped(tmp_path):
  path = write(tmp_path / "a.txt", "some text " * 100)
  first, second = load(path)[0], load(path)[0]
  assert isinstance(second.tokens["train"], np.memmap) and first.fingerprint == second.fingerprint
  write(tmp_path / "a.txt", "other text " * 100)
  assert load(path)[0].fingerprint != first.fingerprint


def cached(path):
  """The arrays of the one source that is in the cache, by split."""
  (entry,) = path.glob("evo_jax/tokens/*")
  return {split: entry / f"{split}.npy" for split in corpora_lib.SPLITS}, entry


@pytest.mark.parametrize(
  "damage",
  [
    lambda files, entry: files["valid"].write_bytes(b""),
    lambda files, entry: files["train"].write_bytes(files["train"].read_bytes()[:-7]),
    lambda files, entry: files["train"].write_bytes(files["train"].read_bytes()[:-9] + bytes(9)),  # pages of zeros
    lambda files, entry: files["test"].write_bytes(b"nonsense"),
    lambda files, entry: files["test"].unlink(),
    lambda files, entry: np.save(files["train"], np.load(files["train"]).astype(np.uint32)),
    lambda files, entry: np.save(files["train"], np.load(files["train"]).astype(np.int16)),
    lambda files, entry: np.save(files["train"], np.load(files["train"])[None]),
    lambda files, entry: np.save(files["train"], np.array([{}], object), allow_pickle=True),
    lambda files, entry: (entry / "meta.json").write_text('{"fingerprint": "'),
    lambda files, entry: (entry / "meta.json").write_text("[]"),
  ],
)
def test_a_damaged_cache_is_mended_for_good(tmp_path, monkeypatch, capfd, damage):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = write(tmp_path / "a.txt", "some text " * 100)
  sound = load(path)[0]
  files, entry = cached(tmp_path / "cache")
  good = [np.array(sound.tokens[split]) for split in corpora_lib.SPLITS]
  damage(files, entry)
  mended = load(path)[0]
  assert mended.fingerprint == sound.fingerprint and isinstance(mended.tokens["train"], np.memmap)
  for split, want in zip(corpora_lib.SPLITS, good):
    np.testing.assert_array_equal(np.load(files[split]), want)
  assert len(list(entry.iterdir())) == 4 and capfd.readouterr().err == ""
  monkeypatch.setattr(Separated, "encode", None)  # a sound cache is not made again
  with pytest.raises(TypeError):
    load(path, Separated())
  assert load(path)[0].fingerprint == sound.fingerprint


@pytest.mark.parametrize("kind", ["a file", "full"])
def test_a_cache_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capfd, kind):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  if kind == "a file":
    write(tmp_path / "cache/evo_jax", "")
  else:
    monkeypatch.setattr(np, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
  for name in ("a.txt", "b.txt"):
    write(tmp_path / name, name * 20)
  corpora = load(f"{tmp_path}/a.txt,{tmp_path}/b.txt")
  assert [len(corpus.tokens["train"]) for corpus in corpora] == [91, 91]
  line = "No space left on device" if kind == "full" else "Not a directory"
  assert capfd.readouterr().err.splitlines() == [
    f"evo_jax: tokens are kept in memory: {tmp_path}/cache/evo_jax/tokens cannot be used ({line})"
  ]
  assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == (
    [tmp_path / "cache/evo_jax"] if kind == "a file" else []
  )


def test_processes_that_tokenize_the_same_text_do_not_disturb_each_other(tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  path = write(tmp_path / "a.txt", "some text " * 100)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: load(path)[0], range(40)))
  assert len({corpus.fingerprint for corpus in found}) == 1 and capfd.readouterr().err == ""
  assert all(int(corpus.tokens["train"].sum()) == int(found[0].tokens["train"].sum()) for corpus in found)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
  class Slow(tokenizers.Bytes):
    identity = "slow"

    def encode(self, text):
      write(tmp_path / "a.txt", text + b"more")
      return super().encode(text)

  with pytest.raises(UserError, match=r"a\.txt: was changed while it was read"):
    load(write(tmp_path / "a.txt", "text"), Slow())
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="pipe: is a pipe, which can be read only once"):
    load(tmp_path / "pipe")


def test_skipped_documents_are_reported_at_every_start_and_move_no_other(tmp_path, capfd):
  lines = [json.dumps({"text": chr(65 + i) * 3}) for i in range(40)]
  path = write(tmp_path / "a.jsonl", "\n".join(lines))
  whole = load(path)[0].tokens
  assert capfd.readouterr().err == ""
  lines[3], lines[29] = "{}", '{"text": "'
  write(tmp_path / "a.jsonl", "\n".join(lines))
  for _ in range(2):
    part = load(path)[0].tokens
    report = capfd.readouterr().err
    assert report.count("\n") == 1 and report.startswith(f"evo_jax: {path}: 2 of 40 documents are skipped (")
    assert report.endswith(f"the first: {path}: line 4 has no field 'text'\n")
  without = lambda tokens, letter: [t for document in np.split(tokens, np.flatnonzero(tokens == 0) + 1)
                                    if letter + 1 not in document for t in document]  # fmt: skip
  assert part["train"].tolist() == without(whole["train"], 65 + 3)
  assert part["valid"].tolist() == without(whole["valid"], 65 + 29)
  np.testing.assert_array_equal(part["test"], whole["test"])
  for strict in (load, lambda path, strict: corpora_lib.all_text(path, BYTES, "--data", strict)):
    with pytest.raises(UserError, match="line 4 has no field 'text'"):
      strict(path, strict=True)


def test_weights_go_with_sources(tmp_path):
  write(tmp_path / "a,b.txt", "text " * 9)
  write(tmp_path / "c.txt", "text " * 9)
  path = f"{tmp_path}/a,b.txt,{tmp_path}/c.txt,"
  assert len(load(path, weights=(1.0, 2.0))) == 2
  with pytest.raises(
    UserError, match=r"config\.data\.weights: \(1\.0,\) must have one weight for each of data\.path's 2"
  ):
    load(path, weights=(1.0,))


def corpus(count, name="made", first=1):
  tokens = np.arange(first, first + count).astype(np.uint32)
  return corpora_lib.Corpus(name, dict.fromkeys(corpora_lib.SPLITS, tokens), "", begin_id=0, separator_id=0)


def separators(count):
  return corpora_lib.Corpus("made", dict.fromkeys(corpora_lib.SPLITS, np.zeros(count, np.uint32)), "", 0, 0)


def take(stream, count):
  """The tokens of the first batches."""
  return [batch.tokens for batch in take_batches(stream, count)]


def take_batches(stream, count):
  iterator = iter(stream)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def stream(rows=None, corpora=None, start=0, segments=False, **changes):
  config = config_lib.Data(batch_size=8, **changes)
  return batches_lib.training_stream(corpora or [corpus(107)], config, 8, rows, start, segments)


def test_every_position_comes_once_before_any_comes_again():
  batches = np.concatenate(take(stream(), 25))
  assert batches.shape == (200, 9) and (batches[:, 0] == 0).all() and (np.diff(batches[:, 1:], axis=1) == 1).all()
  assert sorted(batches[:100, 1]) == list(range(1, 101)) and sorted(batches[100:, 1]) == list(range(1, 101))
  assert list(batches[:100, 1]) != list(batches[100:, 1])
  assert not np.array_equal(batches, np.concatenate(take(stream(seed=1), 25)))


def test_processes_share_one_order():
  """Whatever rows a process holds."""
  whole = take(stream(), 5)
  for rows in (range(4), range(4, 8), [1, 5, 7]):
    for batch, part in zip(whole, take(stream(rows), 5)):
      np.testing.assert_array_equal(batch[list(rows)], part)


def test_the_stream_goes_on_from_any_batch():
  """On as many processes as there are then: nothing twice, nothing left out."""
  want = take(stream(), 20)
  for rows in (range(8), range(2, 4)):
    for batch, again in zip(want[13:], take(stream(rows, start=13), 7)):
      np.testing.assert_array_equal(batch[list(rows)], again)


def test_sources_are_mixed_by_weight():
  batches = np.concatenate(take(stream(corpora=[corpus(50), corpus(500, first=1000)], weights=(3.0, 1.0)), 50))
  assert abs((batches[:, 1] < 1000).mean() - 0.75) < 0.02
  by_size = np.concatenate(take(stream(corpora=[corpus(50), corpus(500, first=1000)]), 50))
  assert abs((by_size[:, 1] < 1000).mean() - 50 / 550) < 0.02


def test_empty_and_foreign_corpora_are_named():
  with pytest.raises(UserError, match="made: there is no text to train on"):
    stream(corpora=[corpus(50), separators(3)])
  with pytest.raises(UserError, match="made: the valid split has no text"):
    batches_lib.held_out([separators(3)], "valid", 8)
  with pytest.raises(UserError, match="made: token 107 is outside the vocabulary of 100"):
    corpora_lib.check_vocabulary([corpus(107)], 100)


def test_held_out_sequences_are_consecutive():
  batch = batches_lib.held_out([corpus(107)], "valid", 8)
  assert batch.tokens.shape == (13, 9) and (batch.tokens[:, 0] == 0).all()
  assert batch.counted is None and batch.segments is None
  np.testing.assert_array_equal(batch.tokens[:, 1:].reshape(-1), np.arange(1, 105))
  few = batches_lib.held_out([corpus(107)], "valid", 8, 3)
  np.testing.assert_array_equal(few.tokens, batch.rows([0, 6, 12]).tokens)


def special(separator_id):
  """A corpus of a tokenizer whose begin token is 90."""
  tokens = np.array([4, 5, separator_id, 6, separator_id, separator_id, 7, 8], np.uint32)
  return corpora_lib.Corpus("special", dict.fromkeys(corpora_lib.SPLITS, tokens), "", 90, separator_id)


@pytest.mark.parametrize("separator_id", [90, 91])
def test_batches_say_which_document_a_token_belongs_to(separator_id):
  batch = batches_lib.held_out([special(separator_id)], "test", 8, segments=True)
  assert batch.tokens.tolist() == [[90, 4, 5, separator_id, 6, separator_id, separator_id, 7, 8]]
  assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4, 4]] and batch.segments.dtype == np.int32
  (training,) = take_batches(stream(corpora=[special(separator_id)], segments=True), 1)
  np.testing.assert_array_equal(training.segments, np.repeat(batch.segments, 8, axis=0))
  assert training.rows(slice(2)).segments.shape == (2, 9) and training.rows([1]).counted is None


def test_the_tokenizers_separator_stands_after_each_document(tmp_path):
  for i in range(20):
    write(tmp_path / f"{i:02d}.txt", "ab")
  (corpus,) = load(tmp_path / "*.txt", Separated())
  assert corpus.begin_id == 7 and corpus.tokens["train"].tolist() == [98, 99, 1] * 18
  everything = corpora_lib.all_text(str(tmp_path / "0*.txt"), Separated(), "--data")
  assert everything.tokens["test"].tolist() == [98, 99, 1] * 10 and everything.separator_id == 1


def test_a_source_without_text_is_named(tmp_path):
  write(tmp_path / "a.jsonl", '{"text": ""}\n')
  with pytest.raises(UserError, match=r"a\.jsonl: no line has text"):
    load(tmp_path / "a.jsonl")


def test_short_text_is_padded_and_only_its_tokens_count():
  short = corpora_lib.Corpus("short", dict.fromkeys(corpora_lib.SPLITS, np.array([4, 5, 91], np.uint32)), "", 90, 91)
  batch = batches_lib.held_out([short], "test", 8, segments=True)
  assert batch.tokens.tolist() == [[90, 4, 5, 91, 91, 91, 91, 91, 91]]
  assert batch.counted.tolist() == [[True] * 4 + [False] * 5] and batch.segments[0, :4].tolist() == [1, 1, 1, 2]
  both = batches_lib.held_out([short, short], "test", 8)
  assert both.tokens.shape == (2, 9) and both.segments is None
  longer = batches_lib.held_out([short, special(91)], "test", 8)  # a remainder is dropped as ever
  assert longer.counted is None and len(longer.tokens) == 1
  for training in take_batches(stream(corpora=[short, special(91)], weights=(1.0, 1.0)), 3):
    full = training.tokens[:, 3:].max(axis=1) < 91
    np.testing.assert_array_equal(training.counted.sum(axis=1), np.where(full | (training.tokens[:, 4] == 6), 9, 4))
    assert 0 < (training.counted.sum(axis=1) == 4).sum() < 8 and training.counted.shape == (8, 9)


def test_held_out_text_may_be_shorter_than_a_sequence(tmp_path):
  for i in range(25):
    write(tmp_path / f"{i:02d}.txt", f"{i:02d}: twenty-five letters!!"[:25])
  corpora = load(tmp_path / "*.txt")
  (batch,) = take_batches(batches_lib.training_stream(corpora, config_lib.Data(batch_size=2), 128), 1)
  assert batch.tokens.shape == (2, 129) and batch.counted is None
  for split, first in (("valid", "09"), ("test", "19")):
    held_out = batches_lib.held_out(corpora, split, 128)
    assert held_out.tokens.shape == (1, 129) and held_out.counted[:, 1:].sum() == len(corpora[0].tokens[split]) == 26
    assert BYTES.decode(held_out.tokens[0, 1:]).startswith(first)


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
  corpora = [corpora_lib.all_text(write(short_run / "text.txt", text), BYTES, "--data") for text in texts]
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

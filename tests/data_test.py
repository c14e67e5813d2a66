"""Text to batches: readers, splits, order, and one clear line for each kind of bad input."""

import gzip
import json
import lzma

import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.data import batches as batches_lib
from evo_jax.data import corpora as corpora_lib
from evo_jax.data import documents as documents_lib
from evo_jax.data import tokenizers
from evo_jax.errors import UserError

BYTES = tokenizers.Bytes()


def write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def documents(path, binary=True):
  return [text for _, text in documents_lib.read_documents(documents_lib.find_files(str(path), "--data"), binary)]


def test_plain_jsonl_gzip_and_xz_are_read(tmp_path):
  lines = "".join(json.dumps({"text": t, "other": 1}) + "\n" for t in ("one", "two\u2028x"))
  write(tmp_path / "a.txt", "plain é")
  write(tmp_path / "b.jsonl", lines)
  write(tmp_path / "c.txt.gz", gzip.compress(b"zipped"))
  write(tmp_path / "d.jsonl.xz", lzma.compress(lines.encode()))
  assert documents(tmp_path / "*", False) == ["plain é", "one", "two\u2028x", "zipped", "one", "two\u2028x"]
  assert documents(tmp_path / "a.txt") == ["plain é".encode()]


BAD = {
  "empty.txt": (b"", "empty.txt: is empty"),
  "blank.txt": (b" \n\n", "blank.txt: is empty"),
  "cut.txt.gz": (gzip.compress(b"some text " * 100)[:25], "cut.txt.gz: is cut off"),
  "cut.txt.xz": (lzma.compress(b"some text " * 100)[:60], "cut.txt.xz: is cut off"),
  "no.txt.gz": (b"this is no gzip", "no.txt.gz: the compressed data is damaged"),
  "latin.txt": ("é".encode("latin-1") + b" abc", "latin.txt: is not UTF-8 text .byte 0"),
  "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "bad.jsonl: line 2 is not JSON"),
  "field.jsonl": (b'{"text": "a"}\n{"txt": "a"}\n', "field.jsonl: line 2 has no field 'text'"),
  "type.jsonl": (b'{"text": 3}\n', "type.jsonl: line 1: field 'text' is not a string"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_files_are_named(tmp_path, name):
  content, message = BAD[name]
  write(tmp_path / name, content)
  with pytest.raises(UserError, match=message):
    documents(tmp_path / name, binary=False)


def test_no_match_is_named(tmp_path):
  with pytest.raises(UserError, match=r"config\.data\.path: no file matches"):
    corpora_lib.load_corpora(str(tmp_path / "*.none"), BYTES)


def test_many_documents_are_split_by_number_few_by_place(tmp_path):
  for i in range(40):
    write(tmp_path / f"{i:02d}.txt", chr(65 + i) * 50)
  many = corpora_lib.load_corpora(str(tmp_path / "*.txt"), BYTES)[0].tokens
  letters = lambda split: {chr(t - 1) for t in np.unique(many[split]) if t}
  assert letters("valid") == {chr(65 + 9), chr(65 + 29)} and letters("test") == {chr(65 + 19), chr(65 + 39)}
  assert len(letters("train")) == 36
  write(tmp_path / "one.text", bytes(range(100)) * 10)
  few = corpora_lib.load_corpora(str(tmp_path / "one.text"), BYTES)[0].tokens
  assert [len(few[s]) - 1 for s in corpora_lib.SPLITS] == [900, 50, 50]
  assert few["valid"][0] == 1 and few["test"][0] == 51  # byte 0, byte 50


def test_tokens_are_cached_and_mapped(tmp_path):
  path = write(tmp_path / "a.txt", "some text " * 100)
  first, second = corpora_lib.load_corpora(path, BYTES)[0], corpora_lib.load_corpora(path, BYTES)[0]
  assert isinstance(second.tokens["train"], np.memmap) and first.fingerprint == second.fingerprint
  write(tmp_path / "a.txt", "other text " * 100)
  assert corpora_lib.load_corpora(path, BYTES)[0].fingerprint != first.fingerprint


def corpus(count, name="made", first=1):
  tokens = np.arange(first, first + count).astype(np.uint32)
  return corpora_lib.Corpus(name, dict.fromkeys(corpora_lib.SPLITS, tokens), "", begin_id=0, separator_id=0)


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


def test_short_and_foreign_corpora_are_named():
  with pytest.raises(UserError, match=r"made: 5 training tokens are fewer than one sequence \(config\.model\.context"):
    stream(corpora=[corpus(5)])
  with pytest.raises(UserError, match="valid split is shorter than one sequence"):
    batches_lib.held_out([corpus(5)], "valid", 8)
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
  class Separated(tokenizers.Bytes):
    identity = "separated"
    begin_id, separator_id = 7, 1

  for i in range(20):
    write(tmp_path / f"{i:02d}.txt", "ab")
  (corpus,) = corpora_lib.load_corpora(str(tmp_path / "*.txt"), Separated())
  assert corpus.begin_id == 7 and corpus.tokens["train"].tolist() == [98, 99, 1] * 18
  everything = corpora_lib.all_text(str(tmp_path / "0*.txt"), Separated(), "--data")
  assert everything.tokens["test"].tolist() == [98, 99, 1] * 10 and everything.separator_id == 1


def test_a_source_without_text_is_named(tmp_path):
  write(tmp_path / "a.jsonl", '{"text": ""}\n')
  with pytest.raises(UserError, match=r"a\.jsonl: no line has text"):
    corpora_lib.load_corpora(str(tmp_path / "a.jsonl"), BYTES)

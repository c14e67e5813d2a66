"""Tokenizers: round trips, units, and the trained one."""

import io
import itertools

from conftest import assert_refused, call
import numpy as np
import pytest
import sentencepiece

from evo_jax.data import tokenizers
from evo_jax.errors import UserError


def test_bytes_round_trip():
  tokenizer = tokenizers.Bytes()
  text = "héllo\n\x00 世界"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text and ids.min() >= 1
  assert tokenizer.lengths()[ids].sum() == len(text.encode())


def test_chars27_is_text8s():
  tokenizer = tokenizers.Chars27()
  ids = tokenizer.encode("Hello,  World! 42 naïve\n")
  assert tokenizer.decode(ids) == "hello world na ve "
  assert tokenizer.decode(tokenizer.encode("...a")) == " a"
  assert tokenizer.lengths()[ids].sum() == len(ids)


def test_text_ends_at_an_end_id():
  for tokenizer in (tokenizers.Bytes(), tokenizers.Chars27()):
    (end,) = tokenizer.end_ids
    ids = np.concatenate([tokenizer.encode("ab"), [end], tokenizer.encode("cd")])
    assert tokenizer.decode(ids) == "ab"


def test_a_tokenizer_may_have_several_special_ids():
  class Lines(tokenizers.Bytes):
    """Bytes of which a zero byte separates documents and a newline or a carriage return ends a text."""

    separator_id = 1
    end_ids = (11, 14)
    turn_end_ids = (14,)

  tokenizer = Lines()
  assert tokenizers.special_ids(tokenizer) == [0, 1, 11, 14]
  assert tokenizer.decode(tokenizer.encode("ab\ncd")) == tokenizer.decode(tokenizer.encode("ab\rcd")) == "ab"
  assert list(np.flatnonzero(tokenizer.lengths() == 0)) == [0, 1, 11, 14]


def test_tokens_outside_the_vocabulary_are_named():
  with pytest.raises(UserError, match="token 300 is outside the vocabulary of 257"):
    tokenizers.Bytes().decode(np.array([1, 300]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
  folder = tmp_path_factory.mktemp("spm")
  done = call("evo_jax.tokenizer", f"--input={text}", "--vocab_size=290", f"--output={folder}")
  assert done.returncode == 0 and "290 pieces" in done.stdout, done.stderr
  return tokenizers.SentencePiece(str(folder))


def test_sentencepiece_keeps_text_as_it_is(trained):
  for text in ("the river  runs\n\n and time", "  leads", "ünknown 世界 42"):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.lengths()[ids].sum() == len(text.encode())
    assert ids.min() > 0
  assert list(np.flatnonzero(trained.lengths() == 0)) == tokenizers.special_ids(trained) == [0, 1]  # <doc>, <unk>
  assert trained.vocab_size == 290 and len(trained.encode("the river runs")) < 8


def random_text(rng, length):
  """Unicode of all kinds: controls, spaces, combining and private characters, and those that SentencePiece uses."""
  ranges = [
    (0, 0x20),
    (0x20, 0x7F),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x2000, 0x2070),
    (0x2580, 0x2590),
    (0xE000, 0x110000),
  ]
  low, high = np.array(ranges)[rng.integers(len(ranges), size=length)].T
  return "".join(map(chr, rng.integers(low, high)))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "chars27"])
def test_lengths_add_up_to_the_texts_and_text_comes_back(trained, kind):
  tokenizer = trained if kind == "sentencepiece" else tokenizers.load_tokenizer(kind)
  rng, lengths = np.random.default_rng(0), tokenizer.lengths()
  texts = [
    "\u2581",
    "a\u2581 \u2581the",
    "\u2581" * 5,
    "",
    "\x00\r\n\t\x7f\u2028",
    "e\u0301<doc><unk><0x41>\u2047\ufffd\ufeff",
  ]
  texts += [chr(c) for c in range(0x3100) if not 0xD800 <= c < 0xE000] + [random_text(rng, 40) for _ in range(300)]
  for text in texts:
    ids = tokenizer.encode(text)
    if kind == "chars27":
      assert lengths[ids].sum() == len(ids) == len(tokenizer.decode(ids)), ascii(text)
    else:
      assert lengths[ids].sum() == len(text.encode()) and tokenizer.decode(ids) == text, ascii(text)
      assert not set(tokenizers.special_ids(tokenizer)) & set(ids.tolist())


def test_broken_bytes_decode_to_replacements(trained):
  ids = trained.encode("\u2581é")
  assert trained.decode(ids[:2]) == "\ufffd\ufffd" and trained.decode(ids[3:4]) == "\ufffd"


def test_a_text_of_one_line_is_trained_on(tmp_path):
  """As text8 is."""
  line = " ".join("".join(word) for word in itertools.permutations("abcdefgh"[:7])) * 2
  assert len(line) > 1 << 16
  (tmp_path / "one.txt").write_text(line)
  done = call("evo_jax.tokenizer", f"--input={tmp_path}/one.txt", "--vocab_size=290", f"--output={tmp_path}")
  assert done.returncode == 0 and "290 pieces" in done.stdout, done.stderr


@pytest.mark.parametrize(
  "text, count",
  [("word " * 30_000, 3), ("世" * 60_000, 3), ("x" * 200_000, 4), ("é" + "x" * 65_535, 2), ("x" * 65_536, 1)],
)
def test_long_lines_are_cut_at_spaces_or_else_between_characters(text, count):
  parts = list(tokenizers.training_lines(text))
  assert "".join(parts) == text.rstrip("\n") and len(parts) == count
  assert all(len(part.encode()) <= 65_536 for part in parts)
  assert " " not in text or all(part.startswith(" ") for part in parts[1:])


def test_lines_are_cut_at_characters_of_the_trainers_own():
  assert list(tokenizers.training_lines("a\u2581b\x00c\u2585 \n\n  d\u2028e")) == ["a", "b", "c", "  d", "e"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--input=FOLDER/none*", "--output=FOLDER"), "--input: no file matches"),
    (("--input=TEXT", "--vocab_size=100000", "--output=FOLDER"), "--vocab_size=100000: Vocabulary size too high"),
    (("--input=TEXT", "--vocab_size=9", "--output=FOLDER"), "--vocab_size=9: is too small: the text's characters and"),
    (("--input=TEXT", "--vocab_size=0", "--output=FOLDER"), "--vocab_size=0: is not in 1..2147483647"),
    (("--input=TEXT", "--vocab_size=-5", "--output=FOLDER"), "--vocab_size=-5: is not in 1..2147483647"),
    (("--input=TEXT", "--vocab_size=2147483648", "--output=FOLDER"), "--vocab_size=2147483648: is not in"),
    (("--input=TEXT", "--vocab_size=x", "--output=FOLDER"), "flag --vocab_size=x"),
    (("--input=TEXT",), "--input and --output are needed"),
    (("--input=TEXT", "--output=FILE"), "FILE: cannot be written: File exists"),
    (("--input=TEXT", "--output=FILE/below"), "FILE/below: cannot be written: Not a directory"),
    (("--input=FILE", "--output=FOLDER"), "a.jsonl: line 1 has no field 'text'"),
    (("--input=TEXT,FOLDER/bad.jsonl", "--strict", "--output=FOLDER"), "bad.jsonl: line 20 is not JSON"),
    (("--input=FOLDER/controls.txt", "--output=FOLDER"), "--vocab_size=8000: the text is empty"),
  ],
)
def test_bad_input_is_one_line(tmp_path, text, flags, message):
  (tmp_path / "a.jsonl").write_text('{"txt": 1}')
  (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 19 + '{"text":')
  (tmp_path / "controls.txt").write_text("\0" * 9)
  names = {"TEXT": str(text), "FOLDER": str(tmp_path), "FILE": str(tmp_path / "a.jsonl")}
  for name, value in names.items():
    flags, message = [flag.replace(name, value) for flag in flags], message.replace(name, value)
  assert_refused(call("evo_jax.tokenizer", *flags), message)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bad.jsonl", "controls.txt"]


def test_skipped_documents_are_reported(tmp_path, text):
  (tmp_path / "bad.jsonl").write_text('{"text": "the river runs"}\n' * 19 + '{"text":')
  flags = (f"--input={text},{tmp_path}/bad.jsonl", "--vocab_size=290", f"--output={tmp_path}/model")
  done = call("evo_jax.tokenizer", *flags)
  assert done.returncode == 0 and done.stderr.count("\n") == 1 and "1 of 20 documents are skipped" in done.stderr
  assert [path.name for path in (tmp_path / "model").iterdir()] == ["tokenizer.model"]


def foreign(**changes):
  """A model with other settings than those of `train_sentencepiece`."""
  model = io.BytesIO()
  settings = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
  settings |= dict(add_dummy_prefix=False, user_defined_symbols=["\n"], bos_id=0, unk_id=1, eos_id=-1)
  lines = iter([f"the river {a} runs {b}" for a in "abcdefgh" for b in "ijklmnop"])
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=lines,
    model_writer=model,
    vocab_size=300,
    hard_vocab_limit=False,
    minloglevel=2,
    **settings | changes,
  )
  return model.getvalue()


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: b"", "is not a SentencePiece model"),
    (lambda: b"nonsense", "is not a SentencePiece model"),
    (lambda: foreign()[:-9], "is not a SentencePiece model"),
    (lambda: foreign()[: len(foreign()) // 2], "is not a SentencePiece model"),
    (lambda: foreign(bos_id=1, unk_id=0, eos_id=2), "piece 0 is not the special one"),
    (lambda: foreign(byte_fallback=False), "does not keep text as it is"),
    (lambda: foreign(normalization_rule_name="nmt_nfkc"), "does not keep text as it is"),
    (lambda: foreign(add_dummy_prefix=True), "does not keep text as it is"),
    (lambda: foreign(remove_extra_whitespaces=True), "does not keep text as it is"),
  ],
)
def test_models_that_cannot_be_used_are_named(tmp_path, make, message):
  (tmp_path / "tokenizer.model").write_bytes(make())
  with pytest.raises(UserError, match=rf"tokenizer\.model: {message}"):
    tokenizers.load_tokenizer("sentencepiece", str(tmp_path))


def test_a_missing_model_is_named(tmp_path):
  with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read: No such file"):
    tokenizers.load_tokenizer("sentencepiece", str(tmp_path))
  (tmp_path / "tokenizer.model").mkdir()
  with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read: Is a directory"):
    tokenizers.load_tokenizer("sentencepiece", str(tmp_path))

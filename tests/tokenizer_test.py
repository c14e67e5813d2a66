"""Tokenizers: round trips, units, and the trained one."""

from conftest import assert_refused, call
import numpy as np
import pytest

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
  assert list(np.flatnonzero(trained.lengths() == 0)) == tokenizers.special_ids(trained) == [0]
  assert trained.vocab_size == 290 and len(trained.encode("the river runs")) < 8


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--input=FOLDER/none*", "--output=FOLDER"), "no file matches"),
    (("--input=TEXT", "--vocab_size=100000", "--output=FOLDER"), "--vocab_size=100000"),
    (("--input=TEXT",), "--input and --output are needed"),
  ],
)
def test_bad_input_is_one_line(tmp_path, text, flags, message):
  flags = (flag.replace("TEXT", str(text)).replace("FOLDER", str(tmp_path)) for flag in flags)
  assert_refused(call("evo_jax.tokenizer", *flags), message)


def test_models_that_cannot_be_loaded_are_named(tmp_path):
  with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read"):
    tokenizers.load_tokenizer("sentencepiece", str(tmp_path))
  (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
  with pytest.raises(UserError, match="is not a SentencePiece model"):
    tokenizers.load_tokenizer("sentencepiece", str(tmp_path))

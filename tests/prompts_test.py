"""Prompt files and prompts in every encoding, and texts cut at stop strings: tokens always decode to the text."""

import gzip
import itertools
import json
import lzma
import os

import numpy as np
import pytest

from evo_jax.data import tokenizers
from evo_jax.decoding import prompt_files, prompts
from evo_jax.decoding.progress import Progress, Snapshot
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError


def gzipped(content):
  """The same at any time: tests are named after their inputs."""
  return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
  "name, content, expected",
  [
    ("a.txt", "a\nb", ["a", "b"]),
    ("a.txt", "a\r\nb\rc\r\n\r\n", ["a", "b", "c", ""]),
    ("a.txt", "\n", [""]),
    ("a.txt", "a\x0cb\x0bc\x1cd\x85e\u2028f\u2029g\0h\n", ["a\x0cb\x0bc\x1cd\x85e\u2028f\u2029g\0h"]),
    ("a.txt", b"\xef\xbb\xbfabc\n", ["abc"]),
    ("a.txt", b"caf\xe9\nb\n", ["caf\udce9", "b"]),
    ("a.txt.gz", gzipped(b"a\nb\n"), ["a", "b"]),
    ("A.TXT.XZ", lzma.compress(b"a\n"), ["a"]),
    ("a.jsonl", '"a"\r\n\n{"prompt": "b"}\n{"text": "c"}', ["a", "b", "c"]),
    ("A.JSONL", '{"text": "a\u2028b\x85c"}\n', ["a\u2028b\x85c"]),
    ("a.jsonl.gz", gzipped(b'\xef\xbb\xbf"\\ud83d\\ude00"\n'), ["\U0001f600"]),
    ("a.jsonl", '{"text": "a", "n": ' + 5000 * "9" + ', "x": NaN}', ["a"]),
    ("a.txt", "", "has no prompts"),
    ("a.txt", b"\xef\xbb\xbf", "has no prompts"),
    ("a.jsonl", "\n \n", "has no prompts"),
    ("a.txt", "abc\n".encode("utf-16"), "is UTF-16"),
    ("a.txt", "abc\n".encode("utf-32"), "is UTF-16 or UTF-32"),
    ("a.jsonl", b'"a"\n"caf\xe9"\n', "line 2 is not valid Unicode"),
    ("a.jsonl", '"\\ud800"\n', "line 1 is not valid Unicode"),
    ("a.jsonl", '"a"\n\n{"text": 5}', "line 3 is neither a string nor"),
    ("a.jsonl", '{"text": null}', "line 1 is neither"),
    ("a.jsonl", "5", "line 1 is neither"),
    ("a.jsonl", '{"text": "a"', "line 1 is not JSON"),
    ("a.jsonl", 100_000 * "[", "line 1 is not JSON"),
    ("a.txt.gz", b"hello", "is damaged or cut off"),
    ("a.txt.gz", gzipped(1000 * b"ab")[:20], "is damaged or cut off"),
    ("a.xz", lzma.compress(1000 * b"ab")[:40], "is damaged or cut off"),
  ],
  ids=lambda value: repr(value)[:30],
)
def test_prompt_files(tmp_path, name, content, expected):
  file = tmp_path / name
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  if isinstance(expected, list):
    assert prompt_files.read_prompt_files([str(file)]) == expected
    return
  with pytest.raises(UserError) as error:
    prompt_files.read_prompt_files([str(file)])
  assert expected in str(error.value) and f"--prompts={file}: " in str(error.value)


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "c"}


@pytest.mark.parametrize(
  "line, chat, expected",
  [
    ({"messages": [USER, ASSISTANT, USER, ASSISTANT], "text": "d"}, True, "d"),
    ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}, True, [SYSTEM, USER]),
    ({"messages": [USER], "id": 1}, True, [USER]),
    ({"messages": [USER]}, False, "line 2 has messages, which --chat continues"),
    ({"messages": [ASSISTANT, USER]}, True, "line 2 has a conversation that the assistant begins"),
    ({"messages": []}, True, "line 2 has a conversation without messages"),
    ({"messages": [{**USER, "role": "human"}]}, True, "line 2 has a message whose role is none of system, user"),
    ({"messages": [{"role": "user"}]}, True, "line 2 has a message without a string in field 'content'"),
    ({"messages": [{**USER, "content": "\ud800"}]}, True, "line 2 is not valid Unicode"),
    ({"messages": "a"}, True, "a"),
    ({"messages": {}}, True, "line 2 is neither a string nor an object"),
  ],
  ids=lambda value: repr(value)[:30],
)
def test_conversations_are_prompts_up_to_the_first_answer(tmp_path, line, chat, expected):
  file = tmp_path / "a.jsonl"
  file.write_text("\n" + json.dumps(line))
  if isinstance(expected, list) or expected in ("a", "d"):
    assert list(prompt_files.iterate_prompts(str(file), chat)) == [(f"--prompts={file}: line 2", expected)]
  else:
    with pytest.raises(UserError, match=f"--prompts={file}: {expected}"):
      prompt_files.read_prompt_files([str(file)], chat)


def test_prompt_files_have_any_name(tmp_path):
  for name in (b"a,b [c] *.txt", b"caf\xe9 \xff.txt"):
    file = tmp_path / os.fsdecode(name)
    file.write_text("a\n")
    assert prompt_files.read_prompt_files([str(file), str(file)]) == ["a", "a"]
  for name, problem in ((str(tmp_path), "Is a directory"), (str(tmp_path / "no"), "No such file")):
    with pytest.raises(UserError, match=f"--prompts=.*: cannot be read: {problem}"):
      prompt_files.read_prompt_files([name])
  with pytest.raises(UserError, match="standard input can be read only once"):
    prompt_files.read_prompt_files(["-", "-"])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """SentencePiece, with pieces of several characters and characters of several pieces."""
  words = ["the", "river;", "runs", "ends;", "and", "token", "flows", "time", "known"]
  lines = [" ".join(np.random.default_rng(i).permutation(words)) for i in range(100)]
  return tokenizers.train_sentencepiece(lines, 290, str(tmp_path_factory.mktemp("pieces")))


def encode(tokenizer, prompt, max_tokens=4, context=32):
  return prompts.encode(prompt, tokenizer, max_tokens, context)[0]


def test_text_that_is_no_unicode(pieces):
  """A tokenizer of bytes takes the bytes themselves; others, and half a surrogate pair, are refused."""
  raw = tokenizers.Bytes()
  assert (np.array(encode(raw, "caf\udcc3")) - 1).astype(np.uint8).tobytes() == b"caf\xc3"
  assert encode(raw, "caf\udcc3\udca9") == encode(raw, "café")
  for tokenizer, prompt, problem in (
    (raw, "a\ud800", "is not valid Unicode"),
    (pieces, "caf\udcc3", "is not valid UTF-8, which the tokenizer, sentencepiece"),
    (tokenizers.Chars27(), "caf\udcc3", "is not valid UTF-8"),
    (tokenizers.Chars27(), "a\0", "has no '.x00'"),
  ):
    with pytest.raises(UserError, match=problem) as error:
      encode(tokenizer, prompt)
    assert str(error.value).isprintable() and str(error.value).startswith("prompt 'a" if prompt[1] != "a" else "prompt")
  assert prompts.readable("caf\udcc3 \ud800é") == "caf\ufffd \ufffdé"


def test_texts_fill_what_the_context_leaves():
  """Without max_tokens at most 200; a number that was asked for must fit, and there must be room for one token."""
  room = lambda length, max_tokens, context: prompts.encode("a" * length, tokenizers.Bytes(), max_tokens, context)[1]
  assert [
    room(*numbers) for numbers in ((0, None, 1000), (4, None, 128), (31, None, 32), (0, 32, 32), (30, 2, 32))
  ] == [
    200,
    124,
    1,
    32,
    2,
  ]
  for numbers, problem in (
    ((30, 3, 32), "its 30 tokens and 3 more do not fit the context of 32"),
    ((0, 2**63, 32), "do not fit"),
    ((32, None, 32), "its 32 tokens leave no room for another in the context of 32"),
    ((10**6, None, 32), "leave no room"),
  ):
    with pytest.raises(UserError, match=problem):
      room(*numbers)


@pytest.mark.parametrize(
  "text, expected",
  [
    ("[...1]", [1]),
    ("[...2]ab[...]", [2, "a", "b", 3]),
    ("a[...2][...1]b", ["a", 3, "b"]),
    ("[...[...1]]", ["[...", 1, "]"]),
    ("".join(f"{c}[...1]" for c in "abcdefghijklmnop"), [x for c in "abcdefghijklmnop" for x in (c, 1)]),
    ("[...32]", [32]),
    ("[...٣][...1]", ["[...٣]", 1]),
    ("abc", "has no gap to fill"),
    ("", "has no gap"),
    ("[ ... ] […]", "has no gap"),
    ("a[...0]b", r"\[...0\] has no token to fill"),
    ("a[...1]b[...000]", "has no token to fill"),
    ("a[...32]", "do not fit the context of 32"),
    ("a[...31]b", "do not fit"),
    ("[...999999999999]", "do not fit"),
    (f"[...{5000 * '9'}]", "do not fit"),
    (1000 * "[...]", "do not fit"),
    ("\ud800[...]", "is not valid Unicode"),
  ],
  ids=lambda value: repr(value)[:30],
)
def test_gaps(text, expected):
  """A number stands for so many tokens to be filled."""
  tokenize = lambda: prompts.encode_with_gaps(text, tokenizers.Bytes(), 3, 32)
  if isinstance(expected, list):
    ids = ([None] * x if isinstance(x, int) else [byte + 1 for byte in x.encode()] for x in expected)
    assert tokenize() == list(itertools.chain(*ids))
  else:
    with pytest.raises(UserError, match=f"--infill .*{expected}"):
      tokenize()


def first_stop(text, stop):
  """Where a text ends that is read character by character until it ends with a stop string."""
  for end in range(1, len(text) + 1):
    found = [len(string) for string in stop if text[:end].endswith(string)]
    if found:
      return end - max(found)
  return len(text)


SOURCE = "the river; é runs\n世界 ends; \U0001f600 the token é; flows\ufffdand"


@pytest.mark.parametrize("kind", ["bytes", "chars27", "sentencepiece"])
def test_tokens_decode_to_the_text_before_a_stop_string(kind, pieces):
  """Whatever the stop strings are, however a text was committed and how often it was looked at: the text ends where a
  reader would stop, and what was streamed is the text. Half of the texts are cut in the middle of a character, or have
  bytes that are none."""
  tokenizer = {"bytes": tokenizers.Bytes(), "chars27": tokenizers.Chars27(), "sentencepiece": pieces}[kind]
  rng = np.random.default_rng(0)
  stopped = halves = 0
  for trial in range(300):
    tokens = tokenizer.encode(SOURCE).tolist()[rng.integers(20) : rng.integers(20, 80)]
    if trial % 4 == 0:
      tokens[rng.integers(len(tokens))] = int(rng.integers(1, tokenizer.vocab_size))
    whole = tokenizer.decode(np.array(tokens))
    cuts = [sorted(rng.integers(0, len(whole) + 1, 2)) for _ in range(rng.integers(4))]
    stop = tuple(s for a, b in cuts if (s := whole[a:b][: rng.integers(1, 9)])) + ("never" * 9,) * int(rng.integers(2))
    (request,) = prompts.make_requests([""], 1, False, Sampling(), tokenizer, 100)
    progress, streamed = Progress(request, tokenizer, stop), ""
    passes = np.concatenate([[0], np.arange(1, len(tokens) + 1)])
    looks = sorted({*rng.integers(0, len(tokens), rng.integers(1, 9)).tolist(), len(tokens)})
    for n in looks:
      row = Snapshot(np.array([0, *tokens]), np.int32(n + 1), np.bool_(n == len(tokens)), np.int32(n), passes)
      streamed += progress.update(row, 1.0)
      if progress.seconds is not None:
        break
    found = progress.generation(row)
    assert tokenizer.decode(np.array(found.tokens, int)) == found.text == streamed, (stop, whole)
    expected = whole[: first_stop(whole, stop)]
    assert found.text == expected or (
      expected.startswith(found.text) and set(expected[len(found.text) :]) == {"\ufffd"}
    )
    assert len(found.settled) == len(found.tokens) and found.settled == sorted(found.settled)
    stopped, halves = stopped + (expected != whole), halves + (found.text != expected)
  assert stopped > 100 and (halves > 10 or kind == "chars27")


def test_what_ended_a_text_is_told():
  """An end token does, also behind half a character; a stop string, or the length, is none."""
  raw = tokenizers.Bytes()

  def end(tokens, *stop):
    (request,) = prompts.make_requests([""], 1, False, Sampling(), raw, 100)
    progress = Progress(request, raw, stop)
    row = Snapshot(np.array([0, *tokens]), len(tokens) + 1, True, 9, np.arange(len(tokens) + 1))
    progress.update(row, 1.0)
    return progress.generation(row).end_id

  text, (end_id, *_) = [b + 1 for b in b"abc"], raw.end_ids
  assert end([*text, end_id]) == end([*text, 0xC3 + 1, end_id]) == end([end_id]) == end_id
  assert end(text) is None and end([*text, 0xC3 + 1]) is None
  assert end([*text, end_id], "c") is None and end([*text, end_id], "d") == end_id


def test_half_a_character_at_the_end_is_left_out():
  raw = tokenizers.Bytes()

  def written(data, *stop):
    (request,) = prompts.make_requests([""], 1, False, Sampling(), raw, 100)
    row = Snapshot(np.array([0, *(b + 1 for b in data)]), len(data) + 1, True, 9, np.arange(len(data) + 1))
    progress = Progress(request, raw, stop)
    progress.update(row, 1.0)
    found = progress.generation(row)
    assert raw.decode(np.array(found.tokens, int)) == found.text
    return bytes(token - 1 for token in found.tokens)

  assert written("é;é".encode(), ";") == "é".encode()
  assert written("aé".encode()[:2]) == b"a"
  assert written("a\U0001f600".encode()[:4]) == b"a" and written("a\U0001f600".encode()) == "a\U0001f600".encode()
  assert written(b"a\xc3;b", ";") == b"a"
  assert written(b"\xc3") == b"" and written(b"a\xffb") == b"a\xffb" and written(6 * b"\xff") == 6 * b"\xff"
  assert (
    written(b"abcabd", "abd", "bc") == b"a" and written(b"abcd", "bc", "abc") == b"" and written(b"ab", "abc") == b"ab"
  )

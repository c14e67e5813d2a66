"""Readers: which files a pattern means, which formats are read, and what becomes of documents that cannot be used."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import socket
import sys
import tarfile

import pytest

from evo_jax.data import documents as documents_lib
from evo_jax.data import files as files_lib
from evo_jax.errors import UserError


def gzipped(content):
  """The same at any time: tests are named after their inputs."""
  return gzip.compress(content, mtime=0)


def write(path, content=b"some text"):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def names(path, root=None):
  """The sources of a path, as names of files, below `root`."""
  sources = files_lib.find_sources(str(path), "--data")
  return [[os.path.relpath(f, root) if root else os.path.basename(f) for f in files] for _, files in sources]


def read(path, binary=False, strict=False):
  """The documents of a path, and the reports."""
  readers = [
    documents_lib.Reader(name, files, binary, strict) for name, files in files_lib.find_sources(str(path), "--data")
  ]
  return [text for reader in readers for text in reader], [reader.report for reader in readers if reader.report]


LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
  "name, content, texts",
  [
    ("a.txt", "plain é", ["plain é"]),
    ("a.TXT.GZ", gzipped(b"a") + gzipped(b"b"), ["ab"]),  # two members
    ("a", b"no suffix", ["no suffix"]),
    ("notes.md.bz2", bz2.compress(b"a") + bz2.compress(b"b"), ["ab"]),
    ("A.JSONL", LINES, ["one", "two"]),
    ("c4.json.gz", gzipped(LINES), ["one", "two"]),
    ("c4.Json", LINES[:16], ["one"]),
    ("a.ndjson.xz", lzma.compress(LINES), ["one", "two"]),
    ("a.jsonl.lzma", lzma.compress(LINES, lzma.FORMAT_ALONE), ["one", "two"]),
    ("a.jsonl.bz2.gz", gzipped(bz2.compress(LINES)), ["one", "two"]),
    ("crlf.jsonl", LINES.replace(b"\n", b"\r\n"), ["one", "two"]),
    ("cr.jsonl", LINES.replace(b"\n", b"\r"), ["one", "two"]),
    ("blank.jsonl", b"\n  \n" + LINES + b'\n{"text": ""}\n', ["one", "two"]),
    ("separators.jsonl", '{"text": "a\u2028b\u0085c\x0bd"}\n'.replace("\x0b", "\\u000b"), ["a\u2028b\u0085c\x0bd"]),
    ("huge.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b', "x": NaN, "y": 1e999}', ["a"]),
    ("twice.jsonl", b'{"text": "a", "text": "b"}', ["b"]),
    ("mark.txt", codecs.BOM_UTF8 + b"text", ["text"]),
    ("mark.jsonl", codecs.BOM_UTF8 + LINES + codecs.BOM_UTF8 + LINES, ["one", "two"] * 2),
    ("one.txt", b"x", ["x"]),
    ("padded.txt.gz", gzipped(b"text") + bytes(512), ["text"]),  # as tapes and some tools pad
  ],
)
def test_formats_are_recognized_by_name(tmp_path, name, content, texts):
  assert read(write(tmp_path / name, content)) == (texts, [])


def test_zstandard_frames_are_read(tmp_path):
  zstandard = pytest.importorskip("zstandard")
  frame = zstandard.ZstdCompressor().compress(LINES)
  skippable = 0x184D2A50.to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
  assert read(write(tmp_path / "a.jsonl.ZST", frame + skippable + frame)) == (["one", "two"] * 2, [])
  for content, message in ((frame[:-3], "is cut off"), (frame + b"garbage", "damaged"), (b"no frame", "damaged")):
    with pytest.raises(UserError, match=f"b.jsonl.zst: .*{message}"):
      read(write(tmp_path / "b.jsonl.zst", content))


def test_a_missing_library_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "zstandard", None)
  with pytest.raises(UserError, match=r"a\.txt\.zst: needs zstandard: pip install 'evo_jax\[zstd\]'"):
    names(write(tmp_path / "a.txt.zst"))


def tarred(name):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as archive:
    archive.add(__file__, name)
  return stream.getvalue()


BAD = {
  "empty.txt": (b"", "is empty"),
  "blank.txt": (b" \n\n", "is empty"),
  "empty.txt.gz": (b"", "is empty"),
  "mark.txt": (codecs.BOM_UTF8, "is empty"),
  "blank.jsonl": (b"\n\n", "is empty"),
  "none.jsonl": (b'{"text": ""}\n', "no line has text"),
  "cut.txt.gz": (gzipped(b"some text " * 100)[:25], "is cut off"),
  "cut.txt.xz": (lzma.compress(b"some text " * 100)[:60], "is cut off"),
  "cut.txt.bz2": (bz2.compress(b"some text " * 100)[:40], "is cut off"),
  "no.txt.gz": (b"this is no gzip", "the compressed data is damaged"),
  "no.txt.xz": (b"this is no xz", "the compressed data is damaged"),
  "no.txt.bz2": (b"this is no bzip2", "the compressed data is damaged"),
  "garbage.txt.gz": (gzipped(b"text") + b"garbage", "the compressed data is damaged"),
  "latin.txt": ("é".encode("latin-1") + b" abc", r"is not UTF-8 text \(byte 0\)"),
  "utf16.txt": ("text".encode("utf-16"), "is UTF-16 text"),
  "utf32.txt": ("text".encode("utf-32"), "is UTF-32 text"),
  "utf16.jsonl": (LINES.decode().encode("utf-16"), "is UTF-16 text"),
  "array.json": (b'[{"text": "a"}]', "is one JSON value"),
  "pretty.json": (b'{\n  "text": "a"\n}\n', "is one JSON value"),
  "number.json": (b"3\n4\n", "is one JSON value"),
  "cut.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
  "field.jsonl": (b'{"text": "a"}\n{"txt": "a"}\n', "line 2 has no field 'text'"),
  "array.jsonl": (b'{"text": "a"}\n["text"]\n', "line 2 has no field 'text'"),
  "type.jsonl": (b'{"text": 3}\n', "line 1 has no string in field 'text'"),
  "null.jsonl": (b'{"text": null}\n', "line 1 has no string in field 'text'"),
  "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1 has a field 'text' that is not valid Unicode"),
  "latin.jsonl": (b'{"text": "\xe9"}\n', "line 1 is not UTF-8 text"),
  "deep.jsonl": (b"[" * 200_000 + b"\n", "line 1 is JSON that is nested too deeply"),
  "a.zip": (b"any", r"\.zip files cannot be read"),
  "a.tar.gz": (b"any", r"\.tar files cannot be read"),
  "A.PARQUET": (b"any", r"\.parquet files cannot be read"),
  "gzip.txt": (gzipped(b"text"), r"is not text, but holds gzip data \(name it \.gz\)"),
  "twice.txt.gz": (gzipped(gzipped(b"text")), "holds gzip data"),
  "xz.txt": (lzma.compress(b"text"), "holds xz data"),
  "bz2.jsonl": (bz2.compress(b"text"), "holds bzip2 data"),
  "zstd.txt": (b"\x28\xb5\x2f\xfd and more", "holds zstd data"),
  "zip.txt": (b"PK\x03\x04 and more", "holds a zip archive"),
  "tar.gz": (gzipped(tarred("a")), "holds a tar archive"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_files_are_named(tmp_path, name):
  content, message = BAD[name]
  with pytest.raises(UserError, match=f"{name}: .*{message}") as raised:
    read(write(tmp_path / name, content), binary=name in ("gzip.txt", "xz.txt", "utf16.txt"))
  assert "\n" not in str(raised.value)


def test_bytes_need_not_be_text(tmp_path):
  assert read(write(tmp_path / "a.bin", b"\xff\x00\xe9"), binary=True) == ([b"\xff\x00\xe9"], [])
  assert read(write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"\xe9"), binary=True) == ([b"\xe9"], [])


def test_bad_documents_are_skipped_counted_and_keep_their_place(tmp_path):
  lines = [json.dumps({"text": str(i)}).encode() for i in range(60)]
  lines[7], lines[30], lines[59] = b'{"txt": 1}', b'{"text": null, "txt": 1}', b'{"text": "cut'
  write(tmp_path / "a.jsonl", b"\n".join(lines))
  write(tmp_path / "b.txt", b"")
  write(tmp_path / "c.txt", b"c")
  texts, (report,) = read(tmp_path / "*")
  assert [i for i, text in enumerate(texts) if text is None] == [7, 30, 59, 60] and texts[8] == "8" and len(texts) == 62
  assert "4 of 62 documents are skipped (" in report and "has no field 'text': 1" in report and "is empty: 1" in report
  assert report.endswith("; the first: " + str(tmp_path / "a.jsonl") + ": line 8 has no field 'text'")
  with pytest.raises(UserError, match=r"a\.jsonl: line 8 has no field 'text'$"):
    read(tmp_path / "*", strict=True)


@pytest.mark.parametrize("bad, problem", [(3, "has no field 'text'"), (2, None)])
def test_a_source_with_too_many_bad_documents_is_refused(tmp_path, bad, problem):
  write(tmp_path / "a.jsonl", b'{"text": "a"}\n' * (20 - bad) + b"{}\n" * bad)
  if problem:
    with pytest.raises(UserError, match=rf"a\.jsonl: 3 of 20 documents cannot be used \({problem}: 3\); the first: "):
      read(tmp_path / "a.jsonl")
  else:
    assert "2 of 20 documents are skipped" in read(tmp_path / "a.jsonl")[1][0]


def test_empty_files_are_no_sign_of_another_kind(tmp_path):
  for i in range(5):
    write(tmp_path / f"{i}/__init__.py", b"")
    write(tmp_path / f"{i}/a.py", b"a")
  texts, (report,) = read(tmp_path / "**/*.py")
  assert texts == [None, "a"] * 5 and "5 of 10 documents are skipped (is empty: 5)" in report
  with pytest.raises(UserError, match="5 of 5 documents cannot be used"):
    read(tmp_path / "*/__init__.py")


ODD = [
  "a[1].txt",
  "a[!b].txt",
  "x,y.txt",
  "x, y,z.txt",
  " spaces .txt",
  "new\nline.txt",
  "star*.txt",
  "what?.txt",
  "ü.txt",
]


@pytest.mark.parametrize("name", [*ODD, os.fsdecode(b"\xff.txt")])
def test_an_existing_file_is_meant_as_it_stands(tmp_path, name):
  write(tmp_path / name, b"")
  write(tmp_path / "a1.txt")
  write(tmp_path / "starry.txt")
  assert names(tmp_path / name) == [[name]]
  assert names(f"{tmp_path / name} , {tmp_path}/a1.txt,") == [[name], ["a1.txt"]]
  with pytest.raises(UserError, match="is empty") as raised:
    read(tmp_path / name)
  assert str(raised.value).isprintable()


def test_globs_find_what_a_shell_finds(tmp_path, monkeypatch):
  for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/.hidden.txt", ".git/f.txt", "v [2]/g.txt", "p,q/h.txt", "b/i.md"):
    write(tmp_path / name)
  monkeypatch.chdir(tmp_path)
  found = lambda pattern: names(pattern, ".")
  assert found("*.txt") == [["a.txt"]]
  assert found("**/*.txt") == [["a.txt", "b/c.txt", "b/d/e.txt", "p,q/h.txt", "v [2]/g.txt"]]
  assert found("./b/**/*.txt, b/**") == [["b/c.txt", "b/d/e.txt"], ["b/i.md"]]  # each file once
  assert found("b/.hid*,**/d/**/e.*,b//c.txt") == [["b/.hidden.txt"], ["b/d/e.txt"], ["b/c.txt"]]
  assert found("v [2]/*.txt,p?q/*,[ab].txt") == [["v [2]/g.txt"], ["p,q/h.txt"], ["a.txt"]]
  assert found(f"{tmp_path}/[!a]/[a-z].txt") == [["b/c.txt"]]
  monkeypatch.setenv("HOME", str(tmp_path))
  assert found("~/b/*.txt") == [["b/c.txt"]]
  stdlib, other = files_lib.find_sources("stdlib,*.txt", "--data")
  assert len(stdlib[1]) > 100 and len(other[1]) == 1


def test_each_file_counts_once_and_links_end(tmp_path):
  write(tmp_path / "d/a.txt", b"a")
  write(tmp_path / "elsewhere/b.txt", b"b")
  for name, target in (("self", "."), ("again", "."), ("up/and", "../.."), ("linked", "../elsewhere")):
    (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "d" / name).symlink_to(target)
  (tmp_path / "d/z.txt").symlink_to("a.txt")
  os.link(tmp_path / "d/a.txt", tmp_path / "d/hard.txt")
  assert read(tmp_path / "d/**/*.txt") == (["a", "b"], [])
  assert read(f"{tmp_path}/d/*.txt,{tmp_path}/elsewhere/*") == (["a", "b"], [])
  with pytest.raises(UserError, match=r"--data: every file of '.*/d/\*\*/z\.txt' is in a source before it"):
    read(f"{tmp_path}/d/*.txt,{tmp_path}/d/**/z.txt")


def test_what_is_no_file_is_named_or_left_out(tmp_path):
  folder = tmp_path / "d"
  write(folder / "a.txt", b"a")
  write(folder / "folder.txt/b", b"b")
  os.mkfifo(folder / "pipe.txt")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(folder / "socket.txt"))
  assert names(folder / "*.txt") == [["a.txt"]]
  for name, message in (
    ("folder.txt", "is a folder; give the files in it, as in '.*txt'"),
    ("socket.txt", "is neither a file nor a pipe"),
    ("none*", "no file matches"),
    ("a.txt/*", "no file matches"),
    ("none/a.txt", "no file matches"),
  ):
    with pytest.raises(UserError, match=rf"--data: .*{message}"):
      names(folder / name)
  for pattern in ("", " , "):
    with pytest.raises(UserError, match="--data: is empty"):
      names(pattern)
  (folder / "dangling.txt").symlink_to("none")
  for pattern in ("*.txt", "dangling.txt"):
    with pytest.raises(UserError, match=r"dangling\.txt: cannot be read \(it is a link\): No such file"):
      names(folder / pattern)


def test_a_file_that_vanishes_is_named(tmp_path):
  write(tmp_path / "a.txt")
  ((name, files),) = files_lib.find_sources(str(tmp_path / "*"), "--data")
  os.remove(tmp_path / "a.txt")
  with pytest.raises(UserError, match=r"a\.txt: cannot be read: No such file"):
    list(documents_lib.Reader(name, files, binary=True))

"""Preparation: the same shards whoever makes them and however often; what is held out, and what is left out."""

import bz2
import gzip
import inspect
import json
import lzma
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

from conftest import ROOT, assert_refused, call, environment
import fsspec
import numpy as np
import pytest

from evo_jax.data import blocks, encoding, json_lines, plan, preparation, shards, tokenizers
from evo_jax.data.chat import ChatTemplate
from evo_jax.data.storage import Folder
from evo_jax.errors import UserError

BYTES = tokenizers.Bytes()


@pytest.fixture
def small(monkeypatch):
  """Limits for a few kilobytes of text, so that it has several groups and pieces, and long documents."""
  shrink(monkeypatch.setattr)


def shrink(put):
  put(blocks, "SIZE", 2_000)
  put(blocks, "LONGEST_LINE", 6_000)
  put(encoding, "PART", 1_500)
  put(plan, "GROUP", 12_000)
  put(preparation, "PIECE", 10_000)


def prepare(output, input, workers=1, hosts=1, host=0, tokenizer=BYTES, **fields):
  job = plan.Job(str(input), **{name: str(v) if name in ("valid", "test") else v for name, v in fields.items()})
  return preparation.prepare(job, tokenizer, "bytes", str(output), workers, hosts, host)


def texts(output, manifest, split, source=None, tokenizer=BYTES):
  """The documents of a split, of one source or all."""
  found = []
  for i, one in enumerate(manifest.sources):
    if source in (None, i):
      stream = shards.open_stream(str(output), manifest, one, split)
      tokens = stream.read(0, stream.length)
      ends = np.flatnonzero(tokens == manifest.separator_id)
      found += [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
  return found


def content(folder):
  """Everything in a folder, by name."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


def words(count, seed=0):
  rng = random.Random(seed)
  return " ".join(rng.choice(["the", "flow", "é", "token\n", "river", "\U0001f600", "  at"]) for _ in range(count))


def lines(some):
  return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(some)).encode()


@pytest.fixture
def corpus(tmp_path):
  """Several kinds of files, short and long documents, copies and bad ones; 2 sources."""
  folder = tmp_path / "text"
  folder.mkdir()
  for i in range(3):
    (folder / f"{i}.jsonl").write_bytes(lines(words(30 + 5 * j, seed=100 * i + j % 50) for j in range(60)))
  (folder / "3.jsonl.gz").write_bytes(gzip.compress(lines(words(50, seed=j) for j in range(40)) + b"{}\nnot JSON\n"))
  (folder / "4.jsonl").write_bytes(lines([words(4000, seed=1), "short", words(5000, seed=2), words(4000, seed=1)]))
  for i, size in enumerate((10, 3000, 5000, 10)):
    (folder / f"{i}.txt").write_text(words(size, seed=i))
  (folder / "4.txt").write_bytes(words(1000).encode() + b"\xff")
  (folder / "5.txt").write_bytes(b"")
  return f"{folder}/*.jsonl*,{folder}/*.txt"


def together(*jobs):
  """Runs hosts side by side, as those wait for each other that compare documents."""
  threads = [threading.Thread(target=job) for job in jobs]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)


@pytest.mark.parametrize("deduplicate", [False, True])
def test_shards_do_not_depend_on_processes_or_hosts(tmp_path, corpus, small, deduplicate):
  fields = dict(deduplicate=deduplicate, max_skipped=0.3)
  one = prepare(tmp_path / "1", corpus, **fields)
  expected = content(tmp_path / "1")
  assert sum(name.endswith(".train") for name in expected) > 8 and not any(".work" in name for name in expected)
  if not deduplicate:
    prepare(tmp_path / "2", corpus, workers=2, **fields)
    assert content(tmp_path / "2") == expected
  for hosts in (2, 3):
    made = {}

    def host(i, hosts=hosts, made=made):
      made[i] = prepare(tmp_path / f"of{hosts}", corpus, hosts=hosts, host=i, **fields)

    together(*(lambda i=i: host(i) for i in range(hosts)))
    assert content(tmp_path / f"of{hosts}") == expected
    assert any(made.values())
  assert prepare(tmp_path / "1", corpus, **fields) == one and content(tmp_path / "1") == expected


def test_a_host_that_is_done_waits_for_nobody(tmp_path, corpus, small):
  assert prepare(tmp_path / "a", corpus, hosts=2, host=0, max_skipped=0.3) is None
  assert not (tmp_path / "a" / "manifest.json").exists()
  assert prepare(tmp_path / "a", corpus, hosts=2, host=1, max_skipped=0.3) is not None


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from evo_jax.data import blocks, encoding, plan, preparation, tokenizers
{shrink}
if __name__ == "__main__":
  shrink(setattr)
  job = plan.Job({corpus!r}, max_skipped=0.3, deduplicate=True)
  wait = lambda done, total: time.sleep(0.02)
  preparation.prepare(job, tokenizers.Bytes(), "bytes", {output!r}, workers=2, progress=wait)
"""


def test_it_goes_on_after_a_kill(tmp_path, corpus, small):
  """Killed while it looks for copies, and again while it writes shards."""
  output = tmp_path / "killed"
  script = tmp_path / "slow.py"
  script.write_text(SLOW.format(root=ROOT, shrink=inspect.getsource(shrink), corpus=corpus, output=str(output)))
  for pattern, count in ((".work/hashes/*.json", 2), (".work/*-????.json", 3)):
    process = subprocess.Popen([sys.executable, str(script)], env=environment())
    deadline = time.monotonic() + 60
    while len(found := sorted(output.glob(pattern))) < count and time.monotonic() < deadline:
      time.sleep(0.01)
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(child) for task in tasks for child in task.read_text().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.json").exists() and workers and len(found) >= count
  shard_times = lambda: [(output / p.name.replace(".json", ".train")).stat().st_mtime_ns for p in found]
  kept = shard_times()
  (output / ".000-00000-0000.train.0123456789abcdef0123456789abcdef").write_bytes(b"half of a shard")
  prepare(output, corpus, max_skipped=0.3, deduplicate=True)
  prepare(tmp_path / "undisturbed", corpus, max_skipped=0.3, deduplicate=True)
  assert content(output) == content(tmp_path / "undisturbed") and shard_times() == kept
  deadline = time.monotonic() + 10
  while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


@pytest.mark.parametrize("change", ["order", "more"])
def test_copies_are_looked_for_again_where_files_have_changed(tmp_path, small, monkeypatch, change):
  """After an interruption behind the search."""
  documents = [json.dumps({"text": f"document {i % 150} " * 12}) + "\n" for i in range(200)]
  file, output = tmp_path / "in" / "b.jsonl", tmp_path / "o"
  file.parent.mkdir()
  file.write_text("".join(documents))
  with monkeypatch.context() as patch:
    patch.setattr(preparation, "_prepare_group", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
      prepare(output, file.parent / "*", deduplicate=True)
  if change == "order":
    file.write_text("".join(documents[::-1]))
  else:
    (file.parent / "a.jsonl").write_text("".join(documents[40:60]))
  manifest = prepare(output, file.parent / "*", deduplicate=True)
  again = prepare(tmp_path / "again", file.parent / "*", deduplicate=True)
  assert manifest.fingerprint == again.fingerprint and manifest.sources[0].duplicates == 50 + 20 * (change == "more")


def test_files_that_were_written_anew_are_told_of(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("the answer is 41, surely")
  first = prepare(tmp_path / "o", tmp_path / "a.txt")
  assert prepare(tmp_path / "o", tmp_path / "a.txt") == first and not capsys.readouterr().err
  (tmp_path / "a.txt").write_text("the answer is 42, surely")
  os.utime(tmp_path / "a.txt", ns=(1, 1))
  prepare(tmp_path / "o", tmp_path / "a.txt")
  assert "a.txt: files were written anew, of the same sizes, since" in capsys.readouterr().err


def test_what_lies_in_the_output_is_no_input(tmp_path):
  (tmp_path / "a.txt").write_text("a" * 100)
  with pytest.raises(UserError, match="was begun"):
    for share in (0.1, 0.1, 0.2):
      manifest = prepare(tmp_path / "o", tmp_path / "**/*", valid_share=share)
      assert manifest.sources[0].files == 1
  with pytest.raises(UserError, match="--input: all files of .* are in --output="):
    prepare(tmp_path / "o", tmp_path / "o/*")


def test_ctrl_c_is_one_line(tmp_path):
  with open(tmp_path / "a.txt", "wb") as file:
    file.truncate(10**9)  # takes no space, and long enough
  command = [
    sys.executable,
    "-m",
    "evo_jax.prepare",
    f"--input={tmp_path}/a.txt",
    f"--output={tmp_path}/o",
    "--workers=2",
  ]
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  while not (tmp_path / "o/.work/flags.json").exists() and process.poll() is None:
    time.sleep(0.01)
  time.sleep(0.3)
  os.killpg(process.pid, signal.SIGINT)
  assert process.communicate(timeout=60)[1] == (
    "evo_jax: interrupted; what is complete is kept, and the same command goes on\n"
  )
  assert process.returncode == 1


def test_files_that_change_are_prepared_again(tmp_path, small):
  file = tmp_path / "a.jsonl"
  file.write_bytes(lines(["a" * 3000] * 20 + ["end"]))
  (tmp_path / "b.jsonl").write_bytes(lines(["b" * 3000] * 20) + b"[")
  input = tmp_path / "*.jsonl"
  with pytest.raises(UserError, match=r"b\.jsonl: line 21 is not JSON"):
    prepare(tmp_path / "o", input, max_skipped=0, valid_share=0, test_share=0)
  file.write_bytes(lines(["c" * 3000] * 20 + ["END"]))
  (tmp_path / "b.jsonl").write_bytes(lines(["b" * 3000] * 21))
  manifest = prepare(tmp_path / "o", input, max_skipped=0, valid_share=0, test_share=0)
  assert texts(tmp_path / "o", manifest, "train") == ["c" * 3000] * 20 + ["END"] + ["b" * 3000] * 21
  with pytest.raises(UserError, match="was begun with --test_share=0, not 0.5"):
    prepare(tmp_path / "o", input, valid_share=0, test_share=0.5)
  file.write_bytes(lines(["d"]))
  with pytest.raises(UserError, match="holds the tokens of other files"):
    prepare(tmp_path / "o", input, valid_share=0, test_share=0)


def test_a_shard_of_another_data_set_is_no_part_of_this_one(tmp_path):
  """Of a file of the same name and size."""
  file, manifests = tmp_path / "a.txt", {}
  for letter in "ab":
    file.write_text(letter * 5000)
    manifests[letter] = prepare(tmp_path / letter, file)
  shutil.copy(tmp_path / "b" / "000-00000-0000.train", tmp_path / "a")
  assert texts(tmp_path / "b", manifests["b"], "train") == ["b" * 4500]
  assert texts(tmp_path / "a", manifests["a"], "valid") == ["a" * 250]
  with pytest.raises(UserError, match="0000.train: record 0 is damaged: .* belongs to another data set"):
    texts(tmp_path / "a", manifests["a"], "train")


def test_an_older_format_is_refused(tmp_path, small):
  file, manifest = tmp_path / "a.txt", tmp_path / "o" / "manifest.json"
  file.write_text("text " * 1000)
  prepare(tmp_path / "o", file)
  manifest.write_text(manifest.read_text().replace(f'"version": {shards.VERSION}', '"version": 1'))
  with pytest.raises(UserError, match=r"manifest.json: has version 1 of the format, not 2: prepare the text again"):
    prepare(tmp_path / "o", file)
  manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
  assert shards.read_manifest(str(tmp_path / "o")).tokenizer == "bytes"
  manifest.write_text(manifest.read_text().replace('"tokenizer": "bytes"', '"tokenizer": "huggingface"'))
  with pytest.raises(UserError, match="has version 2 of the format, not 4"):
    shards.read_manifest(str(tmp_path / "o"))
  (tmp_path / "b.jsonl").write_bytes(lines(["b" * 3000] * 20) + b"[")
  with pytest.raises(UserError, match="is not JSON"):
    prepare(tmp_path / "p", tmp_path / "b.jsonl", max_skipped=0)
  begun = tmp_path / "p" / ".work" / "flags.json"
  begun.write_text(json.dumps({**json.loads(begun.read_text()), "version": [1, 2, 3, 4]}))
  with pytest.raises(UserError, match="/p: was begun by another version of evo_jax"):
    prepare(tmp_path / "p", tmp_path / "b.jsonl", max_skipped=0)


def parquet(texts, **options):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet as parquet_lib

  stream = pyarrow.BufferOutputStream()
  parquet_lib.write_table(pyarrow.table({"text": texts, "n": range(len(texts))}), stream, **options)
  return stream.getvalue().to_pybytes()


def zstd(raw):
  return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


SOME = [words(20, seed=i) for i in range(250)] + ["\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
FORMATS = {
  "a.jsonl": lambda: lines(SOME),
  "a.ndjson": lambda: lines(SOME).replace(b"\n", b"\r\n"),
  "A.JSON.GZ": lambda: gzip.compress(lines(SOME[:9])) + gzip.compress(lines(SOME[9:])),
  "a.jsonl.xz": lambda: lzma.compress(lines(SOME)),
  "a.jsonl.bz2": lambda: bz2.compress(lines(SOME)),
  "a.jsonl.zst": lambda: zstd(lines(SOME)),
  "a.parquet": lambda: parquet(SOME, row_group_size=50),
  "A.PARQUET": lambda: parquet(SOME, compression="zstd"),
  "dictionary.parquet": lambda: parquet(pytest.importorskip("pyarrow").array(SOME).dictionary_encode()),
}


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_give_the_same_tokens(tmp_path, small, name, where):
  folder = Folder(str(tmp_path / "in") if where == "local" else f"memory://{tmp_path}/in")
  folder.write_all(name, FORMATS[name]())
  output = str(tmp_path / "out") if where == "local" else f"memory://{tmp_path}/out"
  manifest = prepare(output, f"{folder.path}/*", valid_share=0.1)
  (tmp_path / "b.jsonl").write_bytes(lines(SOME))
  other = prepare(tmp_path / "o", tmp_path / "b.jsonl", valid_share=0.1)
  for split in shards.SPLITS:
    assert texts(output, manifest, split) == texts(tmp_path / "o", other, split) != []
  assert sorted(text for split in shards.SPLITS for text in texts(output, manifest, split)) == sorted(SOME)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("rule", ["end", "train"])
def test_long_documents_are_encoded_as_short_ones_are(tmp_path, monkeypatch, name, rule):
  long = [words(9000, seed=3), words(700, seed=4)]
  (tmp_path / name).write_bytes(lines(long) if name == "a.jsonl" else long[0].encode())
  fields = {} if rule == "end" else {"valid_share": 0, "test_share": 0}
  whole = prepare(tmp_path / "whole", tmp_path / name, **fields)
  shrink(monkeypatch.setattr)
  manifest = prepare(tmp_path / "parts", tmp_path / name, **fields)
  for split in whole.sources[0].splits:
    assert texts(tmp_path / "parts", manifest, split) == texts(tmp_path / "whole", whole, split)
  joined = [
    "".join(parts) for parts in zip(*(texts(tmp_path / "parts", manifest, s) for s in manifest.sources[0].splits))
  ]
  assert len(manifest.sources[0].splits) == (3 if rule == "end" else 1)
  if rule == "train":
    assert joined == long[: 2 if name == "a.jsonl" else 1]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  return tokenizers.train_sentencepiece(
    [pathlib.Path(ROOT, "README.md").read_text(), words(300)], 420, str(tmp_path_factory.mktemp("pieces"))
  )


@pytest.mark.parametrize("name", ["chars27", "sentencepiece"])
def test_parts_have_the_tokens_of_the_whole(name, pieces):
  tokenizer = pieces if name == "sentencepiece" else tokenizers.Chars27()
  text = words(5000, seed=7) + "x" * 3000 + "\n" * 2000 + "1 2, 3 " * 1000
  for size in (600, 1500):
    parts = list(encoding.cut([text[:5], text[5:7000], text[7000:]], tokenizer, size))
    assert (
      "".join(parts) == text and max(map(len, parts)) <= size and parts == list(encoding.cut([text], tokenizer, size))
    )
  text = words(5000, seed=7)
  parts = encoding.cut([text], tokenizer, 1000)
  tokens = np.concatenate([tokenizer.encode(part, begins=i == 0) for i, part in enumerate(parts)])
  np.testing.assert_array_equal(tokens, tokenizer.encode(text))


LINES = [
  '{"text": "a"}',
  '{"id": 1.5e3, "meta": {"text": [1, "]}", null]}, "text": "a\\"b\\\\", "z": [[], {"a": "\\u00e9"}]}',
  json.dumps({"text": words(300)}),
  json.dumps({"text": words(300)}, ensure_ascii=False),
  ' { "te\\u0078t" : "x" } \n',
  '{"text": "\\ud83d\\ude00\\\\ud83d"}',
  '{"text": ""}',
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_text_of_long_lines_is_taken_out(size):
  for line in LINES:
    raw = line.encode()
    chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
    assert b"".join(json_lines.long_text_field(chunks, "text")).decode() == json.loads(line)["text"]


@pytest.mark.parametrize(
  "line, problem",
  [
    ("[1]", "no field"),
    ('{"a": "b"}', "no field"),
    ('{"text": 3}', "no string"),
    ('{"text": "a", "text": "b"}', "twice"),
    ('{"text": "a"', "delimiter"),
    ('{"text": "a', "Unterminated"),
    ('{"text": "a"} {}', "Extra data"),
    ('{"text": "\\x"}      ', "escape"),
    ('{"text": "\\u12"}      ', "escape"),
    ('{"text": "\\ud83d"}', "not valid Unicode"),
    ('{"text": "\\ude00"}', "not valid Unicode"),
    ('{"n": [1, {"text": "a"}', "delimiter"),
    ('{"n": , "text": "a"}', "Expecting value"),
    ("{text: 1}", "property name"),
  ],
)
def test_long_lines_that_cannot_be_used_are_named(line, problem):
  with pytest.raises(json_lines.BadLine, match=problem):
    list(json_lines.long_text_field([line[i : i + 3].encode() for i in range(0, len(line), 3)], "text"))


def test_a_bad_long_document_leaves_nothing_behind(tmp_path, small):
  (tmp_path / "a.jsonl").write_bytes(
    lines(["first"]) + b'{"text": "' + b"x" * 20_000 + b'", "id": \n' + lines(["last"] * 20)
  )
  manifest = prepare(tmp_path / "o", tmp_path / "a.jsonl", valid_share=0, test_share=0)
  assert texts(tmp_path / "o", manifest, "train") == ["first"] + ["last"] * 20
  assert manifest.sources[0].report == (
    f"1 of 22 documents are skipped (is not JSON: 1); the first: {tmp_path}/a.jsonl: line 2 is not JSON "
    "(Expecting value)"
  )
  (tmp_path / "b.txt").write_bytes(b"x" * 20_000 + b"\xe9")
  with pytest.raises(UserError, match=r"b\.txt: is not UTF-8 text \(byte 20000\)"):
    prepare(tmp_path / "p", tmp_path / "b.txt", tokenizer=tokenizers.Chars27())


def test_bad_rows_are_counted_and_named(tmp_path):
  (tmp_path / "a.parquet").write_bytes(parquet(["a", None, "b", ""] * 10, row_group_size=4))
  manifest = prepare(tmp_path / "o", tmp_path / "a.parquet", max_skipped=0.4)
  assert manifest.sources[0].report.startswith("10 of 30 documents are skipped (has no string in column 'text': 10)")
  assert manifest.sources[0].report.endswith("a.parquet: row 2 (row group 0) has no string in column 'text'")
  with pytest.raises(UserError, match="10 of 30 documents cannot be used"):
    prepare(tmp_path / "p", tmp_path / "a.parquet")
  assert prepare(tmp_path / "p", tmp_path / "a.parquet", max_skipped=0.4)  # goes on with what is there
  for field, message in (("txt", "has no column 'txt', but text, n"), ("n", "column 'n' is of type int64")):
    with pytest.raises(UserError, match=message):
      prepare(tmp_path / f"q{field}", tmp_path / "a.parquet", field=field)
  (tmp_path / "b.parquet").write_bytes(parquet(["a"] * 40)[:-20])
  with pytest.raises(UserError, match=r"b\.parquet: is damaged, or no Parquet file"):
    prepare(tmp_path / "r", tmp_path / "b.parquet")


MESSAGES = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "runs"}]


def with_role(role, content="a"):
  return {"messages": [{"role": role, "content": content}]}


def test_conversations_and_ids_are_documents(tmp_path):
  """In lines without a text, and of the same split as the same content elsewhere; others are counted and named."""
  tokenizer = tokenizers.load_tokenizer("huggingface", os.path.join(ROOT, "tests/tokenizer_files/smollm"))
  ids = {"tokens": [5, 6, 7, 2, 0], "tokenizer": tokenizer.identity}
  bad = {
    "has a conversation without messages": {"messages": []},
    "has no list in field 'messages'": {"messages": "a"},
    "has a message whose role is none of system, user, assistant, tool": with_role("human"),
    "has an empty message": with_role("user", " "),
    "has a message without a string in field 'content'": with_role("user", None),
    "has tokens of another tokenizer": {**ids, "tokenizer": "other"},
    "has tokens that are no ids of the vocabulary": {**ids, "tokens": [5, tokenizer.vocab_size]},
    "has no field 'text'": {"txt": "a"},
    "has text that is not valid Unicode": with_role("user", "\ud800"),
  }
  good = [{"messages": MESSAGES}, {"text": "plain"}, ids, {**ids, "text": "other"}, {**ids, "messages": MESSAGES}]
  good += [{"text": "mine", "tokens": ["mine"]}, {"text": "mine", "tokens": [3], "tokenizer": "other"}]
  some = [json.dumps(line) for line in [*good, *bad.values()]]
  (tmp_path / "a.jsonl").write_text("\n".join(some))
  fields = dict(max_skipped=0.9, valid_share=0, test_share=0)
  manifest = prepare(tmp_path / "o", tmp_path / "a.jsonl", tokenizer=tokenizer, **fields)
  source = manifest.sources[0]
  assert source.skipped == dict.fromkeys(bad, 1) and "a.jsonl: line 8 has a conversation without" in source.report
  stream = shards.open_stream(str(tmp_path / "o"), manifest, source, "train")
  found = stream.read(0, stream.length)
  spoken = ChatTemplate(tokenizer).encode(MESSAGES, add_generation_prompt=False)[:-1]  # without the last line end
  plain, mine = tokenizer.encode("plain").tolist(), tokenizer.encode("mine").tolist()
  expected = [spoken, plain, [5, 6, 7, 2], [5, 6, 7, 2], [5, 6, 7, 2], mine, mine]
  np.testing.assert_array_equal(found, [i for document in expected for i in [*document, tokenizer.separator_id]])
  assert source.splits["train"].text_bytes == tokenizer.lengths()[found].sum()
  (tmp_path / "b.jsonl").write_text("\n".join([*some[:2], some[4], some[3], json.dumps({"text": "other"})]))
  deduplicated = prepare(tmp_path / "p", tmp_path / "b.jsonl", tokenizer=tokenizer, deduplicate=True, **fields)
  assert deduplicated.sources[0].duplicates == 2
  with pytest.raises(UserError, match="1 of 1 documents|has messages, which cannot be read: the tokenizer, bytes, has"):
    (tmp_path / "c.jsonl").write_text(some[0])
    prepare(tmp_path / "q", tmp_path / "c.jsonl", **fields)


def test_held_out_documents_stay_where_they_are(tmp_path):
  split_of = {}
  for round, count in enumerate((200, 300)):
    for i in range(count):
      (tmp_path / f"{(i * 7919) % 1000}.txt").write_text(f"document {i}")
    (tmp_path / f"copy{round}.txt").write_text("document 3")
    manifest = prepare(tmp_path / f"o{round}", tmp_path / "*.txt", valid_share=0.2, test_share=0.1)
    found = {text: split for split in shards.SPLITS for text in texts(tmp_path / f"o{round}", manifest, split)}
    assert sum(split.documents for split in manifest.sources[0].splits.values()) == count + 1 + round
    assert len(found) == count and {text: found[text] for text in split_of} == split_of
    split_of = found
  shares = {split: sum(s == split for s in split_of.values()) / 300 for split in shards.SPLITS}
  assert abs(shares["valid"] - 0.2) < 0.07 and abs(shares["test"] - 0.1) < 0.05


def test_of_few_documents_each_gives_its_end(tmp_path):
  (tmp_path / "a.txt").write_text("".join(map(str, range(10))) * 20)
  for before in ("", "0", "b"):
    (tmp_path / f"{before}.txt").write_text("0123456789" * 20)
    output = tmp_path / f"o{before}"
    manifest = prepare(output, tmp_path / "*.txt")
    assert set(texts(output, manifest, "train")) == {"0123456789" * 18}
    assert set(texts(output, manifest, "valid")) == set(texts(output, manifest, "test")) == {"0123456789"}


def test_named_files_are_held_out(tmp_path):
  for name in "abcd":
    (tmp_path / f"{name}.txt").write_text(f"text {name}")
  (tmp_path / "a_copy.txt").write_text("text d")
  fields = dict(valid=tmp_path / "c*", test=tmp_path / "d*")
  manifest = prepare(tmp_path / "o", tmp_path / "*.txt", **fields)
  assert [list(source.splits) for source in manifest.sources] == [["valid"], ["test"], ["train"]]
  assert texts(tmp_path / "o", manifest, "train") == ["text a", "text d", "text b"]
  assert texts(tmp_path / "o", manifest, "valid") == ["text c"] and texts(tmp_path / "o", manifest, "test") == [
    "text d"
  ]
  manifest = prepare(tmp_path / "p", tmp_path / "*.txt", deduplicate=True, **fields)
  assert texts(tmp_path / "p", manifest, "train") == ["text a", "text b"]  # its copy is held out
  assert manifest.sources[2].duplicates == 1


def test_copies_are_dropped_but_the_first(tmp_path, small):
  some = [f"document {i % 70}" for i in range(300)] + [words(5000, seed=1)] * 2
  (tmp_path / "a.jsonl").write_bytes(lines(some))
  (tmp_path / "b.jsonl").write_bytes(lines(some[::-1] + ["new"]))
  manifest = prepare(tmp_path / "o", f"{tmp_path}/*.jsonl", valid_share=0, test_share=0, deduplicate=True)
  assert texts(tmp_path / "o", manifest, "train") == some[:70] + some[-1:] + ["new"]
  assert manifest.sources[0].duplicates == 605 - 72


def test_the_command_prepares_and_inspects(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(lines(f"document {i} é" for i in range(120)))
  output = tmp_path / "tokens"
  done = call("evo_jax.prepare", f"--input={tmp_path}/a.jsonl", f"--output={output}", "--workers=1", "--test_share=0")
  assert done.returncode == 0 and re.search(r"^train +\d+ ", done.stdout, re.M), (done.stdout, done.stderr)
  done = call("evo_jax.prepare", f"--inspect={output}", "--documents=2")
  assert done.returncode == 0 and done.stdout.count("'document ") == 4, (done.stdout, done.stderr)
  assert "all checksums of 2 shards are right" in done.stdout
  (shard,) = output.glob("*.train")
  raw = bytearray(shard.read_bytes())
  raw[100] ^= 1
  shard.write_bytes(raw)
  done = call("evo_jax.prepare", f"--inspect={output}")
  assert_refused(done, f"{shard}: record 0 is damaged")


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "--input and --output are needed"),
    (["--input=x", "--output=OUT"], "--input: no file matches 'x'"),
    (["--input=TEXT", "--output=OUT", "--valid=x"], "--valid: no file matches 'x'"),
    (["--input=TEXT", "--output=OUT", "--valid=TEXT"], "--input: every file of"),
    (["--input=TEXT", "--output=OUT", "--valid_share=2"], "--valid_share=2.0: is not between 0 and 1"),
    (["--input=TEXT", "--output=OUT", "--valid_share=0.5", "--test_share=0.5"], "nothing is left to train"),
    (["--input=TEXT", "--output=OUT", "--max_skipped=-1"], "--max_skipped=-1.0: is not between 0 and 1"),
    (["--input=TEXT", "--output=OUT", "--hosts=2", "--host=2"], "--host=2: is not one of the 2"),
    (["--input=TEXT", "--output=OUT", "--tokenizer=sentencepiece"], "--tokenizer_path: is empty"),
    (["--input=TEXT", "--output=OUT", "--tokenizer=words"], "--tokenizer=words"),
    (["--input=TEXT", "--output=TEXT"], "TEXT/.work/flags.json: cannot be read: Not a directory"),
    (["--input=TEXT", "--output=/proc/none"], "/proc/none/.work/flags.json: cannot be written"),
    (["--input=TEXT", "--output=nope://x/y"], "nope://x/y: cannot be opened"),
    (["--input=nope://x/*.txt", "--output=OUT"], "nope://x/*.txt: cannot be opened"),
    (["--inspect=OUT"], "OUT/manifest.json: there is none"),
  ],
)
def test_bad_flags_are_one_line(tmp_path, flags, message):
  (tmp_path / "a.txt").write_text("text")
  fill = lambda text: text.replace("TEXT", f"{tmp_path}/a.txt").replace("OUT", f"{tmp_path}/out")
  assert_refused(call("evo_jax.prepare", *map(fill, flags)), fill(message))


@pytest.mark.parametrize("protocol, extra", [("gs", "gcs"), ("hf", "hub")])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, protocol, extra):
  def missing(*_, **__):
    raise ImportError("no such library")

  monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
  with pytest.raises(UserError, match=rf"pip install 'evo_jax\[{extra}\]'"):
    prepare(tmp_path / "o", f"{protocol}://bucket/*.txt")

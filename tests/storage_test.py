"""Buckets that fail, are slow or silent: they are asked again, for a while, and what they hold is never mistaken."""

import asyncio
import concurrent.futures
import contextlib
import http.server
import itertools
import re
import threading
import time

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
import pytest

from evo_jax.data import shards, storage
from evo_jax.data.storage import Folder
from evo_jax.errors import UserError


class Flaky(MemoryFileSystem):
  """Fails with the errors of `answers`, one a read, before it answers."""

  protocol = "flaky"
  cachable = False
  answers: list = []  # noqa: RUF012
  asked = 0

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace("flaky://", "memory://"))

  def cat_file(self, path, start=None, end=None, **kwargs):
    Flaky.asked += 1
    if Flaky.answers:
      raise Flaky.answers.pop(0)
    return super().cat_file(path, start, end, **kwargs)


class Silent(fsspec.asyn.AsyncFileSystem):
  """Does not answer before it is asked for the third time."""

  protocol = "silent"
  asked = 0

  async def _cat_file(self, path, start=None, end=None, **kwargs):
    Silent.asked += 1
    if Silent.asked < 3:
      await asyncio.sleep(600)
    return b"0123456789"[start:end]


class HttpError(Exception):
  """As libraries for buckets raise."""

  def __init__(self, code):
    super().__init__(f"status {code}")
    self.code = code


fsspec.register_implementation("flaky", Flaky, clobber=True)
fsspec.register_implementation("silent", Silent, clobber=True)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
  monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
  monkeypatch.setattr(storage, "_warned", -1e9)
  Flaky.answers, Flaky.asked = [], 0
  storage.leaving.clear()  # of a command that another test has called


@pytest.fixture
def folder():
  Folder("memory://bucket").write_all("file", b"0123456789")
  return Folder("flaky://bucket")


PASSING = [
  OSError("connection reset"),
  TimeoutError(),
  HttpError(503),
  HttpError(429),
  RuntimeError("the library's own"),
]


def test_what_may_pass_is_tried_again_with_one_warning(folder, capfd):
  for read in (lambda: folder.read("file")[2:7], lambda: folder.read_range("file", 2, 7)):
    Flaky.answers, Flaky.asked = list(PASSING), 0
    assert read() == b"23456" and Flaky.asked == 6
  warning = capfd.readouterr().err
  assert warning.count("\n") == 1 and re.match(
    r"evo_jax: warning: flaky://bucket/file: cannot be read yet: \S.*; is tried again$", warning
  )


@pytest.mark.parametrize(
  "error", [PermissionError("no"), HttpError(403), HttpError(400), OSError("Forbidden: x")], ids=repr
)
def test_what_will_not_pass_is_said_at_once(folder, error):
  Flaky.answers = [error] * 9
  with pytest.raises(UserError, match=r"^flaky://bucket/file: cannot be read: "):
    folder.read("file")
  assert Flaky.asked == 1
  Flaky.answers = []
  with pytest.raises(FileNotFoundError):
    folder.read("none")
  assert Flaky.asked == 2


def test_patience_ends(folder, monkeypatch):
  Flaky.answers = [OSError("connection reset") for _ in range(99)]
  monkeypatch.setattr(storage, "LONG_PATIENCE", 0.2)
  began = time.monotonic()
  with pytest.raises(UserError, match=r"file: cannot be read: connection reset \(tried for 0 s\)"):
    folder.read_range("file", 0, 3)
  assert time.monotonic() - began < 5 and Flaky.asked > 2


def test_silence_is_an_error(monkeypatch, capfd):
  monkeypatch.setattr(storage, "SILENCE", 0.1)
  assert Folder("silent://bucket").read_range("file", 1, 3) == b"12" and Silent.asked == 3
  assert "no answer for" in capfd.readouterr().err


def test_a_command_that_ends_does_not_wait_for_a_bucket(folder, monkeypatch):
  monkeypatch.setattr(storage, "_FIRST_PAUSE", 60.0)
  Flaky.answers = [OSError("connection reset") for _ in range(99)]
  with concurrent.futures.ThreadPoolExecutor(4) as readers:
    waiting = [readers.submit(folder.read_range, "file", 0, 3) for _ in range(4)]
    try:
      storage.leaving.set()
      for future in waiting:
        with pytest.raises(UserError, match="cannot be read: connection reset"):
          future.result(timeout=10)
    finally:
      storage.leaving.clear()


class Server(http.server.BaseHTTPRequestHandler):
  """Serves byte ranges of `files`; each other request fails: with status 503, or without an answer."""

  files: dict = {}  # noqa: RUF012
  requests = itertools.count()

  def do_GET(self):
    number = next(Server.requests)
    raw = self.files.get(self.path)
    if number % 4 == 0:
      time.sleep(1.5)
    if number % 2 == 0 or raw is None:
      with contextlib.suppress(OSError):
        self.send_error(503 if number % 2 == 0 else 404)
      return
    first, last = 0, len(raw) - 1
    if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
      first, last = int(span[1]), min(int(span[2]), last)
    self.send_response(206 if span else 200)
    if span:
      self.send_header("Content-Range", f"bytes {first}-{last}/{len(raw)}")
    self.send_header("Content-Length", str(last - first + 1))
    self.end_headers()
    self.wfile.write(raw[first : last + 1])

  def log_message(self, *arguments):
    pass


@pytest.fixture
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_tokens_come_over_a_bad_line(server, tmp_path, monkeypatch):
  """All of them right, though half of the requests fail."""
  pytest.importorskip("aiohttp", reason="reading over HTTP needs aiohttp")
  monkeypatch.setattr(storage, "SILENCE", 0.5)
  tokens, local = np.arange(5000, dtype=np.uint16), Folder(str(tmp_path))
  with shards.shard_writer(local, "0.train", tokens.dtype) as writer:
    writer.append(tokens)
    shard = writer.finish(1, 1)
  Server.files = {"/set/0.train": local.read("0.train")}
  stream = shards.TokenStream(Folder(f"{server}/set"), (shard,), "uint16")
  for start in range(0, 4000, 500):
    np.testing.assert_array_equal(stream.read(start, 1000), tokens[start : start + 1000])
  Server.files["/set/0.train"] = Server.files["/set/0.train"][:4000]
  with pytest.raises(UserError, match=r"http://\S+/set/0\.train: is cut off"):
    stream.read(1500, 1000)

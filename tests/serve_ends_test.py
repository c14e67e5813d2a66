"""Ends of a server and of its requests: time that runs out, an engine that fails, several processes as one."""

from concurrent.futures import ThreadPoolExecutor
import contextlib
import json
import re
import signal
import threading
import time
from unittest import mock

from decode_test import one_device, run
import httpx
from processes_test import assert_well, ends, processes
import pytest

from evo_jax.decoding.engine import Engine
from evo_jax.decoding.programs import Programs
from evo_jax.decoding.settings import Sampling
from evo_jax.serving import server as server_lib
from evo_jax.serving.service import Limits, Service

LONG = {"prompt": "abc", "max_tokens": 80, "logit_bias": {"0": -100}}  # never ends before
PASS = 0.02  # seconds at least, so that LONG takes 1.6


@contextlib.contextmanager
def serving(change=lambda passes: passes, **limits):
  """A service, a client of its server, and the server as a future. change: of what takes passes."""
  model, ready, take = run(model__context=96), threading.Event(), Programs.take_passes
  service = Service(model, {"ar": Sampling()}, ["tiny"], Limits(**limits), rows=1, traces=False)
  listening = server_lib.open_socket("127.0.0.1", 0)
  make_engine = lambda: Engine(model, 1, passes=1, scores=False, mesh=one_device())

  def take_slowly(*args):
    time.sleep(PASS)
    return take(*args)

  with mock.patch.object(Programs, "take_passes", change(take_slowly)), ThreadPoolExecutor(1) as pool:
    server = pool.submit(server_lib.run_server, service, listening, make_engine, ready.set)
    try:
      assert ready.wait(60)
      with httpx.Client(base_url=server_lib.address_of(listening), timeout=60) as client:
        yield service, client, server
    finally:
      service.ending = True


def ask(client, **fields):
  return client.post("/v1/completions", json=fields)


def events(client, **fields):
  """What a stream says, event by event."""
  with client.stream("POST", "/v1/completions", json={"stream": True, **fields}) as stream:
    for line in stream.iter_lines():
      if line.startswith("data: ") and line != "data: [DONE]":
        yield json.loads(line.removeprefix("data: "))


def test_a_request_that_takes_too_long_ends_and_frees_its_row():
  with serving(seconds=0.3) as (service, client, _):
    late = ask(client, **LONG)
    assert late.status_code == 504, late.text
    assert late.json()["error"]["code"] == "timeout"
    assert late.json()["error"]["message"] == "not done after 0.3 seconds"
    *pieces, last = events(client, **LONG)
    assert last == late.json() and 0 < len("".join(piece["choices"][0]["text"] for piece in pieces)) < 80
    begin = time.monotonic()
    while service.unfinished or service.engine.running:
      assert time.monotonic() < begin + 1
      time.sleep(0.01)
    assert ask(client, prompt="abc", max_tokens=2).status_code == 200


def test_what_is_not_done_when_the_server_ends_is_told_so():
  with serving(drain=0.2) as (service, client, server):
    stream = events(client, **LONG)
    first, service.ending = next(stream), True
    *_, last = stream
    assert first["choices"] and last["error"]["code"] == "shutting_down"
    assert last["error"]["message"] == "the server ended before the text did"
    assert server.result(20) is None


def test_an_engine_that_fails_ends_its_server():
  def failing(take):
    calls = iter(range(5))

    def take_some(*args):
      if next(calls, None) is None:
        raise RuntimeError("no memory")
      return take(*args)

    return take_some

  with serving(failing) as (_, client, server):
    *pieces, last = events(client, **LONG)
    assert len(pieces) >= 1 and last["error"]["code"] == "engine_failed"
    assert last["error"]["message"] == "the engine has failed: RuntimeError"
    with pytest.raises(RuntimeError, match="no memory"):
      server.result(20)


@pytest.mark.slow
def test_several_processes_are_one_server(talker):
  """A signal to all of them, as launchers send it, lets what runs finish."""
  flags = [f"--workdir={talker}", "--port=0", "--rows=2", "--context=120", "--passes=1", "--mesh=data:2"]
  with processes(2, flags, "evo_jax.serve") as started:
    url, lines = None, iter(started[0].stderr.readline, "")
    for line in lines:
      url = re.search(r"ready at (http://[\d.:]+\d)", line)
      if url:
        break
    with httpx.Client(base_url=url[1], timeout=60) as client:
      fields = {"prompt": "the", "max_tokens": 60, "seed": 1}
      want = ask(client, **fields).json()["choices"][0]["text"]
      stream = events(client, n=4, **fields)
      pieces = [next(stream)]
      for process in started:
        process.send_signal(signal.SIGTERM)
      pieces += stream
      texts = ["".join(c["text"] for p in pieces for c in p["choices"] if c["index"] == i) for i in range(4)]
      assert texts[0] == want and len(set(texts)) == 4
    assert_well(ends(started, 60))

"""A server, as OpenAI's clients, a browser and Prometheus meet it; and a conversation in the terminal."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

from conftest import ROOT, assert_refused, call, environment, run
from decode_test import one_device
import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from evo_jax import run as run_lib
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.serving import page as page_lib

KEY, ROWS, QUEUE = "secret", 2, 4
FLAGS = ("--port=0", "--mode=ar", "--modes=adaptive,verify", "--draft=3", f"--rows={ROWS}", f"--queue={QUEUE}")
MORE = (f"--api_key={KEY}", "--name=tiny", "--alias=gpt-tiny", "--context=120", "--passes=1", "--max_body=1")
MESSAGES = [{"role": "user", "content": "of <|end|> the night"}]


class Server:
  """A server in a process of its own."""

  def __init__(self, workdir, *flags):
    command = [sys.executable, "-m", "evo_jax.serve", f"--workdir={workdir}", *FLAGS, *MORE, *flags]
    self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    self.url = re.search(r"serves at (http://127\.0\.0\.1:\d+)", self.process.stderr.readline())[1]
    self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

  def wait(self):
    """Until it is ready; the statuses of /health on the way."""
    statuses, end = [], time.monotonic() + 120
    while statuses[-1:] != [200] and time.monotonic() < end:
      with contextlib.suppress(httpx.ConnectError):
        statuses.append(self.http.get("/health").status_code)
      time.sleep(0.05)
    return statuses

  def metric(self, name, **labels):
    text = self.http.get("/metrics").text
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if re.match(rf"evo_jax_{name}[ {{]", line)]
    return sum(float(line.split()[-1]) for line in lines if all(label in line for label in wanted))

  def until(self, condition):
    end = time.monotonic() + 20
    while not condition():
      assert time.monotonic() < end
      time.sleep(0.02)

  def slow(self, n=ROWS + QUEUE):
    """A stream of as many long texts as the server takes."""
    self.until(lambda: self.metric("unfinished_texts") == 0)
    stream = self.client.completions.create(model="tiny", prompt="the", max_tokens=100, n=n, stream=True, seed=1)
    next(iter(stream))
    return stream


@pytest.fixture(scope="module")
def server(talker):
  server = Server(talker)
  try:
    server.statuses = server.wait()
    yield server
    assert server.process.poll() is not None or server.metric("compilations") == 0
  finally:
    server.process.kill()
    server.process.communicate()


@pytest.fixture(scope="module")
def model(talker):
  return run_lib.load_run(str(talker), mesh=one_device())


def test_it_is_ready_when_all_is_compiled(server):
  assert server.statuses[0] == 503 and server.statuses[-1] == 200
  listed = server.client.models.list().data
  assert [m.id for m in listed] == ["tiny", "gpt-tiny"] and listed[0].modes == ["ar", "adaptive", "verify"]
  assert server.client.models.retrieve("gpt-tiny").root == "tiny" and listed[0].max_model_len == 120


def encoded(server, text):
  return server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_texts_are_the_samplers(server, model):
  complete = server.client.completions.create
  asked = dict(prompt="the river", max_tokens=12, seed=5, temperature=0.8)
  want = Sampler(model, Sampling(max_tokens=12, temperature=0.8), one_device())(["the river"], 3, 5)
  answer = complete(model="gpt-tiny", n=3, **asked)
  assert [c.text for c in answer.choices] == [w.text for w in want] and len({w.text for w in want}) == 3
  assert [c.finish_reason for c in answer.choices] == ["length"] * 3 and answer.model == "gpt-tiny"
  assert answer.usage.completion_tokens == sum(len(w.tokens) for w in want)
  ids = encoded(server, "the river")
  assert answer.usage.prompt_tokens == len(ids)
  same = complete(model="tiny", n=3, **asked, extra_body={"mode": "verify"})
  assert [c.text for c in same.choices] == [w.text for w in want]
  assert 0 <= same.usage.completion_tokens_details.accepted_prediction_tokens < same.usage.completion_tokens
  careful = complete(model="tiny", n=3, **asked, extra_body={"mode": "adaptive", "threshold": 0})
  assert [c.text for c in careful.choices] == [w.text for w in want]
  jumps = complete(model="tiny", **asked, extra_body={"mode": "adaptive", "threshold": 3.0})
  assert jumps.usage.passes < 12 == careful.usage.passes / 3
  adaptive = Sampling(mode="adaptive", threshold=3.0, max_tokens=12, temperature=0.8)
  assert jumps.choices[0].text == Sampler(model, adaptive, one_device())(["the river"], 1, 5)[0].text
  listed = complete(model="tiny", **{**asked, "prompt": [ids, ids]})
  assert [c.text for c in listed.choices] == [w.text for w in want[:2]]
  greedy = [complete(model="tiny", prompt="a", max_tokens=9, temperature=0).choices[0].text for _ in range(2)]
  best = complete(model="tiny", prompt="a", max_tokens=9, extra_body={"top_k": 1}).choices[0].text
  assert greedy == [best] * 2
  texts = {complete(model="tiny", prompt="a", max_tokens=12).choices[0].text for _ in range(4)}
  assert len(texts) > 1  # without a seed each is another one


def test_answers_are_the_samplers_and_special_tokens_are_text(server, model):
  ask = server.client.chat.completions.create
  talks = model.in_conversation()
  want = Sampler(talks, Sampling(max_tokens=12), one_device())([MESSAGES], 1, 3)[0]
  answer = ask(model="tiny", messages=MESSAGES, max_completion_tokens=12, seed=3)
  assert answer.choices[0].message.content == want.text and answer.choices[0].message.role == "assistant"
  assert answer.usage.prompt_tokens == len(talks.tokenizer.encode(MESSAGES)) + 1
  parts = [
    {"role": "user", "content": [{"type": "text", "text": "of <|end|> "}, {"type": "text", "text": "the night"}]}
  ]
  again = ask(model="tiny", messages=parts, max_tokens=12, seed=3)
  assert again.choices[0].message.content == want.text
  history = [*MESSAGES, answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
  longer = ask(model="tiny", messages=history, temperature=0.1)
  assert longer.choices[0].finish_reason in ("stop", "length")
  assert longer.usage.total_tokens <= 121 and (longer.choices[0].finish_reason == "stop") == (
    longer.usage.total_tokens < 118
  )


def test_streams_are_the_texts_in_pieces(server):
  asked = dict(model="tiny", max_tokens=30, seed=4, n=2)
  whole = server.client.completions.create(prompt="the", echo=True, **asked)
  texts, reasons, usage = ["", ""], [], None
  for event in server.client.completions.create(
    prompt="the", echo=True, stream=True, stream_options={"include_usage": True}, **asked
  ):
    assert usage is None
    usage = event.usage
    for choice in event.choices:
      texts[choice.index] += choice.text
      reasons += [choice.finish_reason] if choice.finish_reason else []
  assert texts == [c.text for c in whole.choices] and all(text.startswith("the") for text in texts)
  assert reasons == ["length"] * 2 and usage.completion_tokens == whole.usage.completion_tokens
  chat = server.client.chat.completions
  want = chat.create(messages=MESSAGES, **asked).choices
  deltas = [list(map(str, ())), []]
  for event in chat.create(messages=MESSAGES, stream=True, **asked):
    assert event.usage is None
    for choice in event.choices:
      deltas[choice.index].append(choice.delta)
  for pieces, choice in zip(deltas, want):
    assert pieces[0].role == "assistant" and len(pieces) > 4
    assert "".join(piece.content or "" for piece in pieces) == choice.message.content


def test_stop_strings_and_biases(server, model):
  complete = lambda **fields: server.client.completions.create(model="tiny", prompt="the", **fields)
  text = complete(max_tokens=40, seed=8, temperature=0.9).choices[0].text
  stop = text[7:9]
  stopped = complete(max_tokens=40, seed=8, temperature=0.9, stop=["never", stop]).choices[0]
  assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
  token = encoded(server, "q")[0]
  assert complete(max_tokens=5, logit_bias={str(token): 100}).choices[0].text == "qqqqq"
  end = complete(max_tokens=5, logit_bias={str(model.tokenizer.end_ids[0]): 100})
  assert end.choices[0].text == "" and end.choices[0].finish_reason == "stop" and end.usage.completion_tokens == 1


def test_log_probabilities_are_those_of_autoregression(server, model):
  """Of the prompt, too: what the harness asks for. Both forms name the same tokens."""
  ids, begin = encoded(server, "the river runs"), model.tokenizer.begin_id
  complete = lambda prompt, **fields: server.client.completions.create(model="tiny", prompt=prompt, **fields)
  found = complete([[begin, *ids]], max_tokens=1, logprobs=1, echo=True, temperature=0).choices[0].logprobs
  logits = model.model.apply({"params": model.params}, jnp.array([[begin, *ids]]))[0, :, : model.tokenizer.vocab_size]
  log_p = np.asarray(jax.nn.log_softmax(logits))
  assert found.token_logprobs[0] is None and len(found.tokens) == 1 + len(ids) + 1
  assert found.token_logprobs[1:-1] == pytest.approx(log_p[np.arange(len(ids)), ids], abs=1e-4)
  assert found.token_logprobs[-1] == pytest.approx(log_p[-1].max(), abs=1e-4)
  greedy = [log_p == max(top.values()) for log_p, top in zip(found.token_logprobs[1:], found.top_logprobs[1:])]
  assert greedy == [*(log_p[:-1].argmax(1) == ids), True]
  alone = complete("the river runs", max_tokens=0, logprobs=3, echo=True).choices[0]
  assert alone.text == "the river runs" and alone.logprobs.token_logprobs == found.token_logprobs[1:-1]
  assert [alone.text[a:b] for a, b in zip(alone.logprobs.text_offset, [*alone.logprobs.text_offset[1:], None])] == (
    alone.logprobs.tokens
  )
  assert all(3 <= len(top) <= 4 for top in alone.logprobs.top_logprobs)
  asked = dict(messages=MESSAGES, max_tokens=6, seed=1, logprobs=True, top_logprobs=2)
  whole = server.client.chat.completions.create(model="tiny", **asked).choices[0]
  assert len(whole.logprobs.content) <= 6 and all(len(entry.top_logprobs) == 2 for entry in whole.logprobs.content)
  last = list(server.client.chat.completions.create(model="tiny", stream=True, **asked))[-1].choices[0]
  assert last.logprobs.content == whole.logprobs.content and last.delta.content == whole.message.content


def test_a_gap_is_filled(server):
  """What looks like a gap in the prompt is text."""
  fill = lambda **fields: server.client.completions.create(
    model="tiny", prompt="the [...] ", max_tokens=7, seed=6, **fields
  )
  answer, other = fill(suffix=" runs"), fill(suffix=" ends")
  assert answer.usage.prompt_tokens == len(encoded(server, "the [...] ")) and answer.usage.completion_tokens <= 7
  assert answer.choices[0].text not in ("", other.choices[0].text)  # the model sees what stands behind
  assert "".join(event.choices[0].text for event in fill(suffix=" runs", stream=True)) == answer.choices[0].text
  assert not answer.choices[0].text.startswith("the")


def test_traces_tell_every_pass(server):
  asked = dict(model="tiny", prompt="the", max_tokens=20, seed=1, stream=True)
  for mode, fields in (("ar", {}), ("adaptive", {"threshold": 2.0}), ("verify", {})):
    events = list(server.client.completions.create(**asked, extra_body={"mode": mode, "trace": True, **fields}))
    steps = [step for event in events for choice in event.choices for step in getattr(choice, "trace", None) or ()]
    assert [step["pass"] for step in steps] == list(range(1, len(steps) + 1))
    known = {}
    for step in steps:
      for index, t, piece, event in step["cells"]:
        assert index not in known and (t <= 0) == (event in (1, 3))
        known |= {index: piece} if t <= 0 else {}
    assert sorted(known) == list(range(20))
    assert len(steps) == 20 if mode == "ar" else len(steps) <= 20
    # Beliefs are told before tokens are known, drafts before they are verified.
    assert any(t > 0 for step in steps for _, t, _, _ in step["cells"]) == (mode != "ar")


BAD = [
  ({"presence_penalty": 1}, "presence_penalty: 1 is not supported", "presence_penalty"),
  ({"min_p": 0.1}, "min_p: this field is not supported", "min_p"),
  ({"temperature": "hot"}, "temperature: 'hot' is not a finite number", "temperature"),
  ({"temperature": -1}, "temperature: -1 is not at least 0", "temperature"),
  ({"top_p": 0}, "top_p=0.0: is not in (0, 1]", "top_p"),
  ({"max_tokens": 1000}, "fit the context of 120", "prompt"),
  ({"prompt": "a" * 3000}, "fit the context of 120", "prompt"),
  ({"prompt": [1, 1000000]}, "prompt: 1000000 is no id", "prompt"),
  ({"prompt": []}, "prompt: [] is neither text nor ids", "prompt"),
  ({"prompt": "\ud800"}, "is not valid UTF-8", "prompt"),
  ({"logit_bias": {"x": 1}}, "logit_bias: 'x': 1 is no id", "logit_bias"),
  ({"logit_bias": {"100000": 1}}, "logit_bias: 100000 is no id", "logit_bias"),
  ({"mode": "flow"}, "mode: 'flow' is not one of ar, adaptive, verify", "mode"),
  ({"threshold": 1.0}, "threshold: is of mode adaptive, not of ar", "threshold"),
  ({"mode": "adaptive", "threshold": 1e9}, "threshold=1000000000.0: is not in", "threshold"),
  (
    {"suffix": "x", "mode": "ar"},
    "suffix: what stands before it is filled in by the modes flow and adaptive",
    "suffix",
  ),
  ({"suffix": "x", "echo": True}, "echo: does not go with suffix", "echo"),
  ({"best_of": 3}, "best_of: 3 is not n, 1", "best_of"),
  ({"logprobs": 21}, "logprobs: 21 is not from 0 to 20", "logprobs"),
  ({"max_tokens": 0}, "max_tokens: 0 writes nothing", "max_tokens"),
  ({"n": 7}, "n: 7 texts in one request are more than the 6 that may wait", "n"),
  ({"stop": [""]}, "stop: [''] is neither a string nor a list of strings", "stop"),
  ({"trace": True}, "trace: goes with stream", "trace"),
  ({"stream": True, "stream_options": {"x": 1}}, "x: this field is not supported", "x"),
  ({"seed": 1.5}, "seed: 1.5 is not an integer", "seed"),
  ({"temperature": 10**400}, "is not a finite number", "temperature"),
  ({"stop": "\ud83d"}, "stop=\ufffd: is not valid UTF-8", "stop"),
  ({"\ud800": 1}, "\ufffd: this field is not supported", "\ufffd"),
  ({"logit_bias": {"9" * 5000: 1}}, "is no id", "logit_bias"),
  ({"suffix": "x", "mode": "adaptive", "max_tokens": 10**30}, "is more than the context of 120", "max_tokens"),
]
BAD_CHATS = [
  ({"messages": []}, "messages: is no list of messages", "messages"),
  ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: is not one of", "messages"),
  ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role: is not one of", "messages"),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part that is no text", "messages"),
  ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name: this field", "messages"),
  ({"tools": [{"type": "function"}]}, "is not supported", "tools"),
  ({"response_format": {"type": "json_object"}}, "is not supported", "response_format"),
  ({"top_logprobs": 2}, "top_logprobs: goes with logprobs", "top_logprobs"),
  ({"echo": True}, "echo: this field is not supported", "echo"),
]


def test_what_is_bad_is_named(server):
  """In OpenAI's form, and nothing else is touched by it."""
  stream = server.slow(n=2)
  for path, given, cases in (
    ("/v1/completions", {"prompt": "a", "max_tokens": 3}, BAD),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3}, BAD_CHATS),
  ):
    for fields, message, param in cases:
      body = json.dumps({"model": "tiny", **given, **fields})
      done = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
      assert done.status_code == 400, (fields, done.text)
      error = done.json()["error"]
      assert message in error["message"] and error["param"] == param, (fields, error)
      assert error["type"] == "invalid_request_error" and "--" not in error["message"]
      assert (error["code"] == "context_length_exceeded") == ("context of" in message)
  post = lambda **content: server.http.post("/v1/completions", **content)
  assert "no JSON object" in post(json=[1]).json()["error"]["message"]
  assert "is no JSON" in post(content="{", headers={"Content-Type": "application/json"}).json()["error"]["message"]
  assert (
    "NaN is no number"
    in (post(content='{"seed": NaN}', headers={"Content-Type": "application/json"}).json()["error"]["message"])
  )
  assert post(content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
  assert post(json={"prompt": "a" * (1 << 20)}).status_code == 413
  assert server.http.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
  assert server.http.get("/v1/completions").status_code == 405
  with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist; there is tiny, gpt-tiny"):
    server.client.completions.create(model="gpt-5", prompt="a")
  with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
    server.client.with_options(api_key="guess").models.list()
  assert len([event for event in stream if event.choices[0].finish_reason]) == 2


def test_a_full_queue_says_when_to_come_back(server):
  stream = server.slow()
  with pytest.raises(openai.RateLimitError, match="6 texts are on their way, and no more than 6 may be") as refusal:
    server.client.completions.create(model="tiny", prompt="a", max_tokens=1)
  assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 60
  assert server.metric("requests_total", status="429") >= 1
  assert len([event for event in stream if event.choices[0].finish_reason == "length"]) == 6
  assert server.client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens <= 1


def test_who_leaves_frees_the_rows(server):
  before = server.metric("cancelled_total")
  server.slow().close()
  server.until(lambda: server.metric("cancelled_total") == before + 1)
  with pytest.raises(httpx.ReadTimeout):
    body = {"prompt": "the", "max_tokens": 100, "n": 6}
    server.http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
  server.until(lambda: server.metric("cancelled_total") == before + 2)
  gone = server.metric("requests_total", status="499")
  with socket.create_connection((server.http.base_url.host, server.http.base_url.port)) as client:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    client.sendall(f"{head}\r\nContent-Length: 100\r\n\r\n{{".encode())  # and no more of its body
  server.until(lambda: server.metric("requests_total", status="499") == gone + 1)
  assert server.metric("requests_total", status="500") == 0
  server.until(lambda: server.metric("running_texts") + server.metric("waiting_texts") == 0)
  assert server.metric("unfinished_texts") == 0 and server.metric("compilations") == 0
  assert server.metric("completion_tokens_total", mode="ar") > 100 and server.metric("accepted_tokens_total") >= 0


def test_the_page_is_whole_and_escapes(server):
  done = server.http.get("/")
  assert done.status_code == 200 and done.text == page_lib.PAGE and "api_key" not in done.text
  assert not re.search(
    r"https?://|<link|<img|<iframe| src=| on\w+=|innerHTML|outerHTML|insertAdjacent|document\.write|eval", done.text
  )
  policy = done.headers["content-security-policy"]
  assert "default-src 'none'" in policy and "connect-src 'self'" in policy
  for tag, rule in (("script", "script-src"), ("style", "style-src")):
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", done.text, re.S)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    assert f"{rule} 'sha256-{digest}'" in policy
  ids = set(re.findall(r'\bid="(\w+)"', done.text))
  assert set(re.findall(r'\$\("(\w+)"\)', done.text)) <= ids


# What the page's script needs of a browser: elements that remember their text and children.
BROWSER = r"""
const {readFileSync} = require("fs"), vm = require("vm");
class Element {
  constructor(tag) { Object.assign(this, {tag, style: {}, children: [], value: "", text: ""}); }
  append(child) { child.parent = this; this.children.push(child); }
  replaceChildren() { this.children = []; }
  remove() { this.parent.children.splice(this.parent.children.indexOf(this), 1); }
  get previousSibling() { return this.parent.children[this.parent.children.indexOf(this) - 1]; }
  get childElementCount() { return this.children.length; }
  get textContent() { return this.text + this.children.map(c => c.textContent).join(""); }
  set textContent(text) { this.children = []; this.text = String(text); }
}
const page = readFileSync(0, "utf8"), elements = {};
for (const [, tag, id] of page.matchAll(/<(\w+) (?:[^>]* )?id="(\w+)"/g)) elements[id] = new Element(tag);
for (const [, id, value] of page.matchAll(/id="(\w+)"[^>]* value="([^"]*)"/g)) elements[id].value = value;
elements.kind.value = "chat";
const [url, key] = process.argv.slice(1);
const sandbox = {
  document: {getElementById: id => elements[id], createElement: tag => new Element(tag)}, performance, AbortController,
  TextDecoderStream, fetch: (path, options) => fetch(url + path, options),
};
vm.runInNewContext(page.match(/<script>([^]*)<\/script>/)[1], sandbox);
(async () => {
  elements.key.value = key;
  await elements.key.onchange();
  elements.mode.value = "adaptive";
  Object.assign(elements.threshold, {value: "2"});
  Object.assign(elements.most, {value: "20"});
  elements.seed.value = "3";
  const found = {models: elements.mode.children.map(c => c.value), traces: elements.trace.checked};
  elements.prompt.value = "<b>of</b>";
  await elements.send.onclick();
  found.talk = elements.talk.children.map(c => [c.className, c.textContent]);
  found.facts = elements.facts.textContent;
  found.live = elements.live.textContent;
  found.passes = elements.passes.children.length;
  elements.kind.value = "text";
  elements.prompt.value = "the";
  await elements.send.onclick();
  found.text = elements.text.textContent;
  found.error = elements.error.textContent;
  elements.most.value = "1000";
  await elements.send.onclick();
  found.refused = elements.error.textContent;
  console.log(JSON.stringify(found));
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_pages_script_talks_to_the_server(server):
  """In node, with stand-ins for a browser's elements."""
  done = subprocess.run(["node", "-e", BROWSER, server.url, KEY], input=page_lib.PAGE, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  check_page(json.loads(done.stdout), server)


def check_page(found, server):
  asked = dict(model="tiny", max_tokens=20, temperature=0.7, seed=3, extra_body={"mode": "adaptive", "threshold": 2.0})
  chat = server.client.chat.completions.create(messages=[{"role": "user", "content": "<b>of</b>"}], **asked)
  text = server.client.completions.create(prompt="the", **asked)
  assert found["models"] == ["ar", "adaptive", "verify"] and found["traces"] is True
  assert found["talk"] == [["user", "<b>of</b>"], ["assistant", chat.choices[0].message.content]]
  assert f"{chat.usage.completion_tokens} tokens in {chat.usage.passes} passes" in found["facts"]
  assert found["passes"] == chat.usage.passes and len(found["live"]) >= 15
  assert found["text"] == "the" + text.choices[0].text and found["error"] == ""
  assert "fit the context of 120" in found["refused"]


def test_it_finishes_what_runs_and_refuses_what_is_new(server):
  """The last test of the server, which ends it."""
  stream = server.slow()
  server.process.send_signal(signal.SIGTERM)
  server.until(lambda: server.http.get("/health").status_code == 503)
  with pytest.raises(openai.InternalServerError, match="the server is ending"):
    server.client.completions.create(model="tiny", prompt="a")
  assert len([event for event in stream if event.choices[0].finish_reason == "length"]) == 6
  assert server.process.wait(20) == 0
  assert "Traceback" not in server.process.stderr.read()


def test_bad_flags_are_one_line(talker):
  taken = socket.create_server(("127.0.0.1", 0))
  port = taken.getsockname()[1]
  for flags, message in (
    ([], "--workdir is needed"),
    (["--workdir=/nowhere", "--port=0"], "--workdir=/nowhere: is no folder"),
    ([f"--workdir={talker}", f"--port={port}"], f"--host=127.0.0.1 --port={port}: Address already in use"),
    ([f"--workdir={talker}", "--port=0", "--modes=ar,best"], "--modes=ar,best: 'best' is not one of ar, flow"),
    ([f"--workdir={talker}", "--host=192.0.2.1"], "--host=192.0.2.1 --port=8000: Cannot assign requested address"),
    ([f"--workdir={talker}", f"--host={'a' * 80}.com"], ".com --port=8000: "),
  ):
    assert_refused(call("evo_jax.serve", *flags), message)
  taken.close()
  with mock.patch.dict(sys.modules, {"uvicorn": None}):
    for name in [name for name in sys.modules if name.startswith("evo_jax.serving")]:
      del sys.modules[name]
    assert_refused(call("evo_jax.serve", f"--workdir={talker}"), "is not installed: pip install 'evo_jax[serve]'")
  done = call("evo_jax.serve", f"--workdir={talker}", "--port=0", "--mode=flow", "--path=streams")
  assert done.returncode == 1 and "Traceback" not in done.stderr and "streams" in done.stderr.splitlines()[-1]


LINES = """/free
/mode verify
the river and the night <|end|>
and \\
then?
/free
/save FILE
/system be
/mode best
/nothing
/reset
once more
/save FILE
/save x.txt
/quit
never read
"""


def test_a_conversation_in_the_terminal(talker, tmp_path):
  file = tmp_path / "kept.jsonl"
  flags = (f"--workdir={talker}", "--seed=3", "--max_tokens=9", "--temperature=0.8", "--draft=2")
  done = call("evo_jax.chat", *flags, input=LINES.replace("FILE", str(file)))
  assert done.returncode == 0, done.stderr
  first, second = (json.loads(line)["messages"] for line in file.read_text().splitlines())
  assert [m["role"] for m in first] == ["user", "assistant"] * 2 and second[0]["role"] == "system"
  assert first[0]["content"] == "the river and the night <|end|>" and first[2]["content"] == "and \nthen?"
  assert second[0]["content"] == "be" and second[1]["content"] == "once more" and len(second) == 3
  talks = run_lib.load_run(str(talker), mesh=one_device()).in_conversation()
  want = Sampler(talks, Sampling(max_tokens=9, temperature=0.8), one_device())([first[:1]], 1, 3)[0]
  assert first[1]["content"] == want.text
  last, total = re.findall(
    r"^(?:last answer|all 2): (\d+) tokens in (\d+) passes.*drafted tokens.*; (\d+) tokens of prompts",
    done.stdout,
    re.M,
  )
  assert int(last[2]) == int(total[2]) == 32 and int(total[0]) > int(last[0])  # the first turn's page was there
  assert done.stderr.splitlines() == [
    "evo_jax: /free: there is no answer yet",
    "evo_jax: /mode best: is not one of ar, flow, adaptive, verify; it is verify",
    "evo_jax: /nothing: is not one of /reset, /system, /mode, /free, /save, /help, /quit",
    "evo_jax: /save x.txt: is no name of a .jsonl file",
  ]
  assert_refused(call("evo_jax.chat", f"--workdir={talker}", "--seed=-1"), "--seed=-1: is not in [0, 2^32)")


@pytest.mark.slow
def test_a_conversation_on_several_devices(talker):
  done = run("evo_jax.chat", f"--workdir={talker}", "--seed=3", "--max_tokens=9", devices=2, input="the river\n/free\n")
  assert done.returncode == 0 and "last answer: 9 tokens in 9 passes" in done.stdout, done.stderr


def test_ctrl_c_stops_an_answer_and_not_the_conversation(talker, monkeypatch, capsys):
  """An answer that is stopped stays as far as it came."""
  from evo_jax import chat

  class Stopped:
    shared, cancelled = 0, False

    def __iter__(self):
      yield "so \x1b[2Jfar"
      raise KeyboardInterrupt

    def cancel(self):
      Stopped.cancelled = True

  asked = []
  writer = mock.Mock(begin=lambda messages: (asked.append([*messages]), Stopped())[1])
  lines = iter(["one", KeyboardInterrupt, "two", EOFError])

  def read(prompt):
    line = next(lines)
    if isinstance(line, str):
      return line
    raise line

  monkeypatch.setattr("builtins.input", read)
  chat._Conversation(writer, "").run()
  assert Stopped.cancelled and [m["content"] for m in asked[1]] == ["one", "so \x1b[2Jfar", "two"]
  assert capsys.readouterr().out == "so \ufffd[2Jfar\n" * 2  # nothing that a model writes moves the cursor


@pytest.mark.extended
def test_the_harness_asks_the_server(server_of_its_own, tmp_path):
  """`lm_eval --model local-completions`: log-likelihoods, rolling ones and texts, with the server's tokenizer."""
  pytest.importorskip("lm_eval")
  pytest.importorskip("tenacity")  # of lm_eval[api]
  server = server_of_its_own
  task = tmp_path / "tasks"
  task.mkdir()
  rows = [{"q": q, "c": ["a river", "of time", "x"], "a": 0} for q in ("the", "and the night", "flow of")]
  (task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  common = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {task / "rows.jsonl"}}}}}
test_split: test
"""
  choice = """output_type: multiple_choice
doc_to_text: q
doc_to_choice: c
doc_to_target: a
metric_list: [{metric: acc}]
"""
  texts = """output_type: generate_until
doc_to_text: q
doc_to_target: q
generation_kwargs: {max_gen_toks: 8, until: ["zz"]}
metric_list: [{metric: exact_match}]
"""
  rolling = """output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: q
metric_list: [{metric: word_perplexity}]
"""
  for name, rest in (("choice", choice), ("texts", texts), ("rolling", rolling)):
    (task / f"{name}.yaml").write_text(f"task: tiny_{name}\n{common}{rest}")
  arguments = f"model=tiny,base_url={server.url}/v1/completions,num_concurrent=2,tokenized_requests=True"
  arguments += f",max_length=100,auth_token={KEY}"
  command = ["-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--include_path", str(task)]
  command += ["--tasks", "tiny_choice,tiny_texts,tiny_rolling", "--output_path", str(tmp_path / "out"), "--log_samples"]
  variables = environment() | {"OPENAI_API_KEY": KEY, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
  done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, cwd=tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  (result,) = tmp_path.glob("out/**/results_*.json")
  assert set(json.loads(result.read_text())["results"]) == {"tiny_choice", "tiny_texts", "tiny_rolling"}
  (samples,) = tmp_path.glob("out/**/samples_tiny_choice_*.jsonl")
  for line in samples.read_text().splitlines():
    sample = json.loads(line)
    context = server.http.post("/tokenize", json={"prompt": sample["doc"]["q"]}).json()["tokens"]
    for given, (found,) in zip(sample["doc"]["c"], sample["resps"]):
      whole = server.http.post("/tokenize", json={"prompt": f"{sample['doc']['q']} {given}"}).json()["tokens"]
      body = {"prompt": [whole], "max_tokens": 0, "echo": True, "logprobs": 1}
      echoed = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
      assert float(found[0]) == pytest.approx(sum(echoed[len(context) :]), abs=1e-3)


@pytest.fixture
def server_of_its_own(talker):
  server = Server(talker)
  try:
    assert server.wait()[-1] == 200
    yield server
  finally:
    server.process.kill()
    server.process.communicate()


CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVE = """(async () => {
  const get = id => document.getElementById(id), wait = () => new Promise(done => setTimeout(done, 20));
  const until = async test => { while (!test()) await wait(); };
  const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("change")); };
  set("key", KEY);
  await until(() => get("mode").children.length == 3);
  const found = {models: [...get("mode").children].map(c => c.value), traces: get("trace").checked};
  set("mode", "adaptive"); get("threshold").value = "2"; get("most").value = "20"; get("seed").value = "3";
  const send = async text => {
    get("prompt").value = text;
    get("send").click();
    await until(() => !get("send").disabled);
  };
  await send("<b>of</b>");
  found.talk = [...get("talk").children].map(c => [c.className, c.textContent]);
  found.markup = get("talk").querySelectorAll("b").length;
  found.facts = get("facts").textContent;
  found.live = get("live").textContent;
  found.passes = get("passes").children.length;
  set("kind", "text");
  await send("the");
  found.text = get("text").textContent; found.error = get("error").textContent;
  get("most").value = "1000";
  await send("the");
  found.refused = get("error").textContent;
  return JSON.stringify(found);
})()"""


@pytest.mark.extended
@pytest.mark.skipif(CHROME is None, reason="needs chromium")
def test_the_page_in_a_browser(server_of_its_own, tmp_path):
  """A headless browser is told over a pipe what to do (the DevTools protocol)."""
  commands, answers = os.pipe(), os.pipe()
  launch = 'exec "$0" --headless --no-sandbox --disable-gpu --user-data-dir="$1" --remote-debugging-pipe about:blank'
  launch += f" 3<&{commands[0]} 4>&{answers[1]}"
  browser = subprocess.Popen(["bash", "-c", launch, CHROME, str(tmp_path)], pass_fds=(commands[0], answers[1]))
  try:
    found = json.loads(drive_browser(commands[1], answers[0], server_of_its_own.url))
  finally:
    browser.kill()
    browser.wait()
  assert found.pop("markup") == 0
  check_page(found, server_of_its_own)


def drive_browser(commands, answers, url):
  """What DRIVE returns in a page."""
  with open(commands, "wb", 0) as out, open(answers, "rb", 0) as back:
    rest, number = b"", 0

    def ask(method, session=None, **params):
      nonlocal rest, number
      number += 1
      message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
      out.write(json.dumps(message).encode() + b"\0")
      while True:
        while b"\0" not in rest:
          rest += back.read(1 << 16)
        line, _, rest = rest.partition(b"\0")
        answer = json.loads(line)
        if answer.get("id") == number:
          assert "error" not in answer, answer
          return answer["result"]

    target = ask("Target.createTarget", url=url)["targetId"]
    session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    script = DRIVE.replace("KEY", json.dumps(KEY))
    loaded = f'document.readyState == "complete" && location.href.startsWith({json.dumps(url)})'
    while not ask("Runtime.evaluate", session, expression=loaded)["result"]["value"]:
      time.sleep(0.05)
    done = ask("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
    assert "exceptionDetails" not in done, done
    return done["result"]["value"]

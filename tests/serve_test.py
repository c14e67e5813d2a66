"""A server, as OpenAI's clients, a browser and Prometheus meet it; and a conversation in the terminal."""

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import ROOT, assert_refused, call, environment, run
from decode_test import one_device
import httpx
import openai
import pytest

from evo_jax import run as run_lib
from evo_jax.data.chat import ChatTokenizer
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.sampler import Sampler
from evo_jax.decoding.settings import Sampling
from evo_jax.errors import UserError
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


@pytest.fixture(scope="module")
def wanted(model):
  """What a sampler writes."""

  def write(prompt, seed, num=1, infill=False, chat=False, **fields):
    r = model.in_conversation() if chat else model
    return Sampler(r, Sampling(**fields), one_device())([prompt], num, seed, infill)

  return write


def test_it_is_ready_when_all_is_compiled(server):
  assert server.statuses[0] == 503 and server.statuses[-1] == 200
  listed = server.client.models.list().data
  assert [m.id for m in listed] == ["tiny", "gpt-tiny"] and listed[0].modes == ["ar", "adaptive", "verify"]
  assert server.client.models.retrieve("gpt-tiny").root == "tiny" and listed[0].max_model_len == 120


def test_texts_are_the_samplers(server, wanted):
  complete = server.client.completions.create
  answer = complete(model="gpt-tiny", prompt="the river", max_tokens=12, n=3, seed=5, temperature=0.8)
  want = wanted("the river", 5, 3, max_tokens=12, temperature=0.8)
  assert [c.text for c in answer.choices] == [w.text for w in want] and len({w.text for w in want}) == 3
  assert [c.finish_reason for c in answer.choices] == ["length"] * 3 and answer.model == "gpt-tiny"
  assert answer.usage.completion_tokens == sum(len(w.tokens) for w in want)
  assert answer.usage.prompt_tokens == server.http.post("/tokenize", json={"prompt": "the river"}).json()["count"]
  same = complete(
    model="tiny", prompt="the river", max_tokens=12, n=3, seed=5, temperature=0.8, extra_body={"mode": "verify"}
  )
  assert [c.text for c in same.choices] == [w.text for w in want]
  assert 0 <= same.usage.completion_tokens_details.accepted_prediction_tokens < same.usage.completion_tokens
  greedy = complete(model="tiny", prompt="a", max_tokens=9, temperature=0, extra_body={"top_k": 4})
  assert greedy.choices[0].text == wanted("a", 0, max_tokens=9, greedy=True)[0].text
  ids = server.http.post("/tokenize", json={"prompt": "the river"}).json()["tokens"]
  listed = complete(model="tiny", prompt=[ids, ids], max_tokens=12, seed=5, temperature=0.8)
  assert [c.text for c in listed.choices] == [w.text for w in want[:2]]
  jumps = complete(model="tiny", prompt="a", max_tokens=16, seed=2, extra_body={"mode": "adaptive", "threshold": 3.0})
  want = wanted("a", 2, mode="adaptive", threshold=3.0, window=16, max_tokens=16)[0]
  assert jumps.choices[0].text == want.text and jumps.usage.passes == want.passes < 16
  texts = {complete(model="tiny", prompt="a", max_tokens=12).choices[0].text for _ in range(4)}
  assert len(texts) > 1  # without a seed each is another one


def test_answers_are_the_samplers_and_special_tokens_are_text(server, wanted, model):
  answer = server.client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, seed=3)
  want = wanted(MESSAGES, 3, chat=True, max_tokens=12)[0]
  assert answer.choices[0].message.content == want.text and answer.choices[0].message.role == "assistant"
  tokenizer = ChatTokenizer(model.tokenizer)
  assert answer.usage.prompt_tokens == len(tokenizer.encode(MESSAGES)) + 1
  parts = [
    {"role": "user", "content": [{"type": "text", "text": "of <|end|> "}, {"type": "text", "text": "the night"}]}
  ]
  again = server.client.chat.completions.create(model="tiny", messages=parts, max_tokens=12, seed=3)
  assert again.choices[0].message.content == want.text
  longer = server.client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0.1)
  assert longer.usage.total_tokens > 40 and longer.choices[0].finish_reason in ("stop", "length")


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
  token = server.http.post("/tokenize", json={"prompt": "q"}).json()["tokens"][0]
  assert complete(max_tokens=5, logit_bias={str(token): 100}).choices[0].text == "qqqqq"
  end = complete(max_tokens=5, logit_bias={str(model.tokenizer.end_ids[0]): 100})
  assert end.choices[0].text == "" and end.choices[0].finish_reason == "stop" and end.usage.completion_tokens == 1


def test_log_probabilities_are_scores(server, model):
  """Of the prompt, too: what the harness asks for. Both forms name the same tokens."""
  ids = server.http.post("/tokenize", json={"prompt": "the river runs"}).json()["tokens"]
  complete = lambda prompt, **fields: server.client.completions.create(model="tiny", prompt=prompt, **fields)
  begin = model.tokenizer.begin_id
  found = complete([[begin, *ids]], max_tokens=1, logprobs=1, echo=True, temperature=0).choices[0].logprobs
  with Engine(model, 1, context=64, mesh=one_device()) as engine:
    score = engine.score([], ids)
  assert found.token_logprobs[0] is None and len(found.tokens) == 1 + len(ids) + 1
  assert found.token_logprobs[1:-1] == pytest.approx(score.log_p.tolist(), abs=1e-4)
  greedy = [log_p == max(top.values()) for log_p, top in zip(found.token_logprobs[1:], found.top_logprobs[1:])]
  assert greedy[:-1] == score.greedy.tolist() and greedy[-1]
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


def test_a_gap_is_filled(server, wanted):
  answer = server.client.completions.create(model="tiny", prompt="the [...] ", suffix=" runs", max_tokens=7, seed=6)
  with Engine(
    wanted.__closure__[0].cell_contents, 1, modes=[Sampling(mode="adaptive", window=16)], infill=True
  ) as engine:
    r = engine.run
    prompt = [*r.tokenizer.encode("the [...] ").tolist(), *[None] * 7, *r.tokenizer.continuing.encode(" runs").tolist()]
    want = engine.submit(prompt, Sampling(mode="adaptive", window=16), seed=6, infill=True).result()
  assert answer.choices[0].text == r.tokenizer.continuing.decode(want.tokens)
  assert answer.usage.completion_tokens == len(want.tokens) <= 7


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
]
BAD_CHATS = [
  ({"messages": []}, "messages: is no list of messages", "messages"),
  ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: is not one of", "messages"),
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
      done = server.http.post(path, json={"model": "tiny", **given, **fields})
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
  assert server.metric("unfinished_texts") == 6 and server.metric("requests_total", status="429") >= 1
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

# ruff: noqa: E501 (markup)
"""The page at `/`: one file without outer resources, in which what the model writes is text and never markup."""

import base64
import hashlib

_STYLE = """
:root{--bg:#fff;--ink:#1a1a1a;--dim:#777;--line:#d8d8d8;--jump:#1f6fd0;--fix:#128a3f;--hot:200,60,30;--soft:#f3f3f3;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e8e8e8;--dim:#8b8f96;--line:#353a40;--jump:#6cb0ff;--fix:#4fd07f;--hot:235,105,60;--soft:#1e2125;--bad:#ff8a80}}
body{background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif;margin:1.2em auto;max-width:1200px;padding:0 1em}
h1{font-size:1.25em;margin:.2em 0}.dim,label{color:var(--dim)}label{margin-right:1em;white-space:nowrap;display:inline-block}
input,select,textarea,button{font:inherit;color:var(--ink);background:var(--soft);border:1px solid var(--line);border-radius:4px;padding:.2em .4em}
input[type=number]{width:5.5em}textarea{width:100%;box-sizing:border-box;height:5em}#error{color:var(--bad);white-space:pre-wrap}
#talk div,#text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);padding:.6em .8em;border-radius:6px;margin:.5em 0}#talk .user{margin-left:15%;border:1px solid var(--line);background:none}
#live span{border-radius:2px}#live .jump{box-shadow:inset 0 -2px var(--jump)}#live .fix{box-shadow:inset 0 -2px var(--fix)}#live .draft{border:1px dashed var(--dim)}
#box{overflow:auto;max-height:60vh;border:1px solid var(--line);margin:.8em 0}
table{border-collapse:separate;border-spacing:0;font:12px/1 ui-monospace,Menlo,Consolas,monospace}
td,th{min-width:1.4em;height:1.6em;padding:0 2px;text-align:center;box-sizing:border-box;border:1px solid transparent;white-space:pre}
th{background:var(--soft);font-weight:400;color:var(--dim);position:sticky;left:0}td.jump{border:2px solid var(--jump);font-weight:700}td.fix{border:2px solid var(--fix);font-weight:700}td.draft{border:1px dashed var(--dim)}td.old{color:var(--dim)}
"""

_SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id);
const make = (parent, tag, text, kind) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (kind) e.className = kind;
  parent.append(e);
  return e;
};
const visible = piece => piece.replace(/ /g, "\u2423").replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5");
const EVENTS = ["", "jump", "draft", "fix"], MOST_ROWS = 400;
let messages = [], running = null, settled = [], cells = [];

const headers = () => {
  const key = $("key").value;
  return {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
};

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return "HTTP " + response.status; }
}

async function start() {
  try {
    const response = await fetch("/v1/models", {headers: headers()});
    if (!response.ok) { $("error").textContent = await failure(response); return; }
    const model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("mode").replaceChildren();
    for (const mode of model.modes) make($("mode"), "option", mode).value = mode;
    $("kind").value = model.chat ? "chat" : "text";
    $("kind").disabled = !model.chat;
    $("trace").checked = model.traces;
    $("trace").disabled = !model.traces;
    $("error").textContent = "";
    show();
  } catch (error) { $("error").textContent = String(error); }
}

function show() {
  const chat = $("kind").value == "chat";
  $("talk").hidden = $("reset").hidden = !chat;
  $("text").hidden = chat;
  $("thresholds").hidden = $("mode").value != "adaptive";
}

function request() {
  const chat = $("kind").value == "chat";
  const body = {stream: true, stream_options: {include_usage: true}, mode: $("mode").value, temperature: Number($("temperature").value)};
  body[chat ? "max_completion_tokens" : "max_tokens"] = Number($("most").value);
  if ($("mode").value == "adaptive") body.threshold = Number($("threshold").value);
  if ($("seed").value != "") body.seed = Number($("seed").value);
  if ($("trace").checked) body.trace = true;
  if (chat) body.messages = messages; else body.prompt = $("prompt").value;
  return body;
}

// Calls `take` with the data of each event of a response.
async function events(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ") && part != "data: [DONE]") take(JSON.parse(part.slice(6)));
  }
}

function clear_trace() {
  settled = [];
  cells = [];
  $("live").replaceChildren();
  $("passes").replaceChildren();
}

function add_pass(step) {
  const found = new Map(step.cells.map(cell => [cell[0], cell]));
  for (const [i, t, piece, event] of step.cells) {
    while (cells.length <= i) cells.push(make($("live"), "span", ""));
    cells[i].textContent = piece;
    cells[i].className = EVENTS[event];
    cells[i].style.background = `rgba(var(--hot),${t})`;
    cells[i].title = `t = ${t}`;
  }
  if ($("passes").childElementCount < MOST_ROWS) {
    const row = make($("passes"), "tr");
    make(row, "th", step.pass);
    for (let i = 0; i < cells.length; i++) {
      const cell = found.get(i);
      if (!cell) { make(row, "td", settled[i] ? visible(settled[i]) : "", "old"); continue; }
      const td = make(row, "td", visible(cell[2]), EVENTS[cell[3]]);
      td.style.background = `rgba(var(--hot),${cell[1]})`;
      td.title = `pass ${step.pass}, token ${i + 1}: ${JSON.stringify(cell[2])}, t = ${cell[1]}`;
    }
  }
  for (const [i, t, piece] of step.cells) if (t <= 0) settled[i] = piece;
}

async function send() {
  const chat = $("kind").value == "chat";
  let out = $("text");
  if (chat) {
    messages.push({role: "user", content: $("prompt").value});
    make($("talk"), "div", $("prompt").value, "user");
    out = make($("talk"), "div", "", "assistant");
  }
  const asked = request();
  let answer = "", usage = null;
  out.textContent = chat ? "" : asked.prompt;
  $("error").textContent = $("facts").textContent = "";
  clear_trace();
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const began = performance.now();
  try {
    const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {method: "POST", headers: headers(), body: JSON.stringify(asked), signal: running.signal});
    if (!response.ok) throw new Error(await failure(response));
    await events(response, event => {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      for (const choice of event.choices) {
        const content = chat ? choice.delta : choice, piece = chat ? content.content : content.text;
        answer += piece || "";
        out.textContent = (chat ? "" : asked.prompt) + answer;
        for (const step of choice.trace || []) add_pass(step);
      }
    });
    if (chat) $("prompt").value = "";
  } catch (error) {
    if (error.name != "AbortError") $("error").textContent = error.message;
  }
  if (chat) {
    if (answer) messages.push({role: "assistant", content: answer});
    else { messages.pop(); out.previousSibling.remove(); out.remove(); }
  }
  if (usage) {
    const free = (usage.completion_tokens_details || {}).accepted_prediction_tokens;
    $("facts").textContent = `${usage.completion_tokens} tokens in ${usage.passes} passes, ${((performance.now() - began) / 1000).toFixed(2)} s` + (free === undefined ? "" : `; ${free} drafted tokens were accepted`);
  }
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

$("send").onclick = send;
$("stop").onclick = () => running && running.abort();
$("reset").onclick = () => { messages = []; $("talk").replaceChildren(); clear_trace(); };
$("kind").onchange = $("mode").onchange = show;
$("key").onchange = start;
$("prompt").onkeydown = event => { if (event.key == "Enter" && (event.ctrlKey || event.metaKey) && !running) send(); };
start();
"""

PAGE = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>evo_jax</title><style>{_STYLE}</style></head><body>
<h1 id="model">evo_jax</h1>
<p>
<label>ask for <select id="kind"><option value="chat">an answer</option><option value="text">a continuation</option></select></label>
<label>mode <select id="mode"></select></label>
<label id="thresholds" hidden>threshold <input id="threshold" type="number" min="0" step="0.05" value="0.25"></label>
<label>temperature <input id="temperature" type="number" min="0" step="0.1" value="0.7"></label>
<label>tokens <input id="most" type="number" min="1" value="100"></label>
<label>seed <input id="seed" type="number" min="0"></label>
<label><input id="trace" type="checkbox"> show how it matures</label>
<label>key <input id="key" type="password" autocomplete="off" size="8"></label>
</p>
<div id="talk"></div>
<textarea id="prompt" aria-label="prompt" placeholder="Ctrl-Enter sends"></textarea>
<p><button id="send">Send</button> <button id="stop" disabled>Stop</button> <button id="reset">New conversation</button> <span id="facts" class="dim"></span></p>
<p id="error" role="alert"></p>
<div id="text" hidden></div>
<h1>How it matures</h1>
<p class="dim">Each row is a pass, each column a token; the colour is t, the share of its uncertainty that is left. Framed: committed by this pass (blue; green where another token was most probable before); dashed: drafted.</p>
<p id="live"></p>
<div id="box"><table><tbody id="passes"></tbody></table></div>
<script>{_SCRIPT}</script></body></html>
"""


def _hash(text: str) -> str:
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
  "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; script-src {_hash(_SCRIPT)}; "
  f"style-src {_hash(_STYLE)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
}

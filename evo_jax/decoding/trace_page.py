# ruff: noqa: E501 (markup)
"""The page of a trace: a template, whose @@NAMES@@ `trace.render_page` fills."""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>@@TITLE@@</title><style>
:root{--bg:#fff;--ink:#1a1a1a;--dim:#888;--line:#d8d8d8;--jump:#1f6fd0;--fix:#128a3f;--hot:200,60,30;--soft:#f3f3f3}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e8e8e8;--dim:#8b8f96;--line:#353a40;--jump:#6cb0ff;--fix:#4fd07f;--hot:235,105,60;--soft:#1e2125}}
body{background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif;margin:1.2em auto;max-width:1500px;padding:0 1em}
h1{font-size:1.25em;margin:.2em 0}p{margin:.4em 0;max-width:75em}.dim{color:var(--dim)}
#legend span{margin-right:1.4em;white-space:nowrap}#legend i{display:inline-block;width:1.1em;height:1.1em;vertical-align:-.2em;margin-right:.35em;box-sizing:border-box;border:1px solid var(--line)}
#legend i.scale{width:7em;background:linear-gradient(90deg,var(--bg),rgb(var(--hot)))}
.jump{border:2px solid var(--jump)!important;font-weight:700}.fix{border:2px solid var(--fix)!important;font-weight:700}.draft{border:1px dashed var(--dim)!important}
#box{overflow:auto;max-height:70vh;border:1px solid var(--line);margin:.8em 0}
table{border-collapse:separate;border-spacing:0;font:12px/1 ui-monospace,Menlo,Consolas,monospace}
td,th{min-width:1.55em;height:1.6em;padding:0 2px;text-align:center;box-sizing:border-box;border:1px solid transparent;white-space:pre}
th{background:var(--soft);font-weight:400;color:var(--dim);position:sticky;z-index:1}thead th{top:0}tbody th{left:0;text-align:right;padding-right:.5em}
thead th:first-child{left:0;z-index:2}.bar{display:inline-block;height:.75em;background:var(--jump);opacity:.75;vertical-align:middle}
td.old{color:var(--dim)}pre{white-space:pre-wrap;background:var(--soft);padding:.7em;border-radius:4px}pre b{font-weight:400;color:var(--dim)}
</style></head><body>
<h1>@@TITLE@@</h1>
<p>Each row is one pass of the network over the text, each column a token. A cell shows the most probable token after that
pass; its colour is t, the share of its uncertainty that is left. A committed token stays as it is. @@FACTS@@.</p>
<p id="legend"><span><i class="scale"></i>t from 0 (committed) to 1 (nothing known)</span><span><i class="jump"></i>committed by this pass</span>
<span><i class="draft"></i>drafted</span><span><i class="fix"></i>committed, but another token was most probable</span></p>
<div id="box"><table><thead></thead><tbody></tbody></table></div>
<pre><b>@@PROMPT@@</b>@@TEXT@@</pre>
<script type="application/json" id="data">@@DATA@@</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const show = piece => piece.replace(/ /g, "\\u2423").replace(/\\n/g, "\\u23ce").replace(/\\t/g, "\\u21e5");
const make = (parent, tag, text) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; parent.append(e); return e; };
const head = make(document.querySelector("thead"), "tr");
make(head, "th", "pass");
make(head, "th", "tokens committed");
for (let i = 1; i <= data.tokens; i++) make(head, "th", i % 5 == 0 || i == 1 ? i : "");
const most = Math.max(1, ...data.settled), settled = new Array(data.tokens).fill("");
data.rows.forEach((cells, k) => {
  const row = make(document.querySelector("tbody"), "tr"), found = new Map(cells.map(c => [c[0], c]));
  make(row, "th", k + 1);
  const count = make(row, "td");
  count.style.textAlign = "left";
  const bar = make(count, "span");
  bar.className = "bar";
  bar.style.width = 5 * data.settled[k] / most + "em";
  make(count, "span", " " + data.settled[k]);
  for (let i = 0; i < data.tokens; i++) {
    const cell = make(row, "td"), c = found.get(i);
    if (!c) { if (settled[i]) { cell.textContent = show(settled[i]); cell.className = "old"; } continue; }
    const [, percent, piece, event] = c;
    cell.textContent = show(data.pieces[piece]);
    cell.className = ["", "jump", "draft", "fix"][event];
    cell.style.background = `rgba(var(--hot),${(percent / 100).toFixed(2)})`;
    cell.title = `pass ${k + 1}, token ${i + 1}: ${JSON.stringify(data.pieces[piece])}, t = ${(percent / 100).toFixed(2)}`;
    if (percent == 0) settled[i] = data.pieces[piece];
  }
});
</script></body></html>
"""

"""A soak of the server: random requests of all kinds for some minutes, and what is left of memory and order after it.

  pip install -e '.[serve,test]'
  python -m experiments.serve_soak --workdir=runs/tiny --minutes=30 [--requests=5000] [--kill]

Clients ask with random prompts, lengths, stop strings, seeds and modes, streamed or not; some leave in the middle, some
ask for what cannot be, some connect anew each time. It counts answers by status, and says whether any were lost (no
answer, or one that is cut off), whether a random 5 % of the texts are the same when each is asked for alone at the end,
and how memory and compilations went. --kill ends the server by SIGKILL in the middle and starts it again: requests on
their way are then lost, and nothing else.
"""

import asyncio
from collections import Counter
import contextlib
import json
import os
import signal
import time
from typing import Any

from absl import flags
import httpx
import numpy as np

from evo_jax import cli
from evo_jax.errors import UserError
from experiments import common
from experiments.serve_speed import ServerProcess, serve_command

_AGAIN = 0.05  # of finished texts
_REPORTS = 20
_WORDS = ("the", "river", "runs", "def main():", "return", "x = 1", "\n", "and of", "time", "is known")
_BAD = (
  {"temperature": -1},
  {"prompt": [10**9]},
  {"max_tokens": 10**6},
  {"presence_penalty": 2},
  {"no_such_field": 1},
  {"mode": "no such mode"},
)


class Soak:
  """Random requests, and what became of them."""

  def __init__(self, server: ServerProcess, modes: list[str], longest: int, seed: int):
    self.server, self._modes, self._longest = server, modes, longest
    self._rng = np.random.default_rng(seed)
    self.counts: Counter[str] = Counter()
    self.kept: list[tuple[dict[str, Any], str]] = []
    self.killed = 0  # how often the server was
    self.chats = False

  def body(self) -> dict[str, Any]:
    """A request that can be."""
    rng, mode = self._rng, str(self._rng.choice(self._modes))
    prompt = " ".join(rng.choice(_WORDS, rng.integers(0, self._longest // 16)))
    body = {
      "prompt": prompt,
      "max_tokens": int(rng.integers(1, self._longest // 2)),
      "temperature": float(rng.choice([0.0, 0.7, 1.0])),
      "seed": int(rng.integers(2**32)),
      "mode": mode,
      "stream": bool(rng.integers(2)),
    }
    if rng.integers(3) == 0:
      body["stop"] = [["e", "\n\n", "ab"][rng.integers(3)]]
    if rng.integers(6) == 0:
      body |= {"logprobs": int(rng.integers(0, 6)), "echo": bool(rng.integers(2))}
    if rng.integers(8) == 0:
      body["n"] = 2
    if self.chats and rng.integers(3) == 0:
      body = {name: value for name, value in body.items() if name not in ("prompt", "logprobs", "echo")}
      body["messages"] = [{"role": "user", "content": prompt or "a"}]
    return body

  async def work(self, until: float, least: int) -> None:
    """One client, until it is late and all together have asked often enough."""
    client = None
    while time.monotonic() < until or sum(self.counts.values()) < least:
      if client is None or self._rng.integers(10) == 0:  # connects anew
        if client is not None:
          await client.aclose()
        client = httpx.AsyncClient(base_url=self.server.url, timeout=600)
      await self._one(client)
    await client.aclose()

  async def _one(self, client: httpx.AsyncClient) -> None:
    kind, body, killed = self._rng.random(), self.body(), self.killed
    try:
      if kind < 0.05:
        bad = {**body, **_BAD[self._rng.integers(len(_BAD))]}
        done = await client.post(_path(body), json=bad)
        self.counts["refused" if done.status_code == 400 else f"bad request: {done.status_code}"] += 1
      elif kind < 0.12:
        await self._leave(client, body)
      else:
        status, text = await complete(client, body)
        self.counts["done" if status == 200 else str(status)] += 1
        if status == 429:
          await asyncio.sleep(0.2)
        if status == 200 and self._rng.random() < _AGAIN:
          self.kept.append((body, text))
    except (httpx.HTTPError, ValueError) as error:
      # A server that was killed had these on their way, or is not there yet.
      self.counts["killed" if self.killed != killed or self.server.process.poll() is not None else "lost"] += 1
      if self.killed == killed and self.server.process.poll() is None:
        print(f"lost: {type(error).__name__}: {error}; {json.dumps(body)}", flush=True)
      await asyncio.sleep(0.5)

  async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Goes away before the end."""
    with contextlib.suppress(TimeoutError, httpx.TimeoutException):
      async with asyncio.timeout(float(self._rng.uniform(0.001, 0.3))):
        async with client.stream("POST", _path(body), json=body) as response:
          async for _ in response.aiter_lines():
            if self._rng.integers(4) == 0:
              break
    self.counts["left"] += 1


def _path(body: dict[str, Any]) -> str:
  return "/v1/chat/completions" if "messages" in body else "/v1/completions"


async def complete(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str]:
  """The status, and the texts of an answer as one string. Raises ValueError for a stream that is cut off."""
  if not body["stream"]:
    done = await client.post(_path(body), json=body)
    choices = done.json().get("choices", [])
    return done.status_code, json.dumps([c["message"]["content"] if "message" in c else c["text"] for c in choices])
  texts, ended = [""] * body.get("n", 1), False
  async with client.stream("POST", _path(body), json=body) as response:
    if response.status_code != 200:
      await response.aread()
      return response.status_code, ""
    async for line in response.aiter_lines():
      ended |= line == "data: [DONE]"
      if not line.startswith("data: {"):
        continue
      event = json.loads(line[6:])
      if "error" in event:
        raise ValueError(event["error"]["message"])
      for choice in event["choices"]:
        texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
  if not ended:
    raise ValueError("the stream was cut off")
  return 200, json.dumps(texts)


async def run_soak(soak: Soak, args: flags.FlagValues, restart) -> list[dict[str, Any]]:
  """All clients; and reports on the way."""
  began, reports = time.monotonic(), []
  until = began + 60 * args.minutes
  clients = [asyncio.create_task(soak.work(until, args.requests)) for _ in range(args.clients)]
  kill_at = began + 30 * args.minutes if args.kill else float("inf")
  while not all(client.done() for client in clients):
    await asyncio.wait(clients, timeout=max(60 * args.minutes / _REPORTS, 1.0))
    if time.monotonic() > kill_at:
      kill_at, soak.killed = float("inf"), soak.killed + 1
      soak.server.process.send_signal(signal.SIGKILL)
      soak.server.process.wait()
      soak.server = await asyncio.to_thread(restart)
      soak.killed += 1
    report = {
      "minutes": (time.monotonic() - began) / 60,
      "requests": sum(soak.counts.values()),
      "mib": soak.server.mib,
      "compilations": await asyncio.to_thread(soak.server.metric, "compilations"),
      **soak.counts,
    }
    reports.append(report)
    print(", ".join(f"{name} {value:.6g}" for name, value in report.items()), flush=True)
  for client in clients:
    client.result()
  return reports


async def ask_again(soak: Soak) -> int:
  """How many of the texts that were kept differ when they are asked for alone."""
  different = 0
  async with httpx.AsyncClient(base_url=soak.server.url, timeout=600) as client:
    for body, text in soak.kept:
      status, again = await complete(client, body)
      if (status, again) != (200, text):
        different += 1
        print(f"differs ({status}): {json.dumps(body)}\n  {text}\n  {again}", flush=True)
  return different


def main() -> None:
  args = flags.FLAGS
  if not args.workdir:
    raise UserError("--workdir is needed")
  more = (f"--queue={args.queue}", "--notraces", *([f"--context={args.context}"] if args.context else []))
  command = serve_command(args.workdir, args.rows, args.modes, *more)

  def start(port=0):
    server = ServerProcess(command, args.log, port)
    server.wait()
    return server

  server = start()
  model = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]
  soak = Soak(server, model["modes"], min(model["max_model_len"], 512), args.seed)
  soak.chats = model["chat"]
  try:
    reports = asyncio.run(run_soak(soak, args, lambda: start(server.port)))
    different = asyncio.run(ask_again(soak))
    left = {name: soak.server.metric(name) for name in ("unfinished_texts", "running_texts", "waiting_texts")}
    compilations = soak.server.metric("compilations")
  finally:
    status = soak.server.stop()
    if soak.server.process.poll() is None:
      os.kill(soak.server.process.pid, signal.SIGKILL)
  result = {
    "reports": reports,
    "again": len(soak.kept),
    "different": different,
    "lost": soak.counts["lost"],
    "left": left,
    "compilations": compilations,
    "exit_status": status,
  }
  print(
    f"{sum(soak.counts.values())} requests; {soak.counts['lost']} lost; {len(soak.kept)} texts asked for again, alone: "
    f"{different} differ; {compilations:g} compilations; exit status {status}"
  )
  common.write_result("serve_soak", result, common.results_folder(args.output))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "The model's work directory.")
  flags.DEFINE_float("minutes", 30.0, "How long clients go on.", lower_bound=0.0)
  flags.DEFINE_integer("requests", 5000, "So many requests at least.", lower_bound=1)
  flags.DEFINE_integer("clients", 12, "Clients at once.", lower_bound=1)
  flags.DEFINE_integer("rows", 8, "Rows of the server.", lower_bound=1)
  flags.DEFINE_integer("queue", 16, "Texts that may wait.", lower_bound=0)
  flags.DEFINE_integer("context", 0, "Tokens of the longest text; 0: what the model reads.", lower_bound=0)
  flags.DEFINE_string("modes", "ar,verify,adaptive,flow", "Modes.")
  flags.DEFINE_bool("kill", False, "Kill the server in the middle, and start it again.")
  flags.DEFINE_integer("seed", 0, "Seed of the requests.")
  flags.DEFINE_string("log", "", "File for what the server prints.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)

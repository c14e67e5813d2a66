"""A server beside `transformers serve`: requests a second, seconds to the first token and between tokens.

  pip install -e '.[hf,serve,test]' fastapi
  python -m experiments.serve_speed --workdir=runs/smollm2 --conversations=FILE.jsonl --source=FOLDER [--clients=1,4]

Each client asks one question after another, the first messages of conversations, and reads the streamed answer of
--tokens tokens at most, greedily. `ar` and `verify` are modes of one server; transformers' has the same weights, which
`python -m evo_jax.convert --workdir=runs/smollm2 --export=FOLDER` wrote, in float32, and answers one request after
another, or, `continuous`, many at once (--continuous-batching). For each number of clients all take several turns, so
that what else the machine does meets them alike; the servers whose turn it is not are stopped meanwhile.

A server sends several tokens in one event, where it wrote them in one look, so two things are measured: `token`, the
seconds from a request's first to its last event for each token but the first event's; and `gap`, the seconds between
events, what a reader waits.
"""

import asyncio
import contextlib
import json
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from absl import flags
import httpx
import numpy as np

from evo_jax import cli
from evo_jax.errors import UserError
from experiments import common

_LONGEST = 1000  # characters of a question
_START = 600  # seconds in which a server must be ready


class ServerProcess:
  """A server in a process of its own."""

  def __init__(self, command: list[str], log: str = "", port: int = 0):
    """command: without --port. log: file for what it prints; default: nowhere. port: default: one that is free."""
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.port = port or free.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    self._log = open(log, "ab") if log else None  # noqa: SIM115 (as long as the process)
    out = self._log or subprocess.DEVNULL
    self.process = subprocess.Popen([*command, f"--port={self.port}"], stdout=out, stderr=out)

  def wait(self) -> None:
    """Until it is ready. Raises UserError where it ends, or takes too long."""
    end = time.monotonic() + _START
    while time.monotonic() < end and self.process.poll() is None:
      with contextlib.suppress(httpx.HTTPError):
        if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
          return
      time.sleep(0.2)
    raise UserError(f"{' '.join(map(str, self.process.args))}: is not ready")

  def metric(self, name: str) -> float:
    """The sum of a metric's values."""
    lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"evo_jax_{name} ", f"evo_jax_{name}{{")))

  @property
  def mib(self) -> float:
    """Its memory."""
    status = Path(f"/proc/{self.process.pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

  def stop(self, seconds: float = 60) -> int:
    """Ends it by SIGTERM, or kills it; its exit status."""
    self.process.terminate()
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      return self.process.wait()


def serve_command(workdir: str, rows: int, modes: str, *more: str) -> list[str]:
  first, *others = modes.split(",")
  module = [sys.executable, "-m", "evo_jax.serve", f"--workdir={workdir}"]
  return [*module, f"--rows={rows}", f"--mode={first}", f"--modes={','.join(others)}", *more]


def read_questions(path: str) -> list[str]:
  """The first messages of conversations. Raises UserError."""
  try:
    rows = [json.loads(line)["messages"][0]["content"] for line in common.read_lines(path)]
  except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
    raise UserError(f"--conversations={path}: {type(error).__name__}: {error}") from error
  return [question for question in rows if len(question) <= _LONGEST]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
  """One streamed answer: its text, and when each event with text came."""
  began, times, text, tokens = time.perf_counter(), [], "", None
  async with client.stream("POST", "/v1/chat/completions", json=body) as response:
    if response.status_code != 200:
      raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
    async for line in response.aiter_lines():
      if not line.startswith("data: {"):
        continue
      event = json.loads(line[6:])
      tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
      if piece := "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", ())):
        times.append(time.perf_counter() - began)
        text += piece
  return {"seconds": time.perf_counter() - began, "times": times, "text": text, "tokens": tokens or len(times)}


async def load(
  url: str, body: dict[str, Any], questions: list[str], clients: int
) -> tuple[float, list[dict[str, Any]]]:
  """`clients` clients, which ask all questions together: the seconds that it took, and the answers."""
  left, answers = iter(questions), []
  limits = httpx.Limits(max_connections=clients)
  async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:

    async def work():
      for question in left:
        answers.append(await ask(client, {**body, "messages": [{"role": "user", "content": question}]}))

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return time.perf_counter() - began, answers


def summarize(name: str, clients: int, turns: list[tuple[float, list[dict[str, Any]]]]) -> dict[str, Any]:
  """Rates and times over all turns of a way."""
  answers = [answer for _, of_turn in turns for answer in of_turn]
  seconds = sum(seconds for seconds, _ in turns)
  with_text = [a for a in answers if a["times"]]
  spread = lambda values: {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99))}
  each = [(a["times"][-1] - a["times"][0]) / max(a["tokens"] - 1, 1) for a in with_text if len(a["times"]) > 1]
  gaps = [gap for a in with_text for gap in np.diff(a["times"]).tolist()]
  return {
    "way": name,
    "clients": clients,
    "requests": len(answers),
    "seconds": seconds,
    "requests_per_second": len(answers) / seconds,
    "requests_per_second_by_turn": [len(of_turn) / seconds for seconds, of_turn in turns],
    "tokens_per_second": sum(a["tokens"] for a in answers) / seconds,
    "first": spread([a["times"][0] for a in with_text]) if with_text else None,
    "token": spread(each) if each else None,
    "gap": spread(gaps) if gaps else None,
  }


def split_turns(questions: list[str], clients: int) -> list[list[str]]:
  """What is asked in each turn: two questions a client, or one where clients are many; in at least two turns, and as
  many as a dozen questions need."""
  size = min(2 * clients, max(clients, 32))
  count = min(max(2, 12 // size), max(len(questions) // size, 1))
  return [questions[i * size : (i + 1) * size] for i in range(count)]


def measure(
  ways: dict[str, tuple[list[str], dict[str, Any]]], questions: list[str], clients: list[int], log: str
) -> list[dict[str, Any]]:
  """Every number of clients at each server, in turns; the first questions warm it up. ways: command, and what requests
  have in common."""
  servers: dict[str, ServerProcess] = {}
  try:
    for name, (command, body) in ways.items():  # one after another: ours takes the time of passes when it starts
      servers[name] = server = ServerProcess(command, log)
      server.wait()
      asyncio.run(load(server.url, body, questions[:2], 1))
      server.process.send_signal(signal.SIGSTOP)
    rows = []
    for number in clients:
      turns = {name: [] for name in ways}
      for of_turn in split_turns(questions, number):
        for name, (_, body) in ways.items():
          servers[name].process.send_signal(signal.SIGCONT)
          turns[name].append(asyncio.run(load(servers[name].url, body, of_turn, number)))
          servers[name].process.send_signal(signal.SIGSTOP)
      for name in ways:
        rows.append(summarize(name, number, turns[name]))
        print(_line(rows[-1]), flush=True)
    return rows
  finally:
    for server in servers.values():
      server.process.send_signal(signal.SIGCONT)
      server.stop()


def _line(row: dict[str, Any]) -> str:
  times = (row["first"], row["token"], row["gap"])
  shown = "".join(f"{t['median']:>10.3f}{t['p99']:>8.3f}" if t else f"{'':>18}" for t in times)
  return (
    f"{row['way']:<14}{row['clients']:>8}{row['requests_per_second']:>10.3f}{row['tokens_per_second']:>10.1f}{shown}"
  )


def find_ways(args: flags.FlagValues, clients: list[int]) -> dict[str, tuple[list[str], dict[str, Any]]]:
  """By name: a server's command, and what its requests have in common."""
  body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": args.tokens, "temperature": 0}
  more = (f"--queue={max(clients)}", f"--passes={args.passes}", f"--context={args.context}", "--notraces")
  ways = {mode: (serve_command(args.workdir, args.rows, mode, *more), body) for mode in args.modes.split(",")}
  if args.source:
    source = str(Path(args.source).resolve())
    command = [str(Path(sys.executable).with_name("transformers")), "serve", source]
    command += ["--device=cpu", "--dtype=float32", "--host=127.0.0.1"]
    for name, flag in (("transformers", []), ("continuous", ["--continuous-batching"])):
      ways[name] = (command + flag, body | {"model": source})
  return ways


def main() -> None:
  args = flags.FLAGS
  if not args.workdir or not args.conversations:
    raise UserError("--workdir and --conversations are needed")
  clients, questions = [int(number) for number in args.clients.split(",")], read_questions(args.conversations)
  head = f"{'way':<14}{'clients':>8}{'req/s':>10}{'tok/s':>10}"
  print(head + "".join(f"{name:>10}{'p99':>8}" for name in ("first s", "token s", "gap s")), flush=True)
  rows = measure(find_ways(args, clients), questions, clients, args.log)
  common.write_result(
    "serve_speed", {"rows": args.rows, "tokens": args.tokens, "rates": rows}, common.results_folder(args.output)
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "The model's work directory.")
  flags.DEFINE_string("conversations", "", "A .jsonl file with `messages`.")
  flags.DEFINE_string("source", "", "The model's exported folder, for transformers; default: without it.")
  flags.DEFINE_string("clients", "1,4,16,64", "Clients at once.")
  flags.DEFINE_string("modes", "ar,verify", "Modes.")
  flags.DEFINE_integer("rows", 16, "Rows of the server.", lower_bound=1)
  flags.DEFINE_integer("passes", 2, "Passes between looks of the server.", lower_bound=1)
  flags.DEFINE_integer("context", 512, "Tokens of the longest text.", lower_bound=1)
  flags.DEFINE_integer("tokens", 64, "Tokens of an answer at most.", lower_bound=2)
  flags.DEFINE_string("log", "", "File for what the servers print.")
  flags.DEFINE_string("output", "", "Folder for the JSON; default: experiments/results.")
  cli.run(main)

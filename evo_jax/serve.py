"""Serves a trained model to OpenAI's clients.

  pip install -e '.[serve]'
  python -m evo_jax.serve --workdir=DIR [--port=8000] [--mode=verify] [--modes=ar,adaptive] [--rows=32]

  curl 127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def ", "max_tokens": 20}'

There are /v1/models, /v1/completions and /v1/chat/completions, /health and /metrics, and a page at /. All requests are
in one engine (`evo_jax.decoding.engine`), whose programs are compiled at the start: until then /health answers 503. The
first SIGTERM or Ctrl-C lets what runs finish, the second ends at once. `evo_jax/serving/README.md` has the fields.
"""

import ipaddress
import os
from pathlib import Path
import signal
import sys

from absl import flags
import jax

from evo_jax import cli
from evo_jax.decoding import steps
from evo_jax.decoding.device import out_of_memory_as
from evo_jax.decoding.engine import Engine, default_pass_rows
from evo_jax.decoding.settings import DEFAULT_PATH, MODES, Sampling, of_all_thresholds
from evo_jax.errors import UserError
from evo_jax.run import Run, fingerprint, load_run

_KEY = "EVO_JAX_API_KEY"


def main() -> None:
  args = flags.FLAGS
  if not args.workdir:
    raise UserError("--workdir is needed")
  names = _modes(args)
  server, service_lib = _serving()
  cli.join_processes()
  mesh = cli.make_mesh()
  listening = server.open_socket(args.host, args.port) if jax.process_index() == 0 else None
  run = load_run(args.workdir, args.step, mesh)
  modes, mark = {name: _sampling(name, args) for name in names}, fingerprint(run)
  make_engine = lambda: _make_engine(args, run, mesh, list(modes.values()))
  if listening is None:
    for number in (signal.SIGINT, signal.SIGTERM):  # what runs is finished: process 0 says when all is over
      signal.signal(number, signal.SIG_IGN)
    make_engine().follow()
    return
  key = args.api_key or os.environ.get(_KEY, "")
  limits = service_lib.Limits(args.queue, args.timeout, args.max_body << 20, args.drain, key)
  models = list(dict.fromkeys([args.name or Path(args.workdir).resolve().name, *args.alias]))
  service = service_lib.Service(run, modes, models, limits, args.rows, args.traces, mark)
  say = lambda line: print(f"evo_jax: {line}", file=sys.stderr, flush=True)
  where = server.address_of(listening)
  if not key and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
    say(f"--host={args.host}: others may reach this server, which has no --api_key")
  say(f"{models[0]}: compiles, then serves at {where}")
  ready = lambda: say(f"ready at {where}: modes {', '.join(modes)}; {service.engine.memory}")
  server.run_server(service, listening, make_engine, ready)


def _make_engine(args: flags.FlagValues, run: Run, mesh: jax.sharding.Mesh, modes: list[Sampling]) -> Engine:
  sizes = ("rows", "context", "cache_tokens")
  with out_of_memory_as(" ".join(f"--{name}={getattr(args, name)}" for name in sizes if getattr(args, name))):
    return Engine(
      run,
      args.rows,
      modes=[each for mode in modes for each in of_all_thresholds(mode)],
      context=args.context or None,
      cache_tokens=args.cache_tokens or None,
      infill=any(mode.mode in DEFAULT_PATH for mode in modes),
      passes=args.passes,
      pass_rows=_pass_rows(args, mesh),
      traces=args.traces,
      mesh=mesh,
    )


def _serving():
  """The packages that this command needs beside the others. Raises UserError without them."""
  try:
    from evo_jax.serving import server, service
  except ImportError as error:
    raise UserError(f"{error.name} is not installed: pip install 'evo_jax[serve]'") from error
  return server, service


def _modes(args: flags.FlagValues) -> list[str]:
  """The names of modes, the default first. Raises UserError."""
  names = list(dict.fromkeys([args.mode, *filter(None, args.modes)]))
  for name in names:
    if name not in MODES:
      raise UserError(f"--modes={','.join(args.modes)}: {name!r} is not one of {', '.join(MODES)}")
  return names


def _sampling(mode: str, args: flags.FlagValues) -> Sampling:
  """The parameters of requests that name a mode alone."""
  own = {
    "verify": {"draft": args.draft},
    "flow": {"path": args.path, "steps": args.steps, "window": args.window},
    "adaptive": {"window": args.window},
  }
  return Sampling(mode=mode, **own.get(mode, {}))


def _is_list_of_rows(values: list[str] | None) -> bool:
  return all(value.isdecimal() and int(value) > 1 for value in values or ())


def _pass_rows(args: flags.FlagValues, mesh: jax.sharding.Mesh) -> list[int]:
  """Rows of smaller passes."""
  if args.pass_rows is not None:
    return [int(number) for number in args.pass_rows]
  return default_pass_rows(args.rows, mesh)


def define_flags() -> None:
  default = Sampling()
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in: set --api_key.")
  flags.DEFINE_integer("port", 8000, "Port; 0: any that is free.", lower_bound=0, upper_bound=65535)
  flags.DEFINE_string("name", "", "The model's name; default: that of the work directory.")
  flags.DEFINE_multi_string("alias", [], "Another name of the model; may be given several times.")
  flags.DEFINE_string(
    "api_key", "", f"Key that clients must show; default: the variable {_KEY}, which ps does not list."
  )
  flags.DEFINE_enum("mode", default.mode, MODES, "Decoding mode of requests that name none.")
  flags.DEFINE_list("modes", [], "More modes that requests may name, as ar,verify,adaptive.")
  flags.DEFINE_integer("draft", default.draft, "Mode verify: drafted tokens per round; 0: by measured speed.")
  flags.DEFINE_string("path", default.path, "Mode flow: the path, as for generate.")
  flags.DEFINE_integer("steps", default.steps, "Mode flow: passes per window.", lower_bound=1)
  flags.DEFINE_integer("window", 0, "Modes flow and adaptive: tokens of a window; 0: as for generate.", lower_bound=0)
  flags.DEFINE_integer("rows", 8, "Texts that are written at once.", lower_bound=1)
  flags.DEFINE_integer("context", 0, "Tokens of the longest text; 0: 2048, or what the model reads.", lower_bound=0)
  flags.DEFINE_list(
    "pass_rows",
    None,
    "Comma-separated rows of smaller passes, compiled besides, for when fewer texts are written. Default: 4 and 8 on "
    "a CPU, as far as they are at most half of --rows; else none.",
  )
  flags.register_validator("pass_rows", _is_list_of_rows, "is no list of numbers from 2")
  flags.DEFINE_integer("cache_tokens", 0, "Tokens whose keys and values fit; 0: rows x context.", lower_bound=0)
  passes = "Passes of each mode between two looks: fewer bring text, and new requests, earlier; more are faster."
  flags.DEFINE_integer("passes", steps.PASSES, passes, lower_bound=1)
  flags.DEFINE_bool("traces", True, "Whether requests may ask for the trace of their text (the page does).")
  flags.DEFINE_integer("queue", 64, "Texts that may wait; more are refused with status 429.", lower_bound=0)
  flags.DEFINE_float("timeout", 600.0, "Seconds that a request may take.", lower_bound=0.0)
  flags.DEFINE_integer("max_body", 4, "MiB of a request's body.", lower_bound=1)
  flags.DEFINE_float("drain", 30.0, "Seconds that requests may go on after SIGTERM.", lower_bound=0.0)
  cli.define_mesh()
  cli.define_processes()


if __name__ == "__main__":
  define_flags()
  cli.run(main)

"""Runs the application: sockets, the engine's compilation beside it, and an orderly end."""

import asyncio
from collections.abc import Callable
import concurrent.futures
import contextlib
import logging
import socket
import threading
from typing import Any

import uvicorn

from evo_jax.decoding.engine import Engine
from evo_jax.errors import UserError
from evo_jax.serving.app import make_app
from evo_jax.serving.service import Service

_LOOKS = 0.1  # seconds between looks at whether all is done, or has failed
_CLOSES = 5  # seconds that connections have to close, once there is nothing to be written


def open_socket(host: str, port: int) -> socket.socket:
  """A socket that listens. Raises UserError where there is no such address, or it is taken."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
  except (OSError, UnicodeError) as error:  # a name that is none
    raise UserError(f"--host={host} --port={port}: {getattr(error, 'strerror', '') or error}") from error
  return listening


def address_of(listening: socket.socket) -> str:
  """The URL of a socket."""
  host, port = listening.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
  """Ends in order: at the first signal new requests are refused, and those that run go on; at the second it ends."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config)
    self._service = service

  def handle_exit(self, sig: int, frame: Any) -> None:
    if self._service.ending:
      self.should_exit = self.force_exit = True
    self._service.ending = True


def run_server(service: Service, listening: socket.socket, make_engine: Callable[[], Engine], ready: Callable) -> None:
  """Serves until a signal; calls `ready` once all programs are compiled. Raises what `make_engine` raises, and what
  ended the engine, if anything did."""
  config = uvicorn.Config(
    make_app(service), log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=_CLOSES
  )
  _log_errors()
  server = _Server(config, service)

  async def serve():
    watcher = asyncio.create_task(_watch(server, service, make_engine, ready))
    try:
      await server.serve([listening])
    finally:
      await watcher

  try:
    asyncio.run(serve())
  finally:
    if service.engine is not None:
      service.engine.close()
  if service.engine is not None and service.engine.failure is not None:
    raise service.engine.failure


def _in_thread(make: Callable[[], Any]) -> concurrent.futures.Future:
  """What a function gives, which runs in a thread that does not keep the process from ending."""
  future: concurrent.futures.Future = concurrent.futures.Future()

  def run():
    try:
      future.set_result(make())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=run, name="compiles", daemon=True).start()
  return future


def _log_errors() -> None:
  """Tracebacks of requests that fail go to stderr; nothing else is logged."""
  log = logging.getLogger("uvicorn.error")
  log.setLevel(logging.ERROR)
  log.propagate = False
  if not log.handlers:
    log.addHandler(logging.StreamHandler())


async def _watch(server: _Server, service: Service, make_engine: Callable[[], Engine], ready: Callable) -> None:
  """Compiles; then ends the server when it is to end and nothing is left, or time is up, or the engine has failed."""
  try:
    compiling = _in_thread(make_engine)
    while not compiling.done() and not service.ending:
      await asyncio.sleep(_LOOKS)
    if not compiling.done():
      return  # nothing was asked for yet
    service.engine = compiling.result()
    ready()
    while not service.ending and service.engine.failure is None and not server.should_exit:
      await asyncio.sleep(_LOOKS)
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(service.limits.drain):
        while service.unfinished and service.engine.failure is None and not server.force_exit:
          await asyncio.sleep(_LOOKS)
    await asyncio.to_thread(service.engine.close)  # what is left is told so
    await asyncio.sleep(_LOOKS)
  finally:
    server.should_exit = True

"""The web application: routes, keys, limits, and streams of server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import hmac
import json
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from evo_jax.data.tokenizers import Tokenizer
from evo_jax.decoding import prompts
from evo_jax.errors import UserError
from evo_jax.serving import requests as requests_lib
from evo_jax.serving.errors import ApiError, from_user_error
from evo_jax.serving.page import HEADERS, PAGE
from evo_jax.serving.service import Service, Work

_GONE = 499  # of metrics: the client went away

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
  """The application of a service."""
  routes = _Routes(service)
  keyed = lambda path, endpoint, method: Route(
    path, _counted(service, path, _keyed(service, endpoint)), methods=[method]
  )
  return Starlette(
    routes=[
      Route("/", routes.page),
      Route("/health", routes.health),
      Route("/metrics", routes.metrics),
      keyed("/v1/models", routes.models, "GET"),
      keyed("/v1/models/{model:path}", routes.model, "GET"),
      keyed("/v1/completions", routes.completions, "POST"),
      keyed("/v1/chat/completions", routes.chat, "POST"),
      keyed("/tokenizer_info", routes.tokenizer_info, "GET"),
      keyed("/tokenize", routes.tokenize, "POST"),
      keyed("/detokenize", routes.detokenize, "POST"),
    ],
    exception_handlers={
      ApiError: _refuse,
      HTTPException: _refuse_route,
      ClientDisconnect: lambda request, error: Response(status_code=_GONE),
      Exception: _fail,
    },
  )


def _refuse(request: Request, error: ApiError) -> Response:
  return error.response()


def _refuse_route(request: Request, error: HTTPException) -> Response:
  response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
  response.headers.update(error.headers or {})
  return response


def _fail(request: Request, error: Exception) -> Response:
  return ApiError(500, "the server has failed; its log says more").response()


def _keyed(service: Service, endpoint: Endpoint) -> Endpoint:
  """The endpoint, for those who show the key."""
  want = f"Bearer {service.limits.api_key}".encode()

  async def checked(request):
    given = request.headers.get("authorization", "").encode()
    if service.limits.api_key and not hmac.compare_digest(given, want):
      raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
    return await endpoint(request)

  return checked


def _counted(service: Service, path: str, endpoint: Endpoint) -> Endpoint:
  """The endpoint, whose answers are counted by status; of a stream, that with which it begins."""

  async def counted(request):
    status = 500
    try:
      response = await endpoint(request)
      status = response.status_code
      return response
    except ApiError as error:
      status = error.status
      raise
    except ClientDisconnect:
      status = _GONE
      raise
    finally:
      service.metrics.requests.labels(path, status).inc()

  return counted


class _Routes:
  """Endpoints."""

  def __init__(self, service: Service):
    self._service = service

  async def page(self, request: Request) -> Response:
    return HTMLResponse(PAGE, headers=HEADERS)

  async def health(self, request: Request) -> Response:
    self._service.check_ready()
    return JSONResponse({"status": "ok"})

  async def metrics(self, request: Request) -> Response:
    return Response(generate_latest(self._service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

  async def models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._describe(name) for name in self._service.models]})

  async def model(self, request: Request) -> Response:
    return JSONResponse(self._describe(self._service.check_model(request.path_params["model"])))

  def _describe(self, name: str) -> dict[str, Any]:
    service = self._service
    context = service.engine.context if service.engine else None
    return {
      "id": name,
      "object": "model",
      "created": service.started,
      "owned_by": "evo_jax",
      "root": service.models[0],
      "max_model_len": context,
      "modes": list(service.modes),
      "chat": service.chats,
      "traces": service.traces,
    }

  async def completions(self, request: Request) -> Response:
    self._service.check_ready()
    return await self._answer(request, requests_lib.read_completion(await self._json(request), self._service.modes))

  async def chat(self, request: Request) -> Response:
    self._service.check_ready()
    body = await self._json(request)
    self._service.check_chat()
    return await self._answer(request, requests_lib.read_chat(body, self._service.modes))

  async def _json(self, request: Request) -> Any:
    """The body. Raises ApiError where it is none, or too long."""
    if "json" not in request.headers.get("content-type", ""):
      raise ApiError(415, "the body is to be JSON, with Content-Type: application/json")
    body, most = bytearray(), self._service.limits.body
    async for chunk in request.stream():
      body += chunk
      if len(body) > most:
        raise ApiError(413, f"the body has more than {most:,} bytes")
    try:
      return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
      raise ApiError(400, f"the body is no JSON: {error}") from error

  async def _answer(self, request: Request, asked: requests_lib.Asked) -> Response:
    work = await self._service.open(asked)
    if asked.stream:
      return _Stream(self._service, work)
    try:
      answer = await _unless_gone(request, work.whole())
    finally:
      work.close()
    if answer is None:
      self._service.metrics.cancelled.inc()
      return Response(status_code=_GONE)
    return JSONResponse(answer)

  # What lm_eval asks a server whose tokenizer it is to use. A text that is a special token's name is that token.

  async def tokenizer_info(self, request: Request) -> Response:
    tokenizer = self._service.run.tokenizer
    end = _special_names(tokenizer)[tokenizer.separator_id]
    template = getattr(tokenizer, "chat_template", None)
    return JSONResponse({"eos_token": end, "bos_token": None, "pad_token": None, "chat_template": template})

  async def tokenize(self, request: Request) -> Response:
    body, tokenizer = await self._json(request), self._service.run.tokenizer
    text = body.get("prompt") if isinstance(body, dict) else None
    if not isinstance(text, str):
      raise ApiError(400, "prompt: is no string", "prompt")
    special = {name: token for token, name in _special_names(tokenizer).items()}
    try:
      ids = [special[text]] if text in special else prompts.to_ids(text, tokenizer)
    except UserError as error:
      raise from_user_error(error) from error
    return JSONResponse({"tokens": ids, "count": len(ids)})

  async def detokenize(self, request: Request) -> Response:
    body = await self._json(request)
    try:
      ids = prompts.to_ids(body["tokens"], self._service.run.tokenizer)
    except (KeyError, TypeError, UserError) as error:
      raise ApiError(400, "tokens: is no list of ids", "tokens") from error
    return JSONResponse({"prompt": self._service.read_text(ids)})


def _special_names(tokenizer: Tokenizer) -> dict[int, str]:
  """Names of special ids, of which that between documents is one in any tokenizer."""
  named = {token: name for name, token in getattr(tokenizer, "special", {}).items()}
  return {tokenizer.separator_id: "<doc>", **named}


def _no_number(name: str) -> None:
  raise ValueError(f"{name} is no number")


async def _unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
  """What is awaited; None as soon as the client has gone."""

  async def gone():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks[0].result() if tasks[0].done() else None
  finally:
    for task in tasks:
      task.cancel()


class _Stream(StreamingResponse):
  """An answer in pieces, as server-sent events. Its texts end with it, however it does."""

  def __init__(self, service: Service, work: Work):
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    super().__init__(_events(work), headers=headers, media_type="text/event-stream")
    self._service, self._work = service, work

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._work.close()
      if not self._work.complete:
        self._service.metrics.cancelled.inc()


async def _events(work: Work) -> AsyncIterator[str]:
  event = lambda value: f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
  try:
    async with contextlib.aclosing(work.chunks()) as chunks:
      async for chunk in chunks:
        yield event(chunk)
  except ApiError as error:
    yield event(error.body())
    return
  yield "data: [DONE]\n\n"

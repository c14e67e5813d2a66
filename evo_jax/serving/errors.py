"""Errors as OpenAI's clients read them: a status, and a body that says what is wrong, and with which field."""

import dataclasses
import re
from typing import Any

from starlette.responses import JSONResponse

from evo_jax.decoding.prompts import readable
from evo_jax.errors import UserError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclasses.dataclass
class ApiError(Exception):
  """A request that is refused, or fails. status: of HTTP. param: the field. code: a name of the reason. retry_after:
  seconds after which it may go."""

  status: int
  message: str
  param: str | None = None
  code: str | None = None
  retry_after: int | None = None

  def body(self) -> dict[str, Any]:
    kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    param = self.param and readable(self.param)
    return {"error": {"message": readable(self.message), "type": kind, "param": param, "code": self.code}}

  def response(self) -> JSONResponse:
    headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
    if self.status == 401:
      headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(self.body(), self.status, headers)


def from_user_error(error: UserError, prompt: str = "prompt") -> ApiError:
  """What decoding refuses, where names of flags are those of fields. prompt: the field that has the prompt."""
  message = re.sub(r"--(?=\w)", "", str(error))
  found = re.match(r"prompt\b|\w+(?=[=:])", message)
  param = found and (prompt if found[0] == "prompt" else found[0])
  code = "context_length_exceeded" if re.search(r"context of \d|the cache has", message) else None
  return ApiError(400, message, param, code)

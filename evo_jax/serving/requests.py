"""What clients ask for: bodies of OpenAI's completions and chat completions, checked field by field.

A field that is not known, or asks for what this server does not do, is an error that names it; one whose value asks for
nothing (`presence_penalty: 0`) passes. Beside OpenAI's there are `mode`, `threshold`, `top_k` and `trace`.
"""

from collections.abc import Mapping
import dataclasses
import math
import secrets
import sys
from typing import Any

from evo_jax.data.chat import Message
from evo_jax.decoding.programs import BEST
from evo_jax.decoding.settings import DEFAULT_PATH, Sampling
from evo_jax.serving.errors import ApiError

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; an answer in a conversation has what the context leaves
_MOST_STOPS = 32
_DIGITS = 10  # of an id, at most
_LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")  # say who asks, and change no text
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Values that ask for nothing.
_NEUTRAL = {
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "store": (False,),
  "service_tier": ("auto", "default"),
}
_NEUTRAL_IN_CHAT = {
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "functions": ([],),
}


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request for texts.

  prompts: texts, or lists of ids; in chat one list of messages. n: texts for each prompt. max_tokens: of each; None:
  what the context leaves; 0: nothing is written. best: log-probabilities are wanted, of so many most probable tokens.
  suffix: what stands behind the gap that is to be filled; None: there is no gap.
  """

  model: str | None
  prompts: list[Any]
  chat: bool
  sampling: Sampling
  max_tokens: int | None
  n: int = 1
  seed: int = 0
  stream: bool = False
  include_usage: bool = False
  echo: bool = False
  best: int | None = None
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  suffix: str | None = None
  trace: bool = False


class _Fields:
  """The fields of a body, taken one by one."""

  def __init__(self, body: Any):
    if not isinstance(body, dict):
      raise ApiError(400, "the body is no JSON object")
    self._left = {name: value for name, value in body.items() if value is not None}

  def take(self, name: str, kind: type, default: Any = None) -> Any:
    value = self._left.pop(name, default)
    if value is default:
      return default
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is float and not abs(value) <= sys.float_info.max):  # an integer of any length may be given
      words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string", dict: "an object"}
      raise ApiError(400, f"{name}: {_short(value)} is not {words[kind]}", name)
    return value

  def number(self, name: str, kind: type, low: float, high: float = math.inf, default: Any = None) -> Any:
    value = self.take(name, kind, default)
    if value is not None and not low <= value <= high:
      limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
      raise ApiError(400, f"{name}: {value} is not {limits}", name)
    return value

  def any(self, name: str) -> Any:
    return self._left.pop(name, None)

  def skip(self, neutral: Mapping[str, tuple]) -> None:
    """Takes fields whose values ask for nothing. Raises ApiError for others."""
    for name, values in neutral.items():
      if name in self._left and (value := self._left.pop(name)) not in values:
        raise ApiError(400, f"{name}: {_short(value)} is not supported", name, "unsupported_value")

  def finish(self) -> None:
    """Raises ApiError where fields are left."""
    for name in _LABELS:
      self._left.pop(name, None)
    if self._left:
      name = next(iter(self._left))
      raise ApiError(400, f"{name}: this field is not supported", name, "unsupported_parameter")


def read_completion(body: Any, modes: Mapping[str, Sampling]) -> Asked:
  """A body of /v1/completions. modes: those that there are by name, the first by default. Raises ApiError."""
  fields = _Fields(body)
  suffix = fields.take("suffix", str)
  common = _read_common(fields, modes, suffix is not None)
  max_tokens = fields.number("max_tokens", int, 0, default=DEFAULT_TOKENS)
  best = fields.number("logprobs", int, 0, BEST)
  best_of = fields.number("best_of", int, 1)
  if best_of not in (None, common["n"]):
    raise ApiError(400, f"best_of: {best_of} is not n, {common['n']}; all texts are returned", "best_of")
  asked = Asked(
    prompts=_prompts(fields.any("prompt")),
    chat=False,
    max_tokens=max_tokens,
    best=best,
    echo=fields.take("echo", bool, False),
    suffix=suffix,
    **common,
  )
  fields.finish()
  _check_completion(asked)
  return asked


def _check_completion(asked: Asked) -> None:
  """Raises ApiError for fields that do not go together."""
  if asked.suffix is None:
    if not asked.max_tokens and not asked.echo:
      raise ApiError(400, "max_tokens: 0 writes nothing; it goes with echo", "max_tokens")
    return
  if not asked.max_tokens:
    raise ApiError(400, "max_tokens: 0 leaves no gap in front of the suffix", "max_tokens")
  for name, given in (("echo", asked.echo), ("logprobs", asked.best is not None)):
    if given:
      raise ApiError(400, f"{name}: does not go with suffix", name)
  if asked.sampling.mode not in DEFAULT_PATH:
    problem = f"is filled in by the modes flow and adaptive, not by {asked.sampling.mode}"
    raise ApiError(400, f"suffix: what stands before it {problem}", "suffix")


def read_chat(body: Any, modes: Mapping[str, Sampling]) -> Asked:
  """A body of /v1/chat/completions. Raises ApiError."""
  fields = _Fields(body)
  common = _read_common(fields, modes, False)
  fields.skip(_NEUTRAL_IN_CHAT)
  older = fields.number("max_tokens", int, 1)
  max_tokens = fields.number("max_completion_tokens", int, 1)
  best = fields.number("top_logprobs", int, 0, BEST)
  wants = fields.take("logprobs", bool, False)
  if best is not None and not wants:
    raise ApiError(400, "top_logprobs: goes with logprobs", "top_logprobs")
  asked = Asked(
    prompts=[_messages(fields.any("messages"))],
    chat=True,
    max_tokens=older if max_tokens is None else max_tokens,
    best=(best or 0) if wants else None,
    **common,
  )
  fields.finish()
  return asked


def _read_common(fields: _Fields, modes: Mapping[str, Sampling], fills: bool) -> dict[str, Any]:
  """What both have."""
  stream = fields.take("stream", bool, False)
  options = _Fields(fields.take("stream_options", dict, {}))
  include_usage = options.take("include_usage", bool, False)
  options.skip({"include_obfuscation": (False,)})
  options.finish()
  fields.skip(_NEUTRAL)
  trace = fields.take("trace", bool, False)
  if trace and not stream:
    raise ApiError(400, "trace: goes with stream", "trace")
  seed = fields.take("seed", int)
  return dict(
    model=fields.take("model", str),
    sampling=_sampling(fields, modes, fills),
    n=fields.number("n", int, 1, default=1),
    seed=secrets.randbits(32) if seed is None else seed % 2**32,
    stream=stream,
    include_usage=include_usage,
    logit_bias=_logit_bias(fields.take("logit_bias", dict, {})),
    trace=trace,
  )


def _sampling(fields: _Fields, modes: Mapping[str, Sampling], fills: bool) -> Sampling:
  """The sampling parameters, but for `max_tokens`."""
  default = next((name for name in modes if not fills or name in DEFAULT_PATH), next(iter(modes)))
  mode = fields.take("mode", str, default)
  if mode not in modes:
    raise ApiError(400, f"mode: {_short(mode)} is not one of {', '.join(modes)}, which this server has", "mode")
  threshold = fields.take("threshold", float)
  if threshold is not None and mode != "adaptive":
    raise ApiError(400, f"threshold: is of mode adaptive, not of {mode}", "threshold")
  temperature = fields.number("temperature", float, 0, default=1.0)
  changes = {} if threshold is None else {"threshold": float(threshold)}
  return dataclasses.replace(
    modes[mode],
    temperature=float(temperature) if temperature else 1.0,
    greedy=not temperature,
    top_p=float(fields.take("top_p", float, 1.0)),
    top_k=fields.number("top_k", int, 0, 2**31 - 1, default=0),
    stop=_stop(fields.any("stop")),
    **changes,
  )


def _stop(value: Any) -> tuple[str, ...]:
  strings = () if value is None else (value,) if isinstance(value, str) else value
  if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) and string for string in strings):
    raise ApiError(400, f"stop: {_short(value)} is neither a string nor a list of strings", "stop")
  if len(strings) > _MOST_STOPS:
    raise ApiError(400, f"stop: {len(strings)} strings are more than {_MOST_STOPS}", "stop")
  return tuple(strings)


def _logit_bias(values: dict[str, Any]) -> dict[int, float]:
  biases = {}
  for token, bias in values.items():
    if not token.isdecimal() or len(token) > _DIGITS or isinstance(bias, bool) or not isinstance(bias, (int, float)):
      raise ApiError(400, f"logit_bias: {_short(token)}: {_short(bias)} is no id with a number", "logit_bias")
    if not -100 <= bias <= 100:
      raise ApiError(400, f"logit_bias: {bias} is not from -100 to 100", "logit_bias")
    biases[int(token)] = float(bias)
  return biases


def _prompts(value: Any) -> list[Any]:
  """Texts and lists of ids."""
  is_id = lambda token: isinstance(token, int) and not isinstance(token, bool)
  is_prompt = lambda part: isinstance(part, str) or (isinstance(part, list) and all(map(is_id, part)))
  if value is None or isinstance(value, str):
    return [value or ""]
  if isinstance(value, list) and value:
    if all(map(is_id, value)):
      return [value]
    if all(map(is_prompt, value)):
      return value
  raise ApiError(400, f"prompt: {_short(value)} is neither text nor ids, nor a list of either", "prompt")


def _messages(value: Any) -> list[Message]:
  if not isinstance(value, list) or not value:
    raise ApiError(400, "messages: is no list of messages", "messages")
  return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
  role = message.get("role") if isinstance(message, dict) else None
  if not isinstance(role, str) or role not in _ROLES:
    raise ApiError(400, f"{where}.role: is not one of {', '.join(_ROLES)}", "messages")
  for name, value in message.items():
    if name not in ("role", "content") and value not in (None, []):  # clients send back what they got, with nulls
      raise ApiError(400, f"{where}.{name}: this field is not supported", "messages", "unsupported_parameter")
  content = message.get("content")
  if isinstance(content, list):
    for part in content:
      if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ApiError(400, f"{where}.content: has a part that is no text", "messages", "unsupported_value")
    content = "".join(part["text"] for part in content)
  if not isinstance(content, str):
    raise ApiError(400, f"{where}.content: is no text", "messages")
  return {"role": _ROLES[role], "content": content}


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."

"""What /metrics tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from evo_jax.decoding.engine import Engine
from evo_jax.decoding.progress import Generation

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
  """Counters of one server, in a registry of its own."""

  def __init__(self, engine: Callable[[], Engine | None], unfinished: Callable[[], int]):
    """engine: gives the engine, once there is one. unfinished: texts that were asked for and are not done."""
    self.registry = CollectorRegistry()
    add = dict(namespace="evo_jax", registry=self.registry)
    self.requests = Counter("requests", "Requests by endpoint and status.", ["endpoint", "status"], **add)
    self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **add)
    self.tokens = Counter("completion_tokens", "Tokens written.", ["mode"], **add)
    self.passes = Counter("passes", "Passes of texts that are done.", ["mode"], **add)
    self.accepted = Counter("accepted_tokens", "Drafted tokens that mode verify accepted.", **add)
    self.rounds = Counter("rounds", "Rounds in which mode verify verified.", **add)
    self.drafted_rounds = Counter("drafted_rounds", "Those of them that had a draft.", **add)
    self.cancelled = Counter("cancelled", "Requests whose client went away.", **add)
    self.first = Histogram("first_token_seconds", "Until a stream's first text.", buckets=_SECONDS, **add)
    self.seconds = Histogram("request_seconds", "Until an answer was complete.", buckets=_SECONDS, **add)
    gauge = lambda name, text, value: Gauge(name, text, **add).set_function(value)
    of_engine = lambda name: lambda: getattr(engine(), name, 0)
    gauge("unfinished_texts", "Texts asked for that are not done.", unfinished)
    gauge("running_texts", "Texts that have a row.", of_engine("running"))
    gauge("waiting_texts", "Texts that wait for a row or for memory.", of_engine("waiting"))
    gauge("free_pages", "Pages of keys and values that texts could have.", of_engine("pages_free"))
    gauge("compilations", "Programs compiled after the server was ready.", of_engine("compilations"))
    gauge("ready", "Whether all programs are compiled.", lambda: engine() is not None)

  def count(self, generation: Generation, mode: str) -> None:
    """Counts a text that is done."""
    self.tokens.labels(mode).inc(len(generation.tokens))
    self.passes.labels(mode).inc(generation.passes)
    if generation.rounds is not None:
      self.accepted.inc(generation.accepted)
      self.rounds.inc(generation.rounds)
      self.drafted_rounds.inc(generation.drafted_rounds)

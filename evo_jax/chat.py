"""A conversation with a trained model in the terminal.

  python -m evo_jax.chat --workdir=DIR [--system='Be brief.'] [--mode=verify] [--temperature=0.7]

Answers come as they are written; Ctrl-C stops one, and what it has so far stays in the conversation. A line that ends
with a backslash goes on in the next. Lines that begin with a slash are commands:

  /reset         begins a new conversation
  /system TEXT   sets the system message; without a text, removes it
  /mode NAME     decodes by another mode: ar, verify, adaptive, flow
  /free          what came for free in the last answer, and in all
  /save FILE     adds the conversation to a .jsonl file, as `messages`
  /help          this list
  /quit          leaves, as Ctrl-D does

Keys and values of a prompt are kept by the page from turn to turn; an answer is read once more in the next turn, as
part of the prompt, since what a model wrote came from passes of other shapes (`evo_jax.decoding.page_pool`).
"""

from collections.abc import Callable, Iterator
import dataclasses
import importlib
import json
import os
import secrets
import sys

from absl import flags

from evo_jax import cli
from evo_jax.data.chat import ChatTokenizer, Message
from evo_jax.decoding.device import out_of_memory_as
from evo_jax.decoding.engine import DEFAULT_CONTEXT, Engine, Handle
from evo_jax.decoding.progress import Generation
from evo_jax.decoding.settings import MODES, Sampling
from evo_jax.decoding.setup import make_schedule
from evo_jax.errors import UserError, check_seed
from evo_jax.parallel import sharding
from evo_jax.run import Run, load_run

_PAGE = 32  # tokens of a page: of a prompt that goes on, less than so many are read again
_PASSES = 2  # between two looks: text comes as soon as it is written


def main() -> None:
  args = flags.FLAGS
  if args.seed is not None:
    check_seed(args.seed, "--seed")
  names = {field.name for field in dataclasses.fields(Sampling)}
  sampling = Sampling(**{name: getattr(args, name) for name in names if name in args})
  run = load_run(args.workdir, args.step, cli.make_mesh())
  if sys.stdin.isatty():
    importlib.import_module("readline")  # `input` edits lines by it
  with _Writer(run, sampling, args.context, secrets.randbits(32) if args.seed is None else args.seed) as writer:
    _Conversation(writer, args.system).run()


class _Writer:
  """Writes answers by an engine, which is made anew for a mode that it does not have."""

  def __init__(self, run: Run, sampling: Sampling, context: int, seed: int):
    """Raises UserError where the tokenizer has no chat template, or the model does not support the parameters."""
    self._run, self._context, self._seed = run, context or None, seed
    self._tokenizer = ChatTokenizer(run.tokenizer)
    self.sampling = sampling
    self._modes: list[Sampling] = []
    self._engine: Engine | None = None
    self.use(sampling.mode)

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_) -> None:
    if self._engine is not None:
      self._engine.close()

  def use(self, mode: str) -> None:
    """Decodes by a mode from now on. Raises UserError where the model does not support it."""
    sampling = dataclasses.replace(self.sampling, mode=mode)
    make_schedule(self._run, sampling)  # raises what the engine would, which then leaves the old one as it is
    if mode not in {each.mode for each in self._modes}:
      self._make_engine([*self._modes, sampling])
    self.sampling = sampling

  def _make_engine(self, modes: list[Sampling]) -> None:
    """An engine for these modes in place of the one that is there, which stays where that cannot be."""
    if self._engine is not None:
      self._engine.close()
      self._engine = None  # frees its memory
    rows = sharding.batch_shards(self._run.mesh)  # one is used; a mesh has no fewer
    make = lambda modes: Engine(
      self._run, rows, modes=modes, context=self._context, page=_PAGE, scores=False, passes=_PASSES
    )
    try:
      with out_of_memory_as(f"--context={self._context or DEFAULT_CONTEXT}"):
        self._engine = make(modes)
    except UserError:
      if self._modes:
        self._engine = make(self._modes)
      raise
    self._modes = modes

  def begin(self, messages: list[Message]) -> Handle:
    """Begins an answer. Raises UserError where the conversation is too long, or the template refuses it."""
    return self._engine.submit(messages, self.sampling, seed=self._seed, tokenizer=self._tokenizer)


class _Leave(Exception):
  """The user has had enough."""


class _Conversation:
  """Reads lines, answers and obeys."""

  def __init__(self, writer: _Writer, system: str):
    self._writer, self._system = writer, system
    self._messages: list[Message] = []
    self._answers: list[tuple[Generation, int]] = []  # with the prompt's tokens that were kept
    self._commands: dict[str, Callable[[str], None]] = {
      "reset": self._reset,
      "system": self._set_system,
      "mode": self._set_mode,
      "free": self._show_free,
      "save": self._save,
      "help": lambda _: print(__doc__.split("commands:\n\n")[1].split("\n\n")[0]),
      "quit": self._quit,
    }

  def run(self) -> None:
    """Until the input ends, or the user leaves."""
    for line in _lines():
      try:
        if line.startswith("/"):
          self._obey(line)
        elif line.strip():
          self._answer(line)
      except UserError as error:
        print(f"evo_jax: {error}", file=sys.stderr, flush=True)
      except _Leave:
        return

  def _obey(self, line: str) -> None:
    name, _, rest = line[1:].partition(" ")
    if name not in self._commands:
      raise UserError(f"/{name}: is not one of {', '.join(f'/{known}' for known in self._commands)}")
    self._commands[name](rest.strip())

  @property
  def _whole(self) -> list[Message]:
    return [{"role": "system", "content": self._system}] * bool(self._system) + self._messages

  def _answer(self, line: str) -> None:
    self._messages.append({"role": "user", "content": line})
    pieces = []
    try:
      handle = self._writer.begin(self._whole)
      try:
        for piece in handle:
          pieces.append(piece)
          print(_shown(piece), end="", flush=True)
        self._answers.append((handle.result(), handle.shared))
      except KeyboardInterrupt:
        handle.cancel()
      print(flush=True)
    finally:
      if not pieces:
        self._messages.pop()
    if pieces:
      self._messages.append({"role": "assistant", "content": "".join(pieces)})

  def _reset(self, _: str) -> None:
    self._messages = []

  def _set_system(self, text: str) -> None:
    self._system = text

  def _set_mode(self, name: str) -> None:
    if name not in MODES:
      raise UserError(f"/mode {name}: is not one of {', '.join(MODES)}; it is {self._writer.sampling.mode}")
    self._writer.use(name)

  def _show_free(self, _: str) -> None:
    if not self._answers:
      raise UserError("/free: there is no answer yet")
    print(f"last answer: {_free(self._answers[-1:])}")
    print(f"all {len(self._answers)}: {_free(self._answers)}", flush=True)

  def _save(self, name: str) -> None:
    if not name.endswith(".jsonl"):
      raise UserError(f"/save {name}: is no name of a .jsonl file")
    if not self._messages:
      raise UserError("/save: there is nothing to save yet")
    try:
      with open(os.path.expanduser(name), "a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": self._whole}, ensure_ascii=False) + "\n")
    except OSError as error:
      raise UserError(f"/save {name}: cannot be written: {error.strerror or error}") from error

  def _quit(self, _: str) -> None:
    raise _Leave


def _shown(text: str) -> str:
  """Text as a terminal is given it: what would move the cursor is not."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _free(answers: list[tuple[Generation, int]]) -> str:
  total = lambda name: sum(getattr(generation, name) or 0 for generation, _ in answers)
  tokens = sum(len(generation.tokens) + (generation.end_id is not None) for generation, _ in answers)
  words = f"{tokens} tokens in {total('passes')} passes, {tokens / max(total('passes'), 1):.2f} per pass"
  if any(generation.rounds is not None for generation, _ in answers):
    words += f"; {total('accepted')} drafted tokens were accepted"
  return f"{words}; {sum(shared for _, shared in answers)} tokens of prompts were kept from before"


def _lines() -> Iterator[str]:
  """What the user types, in a terminal behind a prompt."""
  terminal, parts = sys.stdin.isatty(), []
  while True:
    try:
      line = input(("... " if parts else "> ") if terminal else "")
    except EOFError:
      break
    except KeyboardInterrupt:
      print("\n(/quit leaves)", file=sys.stderr, flush=True)
      parts = []
      continue
    parts.append(line.removesuffix("\\"))
    if not line.endswith("\\"):
      yield "\n".join(parts)
      parts = []
  if parts:
    yield "\n".join(parts)


def define_flags() -> None:
  default = Sampling()
  flags.DEFINE_string("workdir", "", "A run's work directory, whose tokenizer has a chat template.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  flags.DEFINE_string("system", "", "The system message; default: none, or the template's own.")
  flags.DEFINE_enum("mode", default.mode, MODES, "Decoding mode to begin with.")
  flags.DEFINE_integer("max_tokens", None, "Tokens of an answer at most; default: 200, or what the context leaves.")
  flags.DEFINE_float("temperature", default.temperature, "Divides the logits; below 1 draws are sharper.")
  flags.DEFINE_integer("top_k", default.top_k, "Only the k most probable tokens are drawn; 0: all.")
  flags.DEFINE_float("top_p", default.top_p, "Only the most probable tokens that add up to this are drawn.")
  flags.DEFINE_bool("greedy", default.greedy, "Always the most probable token.")
  flags.DEFINE_float("threshold", default.threshold, "Mode adaptive: the higher, the fewer passes.")
  flags.DEFINE_integer("draft", default.draft, "Mode verify: drafted tokens per round; 0: by measured speed.")
  flags.DEFINE_integer("seed", None, "Seed of all draws; default: another one each time.")
  flags.DEFINE_integer(
    "context", 0, "Tokens of the longest conversation; 0: 2048, or what the model reads.", lower_bound=0
  )
  cli.define_mesh()


if __name__ == "__main__":
  define_flags()
  cli.run(main)

"""Texts for any number of prompts, written to a folder, local or in a bucket, as they are done.

  texts.json              what the texts depend on
  00000.jsonl ...         PART texts each, one a line, in the order of the prompts
  statistics/00000.jsonl  passes and seconds of each of them, which may differ from run to run
  .work/                  of the part that is not complete yet, what is done, some texts a file

Every file appears as a whole, so that a command that is started again goes on behind the last one that was written,
whatever ended it, and the parts are those of a command that nothing ended, byte for byte. A second command in the same
folder is refused while the first one runs (`training.lease`). Memory holds one part. Of several processes number 0
reads and writes the folder.

A line has `messages`, or `prompt` and `text` (with the prompt in front), which any tokenizer can read. `tokens` are the
ids that the model read and wrote, the first `prompt_tokens` of them given: readers of training text take them as they
are where `tokenizer` is their own (`data.conversations`). `number` is the prompt's, `sample` the text's among those for
it, from 0; `mode` the decoding mode; `ended` says whether the model ended the text itself.
"""

import array
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from evo_jax.data.chat import ChatTokenizer
from evo_jax.data.storage import Folder
from evo_jax.decoding.device import out_of_memory_as
from evo_jax.decoding.engine import Engine
from evo_jax.decoding.progress import Generation
from evo_jax.decoding.prompts import Prompt, Request, make_request, readable
from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.setup import make_schedule
from evo_jax.errors import UserError
from evo_jax.parallel import distributed, sharding
from evo_jax.run import Run, fingerprint
from evo_jax.training import lease as lease_lib

PART = 4096  # texts of a file
MANIFEST = "texts.json"
_WORK = ".work"
_CONTEXT_MULTIPLE = 64  # to which the longest text is rounded up
_NAMED = 20  # prompts that cannot be used, in one message
_VERSION = 1
_REFUSED = "--output: process 0 cannot write there"

Prompts = Callable[[], Iterable[tuple[str, Prompt]]]  # can be read again; each prompt with its place, for messages


class Totals(NamedTuple):
  """Texts that are done, of how many, and what those that this command wrote took."""

  done: int
  texts: int
  tokens: int = 0
  passes: int = 0


@dataclasses.dataclass(frozen=True)
class _Survey:
  """All prompts. fingerprint: of their content. ranks: (n,) uint32, how many prompts with the same tokens are before
  each. longest: tokens of the longest text."""

  fingerprint: str
  ranks: np.ndarray
  longest: int


def write_texts(
  run: Run,
  sampling: Sampling,
  prompts: Prompts,
  num: int,
  seed: int,
  output: str,
  flags: dict[str, Any],
  progress: Callable[[Totals, int], None] = lambda totals, written: None,
) -> Totals:
  """Writes `num` texts for each prompt in turn into the folder `output`, but for those that are there.

  A text is that of `Sampler.__call__` for all prompts; an engine of `batch_size` rows writes it. flags: by name, what
  texts depend on beside the model and the prompts. progress: is told in process 0 after each file, with the number of
  its texts. Raises UserError for a prompt that cannot be used, naming its place, and for parameters that the model does
  not support, before anything is written, and where the folder holds other texts, is another command's, or cannot be
  written.
  """
  make_schedule(run, sampling)  # raises what the engine would
  survey = _survey(run, sampling, prompts)
  texts = len(survey.ranks) * num
  asked = flags | {"num": num, "seed": seed, "step": run.step, "model": fingerprint(run)}
  asked |= {"prompts": survey.fingerprint, "texts": texts, "version": _VERSION}
  folder = Folder(output)
  with contextlib.ExitStack() as stack:
    check = stack.enter_context(_holding(folder))
    complete, done = _begin(folder, json.loads(json.dumps(asked)))
    totals = Totals(min(complete * PART, texts) + int(done.sum()), texts)
    if complete * PART >= texts:
      return totals
    stack.enter_context(out_of_memory_as(f"--batch_size={sampling.batch_size}"))
    engine = stack.enter_context(_make_engine(run, sampling, survey, texts))
    if jax.process_index():
      engine.follow()
      return totals
    for number, part in enumerate(_parts(prompts(), num)):
      if number < complete:
        continue
      requests = list(_requests(run, sampling, part, survey.ranks, num))
      work = _Part(folder, number)
      for texts_done in _generate(engine, sampling, requests, done, seed):
        check()
        lines = {place: _line(run, sampling, part[place], requests[place], g) for place, g in texts_done.items()}
        work.add(lines)
        tokens, passes = (sum(n) for n in zip(*((len(g.tokens), g.passes) for g in texts_done.values())))
        totals = Totals(totals.done + len(lines), texts, totals.tokens + tokens, totals.passes + passes)
        progress(totals, len(lines))
      work.finish()
      done = np.zeros(PART, bool)
    _clean(folder)
  return totals


@contextlib.contextmanager
def _holding(folder: Folder) -> Iterator[Callable[[], None]]:
  """Holds the folder's lease, where its file system is one that work directories may be on. Gives what raises UserError
  where another command has taken it over."""
  if not folder.local and not folder.path.startswith("gs://"):
    yield lambda: None
    return
  path = epath.Path(folder.path)
  if jax.process_index() == 0:
    path.mkdir(parents=True, exist_ok=True)
  with lease_lib.held(path, "output") as lease:
    yield lease.check


def _make_engine(run: Run, sampling: Sampling, survey: _Survey, texts: int) -> Engine:
  """An engine for all texts, of the same shape however many of them are left, so that they are the same, too."""
  shards = sharding.batch_shards(run.mesh)
  rows = -(-min(sampling.batch_size, texts) // shards) * shards
  context = -(-survey.longest // _CONTEXT_MULTIPLE) * _CONTEXT_MULTIPLE
  return Engine(run, rows, modes=[sampling], context=context, scores=False)


def _generate(
  engine: Engine, sampling: Sampling, requests: list[Request], done: np.ndarray, seed: int
) -> Iterator[dict[int, Generation]]:
  """The texts of a part that are not `done`, by their places, as many at a time as the engine has rows, as they end.

  Those with the longest prompts come first: where memory is short it shows at once, and short texts fill the end.
  """
  order = sorted(np.flatnonzero(~done[: len(requests)]), key=lambda place: -len(requests[place].tokens))
  place_of = {engine.submit(requests[place], sampling, seed=seed).future: int(place) for place in order}
  found = {}
  for future in concurrent.futures.as_completed(place_of):
    found[place_of[future]] = future.result()
    if len(found) == engine.shape.rows:
      yield found
      found = {}
  if found:
    yield found


def check_output(output: str) -> None:
  """Raises UserError, in all processes, where number 0 cannot write to the folder."""

  def write():
    folder = Folder(output)
    folder.write_all(".writable", b"")
    folder.remove(".writable")
    return np.zeros(1, bool)

  distributed.in_first_process(write, np.zeros(1, bool), _REFUSED)


def _survey(run: Run, sampling: Sampling, prompts: Prompts) -> _Survey:
  """Reads all prompts once. Raises UserError that names those that cannot be used."""
  digest, tokens = hashlib.sha256(), array.array("I")
  first, bad, places, longest = None, 0, [], 0
  for where, prompt in prompts():
    digest.update(json.dumps(prompt).encode() + b"\n")
    try:
      request = _request(run, sampling, prompt)
      tokens.append(request.digest)
      longest = max(longest, request.max_length)
    except UserError as error:
      first, bad = first or UserError(f"{where}: {error}"), bad + 1
      places += [where.rpartition(": ")[2]] if len(places) < _NAMED else []
  if bad > 1:
    more = ", ..." if bad > _NAMED else ""
    raise UserError(f"{first}; {bad:,} prompts cannot be used, also {', '.join(places[1:])}{more}")
  if first:
    raise first
  if jax.process_count() > 1:
    mine = np.frombuffer(digest.digest(), np.uint8)
    if np.any(multihost_utils.process_allgather(mine) != mine):
      raise UserError("--prompts: are not the same for all processes")
  return _Survey(digest.hexdigest()[:16], _ranks(np.array(tokens, np.uint32)), longest)


def _ranks(values: np.ndarray) -> np.ndarray:
  """(n,) uint32, how many of the same `values` (n,) are before each."""
  order = np.argsort(values, kind="stable")
  first = np.flatnonzero(np.diff(values[order], prepend=~values[order[:1]]))
  ranks = np.empty(len(values), np.uint32)
  ranks[order] = np.arange(len(values)) - np.repeat(first, np.diff(first, append=len(values)))
  return ranks


def _request(run: Run, sampling: Sampling, prompt: Prompt) -> Request:
  return make_request(prompt, False, sampling, run.tokenizer, run.config.model.position_limit)


def _requests(
  run: Run, sampling: Sampling, part: list[tuple[int, int, Prompt]], ranks: np.ndarray, num: int
) -> Iterator[Request]:
  """The requests of a part, with the numbers that they have among all with the same tokens."""
  for number, texts in itertools.groupby(part, key=lambda text: text[0]):
    _, _, prompt = first = next(texts)
    request, before = _request(run, sampling, prompt), int(ranks[number]) * num
    yield from (dataclasses.replace(request, repetition=before + sample) for _, sample, _ in [first, *texts])


def _parts(prompts: Iterable[tuple[str, Prompt]], num: int) -> Iterator[list[tuple[int, int, Prompt]]]:
  """The texts of each part: number of the prompt, number of the sample, prompt."""
  texts = ((i, sample, prompt) for i, (_, prompt) in enumerate(prompts) for sample in range(num))
  while part := list(itertools.islice(texts, PART)):
    yield part


def _line(
  run: Run, sampling: Sampling, text: tuple[int, int, Prompt], request: Request, generation: Generation
) -> dict[str, Any]:
  """What is written of a text, and its statistics."""
  tokenizer, (number, sample, prompt) = run.tokenizer, text
  given, end = list(request.tokens), generation.end_id
  if isinstance(tokenizer, ChatTokenizer):  # whose begin token is the first of the conversation
    given.insert(0, tokenizer.begin_id)
    answer = {"role": "assistant", "content": generation.text}
    content = {"messages": [*tokenizer.messages(prompt), answer]}
  else:
    content = {"prompt": readable(prompt), "text": readable(prompt) + generation.text}
  line = {
    "number": number,
    "sample": sample,
    **content,
    "mode": sampling.mode,
    "ended": end is not None,
    "prompt_tokens": len(given),
    "tokens": given + generation.tokens + ([] if end is None else [end]),
    "tokenizer": tokenizer.identity,
  }
  statistics = {"number": number, "sample": sample, "passes": generation.passes, "seconds": generation.seconds}
  return {"line": line, "statistics": statistics}


class _Part:
  """A part that is not complete."""

  def __init__(self, folder: Folder, number: int):
    self._folder, self._name = folder, f"{number:05d}"
    self._files = _work_files(folder, number)

  def add(self, texts: dict[int, dict[str, Any]]) -> None:
    """Writes some texts, by their places."""
    name = f"{_WORK}/{self._name}-{len(self._files):05d}.jsonl"
    self._folder.write_all(name, _lines({"place": place, **text} for place, text in texts.items()))
    self._files.append(name)

  def finish(self) -> None:
    """Writes the part, all of whose texts are there."""
    found = {text["place"]: text for text in _read_work(self._folder, self._files)}
    texts = dict(sorted(found.items()))
    self._folder.write_all(f"statistics/{self._name}.jsonl", _lines(text["statistics"] for text in texts.values()))
    self._folder.write_all(f"{self._name}.jsonl", _lines(text["line"] for text in texts.values()))
    for name in self._files:
      self._folder.remove(name)


def _clean(folder: Folder) -> None:
  """Removes what belongs to no part: also the beginnings of files, where a command was killed."""
  folder.remove(_WORK)
  for name in [*folder.names(), *folder.names("statistics")]:
    if name.rpartition("/")[2].startswith("."):
      folder.remove(name)


def _lines(values: Iterable[Any]) -> bytes:
  return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def _work_files(folder: Folder, number: int) -> list[str]:
  return [name for name in folder.names(_WORK) if name.startswith(f"{_WORK}/{number:05d}-")]


def _read_work(folder: Folder, names: list[str]) -> Iterator[dict[str, Any]]:
  for name in names:
    for line in folder.read(name).splitlines():
      yield json.loads(line)


def _begin(folder: Folder, asked: dict[str, Any]) -> tuple[int, np.ndarray]:
  """How many parts are complete, and (PART,) bool, which texts of the next are done. Raises UserError where the folder
  holds other texts."""

  def look() -> np.ndarray:
    _check_manifest(folder, asked)
    there = set(folder.names())
    complete = next(number for number in itertools.count() if f"{number:05d}.jsonl" not in there)
    found = np.zeros(1 + PART, np.int32)
    found[0] = complete
    found[[1 + text["place"] for text in _read_work(folder, _work_files(folder, complete))]] = 1
    return found

  found = distributed.in_first_process(look, np.zeros(1 + PART, np.int32), _REFUSED)
  return int(found[0]), found[1:].astype(bool)


def _check_manifest(folder: Folder, asked: dict[str, Any]) -> None:
  """Writes what is asked for, or compares it with what was."""
  try:
    earlier = json.loads(folder.read(MANIFEST))
  except FileNotFoundError:
    if others := [name for name in folder.names() if not name.startswith(".") and name != lease_lib.FILE]:
      raise UserError(f"--output={folder.path}: has {others[0]}, but no {MANIFEST}: give a new folder") from None
    earlier = {}
  except ValueError as error:
    raise UserError(f"--output={folder.path}: {MANIFEST} is damaged") from error
  differs = [name for name, value in asked.items() if earlier.get(name) != value]
  is_empty = lambda: f"{0:05d}.jsonl" not in folder.names() and not folder.names(_WORK)
  if not earlier or (differs and is_empty()):  # no text would be lost
    folder.write_all(MANIFEST, json.dumps(asked, indent=1).encode() + b"\n")
    return
  if differs:
    name = differs[0]
    flag = f"--{name}={earlier.get(name)}, not {asked[name]}"
    what = {"model": "another model", "prompts": "other prompts"}.get(name, flag)
    raise UserError(f"--output={folder.path}: was begun with {what}; give a new folder, or remove this one")

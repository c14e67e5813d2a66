"""Writes text with a trained model, and the same from Python.

  python -m evo_jax.generate --workdir=DIR --prompt=TEXT [--prompt=TEXT ...] --mode=ar|flow|adaptive|verify [--num=N]
  python -m evo_jax.generate --workdir=DIR --infill='It was [...] in the morning.' --mode=adaptive

  ar        one token a pass
  flow      windows of tokens in --steps passes each, along any path (--path)
  adaptive  a window that slides: what is certain, or far from what else is settled, jumps ahead; --threshold, in bits
            with the default path, goes from 0 (autoregression) to one pass for all
  verify    autoregression's own distribution in fewer passes: windows propose, the next pass accepts or corrects

From Python:

  run = checkpoint.load_run("runs/tiny")
  sampler = generate.Sampler(run, generate.Sampling(mode="adaptive", threshold=0.3))
  texts = sampler(["def ", "class "], seed=1)

A text ends where the model ends the document, at a --stop string, or after --max_tokens tokens.
"""

import dataclasses
import json
import re
import sys
import time
from typing import Any, Callable
import zlib

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import checkpoint
from evo_jax import cli
from evo_jax import config as config_lib
from evo_jax import decode
from evo_jax import model as model_lib
from evo_jax import paths
from evo_jax import policies
from evo_jax import sample
from evo_jax import sharding
from evo_jax import tokenizer as tokenizer_lib
from evo_jax import trace as trace_lib
from evo_jax.cli import UserError
from evo_jax.model import DOCUMENT

MODES = ("ar", "flow", "adaptive", "verify")
_GRIDS = ("time", "precision")
_DEFAULT_PATH = {"flow": "diagonal", "adaptive": "spread"}
_STEPS_PATHS = ("diagonal", "rolling", "random", "learned")  # whose number is Sampling.steps
_THRESHOLD_PATHS = ("spread", "entropy", "confidence", "maturity")  # whose number is Sampling.threshold
_MANY_PASSES = 0.3  # bits; up to this threshold windows as in training do (experiments/decode_speed.py)
_CHUNK = 8  # passes between two looks of the host
_GAP = re.compile(r"\[\.\.\.(\d*)\]")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How texts are written. Flags of the command have the same names."""

  mode: str = "ar"
  max_tokens: int = 200  # of each text; of a gap without a number, `gap`
  temperature: float = 1.0
  top_k: int = 0  # 0: all
  top_p: float = 1.0
  greedy: bool = False
  stop: tuple[str, ...] = ()  # a text ends before the first of these strings
  steps: int = 8  # flow: passes a window
  path: str = ""  # flow: diagonal, or any that evaluate prices; adaptive: spread, entropy, confidence or maturity
  grid: str = "time"  # flow, of the clock: steps even in time, in log-precision, or t after each pass, as 0.8,0.5,0.2
  stepper: str = "ode"  # flow, adaptive: ode, ode2 (second order) or ancestral
  threshold: float = 0.25  # adaptive
  window: int = 0  # flow, adaptive: tokens of a window; 0: `default_window`
  draft: int = 4  # verify: tokens proposed a pass at most; each text proposes as many as are often accepted
  draft_passes: int = 1  # verify: passes of a round; 1 judges and proposes in one
  gap: int = 16  # infill: tokens of a gap without a number
  endless: bool = False  # the document's end is ruled out: every text gets max_tokens tokens
  batch_size: int = 64  # texts that are written at once


@dataclasses.dataclass(frozen=True)
class Generation:
  """A text. `tokens`: what was written, by id; `settled`: the number of the pass that settled each; `seconds`: until
  this text was done, compilation apart. `text`: what was written; of infilling, the whole text with its gaps filled."""

  prompt: str
  text: str
  tokens: list[int]
  settled: list[int]
  passes: int
  seconds: float


@dataclasses.dataclass
class _Row:
  """A text to be written: `tokens` from place 1 on (None in gaps), and the `number` that its key is made of."""

  prompt: str
  tokens: list[int | None]
  number: tuple[int, int]

  @property
  def begin(self) -> int:
    """The first place that is not known."""
    return (self.tokens + [None]).index(None) + 1

  def written(self, token: np.ndarray, length: int) -> list[int]:
    """Of the buffer `token` (C,), of which `length` places are known without a gap: what was written, up to the
    document's end."""
    tokens = token[self.begin:length].tolist()
    return tokens[:tokens.index(DOCUMENT)] if DOCUMENT in tokens else tokens


def default_window(sampling: Sampling, config: config_lib.Config) -> int:
  """The tokens of a window where nothing says how many: as in training.

  `adaptive` takes up to four times as many, as far as texts fill them, where its threshold asks for few passes: the
  tokens that jump together are then so many that a window of training has no places for them that are far apart.
  """
  size = config.window.size
  if sampling.mode != "adaptive" or sampling.path not in ("", "spread") or sampling.threshold <= _MANY_PASSES:
    return size
  return min(max(sampling.max_tokens, size), 4 * size, config.model.context)


class Sampler:
  """Writes texts with a model. Compiles once for texts of like length in batches of like size;
  `compile_seconds` sums up."""

  def __init__(self, run: checkpoint.Run, sampling: Sampling = Sampling(), mesh: jax.sharding.Mesh | None = None):
    """mesh: over which texts and parameters are laid out by the rules of training; None: all devices hold copies of the
    parameters. Raises UserError for a setting that is impossible, or that this model does not have."""
    self.run, self.sampling, self.compile_seconds = run, sampling, 0.0
    path = check(sampling, run.config)
    self._window = sampling.window or default_window(sampling, run.config)
    self._mesh = sharding.make_mesh(config_lib.Mesh()) if mesh is None else mesh
    self._everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
    self._model = run.model.clone(stacked=False)
    boxed = jax.eval_shape(self._model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    apart = sharding.shardings(self._mesh, boxed)
    self._params = jax.jit(model_lib.unstacked, out_shardings=apart)(run.params)
    self._statistics = jax.jit(lambda s: s, out_shardings=self._everywhere)(run.statistics)
    self._shaping = decode.Shaping(np.float32(sampling.temperature), np.float32(sampling.top_p), sampling.greedy,
                                   sampling.top_k, sampling.top_p < 1.0, sampling.endless)
    self._walk = None
    if path is not None:
      policy = policies.make(path, self._window, run.config.paths.rolling_width,
                             s=clock_steps(sampling, path, run.statistics.warp))
      self._walk = decode.Walk(policy, self._window, sampling.stepper, run.config.loss.self_conditioning > 0,
                               run.config.diffusion_alone)
    self._compiled = {}
    self._gather = jax.jit(lambda x: x, out_shardings=self._everywhere)

  def __call__(self, prompts: list[str], num: int = 1, seed: int = 0, infill: bool = False,
               on_text: Callable[[int, str], None] | None = None,
               traces: list[trace_lib.Trace] | None = None) -> list[Generation]:
    """Texts behind prompts, `num` for each in turn; with `infill`, prompts whose `[...]` (`[...12]`: 12
    tokens) are filled.

    A text depends on its prompt, its number among those of the same prompt, and the seed, not on the others. on_text
    gets a text's number and what of it was settled since, from left to right. traces: a list that the first text's is
    added to. Raises UserError for a prompt that is too long or cannot be encoded.
    """
    rows, seen = [], {}
    for prompt in prompts:
      tokens = self._encode(prompt, infill)
      digest = zlib.crc32(repr(tokens).encode())
      for _ in range(num):
        seen[digest] = seen.get(digest, -1) + 1
        rows.append(_Row(prompt, tokens, (digest, seen[digest])))
    order = list(range(len(rows)))
    if traces is None:
      order.sort(key=lambda i: len(rows[i].tokens))  # like lengths share a batch
    found: list[Generation | None] = [None] * len(rows)
    size = self.sampling.batch_size
    with jax.set_mesh(self._mesh):
      for part in (order[i:i + size] for i in range(0, len(order), size)):
        tell = on_text and (lambda i, piece, part=part: on_text(part[i], piece))
        for i, generation in zip(part, self._write([rows[i] for i in part], seed, infill, tell, traces)):
          found[i] = generation
        traces = None
    return found

  def _encode(self, prompt: str, infill: bool) -> list[int | None]:
    tokenizer, C = self.run.tokenizer, self.run.config.model.context
    what = ("--infill " if infill else "prompt ") + repr(prompt if len(prompt) < 40 else prompt[:36] + "...")
    if lost := tokenizer.lost(_GAP.sub("", prompt) if infill else prompt):
      raise UserError(f"{what}: the tokenizer, {tokenizer.identity}, has no {lost[0]!r}")
    if not infill:
      tokens = tokenizer.encode(prompt).tolist()
      if len(tokens) + self.sampling.max_tokens > C:
        raise UserError(
            f"{what}: its {len(tokens)} tokens and {self.sampling.max_tokens} more do not fit the context of {C}")
      return tokens
    tokens: list[int | None] = []
    for i, piece in enumerate(_GAP.split(prompt)):  # text, number, text, number, ..., text
      tokens += [None] * int(piece or self.sampling.gap) if i % 2 else tokenizer.encode(piece).tolist()
    if None not in tokens:
      raise UserError(f"{what}: has no gap to fill; mark one by [...], or by [...12] for 12 tokens")
    if len(tokens) > C:
      raise UserError(f"{what}: its {len(tokens)} tokens with the gaps do not fit the context of {C}")
    return tokens

  def _write(self, rows: list[_Row], seed: int, infill: bool, tell: Callable[[int, str], None] | None,
             traces: list[trace_lib.Trace] | None) -> list[Generation]:
    """One batch."""
    clock, compiling = time.perf_counter(), self.compile_seconds
    texts = self._start(rows, seed, infill, traces is not None)
    walk, index = self._walk, np.int32(0)
    stop = np.zeros(texts.done.shape, bool)
    done = [_Progress(row, self.run.tokenizer, self.sampling.stop) for row in rows]
    recorder = _Recorder(rows[0]) if traces is not None else None
    while True:
      host = self._fetch(texts)
      if recorder:
        recorder.look(host)
      seconds = time.perf_counter() - clock - (self.compile_seconds - compiling)
      for i, progress in enumerate(done):
        piece = progress.look(host, i, seconds)
        stop[i] = progress.seconds is not None
        if tell and piece and not infill:
          tell(i, piece)
      if all(progress.seconds is not None for progress in done):
        break
      texts, walk, index = self._advance(texts, stop, walk, index, infill)
    if recorder:
      traces.append(recorder.trace(self.sampling, self.run.tokenizer))
    return [progress.generation(host, i, infill) for i, progress in enumerate(done)]

  def _start(self, rows: list[_Row], seed: int, infill: bool, trace: bool) -> decode.Texts:
    """Reads the prompts. Sizes are rounded up, so that texts of like length share compiled code."""
    sampling, shards = self.sampling, self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    B = _round_up(1 << (len(rows) - 1).bit_length(), shards)
    P = _round_up(max(row.begin for row in rows), 32)
    limits = [len(row.tokens) + 1 + (0 if infill else sampling.max_tokens) for row in rows]
    # For slots behind the last token.
    room = 2 * self._window + decode.fresh_slots(self._window) if self._walk else 2 * sampling.draft + 4
    C = _round_up(max(max(limits), P) + room, 32)
    token, known = np.zeros((B, C), np.int32), np.zeros((B, C), bool)
    known[:, 0] = True
    for i, row in enumerate(rows):
      token[i, 1:len(row.tokens) + 1] = [t or 0 for t in row.tokens]
      known[i, 1:len(row.tokens) + 1] = [t is not None for t in row.tokens]
    filled = lambda values, dtype: np.array(
        values + [1] * (B - len(rows)), dtype)  # rows that are done before they begin
    digest, count = (filled([row.number[j] for row in rows], np.uint32) for j in (0, 1))

    def start(params, statistics, token, known, prefix, begin, limit, digest, count, seed):
      net = self._model.bind({"params": params})
      fold = lambda digest, count: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), count)
      texts = decode.start(net, token, known, prefix, begin, limit, jax.vmap(fold)(digest, count), trace,
                           flat=self._mesh.size == 1)
      if sampling.mode == "verify":
        return decode.with_draft(texts, sampling.draft, self._model.rows)
      if sampling.mode == "ar":
        return texts
      return decode.with_motion(texts, net.codes(), statistics.log_unigram_V if self._walk.self_conditioned else None,
                                self._window)

    return self._call(("start", trace), start, self._params, self._statistics, token, known, token[:, :P],
                      filled([row.begin for row in rows], np.int32), filled(limits, np.int32), digest, count,
                      np.uint32(seed))

  def _advance(self, texts: decode.Texts, stop: np.ndarray, walk: decode.Walk | None, index: np.ndarray,
               infill: bool) -> tuple[decode.Texts, decode.Walk | None, np.ndarray]:
    """Some passes more, a single one where a trace is wanted. stop (B,) bool ends rows. walk, index: of the window
    that is on its way (mode flow), with the number of its next pass, 0 where a new one is to begin."""
    sampling, trace = self.sampling, texts.guess is not None
    chunk = 1 if trace else _CHUNK
    bind = lambda params: self._model.bind({"params": params})
    end = lambda texts, stop: texts.replace(done=texts.done | stop)
    shaping = self._shaping.replace(endless=True) if infill else self._shaping  # a gap does not end the text
    given = (self._params, self._statistics, texts, shaping, stop)
    if sampling.mode == "ar":
      def some(params, statistics, texts, shaping, stop):
        return decode.advance(lambda t: decode.ar(bind(params), t, shaping), end(texts, stop), chunk)
      return self._call(("ar", chunk), some, *given), None, index
    if sampling.mode == "verify":
      done, most = self._read((texts.done, texts.draft.most))
      wanted = int(np.max(np.where(done, 1, most)))
      proposals = min(next(p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p >= wanted), sampling.draft)
      def some(params, statistics, texts, shaping, stop):
        step = lambda t: decode.verify(bind(params), statistics, t, shaping, proposals, sampling.draft_passes)
        return decode.fit_draft(decode.advance(step, end(texts, stop), chunk))
      return self._call(("verify", chunk, proposals), some, *given), None, index
    if sampling.mode == "adaptive":
      def some(params, statistics, texts, shaping, stop, walk):
        step = lambda t: decode.adaptive(bind(params), statistics, t, walk, shaping, infill)
        return decode.advance(step, end(texts, stop), chunk)
      return self._call(("adaptive", chunk, infill), some, *given, walk), walk, index
    if not trace:
      def some(params, statistics, texts, shaping, stop, walk):
        return decode.flow_window(bind(params), statistics, end(texts, stop), walk, shaping)
      return self._call(("flow",), some, *given, walk), walk, index
    if index == 0:
      def some(params, statistics, texts, shaping, stop, walk):
        return decode.flow_first(bind(params), statistics, end(texts, stop), walk, shaping)
      texts, walk = self._call(("flow first",), some, *given, self._walk)
    else:
      def some(params, statistics, texts, shaping, stop, walk, index):
        return decode.flow_next(bind(params), statistics, end(texts, stop), walk, shaping, index)
      texts = self._call(("flow next",), some, *given, walk, index)
    inside = bool(self._read(decode.unfinished(texts, self._window)))
    return texts, walk, np.int32(index + 1 if inside else 0)

  def _call(self, name: tuple, function: Callable, *args: Any) -> Any:
    """function(*args), compiled ahead once for each name and kind of arguments; texts are used up, and come back laid
    out by rows."""
    key = (name, jax.tree.structure(args), tuple((x.shape, x.dtype) for x in jax.tree.leaves(args)))
    if key not in self._compiled:
      clock = time.perf_counter()
      layout = jax.tree.map(self._layout, jax.eval_shape(function, *args),
                            is_leaf=lambda x: isinstance(x, decode.Texts))
      old = tuple(i for i, arg in enumerate(args) if isinstance(arg, decode.Texts))
      self._compiled[key] = jax.jit(function, out_shardings=layout, donate_argnums=old).lower(*args).compile()
      self.compile_seconds += time.perf_counter() - clock
    return self._compiled[key](*args)

  def _layout(self, value: Any) -> Any:
    if not isinstance(value, decode.Texts):
      return self._everywhere
    place = lambda names: jax.sharding.NamedSharding(self._mesh, sharding.RULES.spec(names))
    keys = self._everywhere if self._mesh.size == 1 else place(("batch", "kv_heads", None, None))
    return jax.tree.map(lambda _: place(("batch",)), value).replace(k=(keys,) * len(value.k), v=(keys,) * len(value.v))

  def _read(self, value: Any) -> Any:
    """Arrays on the host, also where other processes hold parts of them; copies, since texts are written in place."""
    return jax.tree.map(np.array, self._gather(value) if jax.process_count() > 1 else value)

  def _fetch(self, texts: decode.Texts) -> dict[str, np.ndarray]:
    """What the host needs to know of texts."""
    names = ("token", "length", "done", "passes", "settled") + (("time", "guess") if texts.guess is not None else ())
    found = {name: getattr(texts, name) for name in names}
    if texts.guess is not None and texts.draft is not None:
      found |= {"proposal": texts.draft.token, "proposals": texts.draft.count}
    return self._read(found)


class _Progress:
  """What is settled of one text, as the host sees it."""

  def __init__(self, row: _Row, tokenizer: tokenizer_lib.Tokenizer, stop: tuple[str, ...]):
    self._row, self._tokenizer, self._stop = row, tokenizer, stop
    self._told, self._cut = "", None
    self.seconds: float | None = None  # until it was done

  def _tokens(self, host: dict[str, np.ndarray], i: int) -> list[int]:
    """What is written without a gap, up to the document's end."""
    return self._row.written(host["token"][i], host["length"][i])

  def _decode(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(np.array(tokens, np.int64))

  def look(self, host: dict[str, np.ndarray], i: int, seconds: float) -> str:
    """What is new and will stay."""
    if self.seconds is not None:
      return ""
    text = self._decode(self._tokens(host, i))
    found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
    if found:
      self._cut = min(found)
    if found or host["done"][i]:
      text, self.seconds = text[:self._cut], max(seconds, 1e-9)
    else:  # the first bytes of a character, and what may be the beginning of a stop string, wait
      text = text.rstrip("\ufffd")
      text = text[:len(text) - max(map(len, self._stop), default=1) + 1]
    new = text[len(self._told):] if text.startswith(self._told) else ""
    self._told += new
    return new

  def generation(self, host: dict[str, np.ndarray], i: int, infill: bool) -> Generation:
    row = self._row
    if infill:
      places = [place for place, token in enumerate(row.tokens, 1) if token is None]
      text = self._decode(host["token"][i, 1:len(row.tokens) + 1].tolist())
      tokens = host["token"][i, places].tolist()
    else:
      # A stop string shortens the text; the tokens that are left are those that the rest needs.
      tokens = self._tokens(host, i)
      text = self._decode(tokens)[:self._cut]
      if self._cut is not None:
        tokens = next(tokens[:n] for n in range(len(tokens) + 1) if len(self._decode(tokens[:n])) >= self._cut)
      places = [row.begin + j for j in range(len(tokens))]
    return Generation(row.prompt, text, tokens, host["settled"][i, places].tolist(), int(host["passes"][i]),
                      self.seconds)


class _Recorder:
  """Looks at the first text of a batch after every pass."""

  def __init__(self, row: _Row):
    self._row, self._looks = row, []

  def look(self, host: dict[str, np.ndarray]) -> None:
    new = {name: value[0] for name, value in host.items()}
    before = self._looks[-1]["passes"] if self._looks else -1
    # Between two looks there may be passes that only propose: nothing is settled by them.
    self._looks += [self._looks[-1]] * max(new["passes"] - before - 1, 0) if self._looks else []
    if new["passes"] > before:
      self._looks.append(new)

  def trace(self, sampling: Sampling, tokenizer: tokenizer_lib.Tokenizer) -> trace_lib.Trace:
    """The passes; places from the first unknown one to the last known one."""
    begin, last = self._row.begin, self._looks[-1]
    places = begin + np.arange(len(self._row.written(last["token"], last["length"])))
    decode_one = lambda token: tokenizer.decode(np.array([token], np.int64))
    time, believed, event = [], [], []
    before_text = [""] * len(places)
    for old, new in zip(self._looks, self._looks[1:]):
      known, was = new["time"][places] <= 0.0, old["time"][places] <= 0.0
      shown = np.where(known, new["token"][places], new["guess"][places])
      seen = known | (new["guess"][places] > 0)
      proposed = np.zeros(len(places), bool)
      if "proposal" in new:
        at = places - int(new["length"])
        proposed = (at >= 0) & (at < new["proposals"]) & ~known
        shown = np.where(proposed, new["proposal"][np.clip(at, 0, len(new["proposal"]) - 1)], shown)
        seen = known | proposed
      texts = [decode_one(token) if there else "" for token, there in zip(shown.tolist(), seen)]
      changed = np.array([bool(a) and a != b for a, b in zip(before_text, texts)])
      partial = (old["time"][places] < 1.0) | ("proposal" in new)
      newly = known & ~was
      event.append(np.where(newly & changed & partial, trace_lib.CORRECTION,
                            np.where(newly, trace_lib.JUMP, np.where(proposed, trace_lib.DRAFT, trace_lib.NONE))))
      time.append(np.where(seen, new["time"][places], np.nan))
      believed.append(texts)
      before_text = texts
    prompt = tokenizer.decode(np.array(self._row.tokens[:begin - 1], np.int64))
    setting = {"flow": f", {sampling.path or 'diagonal'}, {sampling.steps} passes a window",
               "adaptive": f", threshold {sampling.threshold:g}"}.get(sampling.mode, "")
    return trace_lib.Trace(prompt, sampling.mode + setting, np.array(time, float).reshape(len(time), len(places)),
                           believed, np.array(event, np.int8).reshape(len(time), len(places)))


def check(sampling: Sampling, config: config_lib.Config) -> str | None:
  """Raises UserError, naming the flag, for settings that are impossible or that the model does not have. Returns the
  path that windows take, with its number; None for modes without one."""
  def need(condition: bool, flag: str, problem: str) -> None:
    if not condition:
      raise UserError(f"--{flag}={getattr(sampling, flag)}: {problem}")

  need(sampling.mode in MODES, "mode", f"is not one of {', '.join(MODES)}")
  for flag in ("max_tokens", "steps", "draft", "draft_passes", "gap", "batch_size"):
    need(getattr(sampling, flag) >= 1, flag, "is not positive")
  need(sampling.temperature > 0, "temperature", "is not positive; for the most probable tokens use --greedy")
  need(sampling.top_k >= 0, "top_k", "is negative")
  need(0 < sampling.top_p <= 1, "top_p", "is not in (0, 1]")
  need(sampling.window >= 0, "window", "is negative")
  need(sampling.window <= config.model.context, "window", f"is more than the context of {config.model.context}")
  need(sampling.draft <= 16, "draft", "is more than 16: a pass has a window for every proposal")
  need(sampling.stepper in sample.STEPPERS, "stepper", f"is not one of {', '.join(sample.STEPPERS)}")
  need(all(sampling.stop), "stop", "is empty")
  if config.diffusion_alone:
    need(sampling.mode == "flow", "mode", "the model is of diffusion alone (loss.ar_weight = 0): --mode=flow")
    need(sampling.window in (0, config.window.size), "window", f"the model knows only windows of {config.window.size}")
  if sampling.mode not in _DEFAULT_PATH:
    need(not sampling.path, "path", f"goes with --mode=flow or --mode=adaptive, not with {sampling.mode}")
    return None
  path = sampling.path or _DEFAULT_PATH[sampling.mode]
  if sampling.mode == "adaptive":
    need(path in _THRESHOLD_PATHS, "path", f"is not one of {', '.join(_THRESHOLD_PATHS)}, whose number is --threshold")
    try:
      return _full(f"{path}:{sampling.threshold}")
    except UserError:
      most = paths.LIMITS[path]
      raise UserError(f"--threshold={sampling.threshold}: is not in [0, {most:g}], which {path} needs") from None
  path = f"{path}:{sampling.steps}" if path in _STEPS_PATHS else path
  name, _ = paths.parse(path)
  need(name != "ar", "path", "has a mode of its own, --mode=ar")
  need(name != "learned" or config.model.progression == "learned", "path",
       "the model has a shared clock (model.progression)")
  _clock_times(sampling)
  need(sampling.grid == "time" or name in ("diagonal", "rolling"), "grid", f"does not go with --path={path}")
  return path


def _full(path: str) -> str:
  """confidence:t is a probability that has to be exceeded; as a threshold, 0 must be autoregression: 1 - t."""
  name, _, number = path.partition(":")
  path = f"{name}:{1.0 - float(number)}" if name == "confidence" else path
  paths.parse(path)
  return path


def _clock_times(sampling: Sampling) -> list[float] | None:
  """The times after each pass that `grid` gives, but for the last 0; None where it names a rule. Raises UserError."""
  if sampling.grid in _GRIDS:
    return None
  try:
    times = [float(t) for t in sampling.grid.split(",")]
  except ValueError:
    times = []
  if not times or any(a <= b for a, b in zip([1.0] + times, times + [0.0])):
    raise UserError(f"--grid={sampling.grid}: is neither {' nor '.join(_GRIDS)}, nor times that fall from 1 to 0, "
                    "as 0.8,0.5,0.2")
  return times


def clock_steps(sampling: Sampling, path: str, warp: paths.Warp) -> jax.Array | None:
  """The clock (K + 1,) of a grid's passes; None: even steps.

  "precision": steps even in the logarithm of the diagonal's precision, between t = 0.98 and t = 0.02.
  """
  if sampling.grid == "time" or sampling.mode != "flow":
    return None
  times = _clock_times(sampling)
  if times is None:
    K = int(paths.parse(path)[1])
    ends = jnp.log(warp.precision(jnp.array([1.0 - paths.END, paths.END])))
    times = warp.time(jnp.exp(jnp.linspace(ends[0], ends[1], max(K - 1, 1))))[:K - 1]
  return jnp.concatenate([jnp.zeros(1), 1.0 - jnp.asarray(times, jnp.float32), jnp.ones(1)])


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple


def final_samples(run: checkpoint.Run, mesh: jax.sharding.Mesh) -> str:
  """A few texts in two modes, from nothing, for the end of training."""
  config, parts = run.config, []
  for mode in () if not config.eval.samples else ("flow",) if config.diffusion_alone else ("ar", "flow"):
    sampling = Sampling(mode=mode, max_tokens=min(config.eval.sample_tokens, config.model.context),
                        steps=config.eval.flow_steps)
    found = Sampler(run, sampling, mesh)([""], config.eval.samples, config.train.seed)
    passes = "one token a pass" if mode == "ar" else f"{config.eval.flow_steps} passes for {config.window.size} tokens"
    parts += [f"--- {mode} ({passes})\n{generation.text}" for generation in found]
  return "\n".join(parts)


def read_prompts(name: str) -> list[str]:
  """The prompts of a file, one a line, or of a .jsonl file, each line a string or an object with "prompt" or "text";
  "-" is standard input, one a line. Raises UserError that names file and line."""
  try:
    if name == "-":
      lines = sys.stdin.read().splitlines()
    else:
      with open(name, encoding="utf-8") as file:
        lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts={name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
  if not name.endswith(".jsonl"):
    return lines
  prompts = []
  for i, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise UserError(f"--prompts={name}: line {i} is not JSON ({error})") from error
    value = value.get("prompt", value.get("text")) if isinstance(value, dict) else value
    if not isinstance(value, str):
      raise UserError(f"--prompts={name}: line {i} is neither a string nor an object with \"prompt\" or \"text\"")
    prompts.append(value)
  return prompts


def main() -> None:
  args = flags.FLAGS
  fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)}
  sampling = Sampling(**fields | {"stop": tuple(args.stop)})
  if args.num < 1:
    raise UserError(f"--num={args.num}: is not positive")
  if not 0 <= args.seed < 2**32:
    raise UserError(f"--seed={args.seed}: is not in [0, 2^32)")
  prompts = args.infill or args.prompt + (read_prompts(args.prompts) if args.prompts else [])
  if args.infill and (args.prompt or args.prompts):
    raise UserError("--infill: is a text of its own, and goes without --prompt and --prompts")
  if args.infill and sampling.mode not in _DEFAULT_PATH:
    raise UserError(f"--infill: needs --mode=flow or --mode=adaptive; {sampling.mode} sees no text behind a gap")
  if args.prompts and not prompts:
    raise UserError(f"--prompts={args.prompts}: has no prompts")
  if args.trace:
    trace_lib.check(args.trace)
  run = checkpoint.load_run(args.workdir, args.step)
  sampler = Sampler(run, sampling)
  prompts = prompts or [""]
  single = len(prompts) * args.num == 1 and not args.json and not args.infill
  if single:  # is shown as it comes
    print(prompts[0], end="", flush=True)
  traces = [] if args.trace else None
  found = sampler(prompts, args.num, args.seed, bool(args.infill),
                  (lambda _, piece: print(piece, end="", flush=True)) if single else None, traces)
  if args.json:
    print(json.dumps([dataclasses.asdict(generation) for generation in found], indent=2))
  elif single:
    print()
  else:
    for i, generation in enumerate(found):
      print(("-" * 20 + "\n" if i else "") + ("" if args.infill else generation.prompt) + generation.text)
  if traces:
    trace_lib.write(traces[0], args.trace)
  tokens, passes = (sum(x) for x in zip(*((len(g.tokens), g.passes) for g in found)))
  seconds = max(generation.seconds for generation in found)
  print(f"{tokens} tokens in {passes} passes ({tokens / max(passes, 1):.2f} a pass), {seconds:.2f} s, and "
        f"{sampler.compile_seconds:.1f} s to compile", file=sys.stderr)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "A run's work directory.")
  flags.DEFINE_multi_string("prompt", [], "A text's beginning; may be given several times.")
  flags.DEFINE_string("prompts", "", "File of prompts, one a line, or .jsonl; - is standard input.")
  flags.DEFINE_multi_string("infill", [],
                            "A text whose [...] ([...12]: of 12 tokens) are filled, what stands behind held fixed.")
  flags.DEFINE_integer("num", 1, "Texts for each prompt.")
  flags.DEFINE_integer("seed", 0, "Of all draws.")
  flags.DEFINE_bool("json", False,
                    "Print a list of objects: prompt, text, tokens, settled (each token's pass), passes, seconds.")
  flags.DEFINE_string("trace", "", "File (.html or .png) for a picture of how the first text matured.")
  flags.DEFINE_integer("step", None, "The checkpoint's step; default: the last.")
  default = Sampling()
  flags.DEFINE_enum("mode", default.mode, MODES, "How tokens are settled.")
  flags.DEFINE_integer("max_tokens", default.max_tokens, "Tokens of each text at most.")
  flags.DEFINE_float("temperature", default.temperature, "Below 1 draws are sharper.")
  flags.DEFINE_integer("top_k", default.top_k, "Only the k most probable tokens are drawn; 0: all.")
  flags.DEFINE_float("top_p", default.top_p, "Only the most probable tokens that make up this probability are drawn.")
  flags.DEFINE_bool("greedy", default.greedy, "The most probable token always.")
  flags.DEFINE_multi_string("stop", list(default.stop), "A string that ends a text; may be given several times.")
  flags.DEFINE_integer("steps", default.steps, "Passes a window (mode flow).")
  flags.DEFINE_string("path", default.path, "Mode flow: diagonal (default), rolling, random or learned, in --steps "
                      "passes, or any that evaluate prices, as streams:4. Mode adaptive: spread (default), entropy, "
                      "confidence or maturity.")
  flags.DEFINE_string("grid", default.grid, "Steps of diagonal and rolling: even in time, in (log-)precision, or t "
                      "after each pass as 0.8,0.5,0.2.")
  flags.DEFINE_string("stepper", default.stepper, "How a step is taken: ode, ode2 (second order) or ancestral.")
  flags.DEFINE_float("threshold", default.threshold,
                     "Mode adaptive: 0 is autoregression; the higher, the fewer passes.")
  flags.DEFINE_integer("window", default.window, "Tokens of a window; 0: as in training; in mode adaptive, where the "
                       "threshold asks for few passes, up to four times as many.")
  flags.DEFINE_integer("draft", default.draft, "Mode verify: tokens proposed a pass, at most.")
  flags.DEFINE_integer("draft_passes", default.draft_passes,
                       "Mode verify: passes of a round; 1 judges and proposes in one.")
  flags.DEFINE_integer("gap", default.gap, "Tokens of a gap [...] without a number.")
  flags.DEFINE_bool("endless", default.endless, "The end of a document is ruled out.")
  flags.DEFINE_integer("batch_size", default.batch_size, "Texts that are written at once.")
  cli.run(main)

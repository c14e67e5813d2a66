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

from collections.abc import Callable
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from evo_jax import config as config_lib
from evo_jax import run as run_lib
from evo_jax.decoding import logits as logits_lib
from evo_jax.decoding import modes, settings, speculative
from evo_jax.decoding import progress as progress_lib
from evo_jax.decoding import prompts as prompts_lib
from evo_jax.decoding import state as state_lib
from evo_jax.decoding import trace as trace_lib
from evo_jax.errors import UserError
from evo_jax.flow import policies
from evo_jax.network import evo as evo_lib
from evo_jax.parallel import sharding

_CHUNK = 8  # passes between two looks of the host


class Sampler:
  """Writes texts with a model. Compiles once for texts of like length in batches of like size;
  `compile_seconds` sums up."""

  def __init__(
    self, run: run_lib.Run, sampling: settings.Sampling = settings.Sampling(), mesh: jax.sharding.Mesh | None = None
  ):
    """mesh: over which texts and parameters are laid out by the rules of training; None: all devices hold copies of the
    parameters. Raises UserError for a setting that is impossible, or that this model does not have."""
    self.run, self.sampling, self.compile_seconds = run, sampling, 0.0
    path = settings.check_sampling(sampling, run.config)
    self._window = sampling.window or settings.default_window(sampling, run.config)
    self._mesh = sharding.make_mesh(config_lib.Mesh()) if mesh is None else mesh
    self._everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
    self._model = run.model.clone(stacked=False, layout=sharding.Layout.of(self._mesh))
    boxed = jax.eval_shape(
      run.model.clone(stacked=False, layout=sharding.Layout()).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )["params"]
    apart = sharding.shardings(self._mesh, boxed)
    self._params = jax.jit(evo_lib.unstack_layers, out_shardings=apart)(run.params)
    self._statistics = jax.jit(lambda s: s, out_shardings=self._everywhere)(run.statistics)
    self._shaping = logits_lib.LogitsProcessor(
      np.float32(sampling.temperature),
      np.float32(sampling.top_p),
      sampling.greedy,
      sampling.top_k,
      sampling.top_p < 1.0,
      sampling.endless,
    )
    self._walk = None
    if path is not None:
      policy = policies.make_policy(
        path, self._window, run.config.paths.rolling_width, s=settings.clock_steps(sampling, path, run.statistics.warp)
      )
      self._walk = modes.WindowSchedule(
        policy, self._window, sampling.stepper, run.config.loss.self_conditioning > 0, run.config.diffusion_alone
      )
    self._compiled = {}
    self._gather = jax.jit(lambda x: x, out_shardings=self._everywhere)

  def __call__(
    self,
    prompts: list[str],
    num: int = 1,
    seed: int = 0,
    infill: bool = False,
    on_text: Callable[[int, str], None] | None = None,
    traces: list[trace_lib.Trace] | None = None,
  ) -> list[progress_lib.Generation]:
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
        rows.append(progress_lib.Row(prompt, tokens, (digest, seen[digest])))
    order = list(range(len(rows)))
    if traces is None:
      order.sort(key=lambda i: len(rows[i].tokens))  # like lengths share a batch
    found: list[progress_lib.Generation | None] = [None] * len(rows)
    size = self.sampling.batch_size
    with jax.set_mesh(self._mesh):
      for part in (order[i : i + size] for i in range(0, len(order), size)):
        tell = on_text and (lambda i, piece, part=part: on_text(part[i], piece))
        for i, generation in zip(part, self._write([rows[i] for i in part], seed, infill, tell, traces)):
          found[i] = generation
        traces = None
    return found

  def _encode(self, prompt: str, infill: bool) -> list[int | None]:
    tokenizer, C = self.run.tokenizer, self.run.config.model.context
    what = ("--infill " if infill else "prompt ") + repr(prompt if len(prompt) < 40 else prompt[:36] + "...")
    if lost := tokenizer.lost(prompts_lib.GAP.sub("", prompt) if infill else prompt):
      raise UserError(f"{what}: the tokenizer, {tokenizer.identity}, has no {lost[0]!r}")
    if not infill:
      tokens = tokenizer.encode(prompt).tolist()
      if len(tokens) + self.sampling.max_tokens > C:
        raise UserError(
          f"{what}: its {len(tokens)} tokens and {self.sampling.max_tokens} more do not fit the context of {C}"
        )
      return tokens
    tokens: list[int | None] = []
    for i, piece in enumerate(prompts_lib.GAP.split(prompt)):  # text, number, text, number, ..., text
      tokens += [None] * int(piece or self.sampling.gap) if i % 2 else tokenizer.encode(piece).tolist()
    if None not in tokens:
      raise UserError(f"{what}: has no gap to fill; mark one by [...], or by [...12] for 12 tokens")
    if len(tokens) > C:
      raise UserError(f"{what}: its {len(tokens)} tokens with the gaps do not fit the context of {C}")
    return tokens

  def _write(
    self,
    rows: list[progress_lib.Row],
    seed: int,
    infill: bool,
    tell: Callable[[int, str], None] | None,
    traces: list[trace_lib.Trace] | None,
  ) -> list[progress_lib.Generation]:
    """One batch."""
    clock, compiling = time.perf_counter(), self.compile_seconds
    texts = self._start(rows, seed, infill, traces is not None)
    walk, index = self._walk, np.int32(0)
    stop = np.zeros(texts.done.shape, bool)
    done = [progress_lib.Progress(row, self.run.tokenizer, self.sampling.stop) for row in rows]
    recorder = progress_lib.TraceRecorder(rows[0]) if traces is not None else None
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

  def _start(self, rows: list[progress_lib.Row], seed: int, infill: bool, trace: bool) -> state_lib.DecodingState:
    """Reads the prompts. Sizes are rounded up, so that texts of like length share compiled code."""
    sampling, shards = self.sampling, self._mesh.shape["data"] * self._mesh.shape["fsdp"]
    B = _round_up(1 << (len(rows) - 1).bit_length(), shards)
    P = _round_up(max(row.begin for row in rows), 32)
    limits = [len(row.tokens) + 1 + (0 if infill else sampling.max_tokens) for row in rows]
    # For slots behind the last token.
    room = 2 * self._window + modes.uncached_slots(self._window) if self._walk else 2 * sampling.draft + 4
    C = _round_up(max(max(limits), P) + room, 32)
    token, known = np.zeros((B, C), np.int32), np.zeros((B, C), bool)
    known[:, 0] = True
    for i, row in enumerate(rows):
      token[i, 1 : len(row.tokens) + 1] = [t or 0 for t in row.tokens]
      known[i, 1 : len(row.tokens) + 1] = [t is not None for t in row.tokens]
    filled = lambda values, dtype: np.array(
      values + [1] * (B - len(rows)), dtype
    )  # rows that are done before they begin
    digest, count = (filled([row.number[j] for row in rows], np.uint32) for j in (0, 1))

    def start(params, statistics, token, known, prefix, begin, limit, digest, count, seed):
      net = self._model.bind({"params": params})
      fold = lambda digest, count: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), count)
      texts = state_lib.prefill(
        net, token, known, prefix, begin, limit, jax.vmap(fold)(digest, count), trace, flat=self._mesh.size == 1
      )
      if sampling.mode == "verify":
        return state_lib.with_draft(texts, sampling.draft, self._model.rows)
      if sampling.mode == "ar":
        return texts
      return state_lib.with_latents(
        texts, net.codes(), statistics.log_unigram_V if self._walk.self_conditioned else None, self._window
      )

    return self._call(
      ("start", trace),
      start,
      self._params,
      self._statistics,
      token,
      known,
      token[:, :P],
      filled([row.begin for row in rows], np.int32),
      filled(limits, np.int32),
      digest,
      count,
      np.uint32(seed),
    )

  def _advance(
    self,
    texts: state_lib.DecodingState,
    stop: np.ndarray,
    walk: modes.WindowSchedule | None,
    index: np.ndarray,
    infill: bool,
  ) -> tuple[state_lib.DecodingState, modes.WindowSchedule | None, np.ndarray]:
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
        return modes.run_passes(lambda t: modes.ar_pass(bind(params), t, shaping), end(texts, stop), chunk)

      return self._call(("ar", chunk), some, *given), None, index
    if sampling.mode == "verify":
      done, most = self._read((texts.done, texts.draft.most))
      wanted = int(np.max(np.where(done, 1, most)))
      proposals = min(next(p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p >= wanted), sampling.draft)

      def some(params, statistics, texts, shaping, stop):
        step = lambda t: speculative.verify_round(
          bind(params), statistics, t, shaping, proposals, sampling.draft_passes
        )
        return speculative.adapt_draft_length(modes.run_passes(step, end(texts, stop), chunk))

      return self._call(("verify", chunk, proposals), some, *given), None, index
    if sampling.mode == "adaptive":

      def some(params, statistics, texts, shaping, stop, walk):
        step = lambda t: modes.adaptive_pass(bind(params), statistics, t, walk, shaping, infill)
        return modes.run_passes(step, end(texts, stop), chunk)

      return self._call(("adaptive", chunk, infill), some, *given, walk), walk, index
    if not trace:

      def some(params, statistics, texts, shaping, stop, walk):
        return modes.flow_window(bind(params), statistics, end(texts, stop), walk, shaping)

      return self._call(("flow",), some, *given, walk), walk, index
    if index == 0:

      def some(params, statistics, texts, shaping, stop, walk):
        return modes.flow_first_pass(bind(params), statistics, end(texts, stop), walk, shaping)

      texts, walk = self._call(("flow first",), some, *given, self._walk)
    else:

      def some(params, statistics, texts, shaping, stop, walk, index):
        return modes.flow_next_pass(bind(params), statistics, end(texts, stop), walk, shaping, index)

      texts = self._call(("flow next",), some, *given, walk, index)
    inside = bool(self._read(modes.unfinished(texts, self._window)))
    return texts, walk, np.int32(index + 1 if inside else 0)

  def _call(self, name: tuple, function: Callable, *args: Any) -> Any:
    """function(*args), compiled ahead once for each name and kind of arguments; texts are used up, and come back laid
    out by rows."""
    key = (name, jax.tree.structure(args), tuple((x.shape, x.dtype) for x in jax.tree.leaves(args)))
    if key not in self._compiled:
      clock = time.perf_counter()
      layout = jax.tree.map(
        self._layout, jax.eval_shape(function, *args), is_leaf=lambda x: isinstance(x, state_lib.DecodingState)
      )
      old = tuple(i for i, arg in enumerate(args) if isinstance(arg, state_lib.DecodingState))
      self._compiled[key] = jax.jit(function, out_shardings=layout, donate_argnums=old).lower(*args).compile()
      self.compile_seconds += time.perf_counter() - clock
    return self._compiled[key](*args)

  def _layout(self, value: Any) -> Any:
    if not isinstance(value, state_lib.DecodingState):
      return self._everywhere
    place = lambda names: jax.sharding.NamedSharding(self._mesh, sharding.RULES.spec(names))
    keys = self._everywhere if self._mesh.size == 1 else place(("batch", "kv_heads", None, None))
    return jax.tree.map(lambda _: place(("batch",)), value).replace(k=(keys,) * len(value.k), v=(keys,) * len(value.v))

  def _read(self, value: Any) -> Any:
    """Arrays on the host, also where other processes hold parts of them; copies, since texts are written in place."""
    return jax.tree.map(np.array, self._gather(value) if jax.process_count() > 1 else value)

  def _fetch(self, texts: state_lib.DecodingState) -> dict[str, np.ndarray]:
    """What the host needs to know of texts."""
    names = ("token", "length", "done", "passes", "settled") + (("time", "guess") if texts.guess is not None else ())
    found = {name: getattr(texts, name) for name in names}
    if texts.guess is not None and texts.draft is not None:
      found |= {"proposal": texts.draft.token, "proposals": texts.draft.count}
    return self._read(found)


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple

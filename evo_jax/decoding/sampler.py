"""Generates texts with a trained model, from Python:

  run = load_run("runs/tiny")
  sampler = Sampler(run, Sampling(mode="adaptive", threshold=0.3))
  generations = sampler(["def ", "class "], seed=1)
  print(generations[0].text)

The modes are described in `evo_jax.generate`, the command. A text ends at a token of the tokenizer's `end_ids`, before
a stop string, after `max_tokens` tokens, or where the context is full.
"""

from collections.abc import Callable
import time

import jax
import numpy as np

from evo_jax.decoding import speculative, steps
from evo_jax.decoding.device import DeviceModel, out_of_memory_as
from evo_jax.decoding.draft_policy import DraftPolicy
from evo_jax.decoding.logits import make_processor, ruled_out
from evo_jax.decoding.progress import Generation, Progress, Snapshot
from evo_jax.decoding.prompts import Prompt, Request, make_requests, pack
from evo_jax.decoding.recorder import TraceRecorder
from evo_jax.decoding.settings import Sampling
from evo_jax.decoding.setup import make_drafting, make_schedule, room_behind
from evo_jax.decoding.state import DecodingState, prefill, row_key, with_latents
from evo_jax.decoding.steps import RunningBatch
from evo_jax.decoding.trace import Trace
from evo_jax.errors import check_seed
from evo_jax.run import Run

OnText = Callable[[int, str], None]


class Sampler:
  """Generates texts. Batches of similar size with texts of similar length share compiled code."""

  def __init__(self, run: Run, sampling: Sampling | None = None, mesh: jax.sharding.Mesh | None = None):
    """Prepares the model. Raises UserError for a parameter that is impossible or that this model does not support.

    Args:
      sampling: default: `Sampling()`.
      mesh: texts and parameters are sharded over it by the rules of training; default: the one that the parameters lie
        on.
    """
    self.run, self.sampling = run, sampling or Sampling()
    self._schedule = make_schedule(run, self.sampling)
    self._drafts = DraftPolicy(*make_drafting(run, self.sampling)) if self.sampling.mode == "verify" else None
    self._device = DeviceModel(run, run.mesh if mesh is None else mesh)

  @property
  def compile_seconds(self) -> float:
    """Seconds spent on compilation so far."""
    return self._device.compile_seconds

  def __call__(
    self,
    prompts: list[Prompt],
    num: int = 1,
    seed: int = 0,
    infill: bool = False,
    on_text: OnText | None = None,
    traces: list[Trace] | None = None,
  ) -> list[Generation]:
    """`num` texts for each prompt in turn; with `infill`, prompts whose gaps `[...]` (`[...12]`: 12 tokens) are filled.

    A text depends on its prompt, its number among those with the same prompt, and the seed; not on other prompts, but
    for rounding (see `state`).

    Args:
      on_text: is called with a text's number and a piece of it that is new and final, from left to right.
      traces: a list to which the first text's trace is added.

    Raises UserError for a prompt that is too long or cannot be encoded, for a seed that does not fit into 32 bits, and
    for a batch that the memory does not hold.
    """
    run, size = self.run, self.sampling.batch_size
    requests = make_requests(prompts, num, infill, self.sampling, run.tokenizer, run.config.model.position_limit)
    order = list(range(len(requests)))
    if traces is None:
      order.sort(key=lambda i: len(requests[i].tokens))  # similar lengths share a batch
    generations: list[Generation | None] = [None] * len(requests)
    with jax.set_mesh(self._device.mesh), out_of_memory_as(f"--batch_size={size}"):
      for start in range(0, len(order), size):
        part = order[start : start + size]
        tell = on_text and (lambda i, piece, part=part: on_text(part[i], piece))
        batch = [requests[i] for i in part]
        for i, generation in zip(part, self._generate(batch, seed, infill, tell, traces if start == 0 else None)):
          generations[i] = generation
    return generations

  def decode(self, requests: list[Request], seed: int = 0) -> list[Generation]:
    """The texts of one batch. Raises UserError for a bad seed, and where the memory does not hold the batch."""
    with jax.set_mesh(self._device.mesh), out_of_memory_as(f"--batch_size={self.sampling.batch_size}"):
      return self._generate(requests, seed, False, None, None)

  def _generate(
    self, requests: list[Request], seed: int, infill: bool, on_text: OnText | None, traces: list[Trace] | None
  ) -> list[Generation]:
    """One batch, from its prompts to its texts."""
    check_seed(seed)
    start, compiled_before = time.perf_counter(), self.compile_seconds
    sampling, tokenizer = self.sampling, self.run.tokenizer
    batch = self._start(requests, seed, infill, traces is not None)
    progress = [Progress(request, tokenizer, sampling.stop, infill) for request in requests]
    recorder = TraceRecorder(requests[0], tokenizer) if traces is not None else None
    while True:
      snapshot = self._device.to_host(Snapshot.select(batch.state))
      if recorder:
        recorder.record(snapshot.row(0))
      seconds = time.perf_counter() - start - (self.compile_seconds - compiled_before)
      for i, text in enumerate(progress):
        piece = text.update(snapshot.row(i), seconds)
        batch.stopped[i] = text.seconds is not None
        if on_text and piece:
          on_text(i, piece)
      if all(text.seconds is not None for text in progress):
        break
      steps.STEPS[sampling.mode](self._device, batch)
    generations = [text.generation(snapshot.row(i)) for i, text in enumerate(progress)]
    if recorder:
      traces.append(recorder.trace(sampling, generations[0].text))
    return generations

  def _start(self, requests: list[Request], seed: int, infill: bool, traced: bool) -> RunningBatch:
    """Reads the prompts of a batch."""
    sampling, device, tokenizer, schedule = self.sampling, self._device, self.run.tokenizer, self._schedule
    buffers, prefix = pack(requests, tokenizer.begin_id, device.row_multiple, room_behind(sampling, schedule))

    def program(net, statistics, buffers, seed, record):
      keys = jax.vmap(lambda *numbers: row_key(seed, *numbers))(buffers.digest, buffers.repetition)
      state = prefill(
        net,
        buffers.tokens,
        buffers.known,
        prefix,
        buffers.prompt_end,
        buffers.max_length,
        keys,
        tokenizer.end_ids,
        traced,
        flat_cache=device.mesh.size == 1,
      )
      if sampling.mode == "verify":
        tokens, coupling = sampling.draft_tokens, sampling.coupling
        return state.replace(draft=speculative.start_draft(net, statistics, len(keys), tokens, coupling, record))
      if sampling.mode == "ar":
        return state
      prior = statistics.log_unigram_V if schedule.self_conditioning else None
      return with_latents(state, net.codes(), prior, schedule.size)

    record = self._drafts and self._drafts.record
    state: DecodingState = device.run(("start", traced, prefix), program, buffers, np.uint32(seed), record)
    suppressed, ends = ruled_out(tokenizer, infill)
    processor = make_processor(sampling, suppressed, tokenizer.vocab_size, ends)
    stopped = np.zeros(state.done.shape, bool)
    return RunningBatch(sampling, schedule, processor, state, stopped, infill, self._drafts)

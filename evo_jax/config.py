"""The configuration: frozen dataclasses, checked before anything compiles.

`configs/*.py` start from `default()` (an `ml_collections.ConfigDict`, so that the command line can change any field)
and `from_dict` turns the result into a `Config`. A misspelt, ill-typed or impossible field raises a `UserError` that
names it. Each section checks itself, `Config` what concerns several sections.
"""

import dataclasses
import math
import re
import types
import typing
from typing import Any

import ml_collections

from evo_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
REMAT_NAMES = ("qkv", "attention", "gate", "up")
ATTENTIONS = ("auto", "xla", "splash", "cudnn")
DTYPES = ("float32", "bfloat16", "float16")
ROPE_SCALINGS = ("none", "linear", "llama3")
PROGRESSIONS = ("shared", "learned")
WINDOW_ATTENTIONS = ("full", "informed")
TRACKERS = ("tensorboard", "wandb")
TOKENIZERS = ("bytes", "chars27", "sentencepiece", "huggingface")
CHATS = ("answers", "last")
GAUSSIAN_PATHS = ("diagonal", "rolling", "independent", "learned")  # tokens pass through partial evidence
JUMP_PATHS = ("staircase", "streams", "erasure", "ragged", "parallel")  # a token is unknown or known
TRAIN_PATHS = GAUSSIAN_PATHS + JUMP_PATHS
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3.4e38  # what int32 and float32 hold
_MOST_THREADS = 1024


def pinned(default, key=lambda value: value):
  """A field that a checkpoint's contents depend on: going on with another value is refused.

  key: of a value, what they depend on, where that is less than the value.
  """
  return dataclasses.field(default=default, metadata={"pinned": "contents", "key": key})


def of_windows(default):
  """A field that parameters depend on which are windows' own: going on with another value is refused once a step was
  made; before, as on an imported model, those parameters begin anew."""
  return dataclasses.field(default=default, metadata={"pinned": "windows", "key": lambda value: value})


def ordering(default, key=lambda value: value):
  """A field that batches and random draws, or what later checkpoints hold, depend on: going on with another value is
  refused once a step was made. key: as for `pinned`."""
  return dataclasses.field(default=default, metadata={"pinned": "order", "key": key})


def parts_of(value: str) -> list[str]:
  """What stands between the commas."""
  return [part.strip() for part in value.split(",")]


class Section:
  """A section of the configuration, called config.NAME after its class in lower case."""

  def check(self) -> None:
    """Raises UserError for the first field that is impossible, whatever the other sections say."""

  def require(self, condition: bool, field: str, problem: str) -> None:
    """Raises UserError, naming the field and its value, unless the condition holds."""
    if not condition:
      raise UserError(f"config.{type(self).__name__.lower()}.{field}: {getattr(self, field)!r} {problem}")

  def require_positive(self, *fields: str) -> None:
    for field in fields:
      self.require(getattr(self, field) >= 1, field, "is not positive")

  def require_not_negative(self, *fields: str) -> None:
    for field in fields:
      self.require(getattr(self, field) >= 0, field, "is negative")

  def require_above_zero(self, *fields: str) -> None:
    for field in fields:
      self.require(getattr(self, field) > 0, field, "is not above 0")

  def require_share(self, *fields: str) -> None:
    for field in fields:
      self.require(0 <= getattr(self, field) <= 1, field, "is not in [0, 1]")

  def require_decay(self, *fields: str) -> None:
    for field in fields:
      self.require(0 <= getattr(self, field) < 1, field, "is not in [0, 1)")

  def require_choice(self, field: str, choices: tuple[str, ...]) -> None:
    self.require(getattr(self, field) in choices, field, f"is not one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Model(Section):
  """The Transformer. Widths are numbers of elements."""

  layers: int = pinned(4)
  width: int = pinned(128)
  heads: int = pinned(4)
  kv_heads: int = pinned(4)  # fewer than heads: grouped-query attention
  hidden: int = pinned(384)  # SwiGLU's inner width
  head_dim: int = pinned(0)  # elements of a head; 0: width / heads
  context: int = ordering(256)  # tokens of a sequence in training and evaluation
  context_limit: int = pinned(0)  # positions that generation and evaluation may use; 0: as many as context
  vocab_size: int = pinned(0)  # rows of the vocabulary tables; 0: as many as the tokenizer has tokens
  vocab_multiple: int = pinned(8)  # the rows are rounded up to a multiple of this, so that they divide over a mesh
  code_dim: int = of_windows(32)  # M: elements of a token's code
  time_dim: int = of_windows(16)  # rank of the time conditioning
  # Parameters of windows alone, which act on slots at t > 0: the clean stream stays as it is, bit for bit.
  window_rank: int = of_windows(0)  # of low-rank changes of all matrices of the blocks; 0: none
  window_twins: bool = of_windows(False)  # matrices of their own for queries, keys and values, which begin as copies
  window_unknown: bool = of_windows(False)  # a learned vector, added to a soft input with the weight t
  window_head: int = of_windows(0)  # hidden width of the head that sees the draft token before; 0: there is none
  # full: a slot sees all slots of its window | informed: those up to itself that it may know of, and behind it those
  # that carry information (`attention.informed_slots`)
  window_attention: str = of_windows("full")
  window_candidates: int = 64  # a slot's best tokens, which the head scores
  qkv_bias: bool = pinned(False)  # queries, keys and values have biases, as in Qwen2.5
  qk_norm: bool = pinned(False)  # RMSNorm of each head's query and key, as in Qwen3
  rope_base: float = pinned(10_000.0)
  # none | linear (all frequencies divided by rope_factor) | llama3 (wavelengths longer than rope_original_context /
  # rope_low_factor divided, shorter than rope_original_context / rope_high_factor kept, between them a mixture)
  rope_scaling: str = pinned("none")
  rope_factor: float = pinned(8.0)
  rope_low_factor: float = pinned(1.0)
  rope_high_factor: float = pinned(4.0)
  rope_original_context: int = pinned(8192)
  norm_epsilon: float = pinned(1e-5)
  norm_casts_first: bool = pinned(False)  # RMSNorm applies its weight in model.dtype, as transformers does, not float32
  tie_embeddings: bool = pinned(False)
  isolate_documents: bool = False  # no attention across document boundaries; conversations need it
  progression: str = of_windows("shared")  # shared: one clock for a window's tokens | learned: one inferred per token
  dtype: str = "float32"  # of computation
  param_dtype: str = "float32"  # of parameters; those that are trained are float32 beside frozen ones of any dtype
  attention: str = "auto"  # auto (splash on TPUs, xla elsewhere) | xla | splash | cudnn. They differ by rounding only
  attention_block: int = 0  # xla: queries whose attention scores are in memory at a time; 0: all. Changes no value
  # What the backward pass recomputes: none (nothing) | full (whole layers) | dots (all but matrix products) |
  # save:NAME,... (all but the named: qkv, attention (its output), gate, up).
  remat: str = "none"
  unroll: int = 1  # layers per iteration of the scan over layers

  @property
  def head_size(self) -> int:
    """E: elements of a head."""
    return self.head_dim or self.width // self.heads

  @property
  def position_limit(self) -> int:
    """Positions that a text may take."""
    return self.context_limit or self.context

  def check(self) -> None:
    self.require_positive("layers", "width", "heads", "kv_heads", "hidden", "context")
    self.require_positive("vocab_multiple", "code_dim", "time_dim", "unroll")
    self.require_positive("window_candidates")
    self.require_not_negative("vocab_size", "attention_block", "head_dim", "context_limit")
    self.require_not_negative("window_rank", "window_head")
    self.require_above_zero("norm_epsilon")
    if self.head_dim:
      self.require(self.head_dim % 2 == 0, "head_dim", "is odd; rotary positions need even")
    else:
      self.require(self.width % self.heads == 0, "width", f"does not divide into {self.heads} heads")
      self.require(self.width // self.heads % 2 == 0, "width", "makes heads of odd size; rotary positions need even")
    self.require(self.heads % self.kv_heads == 0, "kv_heads", f"does not divide model.heads = {self.heads}")
    problem = f"is more than model.context_limit = {self.context_limit}"
    self.require(self.context <= self.position_limit, "context", problem)
    self._check_rope()
    self.require_choice("dtype", DTYPES)
    self.require_choice("param_dtype", DTYPES)
    self.require_choice("attention", ATTENTIONS)
    self.require_choice("progression", PROGRESSIONS)
    self.require_choice("window_attention", WINDOW_ATTENTIONS)
    self.require(self.attention != "cudnn" or self.dtype == "bfloat16", "attention", "needs model.dtype = bfloat16")
    self._check_remat()

  def _check_rope(self) -> None:
    self.require_choice("rope_scaling", ROPE_SCALINGS)
    self.require(self.rope_base >= 1, "rope_base", "is less than 1")
    self.require_positive("rope_original_context")
    self.require_above_zero("rope_factor", "rope_low_factor")
    problem = f"is not more than model.rope_low_factor = {self.rope_low_factor}"
    self.require(self.rope_high_factor > self.rope_low_factor, "rope_high_factor", problem)

  def _check_remat(self) -> None:
    names = self.remat.removeprefix("save:").split(",") if self.remat.startswith("save:") else None
    self.require(
      set(names) <= set(REMAT_NAMES) if names else self.remat in REMAT_POLICIES,
      "remat",
      f"is not one of {', '.join(REMAT_POLICIES)}, or save: and some of {','.join(REMAT_NAMES)}",
    )


@dataclasses.dataclass(frozen=True)
class Window(Section):
  """Windows: runs of tokens at t > 0 that are trained beside the clean stream."""

  size: int = 16  # B: tokens of a window
  count: int = 4  # N: windows per sequence in training; 0 trains AR only
  start: int = 0  # training steps before the first one with windows

  def check(self) -> None:
    self.require_positive("size")
    self.require_not_negative("count", "start")


@dataclasses.dataclass(frozen=True)
class Paths(Section):
  """The mixture of paths that windows are trained on. Weights are relative; zero leaves a path out."""

  diagonal: float = 0.5
  rolling: float = 0.2
  independent: float = 0.2
  learned: float = 0.0  # the clock of model.progression = learned
  staircase: float = 0.1
  streams: float = 0.0  # several staircases side by side
  erasure: float = 0.0  # a random number of tokens unknown, anywhere: the states of masked diffusion
  ragged: float = 0.0  # all known up to some position, and some beyond: the states of adaptive policies
  parallel: float = 0.0  # all tokens unknown, in one jump: the states in which tokens are drafted
  rolling_width: float = 0.5  # share of the clock that a token takes from 1 to 0 on rolling and independent paths
  stream_counts: tuple[int, ...] = (2, 4, 8)  # n of a window on the path streams
  erasure_range: tuple[float, ...] = (0.0, 1.0)  # of the share of unknown tokens (BD3-LM's clipped schedule)
  steps: tuple[int, ...] = (4, 8, 16, 32, 64)  # K of the discretizations that the bound is trained on
  learned_steps: tuple[int, ...] = (2, 4, 8, 16)  # the same for the learned clock
  step_sampling: str = "even"  # of the bound's steps: even | importance (in proportion to their root mean square)

  @property
  def all_unknown(self) -> bool:
    """Whether windows hold nothing that is known: all are on the path `parallel`."""
    return [path for path in TRAIN_PATHS if getattr(self, path) > 0] == ["parallel"]

  def check(self) -> None:
    self.require_not_negative(*TRAIN_PATHS)
    self.require(any(getattr(self, p) > 0 for p in TRAIN_PATHS), "diagonal", "and all other path weights are zero")
    self.require(0 < self.rolling_width <= 1, "rolling_width", "is not in (0, 1]")
    for field in ("steps", "learned_steps", "stream_counts"):
      numbers = getattr(self, field)
      self.require(bool(numbers) and min(numbers) >= 1, field, "must hold positive numbers")
    limits = self.erasure_range
    self.require(len(limits) == 2 and 0 <= limits[0] < limits[1] <= 1, "erasure_range", "is not LOW, HIGH in [0, 1]")
    self.require_choice("step_sampling", ("even", "importance"))


@dataclasses.dataclass(frozen=True)
class Loss(Section):
  """Terms of the objective. Every term is in nats per token before its weight."""

  ar_weight: float = 1.0
  window_weight: float = 0.5
  bound_windows: int = 1  # of window.count windows, those trained by the bound; cross-entropy trains the others
  bound_weight: float = 0.2  # of a window trained by the bound, relative to one trained by cross-entropy
  # Share of the cross-entropy of the other windows that is replaced by the KL divergence from the clean stream's
  # belief about the same token; 1: distillation alone.
  distill: float = 0.0
  position_decay: float = 0.0  # weights exp(-k / position_decay) of the tokens of these windows; 0: even
  head_weight: float = 1.0  # of the term of the head that sees the draft token before
  codes: str = "bound"  # windows that train the codes: bound (those trained by the bound) | all | frozen (none)
  clean_gradient: float = 1.0  # scale of the windows' gradient into the clean stream's keys and values
  self_conditioning: float = 0.0  # share of the steps whose windows take two passes; above 0: evaluation always
  antithetic: bool = True  # take the bound of a step at its noise and at the opposite
  integrand: str = "step"  # step: the bound of a finite step | rate: its limit for short steps
  chunk: int = 0  # rows of the vocabulary whose logits are in memory at a time; 0: all. Changes no value
  one_pass: bool = True  # both streams in one pass over the layers, where windows need no output of the clean stream

  def check(self) -> None:
    self.require_not_negative("ar_weight", "window_weight", "bound_weight", "clean_gradient", "chunk")
    self.require_not_negative("position_decay", "head_weight")
    self.require_share("self_conditioning", "distill")
    self.require_choice("integrand", ("step", "rate"))
    self.require_choice("codes", ("bound", "all", "frozen"))


@dataclasses.dataclass(frozen=True)
class Warp(Section):
  """The time warp t(precision), fitted during training."""

  knots: int = pinned(48)
  precision_max: float = pinned(400.0)
  decay: float = 0.99  # per step, of the running cross-entropy by precision

  def check(self) -> None:
    self.require(self.knots >= 2, "knots", "is less than 2")
    self.require_above_zero("precision_max")
    self.require_decay("decay")


@dataclasses.dataclass(frozen=True)
class Optim(Section):
  """AdamW.

  The learning rate of a step follows from these fields and train.steps. A run that goes on with another train.steps
  jumps on `cosine`, which is stretched to the new length; `wsd` goes on as it was before its decay begins, and jumps
  back to the peak after.
  """

  learning_rate: float = 2e-3  # the peak
  schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay)
  warmup: int = 100  # steps
  final: float = 0.1  # share of the peak that the schedule ends at
  decay_share: float = 0.2  # of the steps: the decay of wsd
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # of the blocks' matrices and the head; not of embeddings, codes, norms
  moment_dtype: str = "float32"  # of the gradient's running mean: float32 | bfloat16
  clip: float = 1.0  # global norm that gradients are clipped to; 0: no clipping
  separate_clip: bool = False  # clip the gradients of the AR and the window term separately (one more backward pass)
  ema: float = pinned(0.0, key=bool)  # decay of the averaged parameters, which are then evaluated; 0: none

  def check(self) -> None:
    self.require_not_negative("learning_rate", "warmup", "weight_decay", "clip")
    self.require_choice("moment_dtype", ("float32", "bfloat16"))
    self.require_choice("schedule", ("cosine", "wsd"))
    self.require_above_zero("epsilon")
    self.require_share("final")
    self.require_decay("beta1", "beta2", "ema")
    self.require(0 < self.decay_share <= 1, "decay_share", "is not in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Data(Section):
  """Text. `path`: folders that evo_jax.prepare wrote, globs of text files, or both, comma-separated; 'stdlib' is the
  standard library of Python. Each glob, and each that a folder was prepared from, is a source. `data/files.py` has the
  rules for odd names, `data/preparation.py` those of held-out text."""

  path: str = "stdlib"  # another one goes on where it holds the same text
  weights: tuple[float, ...] = ordering(())  # of tokens, one per source; empty: in proportion to the sources' tokens
  weight_changes: str = ordering("")  # STEP:W,W,...;STEP:W,W,...: other weights after so many steps
  valid: str = ""  # of text files: globs of those for validation; then nothing else is held out
  test: str = ""  # the same for testing
  valid_share: float = 0.05  # of text files' documents, held out by a hash of their content
  test_share: float = 0.05
  tokenizer: str = pinned("bytes")  # bytes | chars27 | sentencepiece | huggingface
  tokenizer_path: str = ""  # folder of a trained SentencePiece model, or of a tokenizer.json
  # Text files are conversations, of which only the assistant's tokens count: "" (no: text) | answers (all that it says)
  # | last (its last turn). Folders say themselves what they were prepared as.
  chat: str = ordering("")
  batch_size: int = ordering(16)  # sequences per step, over all processes
  seed: int = ordering(0)
  strict: bool = False  # whether a document that cannot be used is an error, instead of skipped and reported
  threads: int = 16  # that read ahead: a bucket answers after some hundredths of a second

  def check(self) -> None:
    self.require_positive("batch_size", "threads")
    self.require(self.threads <= _MOST_THREADS, "threads", f"is more than {_MOST_THREADS}")
    self.require_not_negative("seed")
    self.require_choice("tokenizer", TOKENIZERS)
    self.require(self.chat in ("", *CHATS), "chat", f"is not one of {', '.join(CHATS)}, or empty")
    self.require(
      not self.chat or self.tokenizer == "huggingface", "chat", "needs a chat template: data.tokenizer = huggingface"
    )
    self.require_share("valid_share", "test_share")
    self.require(
      self.valid_share + self.test_share < 1, "valid_share", "with data.test_share leaves nothing to train on"
    )
    self.require(not self.weights or _are_weights(self.weights), "weights", "must be positive, or some of them 0")
    changes = parse_weight_changes(self.weight_changes)
    steps = [step for step, _ in changes]
    self.require(
      steps == sorted({*steps}) and min(steps, default=1) > 0,
      "weight_changes",
      "must have ascending steps above 0",
    )
    counts = {len(weights) for _, weights in changes} | ({len(self.weights)} if self.weights else set())
    self.require(len(counts) <= 1, "weight_changes", "must have one weight for each source, as data.weights has")


def parse_weight_changes(value: str) -> list[tuple[int, tuple[float, ...]]]:
  """(step, weights) of each change in data.weight_changes. Raises UserError."""
  changes = []
  for change in filter(None, value.split(";")):
    step, _, weights = change.partition(":")
    try:
      changes.append((int(step), tuple(float(weight) for weight in weights.split(","))))
    except ValueError as error:
      raise UserError(
        f"config.data.weight_changes: {change!r} is not STEP:WEIGHT,WEIGHT,..., a weight for each source"
      ) from error
    if not _are_weights(changes[-1][1]):
      raise UserError(f"config.data.weight_changes: {change!r}: weights must be positive, or some of them 0")
  return changes


def differs_so_far(field: str, before: Any, after: Any, step: int) -> bool:
  """Whether two values of a field make a difference to the steps up to `step`."""
  if field != "data.weight_changes":
    return before != after
  made = lambda value: [change for change in parse_weight_changes(value) if change[0] < step]
  return made(before) != made(after)


def _are_weights(weights: tuple[float, ...]) -> bool:
  return all(0 <= weight < math.inf for weight in weights) and any(weights)


@dataclasses.dataclass(frozen=True)
class Train(Section):
  """The training loop. Periods are in steps; 0 turns a periodic action off."""

  steps: int = 1000
  seed: int = ordering(0)
  # What is trained, saved and averaged: all | windows (what the clean stream does not read: it stays bit for bit what
  # it was) | patterns of paths, as in blocks/w_time,codes. The rest is frozen, as in the checkpoint of step 0.
  trainable: str = ordering("all", key=lambda value: set(parts_of(value)))
  accumulate: int = 1  # microbatches per step
  log_every: int = 20
  log_to: str = ""  # beside metrics.jsonl: tensorboard (files in WORKDIR/tensorboard), wandb, or both, by a comma
  checkpoint_every: int = 250
  checkpoints_kept: int = 2  # the last ones; that of step 0, if there is one, is always kept
  profile: str = ""  # START:STOP, the first and the last step of a trace, written to WORKDIR/profile
  eval_every: int = 250

  @property
  def trackers(self) -> list[str]:
    """The names in `log_to`."""
    return [name for name in parts_of(self.log_to) if name]

  def check(self) -> None:
    self.require(set(self.trackers) <= set(TRACKERS), "log_to", f"is not of {', '.join(TRACKERS)}")
    self.require_positive("steps", "accumulate", "checkpoints_kept")
    self.require_not_negative("log_every", "checkpoint_every", "eval_every", "seed")
    self.require(all(parts_of(self.trainable)), "trainable", "is not all, windows, or patterns between commas")
    if self.profile:
      ends = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile)
      self.require(bool(ends) and 1 <= int(ends[1]) <= int(ends[2]), "profile", "is not START:STOP, two steps")


@dataclasses.dataclass(frozen=True)
class Eval(Section):
  """Held-out evaluation, during training and at its end."""

  paths: tuple[str, ...] = ("ar", "diagonal:1", "diagonal:4", "diagonal:16", "rolling:8")
  sequences: int = 128  # of held-out text in the final table; 0: all of it
  train_paths: tuple[str, ...] = ("ar", "diagonal:4")
  train_sequences: int = 32
  batch_size: int = 16
  samples: int = 2  # final texts of each decoding mode
  sample_tokens: int = 160
  flow_steps: int = 8  # passes per window in samples of mode flow

  def check(self) -> None:
    self.require_positive("batch_size", "flow_steps", "train_sequences", "sample_tokens")
    self.require_not_negative("sequences", "samples")
    self.require(bool(self.paths), "paths", "is empty")


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
  """Devices along each axis of the mesh; -1 (one axis at most): all that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def check(self) -> None:
    for axis in ("data", "fsdp", "tensor"):
      self.require(getattr(self, axis) >= 1 or getattr(self, axis) == -1, axis, "is neither positive nor -1")
    self.require([self.data, self.fsdp, self.tensor].count(-1) <= 1, "data", "and another axis are both -1")


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run."""

  model: Model = Model()
  window: Window = Window()
  paths: Paths = Paths()
  loss: Loss = Loss()
  warp: Warp = Warp()
  optim: Optim = Optim()
  data: Data = Data()
  train: Train = Train()
  eval: Eval = Eval()
  mesh: Mesh = Mesh()

  @property
  def diffusion_alone(self) -> bool:
    """Whether windows are whole sequences and no loss trains the clean stream, which is then not computed either."""
    return self.loss.ar_weight == 0 and self.window.size == self.model.context

  @property
  def window_slots(self) -> int:
    """Slots of a window that training computes: its anchor and its tokens. Where slots are informed by what is known
    alone, the clean stream has the anchor, and the last of slots that are all unknown is read by none."""
    if self.model.window_attention != "informed" or self.diffusion_alone:
      return self.window.size + 1
    return self.window.size - self.paths.all_unknown

  @property
  def windows_start(self) -> int:
    """Training steps without windows: those before the first one with them, or all."""
    return min(self.window.start, self.train.steps)

  def check(self) -> None:
    """Raises UserError for the first field that is impossible, by itself or beside the others."""
    for section in dataclasses.fields(self):
      getattr(self, section.name).check()
    self._check_windows()
    self._check_objective()
    self.train.require(
      self.data.batch_size % self.train.accumulate == 0,
      "accumulate",
      f"does not divide data.batch_size = {self.data.batch_size}",
    )

  def check_trainable(self) -> None:
    """Raises UserError for a field that is of use only for reading a model."""
    self.optim.require(self.optim.learning_rate > 0, "learning_rate", "trains nothing")
    self.model.require(
      self.model.param_dtype == "float32" or self.train.trainable != "all",
      "param_dtype",
      "cannot be trained: parameters and their averages move in float32 (model.dtype=bfloat16 computes in bfloat16)",
    )
    self.model.require(self.model.dtype != "float16", "dtype", "cannot be trained in: gradients vanish in it")
    if self.data.chat:
      self.check_isolates()

  def check_isolates(self) -> None:
    """Raises UserError where conversations of one sequence would not be kept apart."""
    problem = "lets conversations of one sequence read each other; it must be True"
    self.model.require(self.model.isolate_documents, "isolate_documents", problem)

  def _check_windows(self) -> None:
    model, window, paths = self.model, self.window, self.paths
    window.require(model.context % window.size == 0, "size", f"does not divide model.context = {model.context}")
    paths.require(
      not paths.streams or max(paths.stream_counts) <= window.size,
      "stream_counts",
      f"has more streams than a window has tokens, window.size = {window.size}",
    )
    window.require(
      not window.count or self.window_slots > 0, "size", "leaves nothing to draft: the clean stream has the first token"
    )
    model.require(
      not (model.window_head and self.diffusion_alone), "window_head", "needs a clean stream, which nothing trains here"
    )
    learned = model.progression == "learned"
    paths.require(
      learned == (paths.learned > 0), "learned", f"does not go with model.progression = {model.progression}"
    )
    model.require(
      not learned or window.size < model.context, "progression", "needs a past: windows shorter than model.context"
    )

  def _check_objective(self) -> None:
    window, loss = self.window, self.loss
    loss.require(
      not (window.count and loss.bound_windows) or any(getattr(self.paths, p) > 0 for p in GAUSSIAN_PATHS),
      "bound_windows",
      f"needs one of the paths {', '.join(GAUSSIAN_PATHS)}: on the others the bound is the cross-entropy",
    )
    loss.require(
      not (loss.distill and self.diffusion_alone), "distill", "needs a clean stream, which nothing trains here"
    )
    loss.require(loss.ar_weight > 0 or window.count > 0, "ar_weight", "with window.count = 0 trains nothing")
    loss.require(
      loss.ar_weight > 0 or window.start == 0, "ar_weight", f"trains nothing before window.start = {window.start}"
    )
    loss.require(
      0 <= loss.bound_windows <= window.count or not window.count,
      "bound_windows",
      f"is not in 0..window.count = {window.count}",
    )


def default() -> ml_collections.ConfigDict:
  """The defaults as a ConfigDict, for `configs/*.py` to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: Any) -> Config:
  """The checked `Config` of a ConfigDict or a (JSON) dict. Raises UserError that names the field."""
  config = _build(Config, dict(values), "config")
  config.check()
  return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
  """The configuration as nested plain values, for JSON."""
  return dataclasses.asdict(config)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any, str | None]]:
  """(field, old value, new value, what pins it) of every field in which two configurations differ.

  Pinned by "contents" (of a checkpoint), by "windows" (contents, but of windows' own parameters), by "order" (of
  batches and random draws), or None: free to change.
  """
  changes = []
  for section in dataclasses.fields(Config):
    before, after = getattr(old, section.name), getattr(new, section.name)
    for field in dataclasses.fields(before):
      a, b = getattr(before, field.name), getattr(after, field.name)
      if a != b:
        pin = field.metadata.get("pinned")
        differs = pin and field.metadata["key"](a) != field.metadata["key"](b)
        changes.append((f"{section.name}.{field.name}", a, b, pin if differs else None))
  return changes


def _build(cls, values: dict[str, Any], where: str):
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(values) - set(hints))
  if unknown:
    raise UserError(f"{where}.{unknown[0]}: no such field; {where} has {', '.join(hints)}")
  built = {}
  for name, value in values.items():
    hint = hints[name]
    field = f"{where}.{name}"
    if dataclasses.is_dataclass(hint):
      if not hasattr(value, "items"):
        raise UserError(f"{field}: is a section, not a value")
      built[name] = _build(hint, dict(value.items()), field)
    else:
      built[name] = _typed(value, hint, field)
  return cls(**built)


def _typed(value: Any, hint: Any, field: str) -> Any:
  if isinstance(hint, types.GenericAlias):  # tuple[X, ...]
    if not isinstance(value, (tuple, list)):
      raise UserError(f"{field}: {value!r} is not a tuple")
    return tuple(_typed(v, hint.__args__[0], field) for v in value)
  number = hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
  if number and not abs(value) <= (_LARGEST_INT if hint is int else _LARGEST_FLOAT):
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"{field}: {value!r} is not finite")
    raise UserError(f"{field}: is beyond {_LARGEST_INT if hint is int else _LARGEST_FLOAT}")  # may have 5,000 digits
  if hint is float and number:
    return float(value)
  if not isinstance(value, hint) or (hint is int and not number):
    raise UserError(f"{field}: {value!r} is not of type {hint.__name__}")
  return value

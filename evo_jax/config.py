"""The configuration: frozen dataclasses, checked before anything compiles.

`configs/*.py` start from `default()` (an `ml_collections.ConfigDict`, so that the command line can change any field)
and `from_dict` turns the result into a `Config`. A misspelt, ill-typed or impossible field raises `UserError` and
names the field.
"""

import dataclasses
import types
import typing
from typing import Any

import ml_collections

from evo_jax.errors import UserError

REMAT_POLICIES = ("none", "full", "dots")
REMAT_NAMES = ("qkv", "attention", "gate", "up")
ATTENTIONS = ("auto", "xla", "splash", "cudnn")
DTYPES = ("float32", "bfloat16")
PROGRESSIONS = ("shared", "learned")
TOKENIZERS = ("bytes", "chars27", "sentencepiece")
GAUSSIAN_PATHS = ("diagonal", "rolling", "independent", "learned")  # tokens pass through partial evidence
JUMP_PATHS = ("staircase", "streams", "erasure", "ragged")  # a token is unknown or known
TRAIN_PATHS = GAUSSIAN_PATHS + JUMP_PATHS


def pinned(default):
  """A field whose value a checkpoint's contents depend on: resuming with another one is refused."""
  return dataclasses.field(default=default, metadata={"pinned": True})


@dataclasses.dataclass(frozen=True)
class Model:
  """The Transformer. Widths are counted in elements."""

  layers: int = pinned(4)
  width: int = pinned(128)
  heads: int = pinned(4)
  kv_heads: int = pinned(4)  # fewer than heads: grouped-query attention
  hidden: int = pinned(384)  # SwiGLU's inner width
  context: int = pinned(256)  # tokens of one sequence
  vocab_size: int = pinned(0)  # rows of the tables; 0: as many as the tokenizer has tokens
  vocab_multiple: int = pinned(8)  # rounded up to a multiple of this, so that they divide a mesh
  code_dim: int = pinned(32)  # M: elements of a token's code
  time_dim: int = pinned(16)  # rank of the time conditioning
  rope_base: float = pinned(10_000.0)
  norm_epsilon: float = pinned(1e-5)
  tie_embeddings: bool = pinned(False)
  isolate_documents: bool = pinned(False)  # True: no attention across document boundaries
  progression: str = pinned("shared")  # shared | learned: one clock for a window's tokens, or one for each, inferred
  dtype: str = "float32"  # of computation
  param_dtype: str = pinned("float32")
  attention: str = "auto"  # auto | xla | splash | cudnn: auto is splash on TPUs, xla elsewhere.
  # Changes rounding at most
  attention_block: int = 0  # of xla: queries whose attention scores are in memory at a time; 0: all. Changes no value
  remat: str = "none"  # none | full | dots | save:NAME,...: the backward pass computes nothing again; a layer;
  # what is no matrix product; all but what is named: qkv, attention (its outcome), gate, up
  unroll: int = 1  # layers unrolled in the scan over layers


@dataclasses.dataclass(frozen=True)
class Window:
  """Windows: runs of tokens at t > 0 that are trained beside the clean stream."""

  size: int = 16  # B: tokens of a window
  count: int = 4  # N: windows of a sequence in training; 0 trains AR only
  start: float = 0.0  # share of the training steps before the windows start


@dataclasses.dataclass(frozen=True)
class Paths:
  """The mixture of paths that windows are trained on: weights, zero leaves a path out (method: the bound)."""

  diagonal: float = 0.5
  rolling: float = 0.2
  independent: float = 0.2
  learned: float = 0.0  # the clock of model.progression = learned
  staircase: float = 0.1
  streams: float = 0.0  # several staircases side by side
  erasure: float = 0.0  # a random number of tokens unknown, anywhere: masked diffusion's states
  ragged: float = 0.0  # all known up to somewhere, and some beyond: the states that adaptive policies meet
  rolling_width: float = 0.5  # share of the clock that one token's way takes on rolling and independent paths
  stream_counts: tuple[int, ...] = (2, 4, 8)  # n of a window on the path of streams
  erasure_range: tuple[float, ...] = (0.0, 1.0)  # of the share of unknown tokens that is drawn
  # (BD3-LM's clipped schedule)
  steps: tuple[int, ...] = (4, 8, 16, 32, 64)  # K of the discretizations that the bound is trained on
  learned_steps: tuple[int, ...] = (2, 4, 8, 16)  # K of the learned clock's
  step_sampling: str = "even"  # even | importance: steps of the bound alike, or in proportion to their root mean square


@dataclasses.dataclass(frozen=True)
class Loss:
  """Terms of the objective. Every term is in nats a token before its weight."""

  ar_weight: float = 1.0
  window_weight: float = 0.5
  bound_windows: int = 1  # of the window.count windows, taught by the bound; cross-entropy teaches the others
  bound_weight: float = 0.2  # of a window taught by the bound, beside one taught by cross-entropy
  codes: str = "bound"  # bound | all | frozen: which windows teach the codes
  clean_gradient: float = 1.0  # scale of the windows' gradient into the clean stream's keys and values
  self_conditioning: float = 0.0  # share of the steps whose windows are read twice; above 0, always so in use
  antithetic: bool = True  # price a step of the bound at its noise and at the opposite
  integrand: str = "step"  # step | rate: a step's exact price, or its limit for short steps
  chunk: int = 0  # rows of the vocabulary whose logits are in memory at a time; 0: all. Changes no value
  one_pass: bool = True  # over the layers for both streams, where windows do not wait for what the clean one says.


@dataclasses.dataclass(frozen=True)
class Warp:
  """The time warp t(precision), fitted during training."""

  knots: int = pinned(48)
  precision_max: float = pinned(400.0)
  decay: float = 0.99  # of the running cross-entropy by precision, a step


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW. `schedule`: cosine to `final` x the rate, or wsd (warm-up, stable, linear decay over `decay_share`)."""

  learning_rate: float = 2e-3
  schedule: str = "cosine"
  warmup: int = 100  # steps
  final: float = 0.1
  decay_share: float = 0.2
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-8
  weight_decay: float = 0.1  # on matrices of the blocks and the head; not on embeddings, codes, norms
  moment_dtype: str = "float32"  # of the gradient's running mean: float32 | bfloat16
  clip: float = 1.0  # global gradient norm; 0: no clipping
  separate_clip: bool = False  # clip the AR gradient and the windows' each on its own (one backward pass more)
  ema: float = pinned(0.0)  # decay of the averaged parameters that are evaluated; 0: none are kept


@dataclasses.dataclass(frozen=True)
class Data:
  """Text. `path`: 'stdlib' or comma-separated globs of .txt/.jsonl files (also .gz, .xz); each glob is a source."""

  path: str = pinned("stdlib")
  weights: tuple[float, ...] = pinned(())  # one a source; empty: in proportion to their tokens
  tokenizer: str = pinned("bytes")  # bytes | chars27 | sentencepiece
  tokenizer_path: str = ""  # folder of a trained sentencepiece model
  batch_size: int = pinned(16)  # sequences a step, over all processes
  seed: int = pinned(0)
  threads: int = 2  # that read ahead


@dataclasses.dataclass(frozen=True)
class Train:
  """The loop's length and rhythm, in steps. 0 turns the periodic things off."""

  steps: int = 1000
  seed: int = pinned(0)
  accumulate: int = 1  # microbatches a step
  log_every: int = 20
  checkpoint_every: int = 250
  checkpoints_kept: int = 2
  profile: str = ""  # START:STOP, the first and the last step of a trace, written to WORKDIR/profile
  eval_every: int = 250


@dataclasses.dataclass(frozen=True)
class Eval:
  """Held-out evaluation, during training and at its end."""

  paths: tuple[str, ...] = ("ar", "diagonal:1", "diagonal:4", "diagonal:16", "rolling:8")
  sequences: int = 128  # of held-out text in the table at the end; 0: all of it
  train_paths: tuple[str, ...] = ("ar", "diagonal:4")
  train_sequences: int = 32
  batch_size: int = 16
  samples: int = 2  # texts of each decoding mode at the end
  sample_tokens: int = 160
  flow_steps: int = 8  # passes a window in flow samples


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices by axis; -1 (one axis at most): what is left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  """All of a run."""

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
    """Whether windows are whole sequences and nothing teaches the clean stream: then it is not read either."""
    return self.loss.ar_weight == 0 and self.window.size == self.model.context

  @property
  def windows_start(self) -> int:
    """Training steps before the first one with windows."""
    return int(self.window.start * self.train.steps)


def default() -> ml_collections.ConfigDict:
  """The defaults as a ConfigDict, for `configs/*.py` to change."""
  return ml_collections.ConfigDict(dataclasses.asdict(Config()))


def from_dict(values: Any) -> Config:
  """Checks a ConfigDict or a (JSON) dict and freezes it. Raises UserError that names the field."""
  config = _build(Config, dict(values), "config")
  _check(config)
  return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
  """The configuration as nested plain values, for JSON."""
  return dataclasses.asdict(config)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any, bool]]:
  """(field, old value, new value, pinned) of every field in which two configurations differ."""
  found = []
  for section in dataclasses.fields(Config):
    before, after = getattr(old, section.name), getattr(new, section.name)
    for field in dataclasses.fields(before):
      a, b = getattr(before, field.name), getattr(after, field.name)
      if a != b:
        found.append((f"{section.name}.{field.name}", a, b, bool(field.metadata.get("pinned"))))
  return found


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
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(f"{field}: {value!r} is not of type {hint.__name__}")
  return value


def _check(c: Config) -> None:
  def need(condition: bool, field: str, problem: str) -> None:
    if not condition:
      section, name = field.split(".")
      raise UserError(f"config.{field}: {getattr(getattr(c, section), name)!r} {problem}")

  for field in (
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.hidden",
    "model.context",
    "model.vocab_multiple",
    "model.code_dim",
    "model.time_dim",
    "model.unroll",
    "window.size",
    "data.batch_size",
    "data.threads",
    "train.steps",
    "train.accumulate",
    "train.checkpoints_kept",
    "eval.batch_size",
    "eval.flow_steps",
    "eval.train_sequences",
    "eval.sample_tokens",
  ):
    section, name = field.split(".")
    need(getattr(getattr(c, section), name) >= 1, field, "is not positive")
  for field in (
    "model.vocab_size",
    "window.count",
    "paths.diagonal",
    "paths.rolling",
    "paths.independent",
    "paths.staircase",
    "loss.ar_weight",
    "loss.window_weight",
    "loss.bound_weight",
    "loss.clean_gradient",
    "paths.learned",
    "paths.streams",
    "paths.erasure",
    "loss.chunk",
    "model.attention_block",
    "paths.ragged",
    "window.start",
    "loss.self_conditioning",
    "optim.learning_rate",
    "optim.warmup",
    "optim.weight_decay",
    "optim.clip",
    "train.log_every",
    "train.checkpoint_every",
    "train.eval_every",
    "eval.sequences",
    "eval.samples",
    "train.seed",
    "data.seed",
  ):
    section, name = field.split(".")
    need(getattr(getattr(c, section), name) >= 0, field, "is negative")
  need(c.model.width % c.model.heads == 0, "model.width", f"does not divide into {c.model.heads} heads")
  need(c.model.width // c.model.heads % 2 == 0, "model.width", "makes heads of odd size; rotary positions need even")
  need(c.model.heads % c.model.kv_heads == 0, "model.kv_heads", f"does not divide model.heads = {c.model.heads}")
  need(c.model.dtype in DTYPES, "model.dtype", f"is not one of {', '.join(DTYPES)}")
  need(c.model.param_dtype in DTYPES, "model.param_dtype", f"is not one of {', '.join(DTYPES)}")
  need(c.model.attention in ATTENTIONS, "model.attention", f"is not one of {', '.join(ATTENTIONS)}")
  need(c.model.attention != "cudnn" or c.model.dtype == "bfloat16", "model.attention", "needs model.dtype = bfloat16")
  names = c.model.remat.removeprefix("save:").split(",") if c.model.remat.startswith("save:") else None
  need(
    set(names) <= set(REMAT_NAMES) if names else c.model.remat in REMAT_POLICIES,
    "model.remat",
    f"is not one of {', '.join(REMAT_POLICIES)}, or save: and some of {','.join(REMAT_NAMES)}",
  )
  need(c.model.context % c.window.size == 0, "window.size", f"does not divide model.context = {c.model.context}")
  need(any(getattr(c.paths, p) > 0 for p in TRAIN_PATHS), "paths.diagonal", "and all other path weights are zero")
  need(0 < c.paths.rolling_width <= 1, "paths.rolling_width", "is not in (0, 1]")
  for name in ("steps", "learned_steps", "stream_counts"):
    numbers = getattr(c.paths, name)
    need(numbers and min(numbers) >= 1, f"paths.{name}", "must hold positive numbers")
  need(
    not c.paths.streams or max(c.paths.stream_counts) <= c.window.size,
    "paths.stream_counts",
    f"has more streams than a window has tokens, window.size = {c.window.size}",
  )
  limits = c.paths.erasure_range
  need(len(limits) == 2 and 0 <= limits[0] < limits[1] <= 1, "paths.erasure_range", "is not LOW, HIGH in [0, 1]")
  need(c.paths.step_sampling in ("even", "importance"), "paths.step_sampling", "is not one of even, importance")
  need(c.model.progression in PROGRESSIONS, "model.progression", f"is not one of {', '.join(PROGRESSIONS)}")
  learned = c.model.progression == "learned"
  need(learned == (c.paths.learned > 0), "paths.learned", f"does not go with model.progression = {c.model.progression}")
  need(
    not learned or c.window.size < c.model.context,
    "model.progression",
    "needs a past: windows shorter than model.context",
  )
  need(c.window.start < 1, "window.start", "is not less than 1")
  need(c.loss.self_conditioning <= 1, "loss.self_conditioning", "is more than 1")
  need(c.loss.integrand in ("step", "rate"), "loss.integrand", "is not one of step, rate")
  need(
    not (c.window.count and c.loss.bound_windows) or any(getattr(c.paths, p) > 0 for p in GAUSSIAN_PATHS),
    "loss.bound_windows",
    f"needs one of the paths {', '.join(GAUSSIAN_PATHS)}: on the others the bound is the cross-entropy",
  )
  need(c.loss.ar_weight > 0 or c.window.count, "loss.ar_weight", "with window.count = 0 trains nothing")
  need(
    0 <= c.loss.bound_windows <= c.window.count or not c.window.count,
    "loss.bound_windows",
    f"is not in 0..window.count = {c.window.count}",
  )
  need(c.loss.codes in ("bound", "all", "frozen"), "loss.codes", "is not one of bound, all, frozen")
  need(c.warp.knots >= 2, "warp.knots", "is less than 2")
  need(c.warp.precision_max > 0, "warp.precision_max", "is not positive")
  need(0 <= c.warp.decay < 1, "warp.decay", "is not in [0, 1)")
  need(c.optim.moment_dtype in DTYPES, "optim.moment_dtype", f"is not one of {', '.join(DTYPES)}")
  need(c.optim.schedule in ("cosine", "wsd"), "optim.schedule", "is not one of cosine, wsd")
  need(0 <= c.optim.ema < 1, "optim.ema", "is not in [0, 1)")
  need(0 < c.optim.decay_share <= 1, "optim.decay_share", "is not in (0, 1]")
  need(c.data.tokenizer in TOKENIZERS, "data.tokenizer", f"is not one of {', '.join(TOKENIZERS)}")
  need(all(w > 0 for w in c.data.weights), "data.weights", "must be positive")
  need(
    not c.data.weights or len(c.data.weights) == len(c.data.path.split(",")),
    "data.weights",
    f"must have one weight for each of the {len(c.data.path.split(','))} sources of data.path",
  )
  if c.train.profile:
    ends = c.train.profile.split(":")
    need(
      len(ends) == 2 and all(e.isdigit() for e in ends) and 1 <= int(ends[0]) <= int(ends[1]),
      "train.profile",
      "is not START:STOP, two steps",
    )
  need(
    c.data.batch_size % c.train.accumulate == 0,
    "train.accumulate",
    f"does not divide data.batch_size = {c.data.batch_size}",
  )
  for axis in ("data", "fsdp", "tensor"):
    need(getattr(c.mesh, axis) >= 1 or getattr(c.mesh, axis) == -1, f"mesh.{axis}", "is neither positive nor -1")
  need([c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) <= 1, "mesh.data", "and another axis are both -1")

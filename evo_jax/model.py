"""The network: a time-conditioned Transformer with a clean stream and windows (linen). It knows nothing of paths.

The clean stream is an ordinary causal Transformer over tokens at t = 0: the output of position j gives the context
logits c of token j + 1, its cross-entropy is autoregression's, its keys and values are final. A window is a run of
slots: a clean anchor token and, after it, tokens with any t each. Its slots see the clean stream before the anchor
and each other in both directions, and slot j's output gives c for slot j + 1. The parameters are the same; what t
adds vanishes at t = 0, so that a clean slot is a token of an ordinary Transformer.

Blocks: pre-norm (RMSNorm), rotary grouped-query attention, SwiGLU, as in Llama; per-slot adaptive normalisation as in
DiT (Peebles & Xie, 2023; adaLN-zero), through a factor of low rank.

Letters in names: B batch, L clean positions, N windows, S slots of a run, T = N S, D width, V vocabulary (rows of the
tables), H heads, K heads for keys and values, G = H / K queries that share them, J = G + 2 (queries, key, value),
E elements of a head, F hidden, M code elements, R rank of the time conditioning.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from evo_jax import attention
from evo_jax import config as config_lib
from evo_jax import flow
from evo_jax import sharding
from evo_jax import vocabulary
from evo_jax.sharding import RULES, ShardingRules

DOCUMENT = 0  # the token between documents, in front of every sequence, and the end of a text, in all vocabularies
_FREQUENCIES = 16  # of the time's cosine features
_CLOCK_DIM = 64  # inner width of the heads that infer clocks
_DELAY_SPREAD, _SHARPNESS = 0.2, 8.0  # standard deviation of delays, and sharpness, before training
_PHASE = 8  # of the slot features, a token's place in its stream


@flax.struct.dataclass
class Cache:
  """What the clean stream leaves to be read: final keys and values of its positions.

  k, v: (layers, B, K, L, E), or a tuple of (B, K, L, E) by layer from a model whose layers are apart; start: (B, L)
  int32, the first position that each sees, its document's where documents are isolated.
  """

  k: jax.Array | tuple[jax.Array, ...]
  v: jax.Array | tuple[jax.Array, ...]
  start: jax.Array | None


@flax.struct.dataclass
class Stream:
  """How the slots of a stream read: N runs of S slots; the clean stream is one run.

  angles: `attention.angles` of their places, whose shape tells N and S; stop, start: the clean positions that slots
  see, as `attention.attend` takes them; visible: which slots of its run each sees, (B, N, S, T) or broadcastable to
  it; None: there is nothing but clean slots; time_BxTxR: the time conditioning, T = N S; None: t is 0.
  """

  angles: tuple[jax.Array, jax.Array]
  stop_BxNxS: jax.Array | None
  start_BxNxS: jax.Array | None
  visible_NxSxT: jax.Array | None
  time_BxTxR: jax.Array | None

  @property
  def runs(self) -> int:
    return self.angles[0].shape[3]

  @property
  def slots(self) -> int:
    return self.angles[0].shape[4]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """RMSNorm over the last axis, computed in float32; the result has x's dtype."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
  return (wide * scale).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
  """x (..., in) times weight (in, out), either in several axes: `inputs` of the weight's are contracted; in x's dtype.

  Done as a product by one matrix: of weights with more axes TPUs' compiler makes copies. XLA's CPU backward pass takes
  twice as long over products of more axes, so that there x is a matrix, too; on TPUs making it one costs copies.
  """
  lead, out = x.shape[:x.ndim - inputs], weight.shape[inputs:]
  size = math.prod(weight.shape[:inputs])
  matrix = weight.astype(x.dtype).reshape(size, -1)
  rows = lead if sharding.platform() == "tpu" else (-1,)
  return (x.reshape(*rows, size) @ matrix).reshape(*lead, *out)


def parameter(module: nn.Module, rules: ShardingRules, name: str, init, shape, axes, param_dtype, dtype) -> jax.Array:
  """A module's parameter with its logical axes; where a shard of the batch computes by hand, gathered in `dtype`
  (None: its part)."""
  if sharding.by_hand() and module.has_variable("params", name):  # this device's part, whose shape linen would not take
    part = module.get_variable("params", name)
    return part if dtype is None else rules.gather(part, axes, dtype)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(param_dtype))


class Block(nn.Module):
  """One layer, for both streams."""

  config: config_lib.Model
  rules: ShardingRules

  def setup(self):
    c = self.config
    D, H, K, E, F = c.width, c.heads, c.kv_heads, c.width // c.heads, c.hidden
    J = H // K + 2

    def param(name, init, shape, axes):
      return parameter(self, self.rules, name, init, shape, axes, c.param_dtype, c.dtype)

    def weight(name, shape, axes, fan_in, scale=1.0):
      return param(name, nn.initializers.truncated_normal(scale * fan_in**-0.5), shape, axes)

    def norm(name):
      return param(name, nn.initializers.ones, (D,), ("norm",))

    out = (2 * c.layers) ** -0.5  # keeps the residual stream's variance from growing with depth (GPT-2)
    self.attention_norm = norm("attention_norm")
    # Products with the same input are one: each shard of heads has its own queries, key and value side by side.
    self.w_qkv_DxKxJxE = weight("w_qkv", (D, K, J, E), ("embed", "kv_heads", None, "head_dim"), D)
    self.w_o_HxExD = weight("w_o", (H, E, D), ("heads", "head_dim", "embed"), D, out)
    self.mlp_norm = norm("mlp_norm")
    self.w_gate_DxF = weight("w_gate", (D, F), ("embed", "mlp"), D)
    self.w_up_DxF = weight("w_up", (D, F), ("embed", "mlp"), D)
    self.w_down_FxD = weight("w_down", (F, D), ("mlp", "embed"), F, out)
    self.w_time_Rx6xD = param("w_time", nn.initializers.zeros, (c.time_dim, 6, D), ("time", None, "embed"))

  def __call__(self, x_BxTxD, past, streams, write):
    """Returns the new x and the keys and values (B, K, L, E) that are kept, of clean slots; None: there are none.

    x_BxTxD: the slots of all streams, one after another; the slots of a stream's runs, too, lie in one axis, since TPUs
    pad the last two. past: keys and values of the clean stream; None: there are none, or the first of two streams is
    the clean one, which the second reads: then none are kept. streams: tuple of `Stream`. write: (first_B, fresh): the
    first `fresh` slots, of one run, are clean and enter `past` at these places before it is read.
    """
    c = self.config
    x = x_BxTxD
    B, T, _ = x.shape
    ends = np.cumsum([s.runs * s.slots for s in streams])
    cut = lambda x, axis: jnp.split(x, ends[:-1], axis)
    join = lambda parts, axis: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
    w_time_RxA = self.w_time_Rx6xD.reshape(c.time_dim, 6 * c.width)
    conditioned = [(end, jnp.split(linear(s.time_BxTxR, w_time_RxA), 6, axis=-1))
                   for s, end in zip(streams, ends) if s.time_BxTxR is not None]

    def add(x, change):
      """x and, of slots that time conditions, change(x, modulation). Added in zeros, since cutting clean slots out
      costs TPUs a copy."""
      for end, modulation in conditioned:
        begin = end - modulation[0].shape[1]
        x = x + jnp.pad(change(x[:, begin:end], modulation), ((0, 0), (begin, T - end), (0, 0)))
      return x

    def enter(x, norm, shift, scale):
      return add(rms_norm(x, norm.astype(jnp.float32), c.norm_epsilon), lambda x, m: x * m[scale] + m[shift])

    def of_slots(parts):
      """Something (B or 1, 1, 1, T, E / 2) of all slots, from what each stream has (B or 1, 1, 1, N, S, E / 2)."""
      parts = [a.reshape(*a.shape[:3], -1, a.shape[-1]) for a in parts]
      batch = max(len(a) for a in parts)  # places may be shared by the batch
      return join([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in parts], 3)

    angles = tuple(map(of_slots, zip(*(s.angles for s in streams))))
    h = enter(x, self.attention_norm, 0, 1)
    qkv = self.rules.constrain(linear(h, self.w_qkv_DxKxJxE), "batch", "slots", "kv_heads", None, "head_dim")
    # Heads to the front, so that attention's products are plain batches of matrix products.
    qkv_BxKxJxTxE = qkv.transpose(0, 2, 3, 1, 4)
    qk, v = attention.rotate(qkv_BxKxJxTxE[:, :, :-1], angles), qkv_BxKxJxTxE[:, :, -1]
    qk, v = checkpoint_name(qk, "qkv"), checkpoint_name(v, "qkv")
    found, kept = [], None
    for stream, q, k, v in zip(streams, cut(qk[:, :, :-1], 3), cut(qk[:, :, -1], 2), cut(v, 2)):
      by_run = lambda x, shape=(stream.runs, stream.slots): x.reshape(*x.shape[:-2], *shape, x.shape[-1])
      own, is_clean = None, stream.visible_NxSxT is None and past is None
      if is_clean:
        past = kept = (k, v)
      elif write is not None:
        first, fresh = write
        past = kept = tuple(attention.enter(old, first, new[:, :, :fresh]) for old, new in zip(past, (k, v)))
        own = (k[:, :, None, fresh:], v[:, :, None, fresh:]) if stream.visible_NxSxT is not None else None
      else:
        own = (by_run(k), by_run(v))
      y_BxKxGxNxSxE = attention.attend_by(c, self.rules, by_run(q), past, stream.stop_BxNxS, stream.start_BxNxS, own,
                                          stream.visible_NxSxT, causal=is_clean)
      found.append(y_BxKxGxNxSxE.reshape(q.shape))
    y = join(found, 3).transpose(0, 3, 1, 2, 4).reshape(B, T, c.heads, -1)
    x = x + add(linear(y, self.w_o_HxExD, 2), lambda y, m: y * m[2])
    h = enter(x, self.mlp_norm, 3, 4)
    gate, up = (checkpoint_name(self.rules.constrain(linear(h, w), "batch", "slots", "mlp"), name)
                for name, w in (("gate", self.w_gate_DxF), ("up", self.w_up_DxF)))
    h = nn.silu(gate) * up
    # The modulation's gradient asks for what it scales. Kept where anything is: for it the product of all slots
    # would be computed anew.
    x = x + add(linear(h, self.w_down_FxD), lambda y, m: checkpoint_name(y, "mlp_out") * m[5])
    return self.rules.constrain(x, "batch", "slots", "width"), kept if len(streams) == 1 else None


def _all_but_gathered(primitive, *_, **__) -> bool:
  # A weight that was gathered, or was given another shape or dtype then, is gathered anew: kept, they would be the
  # whole model.
  return primitive.name not in ("all_gather", "convert_element_type", "reshape", "transpose")


def kept(remat: str):
  """The policy of `jax.checkpoint` that config.remat names."""
  if remat.startswith("save:"):
    return jax.checkpoint_policies.save_only_these_names(*remat.removeprefix("save:").split(","), "mlp_out")
  return {"none": _all_but_gathered, "full": None,
          "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[remat]


class Evo(nn.Module):
  """The network. `vocab_size` counts the tokenizer's tokens; the tables may have more rows, which are ruled out.

  stacked: layers share one compiled body, their parameters stacked: for training. False, with `unstacked` parameters:
  each layer by itself, for decoding, where cutting a layer's parameters out of the stack would take longer than
  reading them.
  """

  config: config_lib.Model
  vocab_size: int
  rules: ShardingRules = RULES
  stacked: bool = True

  @property
  def rows(self) -> int:
    """V: rows of the tables."""
    multiple = self.config.vocab_multiple
    return -(-max(self.vocab_size, self.config.vocab_size) // multiple) * multiple

  def setup(self):
    c = self.config
    D, V, M, R = c.width, self.rows, c.code_dim, c.time_dim

    def param(name, shape, axes, init, dtype=c.dtype):
      return parameter(self, self.rules, name, init, shape, axes, c.param_dtype, dtype)

    normal = nn.initializers.normal
    # By hand, a device's part: what reads all rows gathers them some at a time. Or the whole, which is gathered and
    # scattered once.
    in_parts = sharding.keeps_order()
    self.table_rules = self.rules if in_parts else dataclasses.replace(self.rules, embed=None)
    dtype = None if in_parts else c.dtype
    self.embedding_VxD = param("embedding", (V, D), ("vocab", "embed"), normal(D**-0.5), dtype)
    self.head_VxD = None if c.tie_embeddings else param("head", (V, D), ("vocab", "embed"), normal(1.0 / D), dtype)
    self.lookup_VxD = self.table_rules.gather(self.embedding_VxD, ("vocab", "embed"), c.dtype)
    self.codes_VxM = param("codes", (V, M), ("vocab", "code"), normal(M**-0.5))
    self.final_norm = param("final_norm", (D,), ("norm",), nn.initializers.ones)
    self.time_in = param("time_in", (_FREQUENCIES, R), (None, "time"), normal(_FREQUENCIES**-0.5))
    self.time_out = param("time_out", (R, R), (None, "time"), normal(R**-0.5))

    if c.progression == "learned":
      P, F = _CLOCK_DIM, _slot_features(1, jnp.ones(())).shape[-1]
      zeros = nn.initializers.zeros
      self.clock_prior_in = param("clock_prior_in", (D, P), ("width", None), normal(D**-0.5))
      self.clock_prior_slot = param("clock_prior_slot", (F, P), (None, None), normal(F**-0.5))
      self.clock_prior_out = param("clock_prior_out", (P + F, 3), (None, None), zeros)
      self.clock_posterior_in = param("clock_posterior_in", (3, D, P), (None, "width", None), normal((3 * D)**-0.5))
      self.clock_posterior_slot = param("clock_posterior_slot", (F + 1, P), (None, None), normal((F + 1)**-0.5))
      self.clock_posterior_out = param("clock_posterior_out", (P, 2), (None, None), zeros)

    block = (nn.remat(Block, prevent_cse=False, policy=kept(c.remat)) if c.remat != "none" or sharding.by_hand()
             else Block)
    if not self.stacked:
      self.layer = [block(c, self.rules) for _ in range(c.layers)]
      return
    self.blocks = nn.scan(
        block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers,
        unroll=min(c.unroll, c.layers), in_axes=(0, *(nn.broadcast,) * 2),
        metadata_params={nn.PARTITION_NAME: "layers"})(c, self.rules)

  def codes(self) -> jax.Array:
    """(V, M) float32: unit codes of the tokens."""
    return flow.unit(self.codes_VxM)

  def clean(self, tokens_BxL: jax.Array, x_BxLxD: jax.Array | None = None) -> tuple[jax.Array, Cache]:
    """The clean stream: hidden states (B, L, D), of which number j tells of token j + 1, and its cache.

    Positions count from 0. Nothing but the tokens up to j enters number j. x_BxLxD: the tokens' embeddings, if they
    are at hand.
    """
    stream = self._clean_stream(tokens_BxL)
    x, (k, v) = self._layers(self.embed_tokens(tokens_BxL) if x_BxLxD is None else x_BxLxD, None, (stream,))
    return x, Cache(k, v, _starts(stream))

  def window(self, cache: Cache | None, anchor_BxN: jax.Array, x_BxNxSxD: jax.Array,
             time_BxNxS: jax.Array) -> jax.Array:
    """Windows: hidden states (B, N, S, D), of which number j tells of slot j + 1.

    Args:
      cache: the clean stream's; None: there is no past.
      anchor_BxN: position of each window's first slot; the window sees clean positions before it.
      x_BxNxSxD: embedded slots, from `embed`.
      time_BxNxS: progressions t of the slots; 0 for the anchor and other known tokens.
    """
    past = None if cache is None else (cache.k, cache.v)
    stream = self._window_stream(anchor_BxN, time_BxNxS, cache is not None, None if cache is None else cache.start)
    return self._layers(_flat(x_BxNxSxD), past, (stream,))[0].reshape(x_BxNxSxD.shape)

  def clean_and_window(self, tokens_BxL: jax.Array, x_BxLxD: jax.Array, anchor_BxN: jax.Array, x_BxNxSxD: jax.Array,
                       time_BxNxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`clean` and the `window`s that read it, layer by layer: hidden states (B, L, D) and (B, N, S, D).

    A layer's parameters are read once for both, and its products are over all slots at once.
    """
    clean = self._clean_stream(tokens_BxL)
    window = self._window_stream(anchor_BxN, time_BxNxS, True, _starts(clean))
    x, _ = self._layers(jnp.concatenate([x_BxLxD, _flat(x_BxNxSxD)], axis=1), None, (clean, window))
    L = tokens_BxL.shape[1]
    return x[:, :L], x[:, L:].reshape(x_BxNxSxD.shape)

  def slots(self, past: tuple, first_B: jax.Array, fresh: int, x_BxSxD: jax.Array, time_BxS: jax.Array | None,
            position_BxS: jax.Array, stop_BxS: jax.Array | None,
            visible_BxSxT: jax.Array | None) -> tuple[jax.Array, tuple]:
    """Clean slots and windows' together: hidden states (B, S, D), and the past with the clean ones in it.

    Args:
      past: keys and values of the clean stream by layer, (B, K, C, E) or (B K, C, E); None: there are none; the first
        `fresh` slots enter it at the places first[b], first[b] + 1, ... before anything is read.
      x_BxSxD: embedded slots; time_BxS: their progressions (None: all 0); position_BxS: their places in the text.
      stop_BxS: a slot sees the past before this place.
      visible_BxSxT: which of the slots behind the fresh ones a slot sees; None: there are none.
    """
    one_run = lambda x: None if x is None else x[:, None]
    stream = Stream(self._angles(position_BxS[:, None]), one_run(stop_BxS), None, one_run(visible_BxSxT),
                    None if time_BxS is None else self._time(time_BxS))
    x, kept = self._layers(x_BxSxD, past, (stream,), (first_B, fresh) if fresh else None)
    return x, kept if fresh else past

  def _clean_stream(self, tokens_BxL: jax.Array) -> Stream:
    position = jnp.arange(tokens_BxL.shape[1])
    start = None
    if self.config.isolate_documents:
      start = jax.lax.cummax(jnp.where(tokens_BxL == DOCUMENT, position, 0), axis=1)[:, None]
    return Stream(self._angles(position), position[None, None] + 1, start, None, None)

  def _window_stream(self, anchor_BxN: jax.Array, time_BxNxS: jax.Array, reads: bool,
                     start_BxL: jax.Array | None) -> Stream:
    """reads: whether there is a clean stream to read, from `start` on."""
    S = time_BxNxS.shape[2]
    # An anchor that begins a document sees nothing before it.
    start = None if start_BxL is None else jnp.take_along_axis(start_BxL, anchor_BxN, axis=1)[..., None]
    return Stream(self._angles(anchor_BxN[..., None] + jnp.arange(S)), anchor_BxN[..., None] if reads else None, start,
                  jnp.ones((S, S), bool), _flat(self._time(time_BxNxS)))

  def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return attention.angles(positions, self.config.width // self.config.heads, self.config.rope_base)

  def _layers(self, x_BxTxD, past, streams, write=None):
    """The new x and what is kept of clean slots; see `Block`."""
    x = self.rules.constrain(x_BxTxD, "batch", "slots", "width")
    if self.stacked:
      return self.blocks(x, past, streams, write)
    found = []
    for i, layer in enumerate(self.layer):
      x, kept = layer(x, None if past is None else (past[0][i], past[1][i]), streams, write)
      found.append(kept)
    return x, None if kept is None else tuple(zip(*found))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Context logits c (..., V) float32 of hidden states (..., D); rows beyond the vocabulary are ruled out."""
    table = self.table_rules.gather(self._head(), ("vocab", "embed"), self.config.dtype)
    return vocabulary.Beliefs(self._normed(hidden)).logits(table, self._ruled_out())[0]

  def log_probs(self, beliefs: tuple[vocabulary.Beliefs, ...], tokens: tuple[jax.Array, ...],
                chunk: int = 0) -> tuple[tuple[jax.Array, ...], ...]:
    """What beliefs say of tokens in nats: `vocabulary.log_probs`, by hidden states as the streams leave them."""
    beliefs = tuple(b.replace(hidden=self._normed(b.hidden)) for b in beliefs)
    return vocabulary.log_probs(chunk, self.table_rules, beliefs, tokens, self._head(), self._ruled_out())

  def _normed(self, hidden: jax.Array) -> jax.Array:
    return rms_norm(hidden, self.final_norm.astype(jnp.float32), self.config.norm_epsilon)

  def _head(self) -> jax.Array:
    return self._whole(self.embedding_VxD if self.head_VxD is None else self.head_VxD)

  def _ruled_out(self) -> jax.Array:
    return jnp.where(jnp.arange(self.rows) < self.vocab_size, 0.0, vocabulary.FORBIDDEN)

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """(..., D) embeddings of known tokens (...)."""
    return self._whole(self.lookup_VxD)[tokens]

  def _whole(self, table_VxD: jax.Array) -> jax.Array:
    # Before it is read: the compiler would make it whole on its way, and warn of it.
    return self.rules.constrain(table_VxD.astype(self.config.dtype), "vocab", "width")

  def embed(self, latents: tuple[flow.Latent, ...], codes: tuple[jax.Array, ...], prior_logits: jax.Array,
            own: tuple[jax.Array, ...] | None = None, before: tuple[jax.Array, ...] | None = None,
            chunk: int = 0) -> tuple[jax.Array, ...]:
    """The soft inputs (..., D) of slots: the expected embedding under prior and evidence; at t = 0 the token's own.

    codes: (V, M), of each of the latents: by them they are read, and may be taught.
    prior_logits (..., V) or (V,): log-unigram, or the previous pass's context logits (self-conditioning); they are
      not taught.
    own (..., D): the tokens' embeddings, if they are at hand.
    before (..., D): instead of the previous pass's logits, the hidden states that they come from; `prior_logits`,
      zeros then, are added.
    chunk: rows of the vocabulary that are in memory at a time, with `prior_logits` (V,); 0: all.
    """
    hidden, head = (None,) * len(latents), None
    if before is not None:
      hidden, head = jax.lax.stop_gradient((tuple(self._normed(x) for x in before), self._head()))
    beliefs = tuple(vocabulary.Beliefs(h, (latent.y,), c) for h, latent, c in zip(hidden, latents, codes))
    soft = vocabulary.means(chunk, self.table_rules, beliefs, self._whole(self.embedding_VxD), head,
                            prior_logits + self._ruled_out())
    own = tuple(self.embed_tokens(latent.token) for latent in latents) if own is None else own
    return tuple(jnp.where(latent.known[..., None], x, y.astype(x.dtype)) for latent, x, y in zip(latents, own, soft))

  def clock_prior(self, hidden_BxNxD: jax.Array, size: int,
                  passes_BxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the past expects of the clock of the `size` tokens after an anchor, in `passes` passes: the delays' means
    and log standard deviations, and the sharpnesses, each (B, N, size) float32. Before training the clock is that of
    as many streams as the passes ask for, its jumps made soft.

    hidden_BxNxD: the clean stream's at the anchors.
    """
    slots = _slot_features(size, passes_BxN)
    hidden = nn.silu((self._plain(hidden_BxNxD) @ self.clock_prior_in)[:, :, None] + slots @ self.clock_prior_slot)
    out = jnp.concatenate([hidden, slots], axis=-1) @ self.clock_prior_out
    mean, log_std, log_sharpness = jnp.moveaxis(out, -1, 0)
    return (mean + slots[..., _PHASE], log_std + math.log(_DELAY_SPREAD),
            jnp.exp(jnp.clip(log_sharpness + math.log(_SHARPNESS), -2.0, 4.0)))

  def clock_posterior(self, hidden_BxLxD: jax.Array, nats_BxL: jax.Array, token_BxNxW: jax.Array, anchor_BxN: jax.Array,
                      passes_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the tokens themselves add to the means and log standard deviations of their delays (B, N, W), float32.

    Each token is judged by itself, its context, how much it surprises (nats_BxL: cross-entropies of tokens 1..L), and
    the clean stream's last state that the window allows.
    """
    B, N, W = token_BxNxW.shape
    at = (anchor_BxN[..., None] + jnp.arange(W)).reshape(B, N * W)
    before = jnp.take_along_axis(hidden_BxLxD, at[..., None], axis=1).reshape(B, N, W, -1)
    nats = jnp.take_along_axis(nats_BxL, at, axis=1).reshape(B, N, W)
    parts = (before, self.embed_tokens(token_BxNxW), before[:, :, -1:])
    slots = jnp.concatenate([_slot_features(W, passes_BxN), nats[..., None]], axis=-1) @ self.clock_posterior_slot
    hidden = nn.silu(sum(self._plain(x) @ w for x, w in zip(parts, self.clock_posterior_in)) + slots)
    mean, log_std = jnp.moveaxis(hidden @ self.clock_posterior_out, -1, 0)
    return mean, log_std

  def _plain(self, x: jax.Array) -> jax.Array:
    """Normalized, in float32 whatever the network computes in."""
    return rms_norm(x.astype(jnp.float32), jnp.ones(()), self.config.norm_epsilon)

  def _time(self, time: jax.Array) -> jax.Array:
    """The time conditioning (..., R): zero at t = 0, and so is all that linear maps make of it."""
    dtype = jnp.dtype(self.config.dtype)
    features = jnp.cos(jnp.pi * time[..., None] * jnp.arange(_FREQUENCIES))
    hidden = nn.silu(features.astype(dtype) @ self.time_in.astype(dtype)) @ self.time_out.astype(dtype)
    return hidden * time[..., None].astype(dtype)

  def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
    """Next-token logits (B, L, V) of the clean stream: an ordinary language model."""
    return self.logits(self.clean(tokens_BxL)[0])


def _slot_features(size: int, passes: jax.Array) -> jax.Array:
  """(..., size, 12) float32: a token's place in its window as cosines; its place in its stream, were the window
  walked in as many streams as `passes` (...) ask for, on the scale of delays; and the number of passes."""
  index = jnp.arange(size)
  place = jnp.cos(jnp.pi * (index[:, None] + 0.5) / size * jnp.arange(8))
  passes = passes[..., None]
  phase = (index % jnp.maximum(passes, 1) + 0.5) / jnp.maximum(passes, 1)
  passes = passes.astype(jnp.float32)
  counts = jnp.concatenate([jnp.log2(passes) / 4.0, 1.0 / passes, passes / size], axis=-1)[..., None, :]
  shape = (*counts.shape[:-2], size)
  return jnp.concatenate([jnp.broadcast_to(place, (*shape, 8)), jnp.log(phase / (1.0 - phase))[..., None],
                          jnp.broadcast_to(counts, (*shape, 3))], axis=-1)


def _flat(x_BxNxSxD: jax.Array) -> jax.Array:
  """The slots of all runs one after another: (B, N S, D)."""
  return x_BxNxSxD.reshape(x_BxNxSxD.shape[0], -1, x_BxNxSxD.shape[-1])


def _starts(clean: Stream) -> jax.Array | None:
  """(B, L) int32: of each position of a clean stream the first that it sees."""
  return None if clean.start_BxNxS is None else clean.start_BxNxS[:, 0]


def unstacked(params: dict) -> dict:
  """The parameters of `Evo(..., stacked=False)` from a trained model's: each layer's by itself."""
  layers = jax.tree.leaves(params["blocks"])[0].shape[0]
  rest = {name: value for name, value in params.items() if name != "blocks"}
  return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(layers)}


@functools.lru_cache
def abstract_params(config: config_lib.Model, vocab_size: int) -> dict:
  """Shapes and dtypes of the parameters, in linen's boxes, which carry the logical axes."""
  model = Evo(config, vocab_size)
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


def count_parameters(config: config_lib.Model, vocab_size: int) -> int:
  """The number of parameters, from shapes alone."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, vocab_size)))

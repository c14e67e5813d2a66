"""The network: a time-conditioned Transformer with a clean stream and windows (linen). It knows nothing of paths.

The clean stream is an ordinary causal Transformer over tokens at t = 0: the output at position j gives the context
logits c of token j + 1, its cross-entropy is autoregression's, its keys and values are final. A window is a run of
slots: a clean anchor token and, after it, tokens with any t each. Its slots see the clean stream before the anchor and
each other in both directions, and slot j's output gives c for slot j + 1. The parameters are the same; what t adds
vanishes at t = 0, so that a clean slot is a token of an ordinary Transformer. Windows may have parameters of their own
beside those (`adapters`), and attention by which a known slot is the clean stream's, too (config.model.window_*).

Letters in names: B batch, L clean positions, N windows, S slots of a run, T = N S, D width, V vocabulary (rows of the
tables), K heads for keys and values, E elements of a head, M code elements, R rank of the time conditioning.
"""

import dataclasses
import fnmatch
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow.interface import Beliefs, Distillation, Teacher, WindowInputs
from evo_jax.network import adapters, clocks, rotary, vocabulary
from evo_jax.network.attention import KeysValues, Visibility, informed_slots
from evo_jax.network.pages import Pages
from evo_jax.network.transformer import Block, CacheWrite, KVCache, Stream, parameter, remat_policy, rms_norm
from evo_jax.parallel.sharding import Layout

_FREQUENCIES = 16  # of the time's cosine features
_TABLE = ("vocab", "embed")  # logical axes of the tables
# Patterns of the names of windows' own parameters: the clean stream reads none of them.
_OF_WINDOWS = ("window_*", "time_in", "time_out", "w_time", "codes", "clock_*")


class Evo(nn.Module):
  """The network. `vocab_size` counts the tokenizer's tokens; the tables may have more rows, which are ruled out.

  layout: how it computes on a mesh. stacked: layers share one compiled body, their parameters stacked: for training.
  False, with `unstack_layers`' parameters: each layer by itself, for decoding, where slicing a layer's parameters out
  of the stack would take longer than reading them; nothing is rematerialized then.
  """

  config: config_lib.Model
  vocab_size: int
  layout: Layout = Layout()
  stacked: bool = True

  @property
  def rows(self) -> int:
    """V: rows of the tables."""
    multiple = self.config.vocab_multiple
    return -(-max(self.vocab_size, self.config.vocab_size) // multiple) * multiple

  def setup(self):
    c = self.config
    D, V, M, R = c.width, self.rows, c.code_dim, c.time_dim

    def param(name, shape, axes, std, dtype=c.dtype):
      init = nn.initializers.normal(std) if std else nn.initializers.zeros
      return parameter(self, self.layout, name, init, shape, axes, c.param_dtype, dtype)

    # Inside a shard_map a table is this device's shard, of which a chunk is gathered at a time; or it is gathered
    # whole, once.
    by_chunk = self.layout.gathers_tables_by_chunk
    rules = self.layout.rules
    self.table_layout = (
      self.layout if by_chunk else dataclasses.replace(self.layout, rules=dataclasses.replace(rules, embed=None))
    )
    dtype = None if by_chunk else c.dtype
    self.embedding_VxD = param("embedding", (V, D), _TABLE, D**-0.5, dtype)
    self.head_VxD = None if c.tie_embeddings else param("head", (V, D), _TABLE, 1.0 / D, dtype)
    self.lookup_VxD = self.table_layout.gather(self.embedding_VxD, _TABLE, c.dtype)
    self.codes_VxM = param("codes", (V, M), ("vocab", "code"), M**-0.5)
    self.final_norm = parameter(
      self, self.layout, "final_norm", nn.initializers.ones, (D,), ("norm",), c.param_dtype, c.dtype
    )
    self.time_in = param("time_in", (_FREQUENCIES, R), (None, "time"), _FREQUENCIES**-0.5)
    self.time_out = param("time_out", (R, R), (None, "time"), R**-0.5)
    if c.progression == "learned":
      heads = {name: param(name, *shape) for name, shape in clocks.parameter_shapes(D).items()}
      self.clock_prior_params = tuple(heads[name] for name in clocks.PRIOR)
      self.clock_posterior_params = tuple(heads[name] for name in clocks.POSTERIOR)
    if c.window_unknown:
      self.window_unknown_D = parameter(
        self, self.layout, "window_unknown", nn.initializers.zeros, (D,), ("norm",), c.param_dtype, c.dtype
      )
    if c.window_head:
      head = {name: param(name, *shape) for name, shape in adapters.head_shapes(c).items()}
      self.window_head_params = tuple(head[name] for name in adapters.HEAD)
    self._setup_layers()

  def _setup_layers(self):
    c = self.config
    if not self.stacked:
      self.layer = [Block(c, self.layout) for _ in range(c.layers)]
      return
    block = Block
    if c.remat != "none" or self.layout.manual:  # inside a shard_map gathered weights are never kept
      block = nn.remat(Block, prevent_cse=False, policy=remat_policy(c.remat))
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.layers,
      unroll=min(c.unroll, c.layers),
      in_axes=(0, *(nn.broadcast,) * 2),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, self.layout)

  @property
  def reads_clean_anchor(self) -> bool:
    """Whether windows may read the anchor's keys in the clean stream, instead of having a slot for it."""
    return self.config.window_attention == "informed"

  @property
  def head_candidates(self) -> int:
    """How many of a slot's best tokens the head that sees the draft token before scores (`rescore`); 0: there is no
    such head."""
    return min(self.config.window_candidates, self.vocab_size) if self.config.window_head else 0

  def codes(self) -> jax.Array:
    """(V, M) float32: unit codes of the tokens."""
    return latents_lib.unit(self.codes_VxM)

  def clean(
    self, tokens_BxL: jax.Array, segments_BxL: jax.Array | None = None, x_BxLxD: jax.Array | None = None
  ) -> tuple[jax.Array, KVCache]:
    """The clean stream: hidden states (B, L, D), of which number j predicts token j + 1, and its KV cache.

    Positions count from 0. Nothing but the tokens up to j enters number j. segments_BxL: the tokens' documents, between
    which there is no attention; None: one document. x_BxLxD: the tokens' embeddings, where they were looked up before.
    """
    x = self.embed_tokens(tokens_BxL) if x_BxLxD is None else x_BxLxD
    stream = self._clean_stream(x.shape[1], segments_BxL)
    x, (k, v) = self._layers(x, None, (stream,))
    return x, KVCache(k, v, _document_starts(stream))

  def window(self, cache: KVCache | None, windows: WindowInputs) -> jax.Array:
    """Windows: hidden states (B, N, S, D), of which number j predicts slot j + 1. cache: the clean stream's; None:
    there is no past."""
    past = None if cache is None else (cache.k, cache.v)
    stream = self._window_stream(windows, cache is not None, None if cache is None else cache.start)
    x, _ = self._layers(_flatten_runs(windows.x_BxNxSxD), past, (stream,))
    return x.reshape(windows.x_BxNxSxD.shape)

  def forward(
    self, x_BxLxD: jax.Array, segments_BxL: jax.Array | None, windows: WindowInputs, one_pass: bool = True
  ) -> tuple[jax.Array, jax.Array]:
    """`clean` and the `window`s that read it: hidden states (B, L, D) and (B, N, S, D).

    x_BxLxD: embedded tokens. one_pass: both streams layer by layer: a layer's parameters are read once for both, and
    its products are over all slots at once.
    """
    if not one_pass:
      hidden, cache = self.clean(None, segments_BxL, x_BxLxD)
      return hidden, self.window(cache, windows)
    L = x_BxLxD.shape[1]
    clean = self._clean_stream(L, segments_BxL)
    window = self._window_stream(windows, True, _document_starts(clean))
    x = jnp.concatenate([x_BxLxD, _flatten_runs(windows.x_BxNxSxD)], axis=1)
    x, _ = self._layers(x, None, (clean, window))
    return x[:, :L], x[:, L:].reshape(windows.x_BxNxSxD.shape)

  def decode(
    self,
    past: KeysValues | tuple[Pages, ...] | None,
    first_B: jax.Array,
    uncached: int,
    x_BxSxD: jax.Array,
    time_BxS: jax.Array | None,
    position_BxS: jax.Array,
    stop_BxS: jax.Array | None,
    visible_BxSxT: jax.Array | None,
  ) -> tuple[jax.Array, KeysValues | None]:
    """One decoding pass over clean slots and a window's: hidden states (B, S, D), and the KV cache with the clean ones.

    Args:
      past: keys and values of the clean stream by layer, (B, K, C, E) or (B K, C, E), or `Pages` of each layer (the
        result has their keys and values by layer); None: there are none; the first `uncached` slots enter it at the
        positions first[b], first[b] + 1, ... before anything is read.
      x_BxSxD: embedded slots; time_BxS: their progressions (None: all 0); position_BxS: their positions in the text.
      stop_BxS: a slot sees the past before this position.
      visible_BxSxT: which of the slots behind the uncached ones a slot sees, of those that model.window_attention lets
        it see; None: there are none.
    """
    one_run = lambda x: None if x is None else x[:, None]
    time = unknown = None
    if time_BxS is not None:
      time, unknown = self.time_conditioning(time_BxS), time_BxS[:, uncached:] > 0.0
    if visible_BxSxT is not None and self.reads_clean_anchor:
      informed = informed_slots(time_BxS[:, uncached:], position_BxS[:, uncached:])
      visible_BxSxT &= jnp.pad(informed, ((0, 0), (uncached, 0), (0, 0)))
    visibility = Visibility(one_run(stop_BxS), None, one_run(visible_BxSxT))
    stream = Stream(self._angles(position_BxS[:, None]), visibility, time, unknown, uncached)
    x, cache = self._layers(x_BxSxD, past, (stream,), CacheWrite(first_B, uncached) if uncached else None)
    return x, cache if uncached else past

  def trees(self, tokens_BxS: jax.Array, position_BxS: jax.Array, visible_BxSxS: jax.Array) -> jax.Array:
    """The clean stream over trees of tokens: hidden states (B, S, D), of which each predicts its slot's children.

    position_BxS: of the slots in their texts. visible_BxSxS: bool, which slots a slot sees: itself and its ancestors,
    which all come before it.
    """
    visibility = Visibility(None, None, visible_BxSxS[:, None], own_causal=True)
    return self._layers(
      self.embed_tokens(tokens_BxS), None, (Stream(self._angles(position_BxS[:, None]), visibility, None),)
    )[0]

  def _clean_stream(self, length: int, segments_BxL: jax.Array | None) -> Stream:
    position = jnp.arange(length)
    start = None
    if self.config.isolate_documents and segments_BxL is not None:
      changes = segments_BxL[:, 1:] != segments_BxL[:, :-1]
      changes = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
      start = jax.lax.cummax(jnp.where(changes, position, 0), axis=1)[:, None]
    return Stream(self._angles(position), Visibility(position[None, None] + 1, start), None)

  def _window_stream(self, windows: WindowInputs, has_past: bool, start_BxL: jax.Array | None) -> Stream:
    first_BxN, S = windows.first_BxN, windows.time_BxNxS.shape[2]
    # An anchor that begins a document sees nothing before it. What begins behind it is not known to the window.
    start = None
    if start_BxL is not None:
      start = jnp.take_along_axis(start_BxL, windows.anchor_BxN, axis=1)[..., None]
    own, unknown = jnp.ones((S, S), bool), None
    if not windows.all_unknown:
      unknown = windows.time_BxNxS.reshape(len(first_BxN), -1) > 0.0
    if self.reads_clean_anchor:
      own = jnp.tri(S, dtype=bool) if windows.all_unknown else informed_slots(windows.time_BxNxS, jnp.arange(S))
    visibility = Visibility(first_BxN[..., None] if has_past else None, start, own)
    time = jnp.ones((1, 1, 1)) if windows.all_unknown else windows.time_BxNxS
    time = _flatten_runs(self.time_conditioning(time))
    return Stream(self._angles(first_BxN[..., None] + jnp.arange(S)), visibility, time, unknown)

  def _angles(self, positions: jax.Array) -> rotary.Angles:
    return rotary.rotary_angles(positions, rotary.frequencies(self.config))

  def _layers(self, x_BxTxD, past, streams, write=None):
    """The new x, and the clean stream's keys and values by layer; see `Block`."""
    x = self.layout.constrain(x_BxTxD, "batch", "slots", "width")
    if self.stacked:
      return self.blocks(x, past, streams, write)
    caches = []
    for i, layer in enumerate(self.layer):
      of_layer = past[i] if past and isinstance(past[0], Pages) else past and (past[0][i], past[1][i])
      x, cache = layer(x, of_layer, streams, write)
      caches.append(cache)
    return x, None if cache is None else tuple(zip(*caches))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Context logits c (..., V) float32 of hidden states (..., D); rows beyond the vocabulary are ruled out."""
    table = self.table_layout.gather(self._head(), _TABLE, self.config.dtype)
    return Beliefs(self._final_norm(hidden)).logits(table, self._bias())[0]

  def log_probs(
    self, beliefs: tuple[Beliefs, ...], tokens: tuple[jax.Array, ...], chunk: int = 0
  ) -> tuple[tuple[jax.Array, ...], ...]:
    """Log-probabilities of tokens in nats under beliefs: `vocabulary.log_probs`, with hidden states as the streams
    give them."""
    beliefs = tuple(b.replace(hidden=self._final_norm(b.hidden)) for b in beliefs)
    return vocabulary.log_probs(chunk, self.table_layout, beliefs, tokens, self._head(), self._bias())

  def distillation(
    self, student: Beliefs, tokens: jax.Array, teacher: Teacher, best: tuple[int, int] = (0, 0), chunk: int = 0
  ) -> Distillation:
    """Beliefs about tokens (B, ...) beside the clean stream's: `vocabulary.distillation`, with hidden states as the
    streams give them. The teacher receives no gradient."""
    student = student.replace(hidden=self._final_norm(student.hidden))
    teacher = teacher.replace(hidden_BxLxD=self._final_norm(teacher.hidden_BxLxD))
    layout, head, bias = self.table_layout, self._head(), self._bias()
    return vocabulary.distillation(chunk, layout, best, student, tokens, teacher, head, bias)

  def token_logits(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """(..., C) float32 context logits of some tokens (..., C) by hidden states (..., D). The table receives no
    gradient."""
    return self._score_rows(self._final_norm(hidden), tokens)

  def rescore(
    self, hidden: jax.Array, previous_token: jax.Array, candidates: jax.Array, logits: jax.Array
  ) -> jax.Array:
    """Logits (..., C) float32 of a slot's candidates (..., C), given the draft token before it (...).

    hidden: (..., D), as the window's slot gave it; logits: (..., C), the candidates' by it alone. Before training they
    do not change. A shift of the hidden state, scored on the candidates' rows of the table alone.
    """
    token = self._unit_rms(self.embed_tokens(previous_token)).astype(hidden.dtype)
    change = adapters.head_change(self.window_head_params, token, self._final_norm(hidden))
    return logits + self._score_rows(change, candidates)

  def _score_rows(self, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """(..., C) float32: products of vectors (..., D) with the tokens' (..., C) rows of the table."""
    table = (
      self.lookup_VxD if self.head_VxD is None else self.table_layout.gather(self.head_VxD, _TABLE, self.config.dtype)
    )
    rows = jax.lax.stop_gradient(self._constrained(table)[tokens])
    return jnp.einsum("...cd,...d->...c", rows, hidden, preferred_element_type=jnp.float32)

  def _final_norm(self, hidden: jax.Array) -> jax.Array:
    return rms_norm(hidden, self.final_norm, self.config.norm_epsilon, self.config.norm_casts_first)

  def _head(self) -> jax.Array:
    return self._constrained(self.embedding_VxD if self.head_VxD is None else self.head_VxD)

  def _bias(self) -> jax.Array:
    """(V,): rules out rows beyond the vocabulary."""
    return jnp.where(jnp.arange(self.rows) < self.vocab_size, 0.0, vocabulary.FORBIDDEN)

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """(..., D) embeddings of known tokens (...)."""
    return self._constrained(self.lookup_VxD)[tokens]

  def _constrained(self, table_VxD: jax.Array) -> jax.Array:
    # Before it is read: the compiler would make it whole on its way, and warn of it.
    return self.layout.constrain(table_VxD.astype(self.config.dtype), "vocab", "width")

  def embed(
    self,
    latents: tuple[latents_lib.Latent, ...],
    codes: tuple[jax.Array, ...],
    prior_logits: jax.Array,
    embeddings: tuple[jax.Array, ...] | None = None,
    previous_hidden: tuple[jax.Array, ...] | None = None,
    chunk: int = 0,
  ) -> tuple[jax.Array, ...]:
    """The soft inputs (..., D) of slots: the expected embedding under prior and evidence; at t = 0 the token's own.

    Args:
      latents: one or several groups of slots (...).
      codes: (V, M) for each group; they receive gradient.
      prior_logits: (..., V) or (V,), log-unigram or the previous pass's context logits (self-conditioning); without
        gradient.
      embeddings: (..., D), the tokens' embeddings, where they were looked up before.
      previous_hidden: (..., D), instead of the previous pass's logits the hidden states that they come from;
        `prior_logits`, zeros then, are added.
      chunk: rows of the vocabulary in memory at a time, with `prior_logits` (V,); 0: all.
    """
    hidden, head = (None,) * len(latents), None
    if previous_hidden is not None:
      hidden, head = jax.lax.stop_gradient((tuple(self._final_norm(x) for x in previous_hidden), self._head()))
    beliefs = tuple(Beliefs(h, (latent.y,), c) for h, latent, c in zip(hidden, latents, codes))
    table = self._constrained(self.embedding_VxD)
    soft = vocabulary.expectations(chunk, self.table_layout, beliefs, table, head, prior_logits + self._bias())
    if self.config.window_unknown:
      unknown_D = self.window_unknown_D.astype(jnp.float32)
      soft = tuple(y + latent.time[..., None] * unknown_D for latent, y in zip(latents, soft))
    if embeddings is None:
      embeddings = tuple(self.embed_tokens(latent.token) for latent in latents)
    return tuple(
      jnp.where(latent.known[..., None], x, y.astype(x.dtype)) for latent, x, y in zip(latents, embeddings, soft)
    )

  def embed_unknown(self, prior_logits: jax.Array, chunk: int = 0) -> jax.Array:
    """(D,): the soft input of a slot at t = 1 under the prior (V,), which is the same for all such slots."""
    none = jnp.zeros((1, self.config.code_dim))
    latent = latents_lib.Latent(none, jnp.ones(1), jnp.zeros(1, jnp.int32))
    codes = jax.lax.stop_gradient(self.codes())
    (x,) = self.embed((latent,), (codes,), prior_logits, chunk=chunk)
    return x[0]

  def clock_prior(
    self, hidden_BxNxD: jax.Array, size: int, passes_BxN: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The clock that the past expects of the `size` tokens after an anchor, in `passes` passes: see `clocks.prior`.

    hidden_BxNxD: the clean stream's hidden states at the anchors.
    """
    return clocks.prior(self.clock_prior_params, self._unit_rms(hidden_BxNxD), size, passes_BxN)

  def clock_posterior(
    self,
    hidden_BxLxD: jax.Array,
    nats_BxL: jax.Array,
    token_BxNxW: jax.Array,
    anchor_BxN: jax.Array,
    passes_BxN: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """What the tokens themselves add to the means and log standard deviations of their delays: see `clocks.posterior`.

    hidden_BxLxD: the clean stream's hidden states; nats_BxL: its cross-entropies of tokens 1..L.
    """
    B, N, W = token_BxNxW.shape
    index = (anchor_BxN[..., None] + jnp.arange(W)).reshape(B, N * W)
    context = jnp.take_along_axis(hidden_BxLxD, index[..., None], axis=1, mode="clip").reshape(B, N, W, -1)
    nats = jnp.take_along_axis(nats_BxL, index, axis=1, mode="clip").reshape(B, N, W)
    features = (context, self.embed_tokens(token_BxNxW), context[:, :, -1:])
    features = tuple(self._unit_rms(x) for x in features)
    return clocks.posterior(self.clock_posterior_params, features, nats, passes_BxN)

  def _unit_rms(self, x: jax.Array) -> jax.Array:
    """Normalized, in float32 whatever the network computes in."""
    return rms_norm(x.astype(jnp.float32), jnp.ones(()), self.config.norm_epsilon)

  def time_conditioning(self, time: jax.Array) -> jax.Array:
    """(..., R) of progressions (...): zero at t = 0, and so is whatever linear maps make of it."""
    dtype = jnp.dtype(self.config.dtype)
    features = jnp.cos(jnp.pi * time[..., None] * jnp.arange(_FREQUENCIES))
    hidden = nn.silu(features.astype(dtype) @ self.time_in.astype(dtype)) @ self.time_out.astype(dtype)
    return hidden * time[..., None].astype(dtype)

  def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
    """Next-token logits (B, L, V) of the clean stream: an ordinary language model."""
    return self.logits(self.clean(tokens_BxL)[0])


def _flatten_runs(x_BxNxSxD: jax.Array) -> jax.Array:
  """The slots of all runs one after another: (B, N S, D)."""
  return x_BxNxSxD.reshape(x_BxNxSxD.shape[0], -1, x_BxNxSxD.shape[-1])


def _document_starts(clean: Stream) -> jax.Array | None:
  """(B, L) int32: of each position of a clean stream the first that it sees."""
  start = clean.visibility.start_BxNxS
  return None if start is None else start[:, 0]


def unstack_layers(params: dict) -> dict:
  """The parameters of `Evo(..., stacked=False)` from a trained model's: each layer's by itself."""
  layers = jax.tree.leaves(params["blocks"])[0].shape[0]
  rest = {name: value for name, value in params.items() if name != "blocks"}
  return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(layers)}


def narrow_matrices(unstacked: dict, dtype: str) -> dict:
  """`unstack_layers`' parameters, with layers' matrices and the vocabulary's tables in the dtype of computation where
  that is narrower. The network computes the same with them: it never reads them in another, unlike the codes and the
  clock's heads."""

  def narrow(path, x):
    matrix = path[0].key in ("embedding", "head") or (path[0].key.startswith("layer_") and x.ndim > 1)
    return x.astype(dtype) if matrix and jnp.dtype(dtype).itemsize < x.dtype.itemsize else x

  return jax.tree_util.tree_map_with_path(narrow, unstacked)


def is_of_windows(path: tuple[str, ...]) -> bool:
  """Whether a parameter, by its path, is windows' own: whatever it is, the clean stream computes the same."""
  return any(fnmatch.fnmatchcase(name, pattern) for name in path for pattern in _OF_WINDOWS)


@functools.lru_cache
def abstract_params(config: config_lib.Model, vocab_size: int) -> dict:
  """Shapes and dtypes of the parameters, in boxes that carry their logical axes."""
  model = Evo(config, vocab_size)
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


def count_parameters(config: config_lib.Model, vocab_size: int) -> int:
  """The number of parameters, from shapes alone."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, vocab_size)))

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
import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.data import tokenizers
from evo_jax.flow import interface
from evo_jax.flow import latents as latents_lib
from evo_jax.network import clocks, rotary, transformer, vocabulary
from evo_jax.parallel import sharding

_FREQUENCIES = 16  # of the time's cosine features


class Evo(nn.Module):
  """The network. `vocab_size` counts the tokenizer's tokens; the tables may have more rows, which are ruled out.

  stacked: layers share one compiled body, their parameters stacked: for training. False, with `unstacked` parameters:
  each layer by itself, for decoding, where cutting a layer's parameters out of the stack would take longer than
  reading them.
  """

  config: config_lib.Model
  vocab_size: int
  rules: sharding.ShardingRules = sharding.RULES
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
      return transformer.parameter(self, self.rules, name, init, shape, axes, c.param_dtype, dtype)

    normal = nn.initializers.normal
    # By hand, a device's part: what reads all rows gathers them some at a time. Or the whole, which is gathered and
    # scattered once.
    in_parts = sharding.keeps_collective_order()
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
      P, F = clocks.CLOCK_DIM, clocks.slot_features(1, jnp.ones(())).shape[-1]
      zeros = nn.initializers.zeros
      self.clock_prior_in = param("clock_prior_in", (D, P), ("width", None), normal(D**-0.5))
      self.clock_prior_slot = param("clock_prior_slot", (F, P), (None, None), normal(F**-0.5))
      self.clock_prior_out = param("clock_prior_out", (P + F, 3), (None, None), zeros)
      self.clock_posterior_in = param("clock_posterior_in", (3, D, P), (None, "width", None), normal((3 * D) ** -0.5))
      self.clock_posterior_slot = param("clock_posterior_slot", (F + 1, P), (None, None), normal((F + 1) ** -0.5))
      self.clock_posterior_out = param("clock_posterior_out", (P, 2), (None, None), zeros)

    if not self.stacked:
      # Decoding has no backward pass to rematerialize for, and nn.remat would trace `write`'s static number of slots.
      self.layer = [transformer.Block(c, self.rules) for _ in range(c.layers)]
      return
    block = (
      nn.remat(transformer.Block, prevent_cse=False, policy=transformer.remat_policy(c.remat))
      if c.remat != "none" or sharding.in_shard_map()
      else transformer.Block
    )
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.layers,
      unroll=min(c.unroll, c.layers),
      in_axes=(0, *(nn.broadcast,) * 2),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, self.rules)

  def codes(self) -> jax.Array:
    """(V, M) float32: unit codes of the tokens."""
    return latents_lib.unit(self.codes_VxM)

  def clean(self, tokens_BxL: jax.Array, x_BxLxD: jax.Array | None = None) -> tuple[jax.Array, transformer.KVCache]:
    """The clean stream: hidden states (B, L, D), of which number j tells of token j + 1, and its cache.

    Positions count from 0. Nothing but the tokens up to j enters number j. x_BxLxD: the tokens' embeddings, if they
    are at hand.
    """
    stream = self._clean_stream(tokens_BxL)
    x, (k, v) = self._layers(self.embed_tokens(tokens_BxL) if x_BxLxD is None else x_BxLxD, None, (stream,))
    return x, transformer.KVCache(k, v, transformer.document_starts(stream))

  def window(
    self, cache: transformer.KVCache | None, anchor_BxN: jax.Array, x_BxNxSxD: jax.Array, time_BxNxS: jax.Array
  ) -> jax.Array:
    """Windows: hidden states (B, N, S, D), of which number j tells of slot j + 1.

    Args:
      cache: the clean stream's; None: there is no past.
      anchor_BxN: position of each window's first slot; the window sees clean positions before it.
      x_BxNxSxD: embedded slots, from `embed`.
      time_BxNxS: progressions t of the slots; 0 for the anchor and other known tokens.
    """
    past = None if cache is None else (cache.k, cache.v)
    stream = self._window_stream(anchor_BxN, time_BxNxS, cache is not None, None if cache is None else cache.start)
    return self._layers(transformer.flatten_runs(x_BxNxSxD), past, (stream,))[0].reshape(x_BxNxSxD.shape)

  def clean_and_window(
    self, tokens_BxL: jax.Array, x_BxLxD: jax.Array, anchor_BxN: jax.Array, x_BxNxSxD: jax.Array, time_BxNxS: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """`clean` and the `window`s that read it, layer by layer: hidden states (B, L, D) and (B, N, S, D).

    A layer's parameters are read once for both, and its products are over all slots at once.
    """
    clean = self._clean_stream(tokens_BxL)
    window = self._window_stream(anchor_BxN, time_BxNxS, True, transformer.document_starts(clean))
    x, _ = self._layers(jnp.concatenate([x_BxLxD, transformer.flatten_runs(x_BxNxSxD)], axis=1), None, (clean, window))
    L = tokens_BxL.shape[1]
    return x[:, :L], x[:, L:].reshape(x_BxNxSxD.shape)

  def slots(
    self,
    past: tuple,
    first_B: jax.Array,
    fresh: int,
    x_BxSxD: jax.Array,
    time_BxS: jax.Array | None,
    position_BxS: jax.Array,
    stop_BxS: jax.Array | None,
    visible_BxSxT: jax.Array | None,
  ) -> tuple[jax.Array, tuple]:
    """Clean slots and windows' together: hidden states (B, S, D), and the past with the clean ones in it.

    Args:
      past: keys and values of the clean stream by layer, (B, K, C, E) or (B K, C, E); None: there are none; the first
        `fresh` slots enter it at the places first[b], first[b] + 1, ... before anything is read.
      x_BxSxD: embedded slots; time_BxS: their progressions (None: all 0); position_BxS: their places in the text.
      stop_BxS: a slot sees the past before this place.
      visible_BxSxT: which of the slots behind the fresh ones a slot sees; None: there are none.
    """
    one_run = lambda x: None if x is None else x[:, None]
    stream = transformer.Stream(
      self._angles(position_BxS[:, None]),
      one_run(stop_BxS),
      None,
      one_run(visible_BxSxT),
      None if time_BxS is None else self._time(time_BxS),
    )
    x, kept = self._layers(x_BxSxD, past, (stream,), (first_B, fresh) if fresh else None)
    return x, kept if fresh else past

  def _clean_stream(self, tokens_BxL: jax.Array) -> transformer.Stream:
    position = jnp.arange(tokens_BxL.shape[1])
    start = None
    if self.config.isolate_documents:
      start = jax.lax.cummax(jnp.where(tokens_BxL == tokenizers.DOCUMENT, position, 0), axis=1)[:, None]
    return transformer.Stream(self._angles(position), position[None, None] + 1, start, None, None)

  def _window_stream(
    self, anchor_BxN: jax.Array, time_BxNxS: jax.Array, reads: bool, start_BxL: jax.Array | None
  ) -> transformer.Stream:
    """reads: whether there is a clean stream to read, from `start` on."""
    S = time_BxNxS.shape[2]
    # An anchor that begins a document sees nothing before it.
    start = None if start_BxL is None else jnp.take_along_axis(start_BxL, anchor_BxN, axis=1)[..., None]
    return transformer.Stream(
      self._angles(anchor_BxN[..., None] + jnp.arange(S)),
      anchor_BxN[..., None] if reads else None,
      start,
      jnp.ones((S, S), bool),
      transformer.flatten_runs(self._time(time_BxNxS)),
    )

  def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rotary.rotary_angles(positions, self.config.width // self.config.heads, self.config.rope_base)

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
    return interface.Beliefs(self._normed(hidden)).logits(table, self._ruled_out())[0]

  def log_probs(
    self, beliefs: tuple[interface.Beliefs, ...], tokens: tuple[jax.Array, ...], chunk: int = 0
  ) -> tuple[tuple[jax.Array, ...], ...]:
    """What beliefs say of tokens in nats: `vocabulary.log_probs`, by hidden states as the streams leave them."""
    beliefs = tuple(b.replace(hidden=self._normed(b.hidden)) for b in beliefs)
    return vocabulary.log_probs(chunk, self.table_rules, beliefs, tokens, self._head(), self._ruled_out())

  def _normed(self, hidden: jax.Array) -> jax.Array:
    return transformer.rms_norm(hidden, self.final_norm.astype(jnp.float32), self.config.norm_epsilon)

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

  def embed(
    self,
    latents: tuple[latents_lib.Latent, ...],
    codes: tuple[jax.Array, ...],
    prior_logits: jax.Array,
    own: tuple[jax.Array, ...] | None = None,
    before: tuple[jax.Array, ...] | None = None,
    chunk: int = 0,
  ) -> tuple[jax.Array, ...]:
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
    beliefs = tuple(interface.Beliefs(h, (latent.y,), c) for h, latent, c in zip(hidden, latents, codes))
    soft = vocabulary.expectations(
      chunk, self.table_rules, beliefs, self._whole(self.embedding_VxD), head, prior_logits + self._ruled_out()
    )
    own = tuple(self.embed_tokens(latent.token) for latent in latents) if own is None else own
    return tuple(jnp.where(latent.known[..., None], x, y.astype(x.dtype)) for latent, x, y in zip(latents, own, soft))

  def clock_prior(
    self, hidden_BxNxD: jax.Array, size: int, passes_BxN: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the past expects of the clock of the `size` tokens after an anchor, in `passes` passes: the delays' means
    and log standard deviations, and the sharpnesses, each (B, N, size) float32. Before training the clock is that of
    as many streams as the passes ask for, its jumps made soft.

    hidden_BxNxD: the clean stream's at the anchors.
    """
    slots = clocks.slot_features(size, passes_BxN)
    hidden = nn.silu((self._plain(hidden_BxNxD) @ self.clock_prior_in)[:, :, None] + slots @ self.clock_prior_slot)
    out = jnp.concatenate([hidden, slots], axis=-1) @ self.clock_prior_out
    mean, log_std, log_sharpness = jnp.moveaxis(out, -1, 0)
    return (
      mean + slots[..., clocks.PHASE],
      log_std + math.log(clocks.DELAY_SPREAD),
      jnp.exp(jnp.clip(log_sharpness + math.log(clocks.SHARPNESS), -2.0, 4.0)),
    )

  def clock_posterior(
    self,
    hidden_BxLxD: jax.Array,
    nats_BxL: jax.Array,
    token_BxNxW: jax.Array,
    anchor_BxN: jax.Array,
    passes_BxN: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """What the tokens themselves add to the means and log standard deviations of their delays (B, N, W), float32.

    Each token is judged by itself, its context, how much it surprises (nats_BxL: cross-entropies of tokens 1..L), and
    the clean stream's last state that the window allows.
    """
    B, N, W = token_BxNxW.shape
    at = (anchor_BxN[..., None] + jnp.arange(W)).reshape(B, N * W)
    before = jnp.take_along_axis(hidden_BxLxD, at[..., None], axis=1).reshape(B, N, W, -1)
    nats = jnp.take_along_axis(nats_BxL, at, axis=1).reshape(B, N, W)
    parts = (before, self.embed_tokens(token_BxNxW), before[:, :, -1:])
    slots = jnp.concatenate([clocks.slot_features(W, passes_BxN), nats[..., None]], axis=-1) @ self.clock_posterior_slot
    hidden = nn.silu(sum(self._plain(x) @ w for x, w in zip(parts, self.clock_posterior_in)) + slots)
    mean, log_std = jnp.moveaxis(hidden @ self.clock_posterior_out, -1, 0)
    return mean, log_std

  def _plain(self, x: jax.Array) -> jax.Array:
    """Normalized, in float32 whatever the network computes in."""
    return transformer.rms_norm(x.astype(jnp.float32), jnp.ones(()), self.config.norm_epsilon)

  def _time(self, time: jax.Array) -> jax.Array:
    """The time conditioning (..., R): zero at t = 0, and so is all that linear maps make of it."""
    dtype = jnp.dtype(self.config.dtype)
    features = jnp.cos(jnp.pi * time[..., None] * jnp.arange(_FREQUENCIES))
    hidden = nn.silu(features.astype(dtype) @ self.time_in.astype(dtype)) @ self.time_out.astype(dtype)
    return hidden * time[..., None].astype(dtype)

  def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
    """Next-token logits (B, L, V) of the clean stream: an ordinary language model."""
    return self.logits(self.clean(tokens_BxL)[0])


def unstack_layers(params: dict) -> dict:
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

"""Decoding: a state, a policy, a stepper, a scan. Pure functions over a field or a network.

`ar` walks the staircase: one token a pass. `flow` moves a window of tokens down the probability flow as a policy says (a
fixed grid, a learned clock, or what is certain), and lets each token jump to t = 0 at its end. Both keep exact keys and
values: known tokens are final.

Letters in names: B sequences, T tokens of a window, K steps, V vocabulary, M code elements.
"""

from typing import Callable

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax import elbo
from evo_jax import flow
from evo_jax import paths
from evo_jax import policies
from evo_jax.model import DOCUMENT, Cache

PRECISION_MIN = 1e-4  # where the flow starts: y = sqrt(PRECISION_MIN) eps tells nothing, and fixes what will be told

# A stepper moves y (..., T, M) from one precision (..., T) to a higher one under the field's belief.
Stepper = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def euler(key, y, log_belief, codes_VxM, precision, precision_next):
  """The probability flow by an exponential Euler step; first order in the step of log-precision."""
  del key
  return flow.euler_step(y, flow.expected_code(log_belief, codes_VxM), precision, precision_next)


def ancestral(key, y, log_belief, codes_VxM, precision, precision_next):
  """A draw of a token from the belief, and of the evidence that it would give."""
  return flow.ancestral_step(key, y, log_belief, codes_VxM, precision_next - precision)


STEPPERS: dict[str, Stepper] = {"ode": euler, "ancestral": ancestral}


@flax.struct.dataclass
class WindowState:
  """A window on its way: the latent (..., T), its tokens' precisions (..., T), and the last pass's context logits
  (..., T, V), None where the field does not condition itself."""

  latent: flow.Latent
  precision: jax.Array
  context: jax.Array | None


def sample_window(field: flow.Field, codes_VxM: jax.Array, warp: paths.Warp, policy: policies.Policy, key: jax.Array,
                  shape: tuple[int, ...], stepper: Stepper = euler,
                  prior_logits: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Draws tokens `shape` = (..., T) int32 from a field, and the passes (...) that it took.

  `policy` says after each pass where the tokens move; one whose time comes to 0 jumps: it is drawn from its belief. A fixed
  grid is scanned; any other policy is followed until every token is known. prior_logits (V,): what the field gets as the
  context logits before the first pass; None: the field is asked by the latents alone.
  """
  start_key, key = jax.random.split(key)
  noise = jax.random.normal(start_key, (*shape, codes_VxM.shape[1]), codes_VxM.dtype)
  start = WindowState(
      flow.Latent(jnp.sqrt(PRECISION_MIN) * noise, jnp.ones(shape, codes_VxM.dtype), jnp.zeros(shape, jnp.int32)),
      jnp.full(shape, PRECISION_MIN, codes_VxM.dtype),
      None if prior_logits is None else jnp.broadcast_to(prior_logits, (*shape, prior_logits.shape[-1])))
  uncertainty = warp.entropy()[0]

  def step(carry, index):
    state, passes = carry
    token_key, step_key = jax.random.split(jax.random.fold_in(key, index))
    latent = state.latent
    context = field(latent) if state.context is None else field(latent, state.context)
    log_belief = flow.log_belief(context, codes_VxM, latent.y)
    time_next = jnp.broadcast_to(policy(policies.Reading(index, latent.time, log_belief, uncertainty)),
                                 shape).astype(codes_VxM.dtype)
    drawn = jax.random.categorical(token_key, log_belief, axis=-1).astype(jnp.int32)
    token = jnp.where((time_next <= 0.0) & ~latent.known, drawn, latent.token)
    precision = jnp.maximum(elbo.precision_at(warp, time_next), state.precision)
    moved = stepper(step_key, latent.y, log_belief, codes_VxM, state.precision, precision)
    y = jnp.where((precision > state.precision)[..., None], moved, latent.y)
    after = WindowState(flow.Latent(y, time_next, token), precision, None if state.context is None else context)
    return after, passes + jnp.any(~latent.known, axis=-1)

  carry = (start, jnp.zeros(shape[:-1], jnp.int32))
  if isinstance(policy, policies.Grid):
    carry, _ = jax.lax.scan(lambda carry, index: (step(carry, index), None), carry,
                            jnp.arange(policy.times_KxT.shape[0] - 1))
  else:
    unfinished = lambda carry: jnp.any(~carry[1][0].latent.known)
    _, carry = jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1], carry[0])),
                                  (jnp.zeros((), jnp.int32), carry))
  state, passes = carry
  return state.latent.token, passes


@flax.struct.dataclass
class TextState:
  """Texts being written: tokens (B, C + 1), the cache of C positions, and the position of the last token.

  The token at `last` is known and has not been read yet: keys and values are final before it, segments up to it.
  """

  token: jax.Array
  cache: Cache
  last: jax.Array  # int32 scalar


def start_text(net: elbo.Network, prompt_BxC: jax.Array, length: jax.Array) -> TextState:
  """Reads prompts (B, C) of `length` tokens each, the document token in front, anything behind."""
  _, cache = net.clean(prompt_BxC)
  return TextState(jnp.pad(prompt_BxC, [(0, 0), (0, 1)]), cache, jnp.asarray(length, jnp.int32) - 1)


def read(net: elbo.Network, state: TextState, tokens_BxR: jax.Array):
  """A causal pass over the last token and `tokens_BxR` after it: hidden states (B, R + 1, D), keys and values."""
  slots = jnp.concatenate([jnp.take(state.token, state.last, axis=1)[:, None], tokens_BxR], axis=1)
  anchor = jnp.full((slots.shape[0], 1), state.last)
  hidden, kv = net.window(state.cache, anchor, net.embed_tokens(slots)[:, None], jnp.zeros(slots.shape)[:, None],
                          causal=True)
  return hidden[:, 0], kv


def append(state: TextState, tokens_BxT: jax.Array, kv: tuple[jax.Array, jax.Array]) -> TextState:
  """Adds known tokens; `kv` are those that `read` gave for the last token and all but the last of the new ones."""
  places = state.last + 1 + jnp.arange(tokens_BxT.shape[1])
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, :, 0].astype(old.dtype), state.last, axis=2)
  begun = jnp.take(state.cache.segment, state.last, axis=1)[:, None]
  segment = begun + jnp.cumsum(tokens_BxT == DOCUMENT, axis=1, dtype=jnp.int32)
  segment = state.cache.segment.at[:, places].set(segment, mode="drop")  # the last token may stand behind the cache
  cache = Cache(put(state.cache.k, kv[0]), put(state.cache.v, kv[1]), segment)
  return TextState(state.token.at[:, places].set(tokens_BxT), cache, state.last + tokens_BxT.shape[1])


def ar(net: elbo.Network, state: TextState, key: jax.Array, tokens: int) -> TextState:
  """Writes `tokens` tokens one after another."""

  def step(state, key):
    hidden, kv = read(net, state, state.token[:, :0])
    drawn = jax.random.categorical(key, net.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
    return append(state, drawn[:, None], kv), None

  state, _ = jax.lax.scan(step, state, jax.random.split(key, tokens))
  return state


def flow_windows(net: elbo.Network, statistics: elbo.Statistics, state: TextState, key: jax.Array, windows: int,
                 size: int, policy: policies.Policy, stepper: Stepper = euler,
                 self_conditioned: bool = False) -> tuple[TextState, jax.Array]:
  """Writes `windows` windows of `size` tokens (see `sample_window`), each with one causal pass more to read it.

  Returns the state and the passes (windows, B) that the windows took.
  """
  codes, prior = net.codes(), statistics.log_unigram_V

  def window(state, key):
    B = state.token.shape[0]
    key, policy_key = jax.random.split(key)
    anchor = jnp.full((B, 1), state.last)
    anchor_token = jnp.take(state.token, state.last, axis=1)[:, None]
    field = lambda latent, prior=prior: elbo.window_logits(net, state.cache, anchor, anchor_token, latent, codes, prior)
    chosen = policy
    if isinstance(policy, policies.RandomOrder):
      chosen = policy.replace(rank=elbo.random_rank(policy_key, (B, 1, size)))
    if isinstance(policy, policies.Learned):
      hidden, _ = read(net, state, state.token[:, :0])
      mean, log_std, sharpness = net.clock_prior(hidden, size, jnp.broadcast_to(policy.passes, anchor.shape))
      delay = mean + jnp.exp(log_std) * jax.random.normal(policy_key, mean.shape)
      chosen = policy.replace(delay=delay, sharpness=sharpness)
    drawn, passes = sample_window(field, codes, statistics.warp, chosen, key, (B, 1, size), stepper,
                                  prior if self_conditioned else None)
    return append(state, drawn[:, 0], read(net, state, drawn[:, 0, :-1])[1]), passes[:, 0]

  return jax.lax.scan(window, state, jax.random.split(key, windows))

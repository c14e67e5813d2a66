"""The decoding modes ar, flow and adaptive."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.decoding import logits as logits_lib
from evo_jax.decoding import state as state_lib
from evo_jax.flow import interface, policies, schedules, steppers
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import statistics as statistics_lib
from evo_jax.flow import windows as windows_lib


def uncached_slots(window: int) -> int:
  """Slots for fresh tokens in a pass of `adaptive`: as many tokens as it can settle in a row a pass,
  over long texts."""
  return max(16, window // 4)


def ar_pass(
  net: interface.Network, texts: state_lib.DecodingState, shaping: logits_lib.LogitsProcessor
) -> state_lib.DecodingState:
  """One pass, one token."""
  hidden, _, after = state_lib.forward(net, texts, 1, 1 * ~texts.done)
  drawn = logits_lib.draw_tokens(texts, shaping, net.logits(hidden), texts.length[:, None])
  return state_lib.commit(
    after,
    state_lib.scatter(texts.token, texts.length, drawn),
    state_lib.scatter(texts.time, texts.length, jnp.zeros(drawn.shape)),
  )


@flax.struct.dataclass
class WindowSchedule:
  """How windows are walked: a policy, and what does not change from call to call. whole: there is one window, the whole
  text from the document token on with what is known of it, and no clean stream: for models of diffusion alone."""

  policy: policies.Policy
  tokens: int = flax.struct.field(pytree_node=False)
  stepper: str = flax.struct.field(pytree_node=False, default="ode")
  self_conditioned: bool = flax.struct.field(pytree_node=False, default=False)
  whole: bool = flax.struct.field(pytree_node=False, default=False)


def window_slots(
  net: interface.Network,
  prior_logits: jax.Array,
  texts: state_lib.DecodingState,
  anchor_B: jax.Array,
  tokens: int,
  whole: bool = False,
) -> tuple[state_lib.WindowSlots, latents_lib.Latent, jax.Array]:
  """The slots of one window a row: the anchor at `anchor_B` and the `tokens` places after it, cut off at the limit; the
  latents (B, T) of its tokens, and their places (B, T). prior_logits: (V,) or (B, T, V)."""
  place = anchor_B[:, None] + jnp.arange(tokens + 1)
  there = place < texts.limit[:, None]
  token, time = state_lib.gather(texts.token, place), jnp.where(there, state_lib.gather(texts.time, place), 0.0)
  latent = latents_lib.Latent(state_lib.gather(texts.motion.y, place[:, 1:]), time[:, 1:], token[:, 1:])
  (x,) = net.embed((windows_lib.with_anchor(latent, token[:, 0]),), (net.codes(),), windows_lib.for_slots(prior_logits))
  sees_slot = there[:, None, :] | jnp.eye(tokens + 1, dtype=bool)
  stop = None if whole else jnp.broadcast_to(anchor_B[:, None], place.shape)
  return state_lib.WindowSlots(x, time, place, stop, sees_slot), latent, place[:, 1:]


def window_beliefs(
  net: interface.Network,
  after: state_lib.DecodingState,
  hidden: jax.Array,
  latent: latents_lib.Latent,
  walk: WindowSchedule,
) -> tuple[state_lib.DecodingState, jax.Array]:
  """The log beliefs (B, T, V) that a pass's hidden states (B, T + 1, D) give; texts remember the context where the
  walk wants it."""
  context = net.logits(hidden[:, :-1])
  after = after.replace(context=context) if walk.self_conditioned else after
  return after, latents_lib.log_belief(context, net.codes(), latent.y)


def step_window(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  after: state_lib.DecodingState,
  latent: latents_lib.Latent,
  place: jax.Array,
  log_belief: jax.Array,
  walk: WindowSchedule,
  index: jax.Array,
  shaping: logits_lib.LogitsProcessor,
) -> state_lib.DecodingState:
  """What the beliefs (B, T, V) that a pass of `texts` gave do to its window at `place` (B, T)."""
  codes, first = net.codes(), place[:, 0]
  motion = jax.tree.map(lambda a: state_lib.gather(a, place), texts.motion)
  reading = policies.Observation(
    index, latent.time, log_belief, statistics.warp.entropy()[0], motion, codes, statistics.warp
  )
  time_next = jnp.minimum(walk.policy(reading), latent.time).astype(latent.time.dtype)
  jumps = (time_next <= 0.0) & ~latent.known
  token = jnp.where(jumps, logits_lib.draw_tokens(texts, shaping, log_belief, place), latent.token)
  motion = steppers.step_latents(
    motion,
    latent.time,
    time_next,
    log_belief,
    codes,
    statistics.warp,
    steppers.STEPPERS[walk.stepper],
    state_lib.pass_keys(texts),
  )
  after = after.replace(motion=jax.tree.map(lambda old, new: state_lib.scatter(old, first, new), texts.motion, motion))
  if texts.guess is not None:
    after = after.replace(
      guess=state_lib.scatter(
        texts.guess, first, jnp.where(latent.known, latent.token, jnp.argmax(log_belief, axis=-1))
      )
    )
  inside = place < texts.limit[:, None]
  return state_lib.commit(
    after,
    state_lib.scatter(texts.token, first, token),
    state_lib.scatter(texts.time, first, jnp.where(inside, time_next, state_lib.gather(texts.time, place))),
    jnp.any(~latent.known, axis=1),
  )


def catch_up(net: interface.Network, texts: state_lib.DecodingState, fresh: int) -> state_lib.DecodingState:
  """Passes without a window, until no row has more than `fresh` known tokens to read: behind gaps that were filled."""
  unread = lambda texts: jnp.where(texts.done, 0, texts.length - texts.read)

  def step(texts):
    behind = unread(texts) > fresh
    _, _, texts = state_lib.forward(net, texts, fresh, jnp.where(behind, fresh, 0))
    return texts.replace(passes=texts.passes + behind)

  return jax.lax.while_loop(lambda texts: jnp.any(unread(texts) > fresh), step, texts)


def flow_first_pass(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  walk: WindowSchedule,
  shaping: logits_lib.LogitsProcessor,
) -> tuple[state_lib.DecodingState, WindowSchedule]:
  """The first pass of the next window of every row, which also reads what was settled before; and the walk with what is
  drawn anew for each window."""
  T = walk.tokens
  prior = statistics.log_unigram_V
  if walk.whole:
    fresh, count, anchor = 0, 0, jnp.zeros_like(texts.length)
  else:
    texts = catch_up(net, texts, T)
    fresh, count, anchor = T, jnp.where(texts.done, 0, texts.length - texts.read), texts.length - 1
  slots, latent, place = window_slots(net, prior, texts, anchor, T, walk.whole)
  clean, hidden, after = state_lib.forward(net, texts, fresh, count, slots)
  if isinstance(walk.policy, policies.RandomOrder):
    draw = lambda key: jax.random.uniform(key, (T,))
    walk = walk.replace(
      policy=walk.policy.replace(rank=schedules.rank(jax.vmap(draw)(state_lib.pass_keys(texts, state_lib.KEY_POLICY))))
    )
  if isinstance(walk.policy, policies.LearnedClock):
    last = state_lib.gather(clean, jnp.maximum(count - 1, 0)[:, None])
    passes = jnp.broadcast_to(walk.policy.passes, anchor[:, None].shape)
    mean, log_std, sharpness = (a[:, 0] for a in net.clock_prior(last, T, passes))
    noise = jax.vmap(lambda key: jax.random.normal(key, (T,)))(state_lib.pass_keys(texts, state_lib.KEY_POLICY))
    walk = walk.replace(policy=walk.policy.replace(delay=mean + jnp.exp(log_std) * noise, sharpness=sharpness))
  after, log_belief = window_beliefs(net, after.replace(anchor=anchor), hidden, latent, walk)
  return step_window(
    net, statistics, texts, after, latent, place, log_belief, walk, jnp.zeros((), jnp.int32), shaping
  ), walk


def flow_next_pass(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  walk: WindowSchedule,
  shaping: logits_lib.LogitsProcessor,
  index: jax.Array,
) -> state_lib.DecodingState:
  """Pass `index` of the windows that `flow_first` began."""
  prior = texts.context if walk.self_conditioned else statistics.log_unigram_V
  slots, latent, place = window_slots(net, prior, texts, texts.anchor, walk.tokens, walk.whole)
  _, hidden, after = state_lib.forward(net, texts, 0, 0, slots)
  after, log_belief = window_beliefs(net, after, hidden, latent, walk)
  return step_window(net, statistics, texts, after, latent, place, log_belief, walk, index, shaping)


def unfinished(texts: state_lib.DecodingState, tokens: int) -> jax.Array:
  """Whether any row's window has unknown tokens."""
  place = texts.anchor[:, None] + 1 + jnp.arange(tokens)
  open_ = (state_lib.gather(texts.time, place) > 0.0) & (place < texts.limit[:, None]) & ~texts.done[:, None]
  return jnp.any(open_)


def flow_window(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  walk: WindowSchedule,
  shaping: logits_lib.LogitsProcessor,
) -> state_lib.DecodingState:
  """One window of every row, down to its end."""
  texts, walk = flow_first_pass(net, statistics, texts, walk, shaping)
  step = lambda texts, index: flow_next_pass(net, statistics, texts, walk, shaping, index)
  return policies.run_policy(walk.policy, step, texts, lambda texts: unfinished(texts, walk.tokens), first=1)


def adaptive_pass(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  texts: state_lib.DecodingState,
  walk: WindowSchedule,
  shaping: logits_lib.LogitsProcessor,
  infill: bool = False,
) -> state_lib.DecodingState:
  """One pass of a window that slides: it begins behind the tokens that are known without a gap and read.

  The leftmost unknown token always jumps, and its belief is autoregression's where all before it is read, unless
  `infill`: text behind a gap has its say. What else jumps or gathers evidence is the policy's.
  """
  T, prior = walk.tokens, statistics.log_unigram_V
  unread, fresh = texts.length - texts.read, uncached_slots(T)
  count = jnp.where(texts.done, 0, jnp.minimum(unread, fresh))
  anchor = jnp.minimum(texts.length - 1, texts.read + count)
  if walk.self_conditioned:  # the pass before, moved along with the window
    index = jnp.arange(T) + (anchor - texts.anchor)[:, None]
    moved = state_lib.gather(texts.context, jnp.minimum(index, T - 1))
    prior = jnp.where((index < T)[..., None], moved, prior)
  slots, latent, place = window_slots(net, prior, texts, anchor, T)
  clean, hidden, after = state_lib.forward(net, texts, fresh, count, slots)
  after, log_belief = window_beliefs(net, after.replace(anchor=anchor), hidden, latent, walk)
  if not infill:
    last = net.logits(state_lib.gather(clean, jnp.maximum(count - 1, 0)[:, None]))  # (B, 1, V)
    fresh_y = jnp.where((latent.time < 1.0)[..., None], latent.y, 0.0)
    exact = (place == texts.length[:, None]) & (unread <= fresh)[:, None]
    log_belief = jnp.where(exact[..., None], latents_lib.log_belief(last, net.codes(), fresh_y), log_belief)
  return step_window(net, statistics, texts, after, latent, place, log_belief, walk, jnp.zeros((), jnp.int32), shaping)


def run_passes(
  step: Callable[[state_lib.DecodingState], state_lib.DecodingState], texts: state_lib.DecodingState, passes: int
) -> state_lib.DecodingState:
  """`passes` passes, or as many as it takes until all rows are done."""
  unfinished = lambda carry: (carry[0] < passes) & ~jnp.all(carry[1].done)
  return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, texts))[1]

"""The decoding modes ar, flow and adaptive: passes over a decoding state. Pure functions.

  ar        the staircase: one token per pass
  flow      windows of tokens, one after another, each taken to t = 0 along a path (`policies.make_policy`)
  adaptive  a window that slides with the committed prefix: its first token is drawn from autoregression's distribution,
            a policy decides which others jump in the same pass

Letters in names: see `state`.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from evo_jax.decoding.logits import LogitsProcessor, draw_tokens
from evo_jax.decoding.state import (
  KEY_POLICY,
  DecodingState,
  WindowSlots,
  commit,
  forward,
  gather,
  pass_keys,
  write_span,
)
from evo_jax.flow import interface, latents, policies, schedules, steppers
from evo_jax.flow.statistics import Statistics
from evo_jax.flow.windows import for_slots, with_anchor


@flax.struct.dataclass
class WindowSchedule:
  """How windows are decoded.

  policy: which tokens move in a pass, and how far. size: T. stepper: a name in `steppers.STEPPERS`.
  self_conditioning: whether a pass reads the context logits of the pass before. full_sequence: whether the one window
  is the whole text, from the begin token on, without a clean stream, as in models of diffusion alone.
  """

  policy: policies.Policy
  size: int = flax.struct.field(pytree_node=False)
  stepper: str = flax.struct.field(pytree_node=False, default="ode")
  self_conditioning: bool = flax.struct.field(pytree_node=False, default=False)
  full_sequence: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Window:
  """One window for each row: the positions (B, T) and latents of its tokens, and its T + 1 slots with the anchor's."""

  position: jax.Array
  latent: latents.Latent
  slots: WindowSlots


def ar_pass(net: interface.Network, state: DecodingState, processor: LogitsProcessor) -> DecodingState:
  """One pass, one token."""
  hidden, _, state = forward(net, state, 1, 1 * ~state.done)
  drawn = draw_tokens(state, processor, net.logits(hidden), state.length[:, None])
  return commit(
    state,
    write_span(state.tokens, state.length, drawn),
    write_span(state.time, state.length, jnp.zeros(drawn.shape)),
  )


def run_passes(
  step: Callable[[DecodingState], DecodingState], state: DecodingState, passes: int | jax.Array
) -> DecodingState:
  """`passes` passes, fewer if all rows are done."""
  unfinished = lambda carry: (carry[0] < passes) & ~jnp.all(carry[1].done)
  return jax.lax.while_loop(unfinished, lambda carry: (carry[0] + 1, step(carry[1])), (0, state))[1]


def make_window(
  net: interface.Network,
  state: DecodingState,
  schedule: WindowSchedule,
  anchor_B: jax.Array,
  prior_logits: jax.Array,
) -> Window:
  """The windows behind `anchor_B`, cut off at the texts' `max_length`. prior_logits: (V,) or (B, T, V)."""
  position = anchor_B[:, None] + jnp.arange(schedule.size + 1)
  inside = position < state.max_length[:, None]
  token, time = gather(state.tokens, position), jnp.where(inside, gather(state.time, position), 0.0)
  latent = latents.Latent(gather(state.solver.y, position[:, 1:]), time[:, 1:], token[:, 1:])
  (x,) = net.embed((with_anchor(latent, token[:, 0]),), (net.codes(),), for_slots(prior_logits))
  visible = inside[:, None, :] | jnp.eye(schedule.size + 1, dtype=bool)
  stop = None if schedule.full_sequence else jnp.broadcast_to(anchor_B[:, None], position.shape)
  return Window(position[:, 1:], latent, WindowSlots(x, time, position, stop, visible))


def window_beliefs(
  net: interface.Network, state: DecodingState, schedule: WindowSchedule, window: Window, hidden_BxSxD: jax.Array
) -> tuple[DecodingState, jax.Array]:
  """Log beliefs (B, T, V) from a pass's hidden states; the state keeps context logits for self-conditioning."""
  context = net.logits(hidden_BxSxD[:, :-1])
  state = state.replace(context_logits=context) if schedule.self_conditioning else state
  return state, latents.log_belief(context, net.codes(), window.latent.y)


def step_window(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  schedule: WindowSchedule,
  processor: LogitsProcessor,
  window: Window,
  log_belief: jax.Array,
  index: jax.Array,
) -> DecodingState:
  """Moves the tokens of a window as the policy says after pass `index`, by the beliefs (B, T, V) of that pass."""
  codes, warp, latent, position = net.codes(), statistics.warp, window.latent, window.position
  first = position[:, 0]
  solver = jax.tree.map(lambda a: gather(a, position), state.solver)
  observation = policies.Observation(index, latent.time, log_belief, warp.entropy()[0], solver, codes, warp)
  time_next = jnp.minimum(schedule.policy(observation), latent.time).astype(latent.time.dtype)
  jumps = (time_next <= 0.0) & ~latent.known
  token = jnp.where(jumps, draw_tokens(state, processor, log_belief, position), latent.token)
  solver = steppers.step_latents(
    solver, latent.time, time_next, log_belief, codes, warp, steppers.STEPPERS[schedule.stepper], pass_keys(state)
  )
  state = state.replace(solver=jax.tree.map(lambda old, new: write_span(old, first, new), state.solver, solver))
  if state.top_tokens is not None:
    top = jnp.where(latent.known, latent.token, jnp.argmax(log_belief, axis=-1))
    state = state.replace(top_tokens=write_span(state.top_tokens, first, top))
  inside = position < state.max_length[:, None]
  return commit(
    state,
    write_span(state.tokens, first, token),
    write_span(state.time, first, jnp.where(inside, time_next, gather(state.time, position))),
    jnp.any(~latent.known, axis=1),
  )


def fill_cache(net: interface.Network, state: DecodingState, slots: int) -> DecodingState:
  """Clean passes until no row has more than `slots` uncached tokens. Behind a filled gap there may be many."""
  uncached = lambda state: jnp.where(state.done, 0, state.length - state.cached)

  def step(state):
    behind = uncached(state) > slots
    _, _, state = forward(net, state, slots, jnp.where(behind, slots, 0))
    return state.replace(passes=state.passes + behind)

  return jax.lax.while_loop(lambda state: jnp.any(uncached(state) > slots), step, state)


def draw_policy(
  net: interface.Network, state: DecodingState, schedule: WindowSchedule, clean_BxRxD: jax.Array, count_B: jax.Array
) -> policies.Policy:
  """The policy with what is drawn once for each window: a random order, or delays of a learned clock, which the clean
  stream's last hidden state predicts."""
  policy, keys = schedule.policy, pass_keys(state, KEY_POLICY)
  if isinstance(policy, policies.RandomOrder):
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (schedule.size,)))(keys)
    return policy.replace(rank=schedules.rank(uniform))
  if isinstance(policy, policies.LearnedClock):
    last = gather(clean_BxRxD, jnp.maximum(count_B - 1, 0)[:, None])
    passes = jnp.broadcast_to(policy.passes, (len(count_B), 1))
    mean, log_std, sharpness = (a[:, 0] for a in net.clock_prior(last, schedule.size, passes))
    noise = jax.vmap(lambda key: jax.random.normal(key, (schedule.size,)))(keys)
    return policy.replace(delay=mean + jnp.exp(log_std) * noise, sharpness=sharpness)
  return policy


def flow_first_pass(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  schedule: WindowSchedule,
  processor: LogitsProcessor,
) -> tuple[DecodingState, WindowSchedule]:
  """The first pass of each row's next window, which also reads what is uncached; and the schedule for this window."""
  if schedule.full_sequence:
    uncached, count, anchor = 0, 0, jnp.zeros_like(state.length)
  else:
    state = fill_cache(net, state, schedule.size)
    uncached, anchor = schedule.size, state.length - 1
    count = jnp.where(state.done, 0, state.length - state.cached)
  window = make_window(net, state, schedule, anchor, statistics.log_unigram_V)
  clean, hidden, state = forward(net, state, uncached, count, window.slots)
  schedule = schedule.replace(policy=draw_policy(net, state, schedule, clean, count))
  state, log_belief = window_beliefs(net, state.replace(anchor=anchor), schedule, window, hidden)
  index = jnp.zeros((), jnp.int32)
  return step_window(net, statistics, state, schedule, processor, window, log_belief, index), schedule


def flow_next_pass(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  schedule: WindowSchedule,
  processor: LogitsProcessor,
  index: jax.Array,
) -> DecodingState:
  """Pass `index` of the windows that `flow_first_pass` began."""
  prior = state.context_logits if schedule.self_conditioning else statistics.log_unigram_V
  window = make_window(net, state, schedule, state.anchor, prior)
  _, hidden, state = forward(net, state, 0, 0, window.slots)
  state, log_belief = window_beliefs(net, state, schedule, window, hidden)
  return step_window(net, statistics, state, schedule, processor, window, log_belief, index)


def window_unfinished(state: DecodingState, size: int) -> jax.Array:
  """Whether any row's window of `size` tokens has unknown tokens."""
  position = state.anchor[:, None] + 1 + jnp.arange(size)
  unknown = (gather(state.time, position) > 0.0) & (position < state.max_length[:, None])
  return jnp.any(unknown & ~state.done[:, None])


def flow_window(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  schedule: WindowSchedule,
  processor: LogitsProcessor,
) -> DecodingState:
  """One window of every row, to t = 0."""
  state, schedule = flow_first_pass(net, statistics, state, schedule, processor)
  step = lambda state, index: flow_next_pass(net, statistics, state, schedule, processor, index)
  unfinished = lambda state: window_unfinished(state, schedule.size)
  return policies.run_policy(schedule.policy, step, state, unfinished, first=1)


def uncached_slots(window: int, infill: bool) -> int:
  """Slots for uncached tokens in a pass of `adaptive`: as many as the prefix can grow by per pass, over long texts. It
  grows by a window at most, and with `infill` by the known text behind a gap, too."""
  return max(16 if infill else min(window, 16), window // 4)


def adaptive_pass(
  net: interface.Network,
  statistics: Statistics,
  state: DecodingState,
  schedule: WindowSchedule,
  processor: LogitsProcessor,
  infill: bool = False,
) -> DecodingState:
  """One pass of a sliding window, which begins behind the prefix that is cached after this pass.

  The leftmost unknown token always jumps; where the whole prefix is cached its belief is autoregression's, unless
  `infill`: then the text behind the gap counts. Which other tokens jump or gather evidence is the policy's decision.
  """
  T, prior = schedule.size, statistics.log_unigram_V
  uncached, slots = state.length - state.cached, uncached_slots(schedule.size, infill)
  count = jnp.where(state.done, 0, jnp.minimum(uncached, slots))
  anchor = jnp.minimum(state.length - 1, state.cached + count)
  if schedule.self_conditioning:  # the context logits of the pass before, shifted by what the window slides
    index = jnp.arange(T) + (anchor - state.anchor)[:, None]
    shifted = gather(state.context_logits, jnp.minimum(index, T - 1))
    prior = jnp.where((index < T)[..., None], shifted, prior)
  window = make_window(net, state, schedule, anchor, prior)
  clean, hidden, state = forward(net, state, slots, count, window.slots)
  state, log_belief = window_beliefs(net, state.replace(anchor=anchor), schedule, window, hidden)
  if not infill:
    context = net.logits(gather(clean, jnp.maximum(count - 1, 0)[:, None]))  # (B, 1, V)
    gathered_y = jnp.where((window.latent.time < 1.0)[..., None], window.latent.y, 0.0)
    exact = (window.position == state.length[:, None]) & (uncached <= slots)[:, None]
    log_belief = jnp.where(exact[..., None], latents.log_belief(context, net.codes(), gathered_y), log_belief)
  index = jnp.zeros((), jnp.int32)
  return step_window(net, statistics, state, schedule, processor, window, log_belief, index)

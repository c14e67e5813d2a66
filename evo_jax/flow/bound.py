"""The training objective and the bound of any path, over an `apply`-like network. Pure functions, no linen.

One variational bound covers every path from t = 1 to t = 0: a path's total of step costs (`flow.step_cost`, and
`flow.jump_cost` where a token becomes known), averaged over the latents' noise, is at least -log p(w) on average under
the data. The staircase path has no Gaussian step and costs exactly the autoregressive cross-entropy, which the clean
stream gives for all positions in one pass. All costs are in nats unless a name says bits.

Letters in names: B batch, L tokens of a sequence, N windows, W tokens of a window, S = W + 1 slots, V vocabulary,
M code elements, K steps.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.flow import interface, policies, schedules
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import statistics as statistics_lib
from evo_jax.flow import warp as warp_lib
from evo_jax.flow import windows as windows_lib

BITS_PER_NAT = 1.0 / np.log(2.0)  # bits in a nat
_ERASURE_PASSES = 32  # of a random order that are priced, at most


def window_logits(
  net: interface.Network,
  cache,
  anchor_BxN: jax.Array,
  anchor_token_BxN: jax.Array,
  latent: latents_lib.Latent,
  codes_VxM: jax.Array,
  prior_logits: jax.Array,
) -> jax.Array:
  """Context logits (B, N, W, V) of a window's tokens, of which `latent` (B, N, W) is known.

  prior_logits: (V,), or (B, N, W, V) from the pass before (self-conditioning).
  """
  slots = windows_lib.with_anchor(latent, anchor_token_BxN)
  (x,) = net.embed((slots,), (codes_VxM,), windows_lib.for_slots(prior_logits))
  hidden = net.window(cache, anchor_BxN, x, slots.time)
  return net.logits(hidden[:, :, :-1])


def gaussian_kl(q: tuple[jax.Array, jax.Array], p: tuple[jax.Array, jax.Array]) -> jax.Array:
  """KL(q || p) in nats (...) of normal distributions given by means and log standard deviations (...)."""
  (mean_q, log_q), (mean_p, log_p) = q, p
  return log_p - log_q + 0.5 * (jnp.exp(2 * (log_q - log_p)) + ((mean_q - mean_p) * jnp.exp(-log_p)) ** 2 - 1.0)


def infer_clock(
  net: interface.Network,
  hidden_BxLxD: jax.Array,
  nats_BxL: jax.Array,
  token_BxNxW: jax.Array,
  anchor_BxN: jax.Array,
  passes_BxN: jax.Array,
  noise_BxNxW: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A learned clock for windows: delays, drawn from what the clean text proposes; sharpnesses, which the past alone
  tells; and what the delays cost in nats, KL(q || p): each (B, N, W).

  hidden_BxLxD, nats_BxL: the clean stream's hidden states and cross-entropies. The heads learn from them and do
  not teach them.
  """
  hidden_BxLxD, nats_BxL = jax.lax.stop_gradient((hidden_BxLxD, nats_BxL))
  anchor_hidden = jnp.take_along_axis(hidden_BxLxD, anchor_BxN[..., None], axis=1)
  mean, log_std, sharpness = net.clock_prior(anchor_hidden, token_BxNxW.shape[-1], passes_BxN)
  change = net.clock_posterior(hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN)
  posterior = mean + change[0], log_std + change[1]
  delay = posterior[0] + jnp.exp(posterior[1]) * noise_BxNxW
  return delay, sharpness, gaussian_kl(posterior, (mean, log_std))


def token_nll(net: interface.Network, hidden_BxLxD: jax.Array, sequence_BxT: jax.Array, chunk: int = 0) -> jax.Array:
  """(B, L) autoregressive cross-entropies in nats of tokens 1..L of the sequences (B, L + 1)."""
  ((log_p,),) = net.log_probs((interface.Beliefs(hidden_BxLxD),), (sequence_BxT[:, 1:],), chunk)
  return latents_lib.jump_nll(log_p)


@flax.struct.dataclass
class Step:
  """A step of the true tokens from latents (..., T) to the next progressions, before it is priced.

  Fields: codes (V, M); `before` and `after`, latents; d (...): the step in precision; ends: latents' vectors y
  (..., T, M) under the step's noise, the first of which is `after`'s.
  """

  codes_VxM: jax.Array
  before: latents_lib.Latent
  after: latents_lib.Latent
  d: jax.Array
  ends: tuple[jax.Array, ...]

  @classmethod
  def of(
    cls,
    codes_VxM: jax.Array,
    warp: warp_lib.Warp,
    latent: latents_lib.Latent,
    token: jax.Array,
    time_next: jax.Array,
    noise: jax.Array,
    antithetic: bool = True,
  ) -> "Step":
    """The step to progressions `time_next` (..., T), with standard normal `noise` (..., T, M), and, `antithetic`,
    with -`noise`, too."""
    d = jnp.maximum(warp_lib.precision_at(warp, time_next) - warp_lib.precision_at(warp, latent.time), 0.0)
    ends = tuple(
      latent.y + latents_lib.observe(codes_VxM, token, d, n) for n in ([noise, -noise] if antithetic else [noise])
    )
    return cls(codes_VxM, latent, latents_lib.Latent(ends[0], time_next, token), d, ends)

  def price(self, log_probs: tuple[jax.Array, ...], expected_code: jax.Array | None = None) -> jax.Array:
    """Costs in nats (..., T): a known token costs nothing, one that becomes known pays for a jump, any other for its
    Gaussian increment.

    log_probs: of the token in nats under the belief before, and with each of the `ends` as evidence. The mean over
    antithetic ends has the expectation of one without the parts odd in the noise, of which the linear one is nearly all
    of the variance of a short step that stands for its whole path. expected_code (..., T, M): of the belief before; the
    increment is then priced by its limit for short steps, without noise, and `log_probs` need not have the ends'.
    """
    before, *after = log_probs
    if expected_code is None:
      increment = sum(latents_lib.step_nll(before, log_p) for log_p in after) / len(after)
    else:
      increment = self.d * latents_lib.small_step_rate(self.codes_VxM, expected_code, self.after.token)
    return jnp.where(self.before.known, 0.0, jnp.where(self.after.known, latents_lib.jump_nll(before), increment))


def path_nll(
  field: latents_lib.Field,
  codes_VxM: jax.Array,
  warp: warp_lib.Warp,
  token: jax.Array,
  policy: policies.Policy,
  key: jax.Array,
  prior_logits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One draw of a path's whole price in nats for every token (..., T), and the passes (...) that it took.

  The price's mean bounds -log p from above. Steps are priced plainly, not in antithetic pairs: along one trajectory the
  noise of a step's price is made good by the steps after it, and the sum scatters little. `policy` makes the path of
  what is read. prior_logits (V,): what the field gets as the context logits before the first pass; later the last
  pass's; None: the field is asked by the latents alone.
  """
  shape = (*token.shape, codes_VxM.shape[1])
  start = latents_lib.Latent(jnp.zeros(shape, codes_VxM.dtype), jnp.ones(token.shape, codes_VxM.dtype), token)
  context = None if prior_logits is None else jnp.broadcast_to(prior_logits, (*token.shape, prior_logits.shape[-1]))
  uncertainty = warp.entropy()[0]

  def step(carry, index):
    latent, motion, context, total, passes = carry
    noise = jax.random.normal(jax.random.fold_in(key, index), shape, codes_VxM.dtype)
    found = field(latent) if context is None else field(latent, context)
    log_belief = latents_lib.log_belief(found, codes_VxM, latent.y)
    reading = policies.Observation(index, latent.time, log_belief, uncertainty, motion, codes_VxM, warp)
    time_next = jnp.broadcast_to(policy(reading), token.shape).astype(codes_VxM.dtype)
    taken = Step.of(codes_VxM, warp, latent, token, time_next, noise, antithetic=False)
    after, log_after = taken.after, latents_lib.log_belief(found, codes_VxM, taken.after.y)
    cost = taken.price((latents_lib.pick(log_belief, token), latents_lib.pick(log_after, token)))
    precision = jnp.where(after.known, 0.0, warp_lib.precision_at(warp, after.time))
    motion = motion.after(after.y, precision, latents_lib.expected_code(log_belief, codes_VxM))
    return after, motion, None if context is None else found, total + cost, passes + jnp.any(~latent.known, axis=-1)

  carry = (
    start,
    latents_lib.SolverState.start(jnp.zeros(shape, codes_VxM.dtype)),
    context,
    jnp.zeros(token.shape, codes_VxM.dtype),
    jnp.zeros(token.shape[:-1], jnp.int32),
  )
  *_, total, passes = policies.run_until_known(step, carry, lambda carry: jnp.any(~carry[0].known))
  return total, passes


def erasure_nll(
  field: latents_lib.Field, codes_VxM: jax.Array, token: jax.Array, policy: policies.RandomOrder, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A random order's price in nats for every token (..., T), and its passes (...): `path_cost` of the same
  policy in mean.

  Which tokens are known does not depend on what was read before, so each pass is priced by itself, over all tokens that
  it might reveal, and of many passes a stratified sample of _ERASURE_PASSES is enough.
  """
  T = token.shape[-1]
  count = jnp.minimum(policy.passes, _ERASURE_PASSES)

  def price(i, total):
    rank_key, pass_key = jax.random.split(jax.random.fold_in(key, i))
    low, high = i * policy.passes // count, (i + 1) * policy.passes // count  # the stratum's passes
    index = jax.random.randint(pass_key, (), low, high)
    known, after = policy.known_after(index - 1, T), policy.known_after(index, T)
    time = (random_rank(rank_key, token.shape) >= known).astype(codes_VxM.dtype)
    latent = latents_lib.Latent(jnp.zeros((*token.shape, codes_VxM.shape[1]), codes_VxM.dtype), time, token)
    nats = latents_lib.jump_nll(latents_lib.log_prob(field(latent), token))
    share = (after - known) / jnp.maximum(T - known, 1) * (high - low)  # of the unknown that this pass reveals
    return total + jnp.where(latent.known, 0.0, nats * share)

  total = jax.lax.fori_loop(0, count, price, jnp.zeros(token.shape, codes_VxM.dtype))
  return total, jnp.full(token.shape[:-1], policy.passes)


def random_rank(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random orders over the last axis: int32 ranks, uniform over all permutations."""
  return schedules.rank(jax.random.uniform(key, shape))


def sequence_nll(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  sequence_BxT: jax.Array,
  key: jax.Array,
  policy: policies.Policy | None = None,
  size: int = 0,
  self_conditioned: bool = False,
  chunk: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Prices in nats (B, L) of the tokens of sequences (B, L + 1), whose first is context only; and the
  passes (B,) taken.

  policy: None for autoregression; else windows of `size` tokens tile the sequence (`size` must divide L), each read
  after the clean text before it, and the policy makes the path: the total is a bound on the sequence's -log p. A
  learned clock's delays, drawn from what the clean text proposes, pay their KL. chunk: as loss.chunk, for the
  clean stream.
  """
  B, L = sequence_BxT.shape[0], sequence_BxT.shape[1] - 1
  hidden, cache = None, None
  if policy is None or size < L:  # a window of the whole sequence has no past
    hidden, cache = net.clean(sequence_BxT[:, :-1])
  if policy is None:
    return token_nll(net, hidden, sequence_BxT, chunk), jnp.full(B, L)
  anchor_BxN = jnp.broadcast_to(jnp.arange(0, L, size), (B, L // size))
  tokens = windows_lib.gather_windows(sequence_BxT, anchor_BxN, size)
  codes, prior = net.codes(), statistics.log_unigram_V
  field = lambda latent, prior=prior: window_logits(net, cache, anchor_BxN, tokens[..., 0], latent, codes, prior)
  token, kl = tokens[..., 1:], 0.0
  key, start_key = jax.random.split(key)
  if isinstance(policy, policies.RandomOrder):
    if not self_conditioned:
      nats, passes = erasure_nll(field, codes, token, policy, key)
      return nats.reshape(B, L), jnp.sum(passes, axis=1)
    policy = policy.replace(rank=random_rank(start_key, token.shape))
  if isinstance(policy, policies.LearnedClock):
    delay, sharpness, kl = infer_clock(
      net,
      hidden,
      token_nll(net, hidden, sequence_BxT, chunk),
      token,
      anchor_BxN,
      jnp.broadcast_to(policy.passes, anchor_BxN.shape),
      jax.random.normal(start_key, token.shape),
    )
    policy = policy.replace(delay=delay, sharpness=sharpness)
  nats, passes = path_nll(field, codes, statistics.warp, token, policy, key, prior if self_conditioned else None)
  return (nats + kl).reshape(B, L), jnp.sum(passes, axis=1)

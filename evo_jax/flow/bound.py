"""The variational bound on -log p(w) along any path, from a network's answers.

One bound covers every path from t = 1 to t = 0: the sum of its steps' NLLs (`latents.step_nll` for a Gaussian step,
`latents.jump_nll` where a token becomes known), averaged over the latents' noise, is at least -log p(w) on average
under the data. The staircase path has no Gaussian step, and its bound is exactly the autoregressive cross-entropy,
which the clean stream gives for all positions in one pass. Everything is in nats unless a name says bits.

Letters in names: B batch, L tokens of a sequence, N windows, W tokens of a window, V vocabulary, M code elements,
T tokens of any run.
"""

from collections.abc import Callable

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from evo_jax.batch import Batch
from evo_jax.errors import UserError
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies, schedules
from evo_jax.flow.interface import Beliefs, Network, WindowInputs
from evo_jax.flow.statistics import Statistics
from evo_jax.flow.warp import Warp, precision_at
from evo_jax.flow.windows import for_slots, gather_windows, with_anchor

BITS_PER_NAT = 1.0 / np.log(2.0)
_ERASURE_PASSES = 32  # of a random order that are evaluated, at most


def window_logits(
  net: Network,
  cache,
  anchor_BxN: jax.Array,
  anchor_token_BxN: jax.Array,
  latent: latents_lib.Latent,
  codes_VxM: jax.Array,
  prior_logits: jax.Array,
) -> jax.Array:
  """Context logits (B, N, W, V) of a window's tokens, given their `latent` (B, N, W).

  prior_logits: (V,), or (B, N, W, V) from the pass before (self-conditioning).
  """
  slots = with_anchor(latent, anchor_token_BxN)
  (x,) = net.embed((slots,), (codes_VxM,), for_slots(prior_logits))
  hidden = net.window(cache, WindowInputs(anchor_BxN, x, slots.time))
  return net.logits(hidden[:, :, :-1])


def gaussian_kl(q: tuple[jax.Array, jax.Array], p: tuple[jax.Array, jax.Array]) -> jax.Array:
  """KL(q || p) in nats (...) of normal distributions given by means and log standard deviations (...)."""
  (mean_q, log_q), (mean_p, log_p) = q, p
  return log_p - log_q + 0.5 * (jnp.exp(2 * (log_q - log_p)) + ((mean_q - mean_p) * jnp.exp(-log_p)) ** 2 - 1.0)


def infer_clock(
  net: Network,
  hidden_BxLxD: jax.Array,
  nats_BxL: jax.Array,
  token_BxNxW: jax.Array,
  anchor_BxN: jax.Array,
  passes_BxN: jax.Array,
  noise_BxNxW: jax.Array,
  inside_BxNxW: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A learned clock for windows, each (B, N, W): delays, drawn from the posterior; sharpnesses, from the prior; and
  KL(q || p) of the delays in nats.

  hidden_BxLxD, nats_BxL: the clean stream's hidden states and cross-entropies. The heads are trained on them and pass
  no gradient to them. inside_BxNxW: bool, the tokens that there are; others have delays of the prior, and no KL; None:
  all.
  """
  hidden_BxLxD, nats_BxL = jax.lax.stop_gradient((hidden_BxLxD, nats_BxL))
  anchor_hidden = jnp.take_along_axis(hidden_BxLxD, anchor_BxN[..., None], axis=1)
  mean, log_std, sharpness = net.clock_prior(anchor_hidden, token_BxNxW.shape[-1], passes_BxN)
  change = net.clock_posterior(hidden_BxLxD, nats_BxL, token_BxNxW, anchor_BxN, passes_BxN)
  if inside_BxNxW is not None:
    change = jax.tree.map(lambda x: jnp.where(inside_BxNxW, x, 0.0), change)
  posterior = mean + change[0], log_std + change[1]
  delay = posterior[0] + jnp.exp(posterior[1]) * noise_BxNxW
  return delay, sharpness, gaussian_kl(posterior, (mean, log_std))


def token_nll(net: Network, hidden_BxLxD: jax.Array, tokens_BxT: jax.Array, chunk: int = 0) -> jax.Array:
  """(B, L) autoregressive cross-entropies in nats of tokens 1..L of the sequences (B, L + 1). chunk: as loss.chunk."""
  ((log_p,),) = net.log_probs((Beliefs(hidden_BxLxD),), (tokens_BxT[:, 1:],), chunk)
  return latents_lib.jump_nll(log_p)


@flax.struct.dataclass
class Step:
  """A step of the true tokens from latents (..., T) to the next progressions.

  codes: (V, M); before, after: latents; d (...): the step in precision; ends: y (..., T, M) after the step, one for
  each noise, the first of which is `after`'s.
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
    warp: Warp,
    latent: latents_lib.Latent,
    token: jax.Array,
    time_next: jax.Array,
    noise: jax.Array,
    antithetic: bool = True,
  ) -> "Step":
    """The step to progressions `time_next` (..., T), with standard normal `noise` (..., T, M) and, if `antithetic`,
    with -`noise`, too."""
    chex.assert_equal_shape([latent.time, token, time_next])
    chex.assert_equal_shape([latent.y, noise])
    d = jnp.maximum(precision_at(warp, time_next) - precision_at(warp, latent.time), 0.0)
    ends = tuple(
      latent.y + latents_lib.observe(codes_VxM, token, d, n) for n in ([noise, -noise] if antithetic else [noise])
    )
    return cls(codes_VxM, latent, latents_lib.Latent(ends[0], time_next, token), d, ends)

  def nll(
    self,
    log_probs: tuple[jax.Array, ...],
    expected_code: jax.Array | None = None,
    price: Callable[..., jax.Array] | None = None,
  ) -> jax.Array:
    """The step's NLL in nats (..., T): nothing for a known token, a jump's for one that becomes known, a Gaussian
    increment's for any other.

    log_probs: of the token in nats under the belief before, and with each of the `ends` as evidence. The mean over
    antithetic ends has the expectation of a single one without the parts odd in the noise, of which the linear one is
    nearly all of the variance of a short step that stands for its whole path. expected_code (..., T, M): of the belief
    before; the increment's NLL is then its limit for short steps, without noise, and `log_probs` need not have the
    ends'. price: a `Price` of one's own for the tokens that move; it gets expected_code, too.
    """
    before, *after = log_probs
    if price is not None:
      steps = (self.replace(after=self.after.replace(y=y)) for y in self.ends)
      own = sum(price(step, before, log_p, expected_code) for step, log_p in zip(steps, after)) / len(after)
      return jnp.where(self.before.known | (self.after.time >= self.before.time), 0.0, own)
    if expected_code is None:
      increment = sum(latents_lib.step_nll(before, log_p) for log_p in after) / len(after)
    else:
      increment = self.d * latents_lib.small_step_rate(self.codes_VxM, expected_code, self.after.token)
    return jnp.where(self.before.known, 0.0, jnp.where(self.after.known, latents_lib.jump_nll(before), increment))


# A price of one's own, in nats (..., T): price(step, log_before, log_after, expected_code), with the token's
# log-probabilities (..., T) under the beliefs before and after the step, and the expected code (..., T, M) before it. A
# jump is a step to `step.after.time` 0. Only the step's own NLL makes the total a bound on -log p.
Price = Callable[[Step, jax.Array, jax.Array, jax.Array], jax.Array]


def check_price(price: Price, where: str) -> None:
  """Raises UserError, a line that begins with `where`, for a function that is no price; nothing is computed."""

  def priced(lead: tuple[int, ...]) -> jax.Array:
    zeros = lambda *shape: jnp.zeros((*lead, *shape), jnp.float32)
    latent = latents_lib.Latent(zeros(2), zeros(), zeros().astype(jnp.int32))
    step = Step(jnp.zeros((3, 2), jnp.float32), latent, latent, zeros(), (zeros(2),))
    return jnp.broadcast_to(price(step, zeros(), zeros(), zeros(2)), lead)

  for lead in ((2, 4), (2, 3, 4)):
    try:
      jax.eval_shape(lambda lead=lead: priced(lead))
    except Exception as error:
      hint = "; a price takes (step, log_before, log_after, expected_code)"
      raise UserError(f"{where}: {schedules.failure(error)}{hint}") from error


@flax.struct.dataclass
class _PathState:
  """Where a path is: latents, the solver's state, the last pass's context logits (None: not needed), the NLL so far
  (..., T), the passes (...), and (..., T) bool, which tokens were the most probable when they became known (None: not
  asked for)."""

  latent: latents_lib.Latent
  solver: latents_lib.SolverState
  context: jax.Array | None
  nats: jax.Array
  passes: jax.Array
  greedy: jax.Array | None = None


def path_nll(
  field: latents_lib.Field,
  codes_VxM: jax.Array,
  warp: Warp,
  token: jax.Array,
  policy: policies.Policy,
  key: jax.Array,
  prior_logits: jax.Array | None = None,
  price: Price | None = None,
  inside: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One sample of a path's NLL bound in nats for every token (..., T), and the passes (...) that it took.

  The bound's mean is at least -log p. Steps are not evaluated in antithetic pairs: along one trajectory the noise of a
  step's NLL is made up for by the steps after it, and the sum scatters little. policy: makes the path from what each
  pass shows. prior_logits (V,): what the field gets as the context logits before the first pass; later the last pass's;
  None: the field is called with the latents alone. price: of a step, where it is not to be its NLL. inside (..., T)
  bool: the tokens that there are; None: all. The others are drawn from their beliefs as the path goes on, as a sampler
  does, and cost nothing: the total bounds -log of the probability that a sampler writes the tokens inside, whatever it
  writes beside them, and nothing depends on how many there are.
  """
  end = _follow_path(field, codes_VxM, warp, token, policy, key, prior_logits, price, inside)
  return end.nats, end.passes


def _follow_path(
  field, codes_VxM, warp, token, policy, key, prior_logits, price=None, inside=None, finds_greedy=False
) -> _PathState:
  """The end of a path, as of `path_nll`; `key` may be one for each of the leading axes."""
  chex.assert_rank(codes_VxM, 2)
  chex.assert_type(token, int)
  dtype, uncertainty = codes_VxM.dtype, warp.entropy()[0]
  where_inside = lambda x, other: x if inside is None else jnp.where(inside, x, other)
  unknown = lambda latent: where_inside(~latent.known, False)

  def draw_outside(latent: latents_lib.Latent, log_belief: jax.Array, index: jax.Array) -> jax.Array:
    """The tokens (..., T) towards which the step goes."""
    if inside is None:
      return token
    gumbel = lambda key, shape: jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, index), 1), shape, dtype)
    drawn = jnp.argmax(log_belief + _by_row(gumbel, key, log_belief.shape), axis=-1).astype(token.dtype)
    return jnp.where(inside | latent.known, latent.token, drawn)

  def step(path: _PathState, index: jax.Array) -> _PathState:
    latent, solver = path.latent, path.solver
    normal = lambda key, shape: jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
    noise = _by_row(normal, key, latent.y.shape)
    context = field(latent) if path.context is None else field(latent, path.context)
    log_belief = latents_lib.log_belief(context, codes_VxM, latent.y)
    observation = policies.Observation(index, latent.time, log_belief, uncertainty, solver, codes_VxM, warp)
    time_next = jnp.broadcast_to(policy(observation), token.shape).astype(dtype)
    target = draw_outside(latent, log_belief, index)
    taken = Step.of(codes_VxM, warp, latent, target, time_next, noise, antithetic=False)
    after, log_after = taken.after, latents_lib.log_belief(context, codes_VxM, taken.after.y)
    code = latents_lib.expected_code(log_belief, codes_VxM)
    log_probs = latents_lib.pick(log_belief, target), latents_lib.pick(log_after, target)
    nats = taken.nll(log_probs) if price is None else taken.nll(log_probs, code, price)
    precision = jnp.where(after.known, 0.0, precision_at(warp, after.time))
    solver = solver.after(after.y, precision, code)
    passes = path.passes + jnp.any(unknown(latent), axis=-1)
    greedy = path.greedy
    if greedy is not None:
      greedy |= after.known & ~latent.known & (jnp.argmax(log_belief, axis=-1) == target)
    return _PathState(after, solver, None if path.context is None else context, path.nats + nats, passes, greedy)

  zeros = jnp.zeros((*token.shape, codes_VxM.shape[1]), dtype)
  start = _PathState(
    latent=latents_lib.Latent(zeros, jnp.ones(token.shape, dtype), token),
    solver=latents_lib.SolverState.start(zeros),
    context=None if prior_logits is None else jnp.broadcast_to(prior_logits, (*token.shape, len(prior_logits))),
    nats=jnp.zeros(token.shape, dtype),
    passes=jnp.zeros(token.shape[:-1], jnp.int32),
    greedy=jnp.zeros(token.shape, bool) if finds_greedy else None,
  )
  end = policies.run_until_known(step, start, lambda path: jnp.any(unknown(path.latent)))
  return end.replace(nats=where_inside(end.nats, 0.0))


def _by_row(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """draw(key, shape); `key` may be one for each of the leading axes, so that rows do not depend on each other."""
  return jax.vmap(lambda key: _by_row(draw, key, shape[1:]))(key) if key.ndim else draw(key, shape)


def _draw_policy(
  net, policy, key, token, anchor_BxN, hidden, ar_nats, inside
) -> tuple[policies.Policy, jax.Array | float]:
  """The policy with what is drawn once for each window, a random order or a learned clock's delays, and their KL in
  nats; key: as of `_by_row`. hidden, ar_nats: the clean stream's, for a learned clock. inside: as of `path_nll`."""
  if isinstance(policy, policies.RandomOrder):
    return policy.replace(rank=_by_row(random_rank, key, token.shape)), 0.0
  if isinstance(policy, policies.LearnedClock):
    count = jnp.broadcast_to(policy.passes, anchor_BxN.shape)
    noise = _by_row(jax.random.normal, key, token.shape)
    delay, sharpness, kl = infer_clock(net, hidden, ar_nats, token, anchor_BxN, count, noise, inside)
    return policy.replace(delay=delay, sharpness=sharpness), kl
  return policy, 0.0


def erasure_nll(
  field: latents_lib.Field,
  codes_VxM: jax.Array,
  token: jax.Array,
  policy: policies.RandomOrder,
  key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """A random order's NLL bound in nats for every token (..., T), and its passes (...): in mean that of `path_nll` under
  the same policy.

  Which tokens are known does not depend on what was read before, so each pass is evaluated by itself, on all tokens
  that it might reveal, and of many passes a stratified sample of _ERASURE_PASSES is enough.
  """
  T = token.shape[-1]
  count = jnp.minimum(policy.passes, _ERASURE_PASSES)

  def add_pass(i, total):
    rank_key, pass_key = jax.random.split(jax.random.fold_in(key, i))
    low, high = i * policy.passes // count, (i + 1) * policy.passes // count  # the stratum's passes
    index = jax.random.randint(pass_key, (), low, high)
    known, after = policy.known_after(index - 1, T), policy.known_after(index, T)
    time = (random_rank(rank_key, token.shape) >= known).astype(codes_VxM.dtype)
    latent = latents_lib.Latent(jnp.zeros((*token.shape, codes_VxM.shape[1]), codes_VxM.dtype), time, token)
    nats = latents_lib.jump_nll(latents_lib.log_prob(field(latent), token))
    share = (after - known) / jnp.maximum(T - known, 1) * (high - low)  # of the unknown tokens that this pass reveals
    return total + jnp.where(latent.known, 0.0, nats * share)

  total = jax.lax.fori_loop(0, count, add_pass, jnp.zeros(token.shape, codes_VxM.dtype))
  return total, jnp.full(token.shape[:-1], policy.passes)


def random_rank(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random orders over the last axis: int32 ranks, uniform over all permutations."""
  return schedules.rank(jax.random.uniform(key, shape))


@flax.struct.dataclass
class Tiles:
  """Windows of size W that cover parts of sequences, as answers, each from its first token on: each token of a part is
  in one of them.

  anchor_BxN: int32, positions of the tokens before the windows. tokens_BxN: int32, how many of its W tokens are of the
  part, from the first on; 0: it is no window.
  """

  anchor_BxN: jax.Array
  tokens_BxN: jax.Array


def sequence_nll(
  net: Network,
  statistics: Statistics,
  batch: Batch,
  key: jax.Array,
  policy: policies.Policy | None = None,
  size: int = 0,
  self_conditioned: bool = False,
  chunk: int = 0,
  price: Price | None = None,
  tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
  """NLL bounds in nats (B, L) of the tokens of sequences (B, L + 1), whose first is context only, whether they count or
  not; and the passes (B,) taken.

  policy: None for autoregression; else windows of `size` tokens tile the sequence (`size` must divide L), each read
  after the clean text before it, and the policy makes the path: the sum bounds the sequence's -log p. The delays of a
  learned clock are drawn from the posterior and add their KL. chunk: as loss.chunk, for the clean stream. price: as
  of `path_nll`; autoregression has none.

  tiles: the windows, in place of those that tile the sequence, where only parts of it are measured: the answers of
  conversations, or a text that is shorter than the sequence. They read what a model has read when it writes the parts,
  and the sums bound -log p of the parts given what is before each, not given where they end. What is in no tile has 0;
  of autoregression, too, the passes are those of the tiles' tokens.
  """
  tokens = batch.tokens
  chex.assert_rank(tokens, 2)
  B, L = tokens.shape[0], tokens.shape[1] - 1
  hidden, cache = None, None
  has_past = tiles is not None or size < L  # a window of the whole sequence has none
  if policy is None or has_past or isinstance(policy, policies.LearnedClock):
    hidden, cache = net.clean(tokens[:, :-1], None if batch.segments is None else batch.segments[:, :-1])
  if policy is None:
    passes = jnp.full(B, L) if tiles is None else jnp.sum(tiles.tokens_BxN, axis=1)
    return token_nll(net, hidden, tokens, chunk), passes
  if tiles is None:
    anchor_BxN, inside = jnp.broadcast_to(jnp.arange(0, L, size), (B, L // size)), None
  else:
    anchor_BxN, inside = tiles.anchor_BxN, jnp.arange(size) < tiles.tokens_BxN[..., None]
  slots = gather_windows(tokens, anchor_BxN, size)
  token, codes, prior = slots[..., 1:], net.codes(), statistics.log_unigram_V
  field = _window_field(net, cache if has_past else None, anchor_BxN, slots[..., 0], codes, prior)
  key, start_key = jax.random.split(key)
  if isinstance(policy, policies.RandomOrder) and not self_conditioned and price is None and inside is None:
    nats, passes = erasure_nll(field, codes, token, policy, key)
    return _in_sequence(nats, tiles, L), jnp.sum(passes, axis=1)
  ar_nats = token_nll(net, hidden, tokens, chunk) if isinstance(policy, policies.LearnedClock) else None
  policy, kl = _draw_policy(net, policy, start_key, token, anchor_BxN, hidden, ar_nats, inside)
  first_prior = prior if self_conditioned else None
  nats, passes = path_nll(field, codes, statistics.warp, token, policy, key, first_prior, price, inside)
  nats = nats + kl if inside is None else jnp.where(inside, nats + kl, 0.0)
  return _in_sequence(nats, tiles, L), jnp.sum(passes, axis=1)


def _in_sequence(nats_BxNxW, tiles, length):
  """(B, L) of what windows have: those that tile the sequence, or those of `tiles`, where nothing else is but 0."""
  B, _, W = nats_BxNxW.shape
  if tiles is None:
    return nats_BxNxW.reshape(B, length)
  place = tiles.anchor_BxN[..., None] + jnp.arange(W)  # behind the end there is nothing to add
  return jnp.zeros((B, length)).at[jnp.arange(B)[:, None, None], place].add(nats_BxNxW, mode="drop")


def _window_field(net, cache, anchor_BxN, anchor_token_BxN, codes_VxM, log_unigram_V) -> Callable:
  """The network as a field of windows' latents (B, N, W), and of the context logits of the pass before."""

  def field(latent, prior_logits=log_unigram_V):
    return window_logits(net, cache, anchor_BxN, anchor_token_BxN, latent, codes_VxM, prior_logits)

  return field


@flax.struct.dataclass
class TextWindows:
  """Windows (B, N) behind what is known of the texts of B rows, each of W tokens.

  anchor_BxN: int32, positions of the known tokens before them; several may follow the same one. tokens_BxNxW: int32,
  what stands there. count_BxN: int32, how many of the W tokens there are, from the first on; 0: it is no window. Where
  a text ends inside a window, the rest is as the model itself would write it: nothing is told of the text's length.
  key_BxN: one key each, so that the noise of one does not depend on the others.
  """

  anchor_BxN: jax.Array
  tokens_BxNxW: jax.Array
  count_BxN: jax.Array
  key_BxN: jax.Array


def needs_own_text(policy: policies.Policy) -> bool:
  """Whether a window's NLL needs the window's tokens in its row's text, and so a row of its own."""
  return isinstance(policy, policies.LearnedClock)


def windows_nll(
  net: Network,
  statistics: Statistics,
  text_BxT: jax.Array,
  segments_BxT: jax.Array | None,
  windows: TextWindows,
  policy: policies.Policy,
  draws: int = 1,
  self_conditioned: bool = False,
  chunk: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """NLL bounds in nats (draws, B, N) of windows, given each row's text up to the anchor; whether every token was the
  most probable when it became known, (draws, B, N) bool; and the passes (draws, B, N) taken.

  A row's text is read once, whatever number of windows follow parts of it. It reaches to the last anchor at least, and
  to the windows' ends where `needs_own_text`. segments_BxT: where a row has several texts, which the network isolates,
  numbers that tell them apart; a window sees its anchor's. self_conditioned, chunk: as of `sequence_nll`.
  """
  anchor, token = windows.anchor_BxN, windows.tokens_BxNxW
  inside = jnp.arange(token.shape[-1]) < windows.count_BxN[..., None]
  hidden, cache = net.clean(text_BxT, segments_BxT)
  ar_nats = token_nll(net, hidden[:, :-1], text_BxT, chunk) if needs_own_text(policy) else None
  anchor_token = jnp.take_along_axis(text_BxT, anchor, axis=1)
  codes, prior = net.codes(), statistics.log_unigram_V
  field = _window_field(net, cache, anchor, anchor_token, codes, prior)
  fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))

  def draw(number):
    key = fold_in(windows.key_BxN, number)
    key, start_key = fold_in(key, 0), fold_in(key, 1)
    drawn, kl = _draw_policy(net, policy, start_key, token, anchor, hidden[:, :-1], ar_nats, inside)
    prior_logits = prior if self_conditioned else None
    end = _follow_path(field, codes, statistics.warp, token, drawn, key, prior_logits, inside=inside, finds_greedy=True)
    nats = jnp.sum(jnp.where(inside, end.nats + kl, 0.0), axis=2)
    return nats, jnp.all(end.greedy | ~inside, axis=2), end.passes

  return jax.lax.map(draw, jnp.arange(draws))

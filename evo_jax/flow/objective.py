"""The training objective."""

import jax
import jax.numpy as jnp

from evo_jax import config as config_lib
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import interface, schedules
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import statistics as statistics_lib
from evo_jax.flow import warp as warp_lib
from evo_jax.flow import windows as windows_lib


def training_loss(
  net: interface.Network,
  statistics: statistics_lib.Statistics,
  sequence_BxT: jax.Array,
  draw: windows_lib.WindowDraw | None,
  config: config_lib.Loss,
  learned: bool = False,
):
  """The objective's two terms and what was measured on the way.

  Args:
    net: the network at the parameters to be taught.
    statistics: read for the warp and the first pass's prior.
    sequence_BxT: (B, L + 1) int32 tokens; the first is context only.
    draw: `draw_windows` for these sequences; None: there are no windows.
    config: the weights.
    learned: whether the network infers progression times (model.progression).

  Returns:
    (ar, window): weighted losses in nats a token, to be added up or clipped apart; a Measurement; and a dict of `Mean`s
    in bits a token, unweighted: `bits` (autoregression; where nothing reads the clean stream, the windows'
    cross-entropy), `window_ce`, `window_bound`, `progression_kl`, and the cross-entropy on the windows of each path.
  """
  L = sequence_BxT.shape[1] - 1
  # A window of the whole sequence has no past to read: diffusion alone needs no clean stream.
  alone = config.ar_weight == 0 and draw is not None and draw.time.shape[-1] == L
  # Where windows need nothing of the clean stream but its keys and values, one pass can read both.
  waits = alone or learned or config.self_conditioning or config.clean_gradient != 1.0
  together = config.one_pass and draw is not None and not waits
  hidden, cache, metrics = None, None, {}
  # Looked up once for both streams: the gradient of a lookup is as large as the table.
  x_BxTxD = net.embed_tokens(sequence_BxT)
  if not (alone or together):
    hidden, cache = net.clean(sequence_BxT[:, :-1], x_BxTxD[:, :-1])
  if draw is None:
    nats_BxL, none = bound_lib.token_nll(net, hidden, sequence_BxT, config.chunk), jnp.zeros((0,))
    metrics["bits"] = statistics_lib.Mean.of(jax.lax.stop_gradient(nats_BxL) * bound_lib.BITS_PER_NAT)
    return (
      (config.ar_weight * jnp.mean(nats_BxL), jnp.zeros(())),
      statistics_lib.Measurement(sequence_BxT[:, 1:], *[none] * 5),
      metrics,
    )

  codes = net.codes() if config.codes != "frozen" else jax.lax.stop_gradient(net.codes())
  W, bound_windows = draw.time.shape[-1], draw.step_noise.shape[1]
  warp = jax.lax.stop_gradient(statistics.warp)
  tokens = windows_lib.gather_windows(sequence_BxT, draw.anchor, W)
  anchor_token, token = tokens[..., 0], tokens[..., 1:]
  is_bound = jnp.arange(token.shape[1]) < bound_windows

  time, time_next, kl, nats_BxL = draw.time, draw.time_next, jnp.zeros(()), None
  if learned:
    nats_BxL = bound_lib.token_nll(net, hidden, sequence_BxT, config.chunk)
    delay, sharpness, kl = bound_lib.infer_clock(
      net, hidden, nats_BxL, token, draw.anchor, draw.steps, draw.delay_noise
    )
    # Like the codes, clocks are taught by the bound alone: cross-entropy only wants all tokens known at once.
    delay, sharpness = (jnp.where(is_bound[:, None], x, jax.lax.stop_gradient(x)) for x in (delay, sharpness))
    use = (draw.path == windows_lib.LEARNED)[..., None]
    time = jnp.where(use, schedules.learned_clock(delay, sharpness, draw.clock[..., None]), time)
    time_next = jnp.where(use, schedules.learned_clock(delay, sharpness, draw.clock_next[..., None]), time_next)
    kl = jnp.where(use, kl, 0.0)[:, :bound_windows]
  latent = windows_lib.observe_at(codes, warp, token, time, draw.noise)

  # Cross-entropy only wants codes far apart: by default its windows read them and do not teach them.
  if config.codes == "bound":
    latent = latent.replace(y=jnp.where(is_bound[:, None, None], latent.y, jax.lax.stop_gradient(latent.y)))
  fixed = codes if config.codes != "bound" else jax.lax.stop_gradient(codes)
  split = lambda tree: (
    jax.tree.map(lambda x: x[:, :bound_windows], tree),
    jax.tree.map(lambda x: x[:, bound_windows:], tree),
  )
  latent_b, latent_c = split(latent)
  anchor_b, anchor_c = split(anchor_token)
  if config.clean_gradient != 1.0 and cache is not None:  # the same values, bit for bit, with another gradient
    through = lambda x: x + (config.clean_gradient - 1.0) * (x - jax.lax.stop_gradient(x))
    cache = cache.replace(k=through(cache.k), v=through(cache.v))

  # The windows taught by the bound, and by cross-entropy.
  parts = slice(None, bound_windows), slice(bound_windows, None)
  slots = windows_lib.with_anchor(latent_b, anchor_b), windows_lib.with_anchor(latent_c, anchor_c)
  own = windows_lib.gather_windows(x_BxTxD, draw.anchor, W)

  def embedded(before, prior):
    """The windows' slots (B, N, S, D), behind the pass that left hidden states `before` (B, N, W, D;
    None: the first)."""
    if before is not None:
      before = jnp.pad(before, ((0, 0), (0, 0), (1, 0), (0, 0)))  # the anchor's are not read
      before = tuple(before[:, some] for some in parts)
    return jnp.concatenate(
      net.embed(slots, (codes, fixed), prior, tuple(own[:, some] for some in parts), before, config.chunk), axis=1
    )

  prior, slot_time = statistics.log_unigram_V, windows_lib.with_anchor(latent, anchor_token).time
  if together:
    hidden, hidden_w = net.clean_and_window(
      sequence_BxT[:, :-1], x_BxTxD[:, :-1], draw.anchor, embedded(None, prior), slot_time
    )
    hidden_w = hidden_w[:, :, :-1]
  else:
    read = lambda before, prior: net.window(cache, draw.anchor, embedded(before, prior), slot_time)[:, :, :-1]
    before = None
    if config.self_conditioning:
      twice = draw.coin[0] < config.self_conditioning
      first = lambda: jax.lax.stop_gradient(read(None, prior))
      before = jax.lax.cond(
        twice, first, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first))
      )
    hidden_w = read(before, prior if before is None else jnp.where(twice, 0.0, prior))

  # All that is asked of the vocabulary's logits, in one reading of them.
  step = bound_lib.Step.of(
    codes, warp, latent_b, token[:, :bound_windows], time_next[:, :bound_windows], draw.step_noise, config.antithetic
  )
  ends = step.ends if config.integrand == "step" else ()
  bound = interface.Beliefs(hidden_w[:, :bound_windows], (latent_b.y, *ends), codes)
  beliefs = [
    (bound, token[:, :bound_windows]),
    (interface.Beliefs(hidden_w[:, bound_windows:], (latent_c.y,), fixed), token[:, bound_windows:]),
  ]
  if hidden is not None and nats_BxL is None:
    beliefs.append((interface.Beliefs(hidden), sequence_BxT[:, 1:]))
  (of_bound, (of_rest,), *of_clean) = net.log_probs(*zip(*beliefs), config.chunk)
  if of_clean:
    nats_BxL = latents_lib.jump_nll(of_clean[0][0])
  ar = jnp.zeros(())
  if nats_BxL is not None:
    ar = jnp.mean(nats_BxL)
    metrics["bits"] = statistics_lib.Mean.of(jax.lax.stop_gradient(nats_BxL) * bound_lib.BITS_PER_NAT)
  expected = None
  if config.integrand == "rate":
    expected = latents_lib.expected_code(latents_lib.log_belief(net.logits(bound.hidden), codes, latent_b.y), codes)
  cost_b = step.price(of_bound, expected)
  unknown = ~latent.known
  nats = jnp.where(unknown, latents_lib.jump_nll(jnp.concatenate([of_bound[0], of_rest], axis=1)), 0.0)
  whole_b = jnp.mean(cost_b, axis=-1) * draw.steps[:, :bound_windows]  # the path's cost that this step stands for
  bound_BxN = whole_b * draw.weight[:, :bound_windows] + jnp.mean(kl)
  # With the number of unknown tokens uniform, their mean is the continuous-time bound of masked diffusion.
  among = (draw.path == windows_lib.ERASURE) | (draw.path == windows_lib.RAGGED) | (draw.path == windows_lib.STREAMS)
  share = jnp.where(among[..., None], unknown / jnp.maximum(jnp.sum(unknown, axis=-1, keepdims=True), 1), 1.0 / W)
  # Of streams the bound asks only for what the next pass makes known; half of the weight stays with all, for
  # more signal.
  front = draw.front / jnp.sum(draw.front, axis=-1, keepdims=True)
  share = jnp.where((draw.path == windows_lib.STREAMS)[..., None], 0.5 * (share + front), share)
  ce_BxN = jnp.sum(nats * share, axis=-1)[:, bound_windows:]
  window = (config.bound_weight * jnp.sum(bound_BxN) + jnp.sum(ce_BxN)) / (token.shape[0] * token.shape[1])

  nats, whole_b = jax.lax.stop_gradient((nats, whole_b))
  if bound_windows < token.shape[1]:
    metrics["window_ce"] = statistics_lib.Mean.of(
      nats[:, bound_windows:] * bound_lib.BITS_PER_NAT, unknown[:, bound_windows:]
    )
  if bound_windows:
    metrics["window_bound"] = statistics_lib.Mean.of(jax.lax.stop_gradient(bound_BxN) * bound_lib.BITS_PER_NAT)
  if learned and bound_windows:
    metrics["progression_kl"] = statistics_lib.Mean.of(
      jax.lax.stop_gradient(kl) * bound_lib.BITS_PER_NAT, use[:, :bound_windows]
    )
  for i, name in enumerate(config_lib.TRAIN_PATHS):
    metrics[f"ce_{name}"] = statistics_lib.Mean.of(nats * bound_lib.BITS_PER_NAT, unknown & (draw.path == i)[..., None])
  if alone:
    metrics["bits"] = statistics_lib.Mean.of(nats * bound_lib.BITS_PER_NAT, unknown)
  # Where neighbours are known or not at all, nothing is learned of the price of partial knowledge.
  partial = unknown & (draw.path < windows_lib.GAUSSIANS)[..., None]
  measured = statistics_lib.Measurement(
    sequence_BxT[:, 1:],
    jax.lax.stop_gradient(warp_lib.precision_at(warp, time)),
    nats,
    partial.astype(jnp.float32),
    draw.clock[:, :bound_windows],
    whole_b,
  )
  return (config.ar_weight * ar, config.window_weight * window), measured, metrics

"""One window down the flow: a state, a policy, a stepper, a scan. Pure functions over a field, which know
nothing of texts.

A pass reads the field, asks the policy where the tokens move, lets those that reach t = 0 jump (each is drawn from its
belief) and moves the others along the flow by a stepper. With z = y / sqrt(lambda) the probability flow is

    dz / d sqrt(lambda) = e_hat,

so that z only adds up expected codes, and steppers are quadratures of e_hat over sqrt(lambda).

Letters in names: B sequences, T tokens of a window, K passes, V vocabulary, M code elements.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from evo_jax.flow import latents as latents_lib
from evo_jax.flow import policies
from evo_jax.flow import warp as warp_lib

# A stepper gives the y (..., T, M) at a higher precision (..., T). It gets a key (ancestral draws), the motion, log
# beliefs (..., T, V), their expected codes (..., T, M), the table of codes and the precision.
Stepper = Callable[[jax.Array, latents_lib.SolverState, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def euler(key, motion, log_belief, code, codes_VxM, precision):
  """The probability flow by an exponential Euler step, e_hat held fixed; first order in the step of log-precision."""
  del key, log_belief, codes_VxM
  return latents_lib.euler_step(motion.y, code, motion.precision, precision)


def multistep(key, motion, log_belief, code, codes_VxM, precision):
  """The same with e_hat carried on in a straight line from the pass before (two-step Adams-Bashforth in sqrt(lambda),
  as DPM-Solver++(2M) does in its variables); second order, no more passes. A token's first step is Euler's."""
  return euler(key, motion, log_belief, code, codes_VxM, precision) + latents_lib.multistep_correction(
    motion, code, precision
  )


def ancestral(key, motion, log_belief, code, codes_VxM, precision):
  """A draw of a token from the belief, and of the evidence that it would give."""
  del code
  return latents_lib.ancestral_step(key, motion.y, log_belief, codes_VxM, precision - motion.precision)


STEPPERS: dict[str, Stepper] = {"ode": euler, "ode2": multistep, "ancestral": ancestral}


def step_latents(
  motion: latents_lib.SolverState,
  time: jax.Array,
  time_next: jax.Array,
  log_belief: jax.Array,
  codes_VxM: jax.Array,
  warp: warp_lib.Warp,
  stepper: Stepper,
  key: jax.Array,
) -> latents_lib.SolverState:
  """Tokens at times (..., T) moved to `time_next`; those that stay, jump or are known keep their y.

  key: one for all, or (B,), one for each row of the first axis, so that a row's draws do not depend on the others.
  """
  code = latents_lib.expected_code(log_belief, codes_VxM)
  moves = (time_next > 0.0) & (time_next < time)
  precision = jnp.where(moves, jnp.maximum(warp_lib.precision_at(warp, time_next), motion.precision), motion.precision)
  step = jax.vmap(stepper, in_axes=(0, 0, 0, 0, None, 0)) if key.ndim else stepper
  return motion.after(step(key, motion, log_belief, code, codes_VxM, precision), precision, code)


def sample_window(
  field: latents_lib.Field,
  codes_VxM: jax.Array,
  warp: warp_lib.Warp,
  policy: policies.Policy,
  key: jax.Array,
  shape: tuple[int, ...],
  stepper: Stepper = euler,
  prior_logits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws tokens `shape` = (..., T) int32 from a field, and the passes (...) that it took.

  A fixed grid is scanned; any other policy is followed until every token is known. prior_logits (V,): what the field
  gets as the context logits before the first pass; None: the field is asked by the latents alone.
  """
  start_key, key = jax.random.split(key)
  motion = latents_lib.SolverState.start(jax.random.normal(start_key, (*shape, codes_VxM.shape[1]), codes_VxM.dtype))
  latent = latents_lib.Latent(motion.y, jnp.ones(shape, codes_VxM.dtype), jnp.zeros(shape, jnp.int32))
  context = None if prior_logits is None else jnp.broadcast_to(prior_logits, (*shape, prior_logits.shape[-1]))
  uncertainty = warp.entropy()[0]

  def step(carry, index):
    latent, motion, context, passes = carry
    token_key, step_key = jax.random.split(jax.random.fold_in(key, index))
    found = field(latent) if context is None else field(latent, context)
    log_belief = latents_lib.log_belief(found, codes_VxM, latent.y)
    reading = policies.Observation(index, latent.time, log_belief, uncertainty, motion, codes_VxM, warp)
    time_next = jnp.broadcast_to(policy(reading), shape).astype(codes_VxM.dtype)
    drawn = jax.random.categorical(token_key, log_belief, axis=-1).astype(jnp.int32)
    token = jnp.where((time_next <= 0.0) & ~latent.known, drawn, latent.token)
    motion = step_latents(motion, latent.time, time_next, log_belief, codes_VxM, warp, stepper, step_key)
    passes += jnp.any(~latent.known, axis=-1)
    return latents_lib.Latent(motion.y, time_next, token), motion, None if context is None else found, passes

  carry = (latent, motion, context, jnp.zeros(shape[:-1], jnp.int32))
  latent, _, _, passes = policies.run_policy(policy, step, carry, lambda carry: jnp.any(~carry[0].known))
  return latent.token, passes

"""The network: the clean stream is an autoregressive Transformer, whatever the windows do (method fact 2)."""

import dataclasses
import functools
import importlib.util
import pathlib

from conftest import ROOT, small_config
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evo_jax import config as config_lib
from evo_jax.batch import Batch
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import latents as latents_lib
from evo_jax.flow import objective
from evo_jax.flow import windows as windows_lib
from evo_jax.flow.interface import WindowInputs
from evo_jax.network import attention, transformer
from evo_jax.network import evo as evo_lib
from evo_jax.network.attention import Visibility
from evo_jax.parallel.sharding import Layout
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

V = 20


@functools.cache
def build(vocab_size=V, **changes):
  """A small network with random parameters (also those that start at zero), its statistics, and its config."""
  config = small_config(**changes)
  model = evo_lib.Evo(config.model, vocab_size)

  @jax.jit
  def init():
    state = nn.unbox(state_lib.init_state(model, config))
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, leaves), state.statistics

  params, statistics = init()
  return model.bind({"params": params}), statistics, config


def batch(tokens):
  """A batch in which token 0 begins documents."""
  return Batch(tokens, segments=jnp.cumsum(tokens == 0, axis=1))


def _terms(config, params, statistics, tokens, draw):
  """The AR term and the window term of the objective."""
  net, whole = evo_lib.Evo(config.model, V).bind({"params": params}), batch(tokens)
  return objective.training_loss(net, statistics, whole, draw, objective.Counts.of(whole, draw), config.loss)[0]


@functools.partial(jax.jit, static_argnums=0)
def _gradients(config, params, statistics, tokens, draw):
  """The two terms, and the gradient of each."""
  terms, vjp = jax.vjp(lambda params: _terms(config, params, statistics, tokens, draw), params)
  one, zero = jnp.ones(()), jnp.zeros(())
  return terms, *vjp((one, zero)), *vjp((zero, one))


@functools.partial(jax.jit, static_argnums=0)
def _sum_and_gradient(config, params, statistics, tokens, draw):
  return jax.value_and_grad(lambda params: sum(_terms(config, params, statistics, tokens, draw)))(params)


@functools.partial(jax.jit, static_argnums=0)
def _windows(model, params, statistics, tokens, time, seed):
  net = model.bind({"params": params})
  anchor = jnp.array([[0, 11], [5, 20]])
  slots = windows_lib.gather_windows(tokens, anchor, 8)
  noise = jax.random.normal(jax.random.key(seed), (2, 2, 8, net.config.code_dim))
  latent = windows_lib.observe_at(
    net.codes(), statistics.warp, slots[..., 1:], jnp.broadcast_to(time, (2, 2, 8)), noise
  )
  cache = net.clean(tokens[:, :-1], batch(tokens).segments[:, :-1])[1]
  return bound_lib.window_logits(net, cache, anchor, slots[..., 0], latent, net.codes(), statistics.log_unigram_V)


def windows(net, statistics, tokens, time, seed=2):
  """Context logits of two windows of eight tokens, from 0 and 11 and from 5 and 20, at progression `time`."""
  return _windows(net.clone(), net.variables["params"], statistics, tokens, time, seed)


@pytest.fixture(scope="module")
def small():
  return build()


@pytest.fixture
def tokens():
  sequence = jax.random.randint(jax.random.key(1), (2, 33), 1, V)
  return sequence.at[:, 0].set(0).at[1, 13].set(0)


def test_clean_stream_is_causal(small, tokens):
  net, _, _ = small
  before = net(tokens[:, :-1])
  after = net(tokens[:, :-1].at[:, 20].set(3))
  np.testing.assert_array_equal(before[:, :20], after[:, :20])
  assert not np.allclose(before[:, 20:], after[:, 20:])


def test_windows_do_not_touch_the_clean_stream(small, tokens):
  """The AR term is the same with and without windows, and gives their parameters no gradient."""
  net, statistics, config = small
  draw = windows_lib.draw_windows(jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, 1)
  params = net.variables["params"]
  (ar, window), ar_gradient, window_gradient = _gradients(config, params, statistics, tokens, draw)
  alone, none = jax.jit(_terms, static_argnums=0)(config, params, statistics, tokens, None)
  np.testing.assert_allclose(ar, alone, rtol=1e-6)
  assert window > 0 and none == 0
  for name in ("codes", "time_in", "time_out"):
    assert (np.asarray(ar_gradient[name]) == 0).all(), name
  assert (np.asarray(ar_gradient["blocks"]["w_time"]) == 0).all()
  for name, leaf in window_gradient.items():  # the window term trains everything
    assert all(np.asarray(x).any() for x in jax.tree.leaves(leaf)), name


@pytest.mark.parametrize("codes, bound_windows, trained", [("bound", 0, False), ("all", 0, True), ("frozen", 1, False)])
def test_which_windows_train_the_codes(small, tokens, codes, bound_windows, trained):
  """By default only windows trained by the bound do (see above); cross-entropy does where it is asked to."""
  net, statistics, _ = small
  config = small_config(loss__codes=codes, loss__bound_windows=bound_windows)
  draw = windows_lib.draw_windows(
    jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, bound_windows
  )
  params = net.variables["params"]
  loss = lambda codes: _terms(config, params | {"codes": codes}, statistics, tokens, draw)[1]
  assert bool(np.asarray(jax.jit(jax.grad(loss))(params["codes"])).any()) == trained


def test_decoding_continues_the_clean_stream(small, tokens):
  """A few tokens at a time after the past, by rows at different positions: the same states, keys and values."""
  net, _, config = small
  hidden, cache = net.clean(tokens[:, :-1])
  apart = net.clone(stacked=False).bind({"params": evo_lib.unstack_layers(net.variables["params"])})
  first = jnp.array([5, 20])
  empty = lambda x: jnp.where(
    jnp.arange(32)[:, None] < first[:, None, None, None], x, 9.0
  )  # and nothing behind is read
  past = tuple(tuple(map(empty, x)) for x in (cache.k, cache.v))
  position = first[:, None] + jnp.arange(9)
  x = net.embed_tokens(jnp.take_along_axis(tokens, position, axis=1))
  decoded, (k, v) = apart.decode(past, first, 9, x, None, position, position + 1, None)
  for b, a in enumerate(first.tolist()):
    np.testing.assert_allclose(decoded[b], hidden[b, a : a + 9], atol=2e-5)
    for layer in range(config.model.layers):
      np.testing.assert_allclose(k[layer][b, :, : a + 9], cache.k[layer, b, :, : a + 9], atol=2e-5)
      np.testing.assert_allclose(v[layer][b, :, : a + 9], cache.v[layer, b, :, : a + 9], atol=2e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    pytest.param({"model__isolate_documents": True}, marks=pytest.mark.slow),
    pytest.param({"model__remat": "full", "model__attention_block": 8}, marks=pytest.mark.slow),
    pytest.param({"model__remat": "save:qkv", "model__qk_norm": True, "model__qkv_bias": True}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_one_pass_reads_both_streams(tokens, changes):
  """`forward` in one pass gives what `clean` and then `window` give, and their gradients."""
  net, _, config = build(**changes)
  tokens = tokens.at[:, 7].set(0)
  anchor = jnp.array([[0, 7], [5, 20]])
  time = jax.random.uniform(jax.random.key(1), (2, 2, 9)).at[..., 0].set(0.0)
  x_windows = jax.random.normal(jax.random.key(2), (2, 2, 9, config.model.width))

  @functools.partial(jax.jit, static_argnums=0)
  def read(together, params, x_windows):
    def loss(params, x_windows):
      net_ = net.clone().bind({"params": params})
      inputs = WindowInputs(anchor, x_windows, time)
      segments = batch(tokens).segments[:, :-1]
      hidden = net_.forward(net_.embed_tokens(tokens[:, :-1]), segments, inputs, one_pass=together)
      return sum(jnp.mean(jnp.sin(h)) for h in hidden), hidden

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_windows)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
    read(True, net.variables["params"], x_windows),
    read(False, net.variables["params"], x_windows),
  )


@pytest.mark.slow
def test_one_pass_is_a_configuration_and_changes_no_value(small, tokens):
  net, statistics, config = small
  draw = windows_lib.draw_windows(
    jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, config.loss.bound_windows
  )
  one, two = (
    _sum_and_gradient(
      dataclasses.replace(config, loss=dataclasses.replace(config.loss, one_pass=together)),
      net.variables["params"],
      statistics,
      tokens,
      draw,
    )
    for together in (True, False)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one, two)


def test_time_conditioning_vanishes_at_zero_and_only_there(small, tokens):
  net, _, _ = small
  assert (np.asarray(net.time_conditioning(jnp.zeros(3))) == 0).all()
  assert (np.abs(np.asarray(net.time_conditioning(jnp.array([0.1, 0.5, 1.0])))).sum(-1) > 0).all()


def test_soft_input_at_the_ends(small):
  """At t = 0 exactly the token's embedding; at t = 1 one vector, whatever the token."""
  net, statistics, config = small
  latent = latents_lib.Latent(
    jnp.zeros((4, config.model.code_dim)), jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.array([3, 5, 3, 5])
  )
  (x,) = net.embed((latent,), (net.codes(),), statistics.log_unigram_V)
  np.testing.assert_array_equal(x[:2], net.embed_tokens(latent.token[:2]))
  np.testing.assert_array_equal(x[2], x[3])


def test_windows_see_the_past_and_each_other_and_nothing_else(small, tokens):
  net, statistics, _ = small
  c = windows(net, statistics, tokens, 0.5)
  later = windows(net, statistics, tokens.at[:, 30].set(2), 0.5)  # after the windows
  np.testing.assert_allclose(c, later, atol=1e-5)
  past = windows(net, statistics, tokens.at[0, 4].set(2), 0.5)  # before the window at 11; in the one at 0
  assert not np.allclose(c[0, 1], past[0, 1], atol=1e-4)
  np.testing.assert_allclose(c[1], past[1], atol=1e-5)
  last = windows(net, statistics, tokens.at[0, 8].set(2), 0.0)  # the first window's last token tells of the first
  assert not np.allclose(windows(net, statistics, tokens, 0.0)[0, 0, 0], last[0, 0, 0], atol=1e-4)


def test_at_time_one_the_truth_is_not_seen(small, tokens):
  """Without evidence a window's logits do not depend on its tokens: nothing leaks."""
  net, statistics, _ = small
  c = windows(net, statistics, tokens, 1.0)
  other = windows(net, statistics, tokens.at[0, 12:20].set(7), 1.0, seed=5)
  np.testing.assert_allclose(c[0, 1], other[0, 1], atol=1e-5)


def test_documents_can_be_isolated(tokens):
  net, statistics, _ = build(model__isolate_documents=True)
  changed = tokens.at[1, 5].set(2)  # before the document that begins at 13
  hidden = lambda tokens: net.clean(tokens[:, :-1], batch(tokens).segments[:, :-1])[0]
  np.testing.assert_array_equal(hidden(tokens)[1, 13:], hidden(changed)[1, 13:])
  before, after = windows(net, statistics, tokens, 0.5), windows(net, statistics, changed, 0.5)
  np.testing.assert_allclose(before[1, 1], after[1, 1], atol=1e-6)  # the window at 20
  shared = build()[0]
  assert not np.allclose(
    windows(shared, statistics, changed, 0.5)[1, 1], windows(shared, statistics, tokens, 0.5)[1, 1], atol=1e-4
  )


def test_rows_beyond_the_vocabulary_are_ruled_out(small, tokens):
  net, statistics, _ = small
  assert net.rows == 24
  assert (np.asarray(net(tokens[:, :-1]))[..., V:] < -1e8).all()
  assert np.asarray(statistics.unigram_V)[V:].sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"model__remat": "full"}, {"model__remat": "dots"}, {"model__unroll": 2}])
def test_remat_and_unrolling_change_nothing(small, tokens, changes):
  net, statistics, config = small
  draw = windows_lib.draw_windows(jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, 1)

  gradient = lambda config: _sum_and_gradient(config, net.variables["params"], statistics, tokens, draw)
  want, got = gradient(config), gradient(small_config(**changes))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), want, got)


def test_bfloat16_computes_near_float32(small, tokens):
  net, statistics, _ = small
  half = evo_lib.Evo(dataclasses.replace(net.config, dtype="bfloat16"), V).bind(net.variables)
  want, got = windows(net, statistics, tokens, 0.5), windows(half, statistics, tokens, 0.5)
  assert half.clean(tokens[:, :-1])[0].dtype == jnp.bfloat16 and got.dtype == jnp.float32
  assert 0 < np.abs(want - got)[..., :V].mean() < 0.05 * np.abs(want[..., :V]).mean() + 0.05


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_products_in_bfloat16_and_their_gradients_are_those_of_the_rounded_factors(rows):
  x, w = (
    jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0)), [(rows, 12), (12, 6)])
  )
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  product = lambda x, w: transformer.linear(x, w.reshape(3, 4, 6), Layout(), inputs=2)
  got, pull_back = jax.vjp(product, x.reshape(rows, 3, 4), w)
  want, want_pull_back = jax.vjp(jnp.matmul, x.astype(jnp.float32), w.astype(jnp.float32))
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
  for d, want_d in zip(pull_back(got), want_pull_back(got.astype(jnp.float32))):
    assert d.dtype == jnp.bfloat16
    np.testing.assert_allclose(d.reshape(want_d.shape).astype(jnp.float32), want_d, rtol=2**-8)


def test_grouped_queries_share_keys():
  """With one key head copied to both query groups, grouped attention equals full attention."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (2, 2, 1, 2, 5, 8))  # B K N G S E
  k, v = (jax.random.normal(key, (2, 2, 1, 5, 8)) for key in keys[1:])
  stop = jnp.arange(5)[None, None] + 1
  grouped = attention.attend_plain(q, (k[:, :, 0], v[:, :, 0]), Visibility(stop))
  full = attention.attend_plain(
    q.reshape(2, 4, 1, 1, 5, 8), tuple(jnp.repeat(x[:, :, 0], 2, 1) for x in (k, v)), Visibility(stop)
  )
  np.testing.assert_allclose(grouped.reshape(full.shape), full, atol=1e-6)
  own = attention.attend_plain(q, None, Visibility(None, None, jnp.tri(5, dtype=bool)), (k, v))
  np.testing.assert_allclose(grouped, own, atol=1e-6)
  heads_last = lambda x: x.reshape(2, -1, 5, 8).transpose(0, 2, 1, 3)
  want = jax.nn.dot_product_attention(heads_last(q), heads_last(k), heads_last(v), is_causal=True)
  np.testing.assert_allclose(heads_last(grouped), want, atol=1e-5)


# Llama-3-8B has 8,030,261,248 parameters; beside them stand the codes and the time conditioning.
COUNTS = {
  "tiny": 978_816,
  "evo150m": 156_612_352,
  "evo1b": 1_258_232_832,
  "evo8b": 8_030_261_248 + 768 * 2 * 4096 + 129_024 * 128 + 32 * (64 * 6 * 4096) + 16 * 64 + 64 * 64,
  "smollm2_chat": 134_515_008 + 10_245_776,
  "smollm2_windows": 134_515_008 + 10_245_776,
  "llama3_8b": 8_030_261_248 + 128_256 * 32 + 32 * (16 * 6 * 4096) + 16 * 16 + 16 * 16,
}


@pytest.mark.parametrize("name", sorted(p.stem for p in (pathlib.Path(ROOT) / "configs").glob("*.py")))
def test_every_config_has_its_size(name):
  """Each configuration is valid, and its training step has a shape."""
  spec = importlib.util.spec_from_file_location(name, pathlib.Path(ROOT) / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = config_lib.from_dict(module.get_config())
  vocab_size = config.model.vocab_size or 257
  assert evo_lib.count_parameters(config.model, vocab_size) == COUNTS[name]
  model = evo_lib.Evo(config.model, vocab_size)
  state = jax.eval_shape(lambda: nn.unbox(state_lib.init_state(model, config)))
  batch = jax.ShapeDtypeStruct((config.data.batch_size, config.model.context + 1), jnp.int32)
  after, metrics = jax.eval_shape(
    lambda s, b: step_lib.train_step(s, Batch(b), model=model, config=config), state, batch
  )
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
  assert metrics["bits"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, block",
  [({}, 12), ({}, 20), ({"model__isolate_documents": True}, 8), ({"window__size": 32, "window__count": 2}, 20)],
  ids=str,
)
def test_attention_in_blocks_changes_no_value(tokens, changes, block):
  """Forward and backward, of the clean stream and of windows: what one product over all scores gives."""
  net, statistics, config = build(model__remat="full", loss__bound_windows=1, **changes)
  draw = windows_lib.draw_windows(jax.random.key(0), 2, 32, config.model.code_dim, config.window, config.paths, 1)
  params = net.variables["params"]
  blocked = small_config(model__remat="full", model__attention_block=block, loss__bound_windows=1, **changes)
  whole, whole_gradient = _sum_and_gradient(config, params, statistics, tokens, draw)
  value, gradient = _sum_and_gradient(blocked, params, statistics, tokens, draw)
  np.testing.assert_allclose(value, whole, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, whole_gradient)


@pytest.mark.slow
def test_attention_in_blocks_saves_memory():
  """In a stream so long that scores outweigh the rest."""
  net, _, config = build(model__remat="full", loss__bound_windows=1)
  memory = {}
  for block in (0, 32):
    model = evo_lib.Evo(dataclasses.replace(config.model, attention_block=block, context=1024), V)
    loss = jax.jit(jax.grad(lambda p, t: jnp.sum(model.apply({"params": p}, t) ** 2)))
    memory[block] = (
      loss.lower(net.variables["params"], jnp.ones((2, 1024), jnp.int32)).compile().memory_analysis().temp_size_in_bytes
    )
  assert memory[32] < 0.5 * memory[0], memory


@pytest.mark.parametrize("kernel", ["splash", "xla"])
def test_attention_is_saved_once_for_the_backward_pass(kernel):
  """With remat "save:attention" one array of the attention's size leaves the layers' loop, beside the keys and
  values."""
  config = small_config(model__attention=kernel, model__context=128, model__remat="save:attention", model__layers=1)
  net = evo_lib.Evo(config.model, V)
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  tokens = jnp.zeros((2, 128), jnp.int32)
  program = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(net.apply(params, tokens))))(nn.unbox(params))
  forward = next(eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan")
  of_heads = [v.aval.shape for v in forward.outvars if v.aval.ndim > 4 and v.aval.size == 2 * 128 * config.model.width]
  assert len(of_heads) == 1, of_heads

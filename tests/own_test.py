"""Paths, policies and prices of one's own: pure functions, from Python and from files; runs compared in pairs."""

import csv
from functools import partial
import json
import shutil

from conftest import assert_refused, call, small_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy import LENGTH, STRINGS, Toy

from evo_jax import config as config_lib
from evo_jax import functions
from evo_jax.batch import Batch
from evo_jax.data import tokenizers
from evo_jax.decoding import settings
from evo_jax.errors import UserError
from evo_jax.flow import bound as bound_lib
from evo_jax.flow import latents, policies, schedules, steppers
from evo_jax.flow import windows as windows_lib
from evo_jax.flow.warp import Warp
from evo_jax.parallel import sharding
from evo_jax.training import state as state_lib
from evo_jax.training import step as step_lib

FILE = """
import jax.numpy as jnp
from evo_jax.flow import latents

def wave(s, tokens):  # the path rolling, whose width is 0.5
  start = 0.5 * jnp.arange(tokens) / max(tokens - 1, 1)
  return jnp.clip(1.0 - (s - start) / 0.5, 0.0, 1.0)

def rises(s, tokens):
  return jnp.where((s > 0.4) & (s < 0.6), 1.0, 1.0 - s)

def ends_early(s, tokens):
  return 1.0 - s / 2

def below_one(s, tokens):
  return 1.0 - 2.0 * s

def eager(observation, bits):  # the policy entropy:h
  low = observation.entropy < bits * jnp.log(2.0)
  return jnp.where(observation.leftmost | (observation.unknown & low), 0.0, observation.time)

def waits(observation):
  return observation.time

def back(observation):
  return observation.time + 1.0

def nothing(observation):
  return jnp.nan * observation.time

def short(observation):
  return jnp.zeros(3)

def breaks(observation):
  return observation.no_such_field

def nll(step, log_before, log_after, expected_code):
  return jnp.where(step.after.known, -log_before, log_after - log_before)

def rate(step, log_before, log_after, expected_code):
  each = step.d * latents.small_step_rate(step.codes_VxM, expected_code, step.after.token)
  return jnp.where(step.after.known, -log_before, each)

number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  file = tmp_path_factory.mktemp("own") / "mine.py"
  file.write_text(FILE)
  return str(file)


@pytest.fixture(scope="module")
def toy():
  return Toy()


@partial(jax.jit, static_argnames=("toy", "price"))
def _nll(policy, token, toy, price):
  return bound_lib.path_nll(toy.field, toy.codes, toy.warp, token, policy, jax.random.key(1), price=price)


def nll_of(toy, path, price=None, token=STRINGS):
  """NLL bounds (n, LENGTH) in nats on a path, and passes (n,)."""
  policy = policies.make_policy(path, LENGTH, 0.5, most=40)  # one program for all grids
  return jax.tree.map(np.asarray, _nll(policy, jnp.asarray(token), toy, price))


def test_functions_are_what_the_names_are(toy, file):
  """A path and a policy of one's own, written as two that have names, cost the same to the bit, in as many passes."""
  for own, name in ((":wave:5", "rolling:5"), (":eager:1.35", "entropy:1.35")):
    jax.tree.map(np.testing.assert_array_equal, nll_of(toy, functions.read_path(file + own)), nll_of(toy, name))


def test_a_policy_of_ones_own_samples_with_the_probability_of_its_nll(toy):
  """As built-in ones do: the same function prices text and draws it."""

  def outer(observation):  # the first and the last unknown token jump together
    last = observation.unknown & (jnp.cumsum(observation.unknown[..., ::-1], axis=-1)[..., ::-1] == 1)
    return jnp.where(observation.leftmost | last, 0.0, observation.time)

  path = schedules.OwnPath(outer)
  nll, passes = nll_of(toy, path)
  q = np.exp(-nll.sum(-1, dtype=np.float64))
  assert abs(q.sum() - 1) < 1e-4 and (passes == 2).all()
  sample = lambda policy, key: steppers.sample_window(toy.field, toy.codes, toy.warp, policy, key, (8000, LENGTH))
  drawn, _ = jax.jit(sample)(policies.make_policy(path, LENGTH, 0.5), jax.random.key(2))
  counts = np.bincount(np.asarray(drawn) @ (3 ** np.arange(LENGTH)[::-1]), minlength=81)
  assert stats.chisquare(counts, 8000 * q / q.sum()).pvalue > 1e-3


@pytest.mark.parametrize("name", ["back", "nothing"])
def test_a_policy_that_moves_nothing_ends_all_the_same(toy, file, name):
  """The leftmost token jumps: the staircase, in LENGTH passes."""
  nll, passes = nll_of(toy, functions.read_path(f"{file}:{name}"))
  np.testing.assert_allclose(nll.sum(-1), -np.log(toy.probability), atol=1e-4)
  assert (passes == LENGTH).all()


def test_the_prices_of_a_step(file):
  """The two that a configuration may name, as functions, to the bit; tokens that wait or are known cost nothing."""
  draw = lambda i, *shape: jax.random.uniform(jax.random.key(i), (5, 6, *shape))
  time = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.8, 0.5, 0.5, 0.0]), (5, 6))
  time_next = jnp.broadcast_to(jnp.array([0.6, 0.0, 0.3, 0.5, 0.0, 0.0]), (5, 6))
  token = jnp.broadcast_to(jnp.arange(6), (5, 6))
  warp = Warp.start(jnp.linspace(5.0, 0.0, 16), 100.0)
  latent = latents.Latent(draw(0, 4), time, token)
  step = bound_lib.Step.of(latents.unit(draw(1, 4)[0]), warp, latent, token, time_next, draw(2, 4))
  after = (jnp.where(time_next < time, -draw(i), -draw(3)) for i in (4, 5))
  log_probs, code = (-draw(3), *after), draw(6, 4)
  nll, rate = (functions.read_price(f"{file}:{name}") for name in ("nll", "rate"))
  np.testing.assert_array_equal(step.nll(log_probs, code, nll), step.nll(log_probs))
  np.testing.assert_allclose(step.nll(log_probs, code, rate), step.nll(log_probs[:1], code), rtol=1e-6)
  ones = step.nll(log_probs, code, lambda step, before, after, code: jnp.ones_like(before))
  np.testing.assert_array_equal(ones, np.tile([1.0, 1.0, 1.0, 0.0, 1.0, 0.0], (5, 1)))


def test_a_path_by_the_price_of_small_steps(toy, file):
  """It comes near the bound as steps become small."""
  rate, excess = functions.read_price(f"{file}:rate"), {}
  for steps in (2, 40):
    ours, plain = (nll_of(toy, f"diagonal:{steps}", price)[0].sum(-1) for price in (rate, None))
    excess[steps] = ours.mean() - plain.mean()
  assert excess[2] > 1.0 and abs(excess[40]) < 0.1 * excess[2]


def test_a_step_is_made_with_functions_of_ones_own():
  """All windows jump at once, in one pass, at a price of two nats a token."""
  config = small_config(model__layers=1, model__width=16, model__heads=1, window__count=1, loss__bound_windows=1)
  mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  model = state_lib.make_model(config, tokenizers.Bytes(), mesh)
  jump = lambda draw: draw.replace(
    time=jnp.ones_like(draw.time), time_next=jnp.zeros_like(draw.time), steps=jnp.ones_like(draw.steps)
  )
  two = lambda step, before, after, code: 2.0 + 0.0 * code.sum(-1)
  own = step_lib.OwnFunctions(jump, two)
  with jax.set_mesh(mesh):
    state = state_lib.sharded_init(model, config, mesh)
    batch = Batch(np.random.default_rng(0).integers(1, 257, (8, 33)).astype(np.int32))
    _, metrics = step_lib.make_step(model, config, mesh, "cpu", own)(state, batch)
  assert float(metrics["window_bound"]) == pytest.approx(2.0 / np.log(2.0), rel=1e-5)


def test_windows_follow_a_path(file):
  """Those of the path that it stands in for, and no others."""
  config = small_config(window__count=8, paths__independent=0.5, paths__streams=0.5)
  draw = windows_lib.draw_windows(jax.random.key(0), 8, 32, 4, config.window, config.paths, 2)
  wave = functions.read_path(f"{file}:wave:1").function
  followed = windows_lib.follow(draw, wave, "independent")
  own = np.asarray(draw.path == config_lib.GAUSSIAN_PATHS.index("independent"))
  assert own.any() and not own.all()
  for clock, before, after in ((draw.clock, draw.time, followed.time), (draw.clock_next, draw.time_next, None)):
    after = followed.time_next if after is None else after
    np.testing.assert_array_equal(np.asarray(after)[~own], np.asarray(before)[~own])
    want = schedules.linear_clock("rolling", 8, 0.5)(np.asarray(clock)[own][:, None])
    np.testing.assert_allclose(np.asarray(after)[own], want, atol=2e-5)
  assert (followed.time_next <= followed.time).all() and (followed.time_next[draw.clock_next >= 1] == 0).all()


@pytest.mark.parametrize(
  "name, message",
  [
    ("FILE:wave", "needs a number of passes from 1 to 65536"),
    ("FILE:wave:2.5", "needs a number of passes"),
    ("FILE:wave:many", "'many' is not a number"),
    ("FILE:wave:4:4", "is not FILE.py:NAME or FILE.py:NAME:NUMBER"),
    ("FILE:", "is not FILE.py:NAME"),
    ("FILE:eager", "is called with (observation); a number goes behind the name"),
    ("FILE:waits:3", "is called with (observation, number)"),
    ("FILE:eager:inf", "its number is not finite"),
    ("FILE:nll", "takes (step, log_before, log_after, expected_code); a path takes (s, tokens), a policy"),
    ("FILE:wavy:4", "has no function wavy; it has wave, rises, "),
    ("FILE:number", "has no function number"),
    ("/no/such.py:wave:4", "/no/such.py cannot be read: No such file"),
    ("FILE:rises:4", "rises between s = 0.25 and 0.5"),
    ("FILE:ends_early:4", "must be 1 at s = 0 and 0 at s = 1"),
    ("FILE:below_one:4", "gives times that are not in [0, 1]"),
    ("FILE:short", "fails: ValueError"),
    ("FILE:breaks", "fails: AttributeError: 'Observation' object has no attribute 'no_such_field'"),
  ],
)
def test_a_function_of_no_use_is_named(file, name, message):
  config = small_config()
  with pytest.raises(UserError) as refused:
    path = functions.read_path(name.replace("FILE", file))
    policies.check_policy(path, 8, 257, config)
    policies.make_policy(path, 8, 0.5)
  assert message in str(refused.value) and str(refused.value).startswith(f"path {name.replace('FILE', file)!r}: ")
  assert "\n" not in str(refused.value)


def test_files_are_read_when_they_change(tmp_path):
  file = tmp_path / "mine.py"
  for body, message in (
    ("x = y", "NameError: name 'y'"),
    ("def f(:", "cannot be loaded: SyntaxError"),
    ("", "no func"),
  ):
    file.write_text(body)
    with pytest.raises(UserError, match=message):
      functions.read_path(f"{file}:f")
  file.write_text("def f(observation): return 0.0")
  path = functions.read_path(f"{file}:f")
  assert functions.read_path(f"{file}:f") == path  # one function, by which compiled programs are found
  before = functions.digest(f"{file}:f")
  file.write_text("def f(observation): return 0.0 * observation.time")
  assert functions.read_path(f"{file}:f") != path and functions.digest(f"{file}:f") != before


def test_generate_writes_along_a_policy_in_a_file(trained, file):
  """All tokens of a window of 8 jump at once, and again where the text goes on."""
  flags = (f"--workdir={trained}", "--prompt=the ri", "--mode=flow", "--max_tokens=14", "--json", "--endless")
  done = call("evo_jax.generate", *flags, f"--path={file}:eager:64")
  assert done.returncode == 0, done.stderr
  (text,) = json.loads(done.stdout)
  assert text["settled"] == [1] * 8 + [2] * 6 and text["passes"] == 2
  assert_refused(call("evo_jax.generate", *flags, f"--path={file}:short"), "mine.py:short': fails: ValueError")


def test_a_path_takes_its_passes_from_steps(file):
  check = lambda **fields: settings.check_sampling(settings.Sampling(mode="flow", **fields), small_config())
  assert str(check(path=f"{file}:wave", steps=3)) == f"{file}:wave:3" and check(path=f"{file}:wave:5").number == 5
  assert check(path=schedules.OwnPath(lambda s, tokens: 1.0 - s, 4)).fixed
  with pytest.raises(UserError, match="--grid=precision: does not go with --path="):
    check(path=f"{file}:wave:4", grid="precision")
  with pytest.raises(UserError, match="is not one of spread, entropy, confidence, maturity"):
    settings.check_sampling(settings.Sampling(mode="adaptive", path=f"{file}:eager:1"), small_config())


@pytest.fixture(scope="module")
def earlier(trained, tmp_path_factory):
  """The run `trained` as it was before its last checkpoint."""
  folder = tmp_path_factory.mktemp("earlier") / "run"
  shutil.copytree(trained, folder)
  steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
  shutil.rmtree(folder / "checkpoints" / str(steps[-1]))
  return folder


def test_runs_are_compared_in_pairs(trained, earlier, file, tmp_path):
  """Path by path on the same sequences, with a standard error below those of the tables; JSON and CSV say the same."""
  out = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv")]
  paths = f"--paths=ar,rolling:4,{file}:wave:4"
  done = call("evo_jax.evaluate", f"--workdir={trained}", f"--workdir={earlier}", paths, *out)
  assert done.returncode == 0 and f"{earlier} minus {trained}: bits per byte" in done.stdout, done.stderr
  found = json.loads((tmp_path / "json").read_text())
  assert list(found["runs"]) == [str(trained), str(earlier)]
  late, early = ({e["path"]: e for e in table} for table in found["runs"].values())
  assert [d["path"] for d in found["differences"]] == ["ar", "rolling:4", f"{file}:wave:4"] == list(late)
  for d in found["differences"]:
    assert (d["run"], d["minus"]) == (str(earlier), str(trained))
    assert d["difference"] == pytest.approx(early[d["path"]]["bits"] - late[d["path"]]["bits"], abs=1e-9)
    assert d["difference"] != 0 and 0 < d["stderr"] < 0.5 * late[d["path"]]["stderr"]
  assert late["rolling:4"]["bits"] == late[f"{file}:wave:4"]["bits"]
  rows = list(csv.DictReader((tmp_path / "csv").open()))
  assert [row["minus"] for row in rows] == 6 * [""] + 3 * [str(trained)]
  numbers = [e["bits"] for t in (late, early) for e in t.values()] + [d["difference"] for d in found["differences"]]
  assert [float(row["bits"]) for row in rows] == numbers


@pytest.mark.parametrize(
  "change, message",
  [
    ({"data.tokenizer": "chars27"}, "its tokenizer, chars27, is not that of"),
    ({"model.context": 64}, "its context of 64 tokens is not the 32 of"),
    ({"data.valid_share": 0.3}, "its held-out text is not that of"),
  ],
)
def test_runs_that_cannot_be_compared_are_refused(trained, tmp_path, change, message):
  """By the other's name, before any model is read."""
  other = tmp_path / "other"
  other.mkdir()
  values = json.loads((trained / "config.json").read_text())
  for name, value in change.items():
    section, field = name.split(".")
    values["config"][section][field] = value
  (other / "config.json").write_text(json.dumps(values))
  done = call("evo_jax.evaluate", f"--workdir={trained}", f"--workdir={other}", "--paths=ar")
  assert_refused(done, f"--workdir={other}: {message}")


def test_a_model_of_diffusion_alone_reads_whole_sequences(trained, tmp_path):
  values = json.loads((trained / "config.json").read_text())
  values["config"]["loss"]["ar_weight"], values["config"]["window"]["size"] = 0.0, values["config"]["model"]["context"]
  (tmp_path / "config.json").write_text(json.dumps(values))
  done = call("evo_jax.evaluate", f"--workdir={tmp_path}", f"--workdir={trained}", "--window=8", "--paths=random:4")
  assert_refused(
    done, "--window=8: is not the sequence, 32 tokens, and a model of diffusion alone reads nothing before"
  )


def test_runs_of_one_text_are_compared_whether_or_not_they_isolate_documents(trained, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(trained, other)
  values = json.loads((other / "config.json").read_text())
  values["config"]["model"]["isolate_documents"] = True
  (other / "config.json").write_text(json.dumps(values))
  flags = (f"--workdir={trained}", f"--workdir={other}", "--paths=ar", "--sequences=8", f"--json={tmp_path / 'json'}")
  done = call("evo_jax.evaluate", *flags)
  assert done.returncode == 0, done.stderr
  assert [d["path"] for d in json.loads((tmp_path / "json").read_text())["differences"]] == ["ar"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--workdir=a", "--workdir=a"), "--workdir=a: is given twice"),
    (("--workdir=a", "--show_progression", "--passes=0"), "--passes=0: is not positive"),
    (("--workdir=a", "--workdir=b", "--show_progression"), "--workdir: does not go with --show_progression"),
    (("--workdir=a", "--csv=/no/such/file"), "--csv=/no/such/file: there is no folder"),
    (("--workdir=/no/such", "--price=FILE:wave"), "a price takes (step, log_before, log_after, expected_code)"),
    (("--workdir=/no/such", "--price=rate"), "--price=rate: is not FILE.py:NAME"),
    (("--workdir=/no/such", "--paths=ar,FILE:wavy:2"), "mine.py has no function wavy"),
  ],
)
def test_bad_flags_are_one_line(file, flags, message):
  assert_refused(call("evo_jax.evaluate", *(flag.replace("FILE", file) for flag in flags)), message)

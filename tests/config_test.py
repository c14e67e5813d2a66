"""The configuration: checks that name a field, differences, and the shipped files."""

import dataclasses
import math
import re

import pytest

from evo_jax import config as config_lib
from evo_jax.errors import UserError


@pytest.mark.parametrize(
  "values, message",
  [
    ({"model": {"widht": 3}}, "config.model.widht: no such field"),
    ({"model": {"width": 3.5}}, "config.model.width: 3.5 is not of type int"),
    ({"model": {"width": True}}, "config.model.width: True is not of type int"),
    ({"modl": {}}, "config.modl: no such field"),
    ({"model": 3}, "config.model: is a section"),
    ({"eval": {"paths": "ar"}}, "config.eval.paths: 'ar' is not a tuple"),
    ({"train": {"steps": -1}}, "config.train.steps: -1 is not positive"),
    ({"model": {"progression": "learned"}}, "config.paths.learned: 0.0 does not go with model.progression = learned"),
    ({"paths": {"erasure_range": (0.9, 0.1)}}, "config.paths.erasure_range: (0.9, 0.1) is not LOW, HIGH"),
    (
      {"paths": {"diagonal": 0, "rolling": 0, "independent": 0, "erasure": 1}},
      "config.loss.bound_windows: 1 needs one of",
    ),
    ({"window": {"start": 0.5}}, "config.window.start: 0.5 is not of type int"),
    (
      {"window": {"start": 3}, "loss": {"ar_weight": 0}},
      "config.loss.ar_weight: 0.0 trains nothing before window.start",
    ),
    ({"loss": {"bound_windows": 9}}, "config.loss.bound_windows: 9 is not in"),
    ({"data": {"weights": (0.0,)}}, "config.data.weights: (0.0,) must be positive, or some of them 0"),
    ({"train": {"log_to": "file"}}, "config.train.log_to: 'file' is not of tensorboard, wandb"),
    ({"data": {"weights": (1.0, -1.0), "path": "a,b"}}, "config.data.weights: (1.0, -1.0) must be positive"),
    ({"optim": {"schedule": "step"}}, "config.optim.schedule: 'step' is not one of"),
    ({"optim": {"clip": -1.0}}, "config.optim.clip: -1.0 is negative"),
    ({"model": {"width": 130}}, "config.model.width: 130 does not divide into 4 heads"),
    ({"model": {"attention": "cudnn"}}, "config.model.attention: 'cudnn' needs model.dtype = bfloat16"),
    ({"model": {"remat": "save:qkv,x"}}, "config.model.remat: 'save:qkv,x' is not one of none, full, dots, or save:"),
    ({"model": {"head_dim": 15}}, "config.model.head_dim: 15 is odd; rotary positions need even"),
    ({"model": {"context_limit": 100}}, "config.model.context: 256 is more than model.context_limit = 100"),
    ({"model": {"rope_scaling": "yarn"}}, "config.model.rope_scaling: 'yarn' is not one of none, linear, llama3"),
    ({"model": {"rope_factor": 0.0}}, "config.model.rope_factor: 0.0 is not above 0"),
    ({"model": {"rope_high_factor": 1.0}}, "config.model.rope_high_factor: 1.0 is not more than model.rope_low_factor"),
    ({"model": {"dtype": "int8"}}, "config.model.dtype: 'int8' is not one of float32, bfloat16, float16"),
    ({"window": {"size": 48}}, "config.window.size: 48 does not divide model.context = 256"),
    ({"paths": {"streams": 1.0}, "window": {"size": 4}}, "config.paths.stream_counts: (2, 4, 8) has more streams than"),
    ({"paths": {"steps": ()}}, "config.paths.steps: () must hold positive numbers"),
    (
      {"model": {"progression": "learned"}, "paths": {"learned": 1.0}, "window": {"size": 256}},
      "config.model.progression: 'learned' needs a past",
    ),
    ({"loss": {"ar_weight": 0}, "window": {"count": 0}}, "config.loss.ar_weight: 0.0 with window.count = 0 trains"),
    ({"warp": {"decay": 1.0}}, "config.warp.decay: 1.0 is not in [0, 1)"),
    ({"train": {"profile": "5:2"}}, "config.train.profile: '5:2' is not START:STOP"),
    ({"train": {"trainable": "codes,"}}, "config.train.trainable: 'codes,' is not all, windows, or patterns between"),
    ({"train": {"accumulate": 3}}, "config.train.accumulate: 3 does not divide data.batch_size = 16"),
    ({"eval": {"samples": -1}}, "config.eval.samples: -1 is negative"),
    ({"mesh": {"fsdp": 0}}, "config.mesh.fsdp: 0 is neither positive nor -1"),
    ({"mesh": {"tensor": -1}}, "config.mesh.data: -1 and another axis are both -1"),
  ],
)
def test_impossible_fields_are_named(values, message):
  with pytest.raises(UserError, match=re.escape(message)):
    config_lib.from_dict(values)


@pytest.mark.parametrize(
  "field, values",
  [
    ("optim.learning_rate", (math.nan, math.inf, -1.0, 1e39)),
    ("optim.epsilon", (0.0, -1e-8)),
    ("optim.beta2", (1.0, -0.1, math.nan)),
    ("optim.final", (-0.1, 1.5)),
    ("optim.ema", (1.0, -0.5)),
    ("model.rope_base", (0.0, math.inf)),
    ("model.norm_epsilon", (0.0, math.nan)),
    ("loss.self_conditioning", (1.1, -0.1)),
    ("warp.precision_max", (0.0, math.inf)),
    ("paths.erasure_range", ((0.0, math.nan), (0.5, 0.5), (0.1,))),
    ("data.weights", ((math.nan,), (0.0,))),
    ("data.threads", (0, 10**6)),
    ("data.seed", (-1, 2**31, 10**5000)),
    ("train.steps", (0, 2**31, 10**30)),
    ("train.profile", ("\u00b2:3", "0:5", "1:99999999999", "5", "1:2:3", "-1:3")),
    ("paths.steps", ((0,), (2**31,))),
    ("window.start", (-1, 2**31)),
  ],
)
def test_numbers_beyond_a_limit_are_refused(field, values):
  section, name = field.split(".")
  for value in values:
    with pytest.raises(UserError, match=f"^config.{field}: [^\n]*$"):
      config_lib.from_dict({section: {name: value}})


@pytest.mark.parametrize(
  "values, message",
  [
    ({"optim": {"learning_rate": 0.0}}, "config.optim.learning_rate: 0.0 trains nothing"),
    ({"model": {"param_dtype": "bfloat16"}}, "config.model.param_dtype: 'bfloat16' cannot be trained"),
  ],
)
def test_what_can_be_read_but_not_trained(values, message):
  config = config_lib.from_dict(values)
  with pytest.raises(UserError, match=message):
    config.check_trainable()


def test_frozen_parameters_may_be_of_any_dtype():
  config_lib.from_dict({"model": {"param_dtype": "float16"}, "train": {"trainable": "windows"}}).check_trainable()


def test_differences_say_what_is_pinned():
  old = config_lib.Config()
  new = dataclasses.replace(
    old,
    model=config_lib.Model(layers=5, isolate_documents=True),
    data=config_lib.Data(seed=1),
    train=config_lib.Train(steps=7),
  )
  assert config_lib.differences(old, new) == [
    ("model.layers", 4, 5, "contents"),
    ("model.isolate_documents", False, True, None),
    ("data.seed", 0, 1, "order"),
    ("train.steps", 1000, 7, None),
  ]
  assert config_lib.from_dict(config_lib.to_dict(new)) == new


def test_the_order_of_patterns_is_free():
  config = lambda value: config_lib.Config(train=config_lib.Train(trainable=value))
  pin = lambda value: config_lib.differences(config("codes,blocks/w_time"), config(value))[0][3]
  assert (pin("blocks/w_time, codes"), pin("codes"), pin("all")) == (None, "order", "order")


def test_of_an_average_only_its_existence_is_pinned():
  pins = [
    config_lib.differences(config_lib.from_dict({"optim": {"ema": a}}), config_lib.from_dict({"optim": {"ema": b}}))[0][
      3
    ]
    for a, b in ((0.5, 0.9), (0.0, 0.9), (0.5, 0.0))
  ]
  assert pins == [None, "contents", "contents"]

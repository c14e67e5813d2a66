"""Suites of benchmarks, and where their documents are without network: the harness's tasks, by their names there."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

from evo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A task or group of the harness. shots: examples in front of each question; None: the task's own. changes: fields of
  the task's configuration that these shots need."""

  task: str
  shots: int | None = None
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# MBPP's three examples stand in the task; a fourth is in the split that its authors made for prompts.
_MBPP_SHOTS = {
  "fewshot_config": {"sampler": "first_n", "split": "prompt", "doc_to_target": "{{code}}\n[DONE]"},
}

# The fifteen benchmarks of the paper, with the shots of LLaDA's table. For infilling that names two; the harness's task
# has none, and takes none.
EVO15 = (
  Benchmark("mmlu", 5),
  Benchmark("bbh", 3),
  Benchmark("arc_challenge", 0),
  Benchmark("hellaswag", 0),
  Benchmark("truthfulqa_mc2", 0),
  Benchmark("winogrande", 5),
  Benchmark("piqa", 0),
  Benchmark("gsm8k", 4),
  Benchmark("minerva_math", 4),
  Benchmark("gpqa_main_n_shot", 5),
  Benchmark("humaneval", 0),
  Benchmark("humaneval_single_line_infilling", 0),
  Benchmark("mbpp", 4, _MBPP_SHOTS),
  Benchmark("cmmlu", 5),
  Benchmark("ceval-valid", 5),
)
_MORE = tuple(
  Benchmark(task, 0) for task in ("arc_easy", "boolq", "commonsense_qa", "lambada_openai", "openbookqa", "sciq")
)
SUITES = {
  "evo15": EVO15,
  "quick": tuple(Benchmark(task, 0) for task in ("arc_easy", "lambada_openai", "piqa", "sciq")),
  "all": EVO15 + _MORE,
}
QUICK_LIMIT = 100  # items of a task of `quick`, where --limit does not say

RUNS_CODE = ("humaneval", "humaneval_single_line_infilling", "mbpp")  # tasks of suites that execute what was written
INFILLING = tuple(
  f"humaneval_{kind}_infilling{size}"
  for kind, size in (("single_line", ""), ("multi_line", ""), ("random_span", ""), ("random_span", "_light"))
)


@dataclasses.dataclass(frozen=True)
class LocalDocuments:
  """Where a task's documents are under --data.

  folder: of the files. splits: by the harness's split, the file SPLIT.jsonl that stands for it. changes: fields of the
  task's configuration. only: the value that a field of a document must have. shots: at most so many, where the examples
  come from what is asked.
  """

  folder: str
  splits: Mapping[str, str]
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  only: tuple[str, str] | None = None
  shots: int | None = None

  def files(self, data: str) -> dict[str, str]:
    """By the harness's split, the files that there are."""
    paths = {split: os.path.join(data, self.folder, f"{name}.jsonl") for split, name in self.splits.items()}
    return {split: path for split, path in paths.items() if os.path.isfile(path)}


# Of exams with a development split alone, a question's examples are the other questions.
_OTHERS_AS_EXAMPLES = {
  "validation_split": None,
  "test_split": "test",
  "fewshot_split": "test",
  "fewshot_config": {"sampler": "default"},
}
_MATH = {
  "algebra": "Algebra",
  "counting_and_prob": "Counting & Probability",
  "geometry": "Geometry",
  "intermediate_algebra": "Intermediate Algebra",
  "num_theory": "Number Theory",
  "prealgebra": "Prealgebra",
  "precalc": "Precalculus",
}
_SAME = {"train": "train", "validation": "validation"}
_VALIDATION = {"validation": "validation", "test": "validation"}

# By the harness's task; a * stands for a subject, which is a folder.
LOCAL: dict[str, LocalDocuments] = {
  "arc_challenge": LocalDocuments("arc_challenge", {**_SAME, "test": "validation"}),
  "arc_easy": LocalDocuments("arc_easy", {**_SAME, "test": "validation"}),
  "bbh_cot_fewshot_*": LocalDocuments("bbh/*", {"test": "test"}),
  "boolq": LocalDocuments("boolq", {"validation": "validation"}, {"doc_to_target": "answer"}),
  "ceval-valid_*": LocalDocuments("ceval/*", {"test": "dev"}, _OTHERS_AS_EXAMPLES, shots=4),
  "cmmlu_*": LocalDocuments("cmmlu/*", {"test": "dev"}, _OTHERS_AS_EXAMPLES, shots=4),
  "commonsense_qa": LocalDocuments("commonsenseqa", {"validation": "validation"}),
  "gsm8k": LocalDocuments("gsm8k", {"train": "train", "test": "test"}),
  "hellaswag": LocalDocuments("hellaswag", {"validation": "validation"}),
  "humaneval": LocalDocuments("humaneval", {"test": "test"}),
  **{
    f"humaneval_{kind}_infilling": LocalDocuments(f"humaneval_infilling/{kind}", {"test": "test"})
    for kind in ("single_line", "multi_line", "random_span")
  },
  "lambada_openai": LocalDocuments("lambada_openai", {"test": "test"}),
  "mbpp": LocalDocuments(
    "mbpp", {"train": "train", "prompt": "prompt", "validation": "validation", "test": "validation"}
  ),
  **{
    f"minerva_math_{task}": LocalDocuments("math", {"test": "test"}, only=("type", kind))
    for task, kind in _MATH.items()
  },
  "mmlu_*": LocalDocuments("mmlu/*", {"dev": "dev", "test": "validation"}),
  "openbookqa": LocalDocuments("openbookqa", _VALIDATION),
  "piqa": LocalDocuments("piqa", _SAME),
  "sciq": LocalDocuments("sciq", _VALIDATION),
  "truthfulqa_mc1": LocalDocuments("truthfulqa_mc", {"validation": "validation"}),
  "truthfulqa_mc2": LocalDocuments("truthfulqa_mc", {"validation": "validation"}),
  "winogrande": LocalDocuments("winogrande", _SAME),
}


def local_documents(task: str) -> LocalDocuments | None:
  """Where a task's documents are under --data; None: the table does not say."""
  if task in LOCAL:
    return LOCAL[task]
  for pattern, local in LOCAL.items():
    prefix = pattern.removesuffix("*")
    if prefix != pattern and task.startswith(prefix):
      return dataclasses.replace(local, folder=local.folder.replace("*", task.removeprefix(prefix)))
  return None


def find_benchmark(name: str) -> Benchmark:
  """A task or group with the shots of the suites, where it is in one."""
  return next((each for suite in SUITES.values() for each in suite if each.task == name), Benchmark(name))


def parse_tasks(value: str) -> tuple[Benchmark, ...]:
  """The benchmarks of --tasks: names of suites, and of tasks or groups of the harness. Raises UserError."""
  found: dict[str, Benchmark] = {}
  for name in (part.strip() for part in value.split(",")):
    if not name:
      raise UserError(f"--tasks={value}: has an empty name; give suites ({', '.join(SUITES)}) or the harness's tasks")
    for benchmark in SUITES.get(name) or (find_benchmark(name),):
      found.setdefault(benchmark.task, benchmark)
  return tuple(found.values())

"""Published figures of base models on the benchmarks of `tasks.EVO15`, in percent, with where they come from."""

# By task of the suite.
FIGURES: dict[str, dict[str, float]] = {
  "Evo 8B": {"mmlu": 78.6, "arc_challenge": 65.6, "hellaswag": 82.1, "winogrande": 76.3},
  "LLaDA 8B": {
    "mmlu": 65.9,
    "bbh": 49.7,
    "arc_challenge": 45.9,
    "hellaswag": 70.5,
    "truthfulqa_mc2": 46.1,
    "winogrande": 74.8,
    "piqa": 73.6,
    "gsm8k": 70.3,
    "minerva_math": 31.4,
    "gpqa_main_n_shot": 25.2,
    "humaneval": 35.4,
    "mbpp": 40.0,
    "cmmlu": 69.9,
    "ceval-valid": 70.5,
  },
  "iLLaDA 8B": {
    "mmlu": 74.8,
    "bbh": 71.3,
    "arc_challenge": 60.8,
    "hellaswag": 76.6,
    "gsm8k": 81.9,
    "minerva_math": 38.4,
    "humaneval": 50.0,
    "mbpp": 57.8,
  },
  "Dream 7B": {
    "mmlu": 69.5,
    "bbh": 57.9,
    "arc_challenge": 59.8,
    "hellaswag": 73.3,
    "gsm8k": 77.2,
    "minerva_math": 39.6,
    "humaneval": 57.9,
    "mbpp": 56.2,
  },
  "Qwen2.5 7B": {
    "mmlu": 71.9,
    "bbh": 63.9,
    "arc_challenge": 51.5,
    "hellaswag": 79.0,
    "gsm8k": 78.9,
    "minerva_math": 41.1,
    "humaneval": 56.7,
    "mbpp": 63.6,
  },
}

SETTINGS = {
  "Evo 8B": "the four figures that are public of the paper's table (arXiv 2603.06617); its settings are not",
  "LLaDA 8B": "2.3T tokens, base model without guidance, from its evaluation notes; the shots of evo15",
  "iLLaDA 8B": "12T tokens, base model, from its model card (arXiv 2606.25331)",
  "Dream 7B": "18T + 0.6T tokens, base model, from iLLaDA's model card",
  "Qwen2.5 7B": "18T tokens, base model, from iLLaDA's model card",
}

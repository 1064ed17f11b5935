"""CORE of OpenAI's GPT-2, to compare with."""

import statistics

from MaxNano.evals.core_tasks import center

# Accuracies of guessing, of GPT-2 (124 M parameters) and of GPT-2 XL (1.6 B) on CORE's tasks.
# Source: the result files of the CORE bundle (https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip).
GPT2 = {
    "hellaswag_zeroshot": (0.25, 0.308504, 0.502),
    "jeopardy": (0.0, 0.001889, 0.092),
    "bigbench_qa_wikidata": (0.0, 0.282663, 0.531),
    "arc_easy": (0.25, 0.412458, 0.595),
    "arc_challenge": (0.25, 0.221843, 0.299),
    "copa": (0.5, 0.6, 0.67),
    "commonsense_qa": (0.2, 0.224406, 0.227),
    "piqa": (0.5, 0.62296, 0.725),
    "openbook_qa": (0.25, 0.278, 0.346),
    "lambada_openai": (0.0, 0.322919, 0.523),
    "hellaswag": (0.25, 0.307907, 0.512),
    "winograd": (0.5, 0.578755, 0.714286),
    "winogrande": (0.5, 0.486188, 0.569),
    "bigbench_dyck_languages": (0.0, 0.155, 0.247),
    "agi_eval_lsat_ar": (0.2, 0.226087, 0.273913),
    "bigbench_cs_algorithms": (0.0, 0.419697, 0.417),
    "bigbench_operators": (0.0, 0.085714, 0.157143),
    "bigbench_repeat_copy_logic": (0.0, 0.03125, 0.09375),
    "squad": (0.0, 0.058278, 0.309),
    "coqa": (0.0, 0.133659, 0.28),
    "boolq": (0.62, 0.552294, 0.619),
    "bigbench_language_identification": (0.091, 0.2566, 0.25),
}


def scores_of(task: str) -> tuple[float, float] | None:
    """Centered accuracies of GPT-2 and GPT-2 XL on a task, None if it is not one of CORE's."""
    if task not in GPT2:
        return None
    guessing, small, largest = GPT2[task]
    return center(small, guessing), center(largest, guessing)


def core() -> tuple[float, float]:
    """CORE of GPT-2 and GPT-2 XL."""
    small, largest = zip(*map(scores_of, GPT2), strict=True)
    return statistics.fmean(small), statistics.fmean(largest)

"""STAGE_CONFIGS: what each training stage asks of the config, known before JAX is imported.

A stage is a way to train: its batches, its loss, its validation. Those are in training/stages.py.
This half gives the row length, the batch size and the values that contradict the stage. A new stage
is a row here, a row in training/stages.py and a file configs/stages/NAME.yml; a new dataset_type
needs its contents in data/fingerprint.py too.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Values = Mapping[str, Any]


class Contradiction(NamedTuple):
    """A value that a stage cannot use: its key, and the sentence that follows `key=value`."""

    key: str
    problem: str


class StageConfig(NamedTuple):
    """How a stage fills and checks a config. Each function receives the values by key."""

    name: str
    # The values of dataset_type that the stage reads. Empty: every type that no other
    # stage lists.
    dataset_types: tuple[str, ...]
    # What the stage trains on, in words, for the start-up table and the report.
    describe_data: Callable[[Values], str]
    # Tokens of a row of a batch.
    row_tokens: Callable[[Values], int] = lambda values: values["max_target_length"]
    # Tokens of a step if other keys decide that, with the words for it; None: the scaling law does.
    batch_tokens: Callable[[Values], int] | None = None
    batch_tokens_text: str = ""
    # Whether the data, and not the scaling law, decide how many steps a run has.
    horizon_from_data: bool = False
    contradictions: Callable[[Values], Iterator[Contradiction]] = lambda values: iter(())
    long_name: str = ""

    @property
    def title(self) -> str:
        """What a report calls the stage."""
        return self.long_name or self.name


def stage_config(values: Values) -> StageConfig:
    """The row that a config chooses: that of `stage`, if it reads dataset_type, or the first that
    does.
    """
    kind = values["dataset_type"]
    named = STAGE_CONFIGS.get(values["stage"])
    readers = [row for row in STAGE_CONFIGS.values() if kind in row.dataset_types]
    if named in readers:
        return named
    return readers[0] if readers else STAGE_CONFIGS["pretrain"]


# ---- Pretraining --------------------------------------------------------------------------------


def _describe_text(values: Values) -> str:
    if values["dataset_type"] == "mixture":
        return ", ".join(" x ".join(row[1::-1]) for row in values["dataset_mixture"])
    return f"{values['dataset_type']}, {values['dataset_name'] or values['dataset_path']}"


# ---- Supervised fine-tuning ---------------------------------------------------------------------


def _describe_mixture(values: Values) -> str:
    shares = []
    for row in values["chat_train_mixture"]:  # a malformed one is refused where it is read
        limits = "".join(f" (at most {count})" for count in row[2:])
        shares.append(" x ".join(row[:2]) + limits)
    return ", ".join(shares)


# ---- Reinforcement learning ---------------------------------------------------------------------


def _rollout_row_tokens(values: Values) -> int:
    return values["rl_row_tokens"] or values["max_target_length"]


def _rollout_batch_tokens(values: Values) -> int:
    return values["rl_problems"] * values["rl_samples"] * _rollout_row_tokens(values)


def _rollout_contradictions(values: Values) -> Iterator[Contradiction]:
    if (values["rl_row_tokens"] or 0) > values["max_target_length"]:
        yield Contradiction(
            "rl_row_tokens", f"is larger than max_target_length={values['max_target_length']}"
        )
    if values["quantization"] != "none":
        yield Contradiction(
            "quantization", "does not work with rollouts, which are sampled without quantization"
        )


def _describe_rollouts(values: Values) -> str:
    samples, problems = values["rl_samples"], values["rl_problems"]
    return f"{samples} answers to each of {problems} problems of {values['rl_task']} per step"


STAGE_CONFIGS: dict[str, StageConfig] = {
    "pretrain": StageConfig("pretrain", (), _describe_text, long_name="pretraining"),
    "sft": StageConfig(
        "sft",
        long_name="fine-tuning",
        dataset_types=("chat",),
        describe_data=_describe_mixture,
        horizon_from_data=True,
    ),
    "rl": StageConfig(
        "rl",
        long_name="reinforcement learning",
        dataset_types=("rollouts",),
        describe_data=_describe_rollouts,
        row_tokens=_rollout_row_tokens,
        batch_tokens=_rollout_batch_tokens,
        batch_tokens_text="rl_problems x rl_samples x rl_row_tokens",
        horizon_from_data=True,
        contradictions=_rollout_contradictions,
    ),
}

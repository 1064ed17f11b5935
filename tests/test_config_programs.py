"""base.yml names the programs that read each key; here that is compared with the source."""

import pytest
from config_reads import keys_of_config_modules, keys_read

from MaxNano import config_schema

KEYS = config_schema.base_keys()

# Reachable by name in train.py, but only other programs call it.
NOT_OF_TRAIN = {
    "chat_max_per_task",
    "decode_max_length",
    "decode_slots",
    "evals",
    "prompt",
    "step",
    "stream_milliseconds",
}


def declared(program):
    return {name for name, key in KEYS.items() if program in key.programs}


@pytest.mark.parametrize("program", config_schema.PROGRAMS)
def test_a_program_reads_what_base_yml_says(program):
    assert declared(program) <= keys_read(program) | keys_of_config_modules()


# HumanEval's rows, which a fingerprint of chat data reads, have a `prompt` too.
@pytest.mark.parametrize(
    "program, others", [("train", NOT_OF_TRAIN), ("train_tokenizer", {"prompt"})]
)
def test_what_a_program_reads_is_declared(program, others):
    assert keys_read(program) - declared(program) <= others


def test_every_key_is_read():
    read = set().union(*map(keys_read, config_schema.PROGRAMS)) | keys_of_config_modules()
    assert set(KEYS) <= read


def test_a_key_that_nothing_reads_would_be_noticed():
    """The analysis tells programs apart."""
    assert "serve_port" in keys_read("serve") and "serve_port" not in keys_read("train")
    assert "matrix_lr" in keys_read("train") and "matrix_lr" not in keys_read("chat")
    assert "xla_flags" in keys_read("train_compile") - keys_read("train_tokenizer")

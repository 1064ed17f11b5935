"""train_compile.py through its command line: a machine without a TPU says what a TPU slice would
do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from MaxNano import pyconfig, scaling

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "num_decoder_layers=2 emb_dim=128 head_dim=128 num_query_heads=1 vocab_size=1024 max_target_length=256 "
    "short_window_multiple=128 global_batch_tokens=65536 steps=100"
).split()
LEAST_EFFORT = {"JAX_OPTIMIZATION_LEVEL": "O0"}  # of the compiler, in an environment


def run(tmp_path, *words, status=0, **own):
    """(stdout, stderr) of train_compile.py, which finds nothing in its environment that concerns
    TPUs but `own`.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TPU", "JAX", "LIBTPU"))
    }
    environment |= own
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "MaxNano/train_compile.py"),
            str(ROOT / "configs/base.yml"),
            f"base_output_directory={tmp_path}",
            f"compile_report={tmp_path}/report.json",
            *words,
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def report(tmp_path, *words, **own):
    """(stdout, the JSON written)."""
    out, _ = run(tmp_path, *words, **own)
    return out, json.loads((tmp_path / "report.json").read_text())


# ---- Names of slices ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,shape",
    [
        ("v6e-1", (1, 1)),
        ("v6e-4", (2, 2)),
        ("v6e-8", (2, 4)),
        ("v6e-16", (4, 4)),
        ("v6e-32", (4, 8)),
        ("v6e-64", (8, 8)),
        ("v5e-128", (8, 16)),
        ("v6e-256", (16, 16)),
        ("v5p-8", (2, 2, 1)),
        ("v5p-16", (2, 2, 2)),
        ("v4-32", (2, 2, 4)),
        ("v4-64", (2, 4, 4)),
        ("v5p-128", (4, 4, 4)),
        ("v5p-2048", (8, 8, 16)),
        ("tpu7x-8", (2, 2, 1)),
        ("tpu7x-128", (4, 4, 4)),
    ],
)
def test_slices_have_the_shapes_of_cloud_tpu(name, shape):
    from MaxNano.compile import topologies

    assert topologies.slice_shape(name) == (name.partition("-")[0], shape)


@pytest.mark.parametrize(
    "name", ["v6e-2", "v6e-12", "v6e-512", "v5p-4", "v4-9", "v7x-8", "v6e", "v6e-", "8"]
)
def test_other_names_are_refused_with_what_would_do(name):
    from MaxNano.compile import topologies

    with pytest.raises(ValueError, match=rf"compile_topology={name} is no TPU slice: .* v6e-8"):
        topologies.slice_shape(name)


def test_a_wrong_name_is_one_line_and_status_2(tmp_path):
    _, err = run(tmp_path, *TINY, "compile_topology=v6e-7", status=2)
    assert err.startswith("error: compile_topology=v6e-7") and err.count("\n") == 1, err


def test_this_jax_knows_the_least_effort():
    """JAX ignores a variable of its environment that it does not know."""
    import jax

    assert {name.lower() for name in LEAST_EFFORT} <= jax.config.values.keys()


# ---- Compiling ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_both_programs_compile_for_a_slice(tmp_path):
    keys = (*TINY, "per_device_batch_size=8", "num_decoder_layers=1", "muon_iterations=1")
    words = (*keys, "compile_programs=[train,evaluate]")
    out, values = report(tmp_path, *words, **LEAST_EFFORT)
    for words in (
        "train: memory",
        "train: cycles",
        "collectives",
        "most expensive operations",
        "estimated MFU",
        "31.250",
    ):
        assert words in out, words
    assert values["topology"] == "v6e-8" and values["versions"]["libtpu"]
    assert (values["micro_batch_rows"], values["accumulation_steps"]) == (8, 4)
    train, evaluate = values["programs"]["train"], values["programs"]["evaluate"]
    for program in (train, evaluate):
        assert program["chips"] == 8
        assert 0 < program["memory"]["total"] < program["memory"]["limit"] == 31.25 * 2**30
        assert program["cycles"] == pytest.approx(sum(program["cycles_by_class"].values()))
        assert program["cycles_by_class"]["matmul"] > 0
        assert program["most_expensive"] and all(
            o["cycles"] < 2**40 for o in program["most_expensive"]
        )
        computed = program["matmul_flops"] + program["pallas_flops"]
        assert computed >= program["model_flops"] * 0.5
        assert program["step_seconds"] == pytest.approx(program["cycles"] / 1.75e9)
    assert any(".py:" in o["source"] for o in train["most_expensive"])
    assert train["model_flops"] == pytest.approx(3 * evaluate["model_flops"])
    assert train["run_seconds"] == pytest.approx(100 * train["step_seconds"])
    assert train["run_price"] == pytest.approx(train["run_seconds"] / 3600 * 8 * 0.540137)
    assert evaluate["run_seconds"] is None
    kinds = {c["kind"] for c in train["collectives"]}
    assert kinds & {"all-reduce", "reduce-scatter"}, "gradients of eight chips are summed"
    assert all(
        c["axes"] and c["group_size"] > 1 and c["network"] == "ici" for c in train["collectives"]
    )
    assert train["cycles"] > evaluate["cycles"]
    check_that_weights_travel_once(train["collectives"], keys)


def check_that_weights_travel_once(collectives, keys, micro_batches=None):
    """However many micro-batches: one gather of every weight in bfloat16; one sum of every
    gradient, of the embeddings in bfloat16 and of the rest in float32.

    micro_batches: with FSDP; in each of them layers are gathered twice, embedding and head once,
    and every gradient is summed. Where layers do not divide the devices, the update has collectives
    of its own.
    """
    config = pyconfig.initialize([str(ROOT / "configs/base.yml"), *keys])
    counts = scaling.parameter_counts(scaling.shape_of(config))
    embeddings = counts.token_embed + counts.value_embeds
    every = embeddings + counts.lm_head + counts.matrices

    def moved(*kinds):
        # Where the compiler has joined several, it names no source.
        of_step = (
            c for c in collectives if c["kind"] in kinds and not c["source"].startswith("muon.py")
        )
        return sum(c["bytes"] * c["count"] for c in of_step)

    ends = counts.token_embed + counts.lm_head
    gathered = every if micro_batches is None else micro_batches * (2 * every - ends)
    summed = (micro_batches or 1) * (4 * every - 2 * embeddings)
    assert moved("all-gather") == pytest.approx(2 * gathered, rel=0.02)
    assert moved("reduce-scatter", "all-reduce") == pytest.approx(summed, rel=0.02)


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_prefill_and_decode_compile_for_a_slice(tmp_path):
    words = (
        "compile_programs=[prefill,decode]",
        "decode_slots=32",
        "stream_interval=4",
        "prefill_rows=1",
        "num_decoder_layers=1",
    )
    out, values = report(tmp_path, *TINY, *words, **LEAST_EFFORT)
    prefill, decode = values["programs"]["prefill"], values["programs"]["decode"]
    assert 0 < decode["bandwidth_utilization"] < 1 and prefill["bandwidth_utilization"] is None
    assert "estimated bandwidth utilization" in out
    assert decode["tokens_per_second"] == pytest.approx(4 * 32 / decode["step_seconds"])
    assert prefill["tokens_per_second"] == pytest.approx(8 * 256 / prefill["step_seconds"])
    for program in (prefill, decode):
        assert program["chips"] == 8
        assert all(c["bytes"] < 2**16 for c in program["collectives"]), (
            "only what the host reads travels"
        )
        assert 0 < program["cycles_by_class"]["matmul"] < program["cycles"]
        assert program["memory"]["aliased"] > 0, "the cache is taken over"
        assert program["run_seconds"] is None


@pytest.mark.long
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_decoding_finds_the_cache_as_it_wants_it(tmp_path):
    """Else each round would copy all of it twice, which is what has the shape of weights here."""
    words = (
        "compile_programs=[decode]",
        "decode_slots=64",
        "stream_interval=4",
        "num_query_heads=8",
        "emb_dim=1024",
    )
    _, values = report(tmp_path, *TINY, *words)
    cycles = values["programs"]["decode"]["cycles_by_class"]
    assert 0 < cycles["weight"] < 0.1 * cycles["matmul"]


@pytest.mark.long
@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
def test_two_slices_talk_over_the_data_center_network(tmp_path):
    """In the step of reinforcement learning with all that a batch can have, as long as nobody says
    its steps.
    """
    words = (
        "num_decoder_layers=1",
        "compile_topology=v6e-4",
        "compile_num_slices=2",
        "dcn_data_parallelism=2",
    )
    stage = ("stage=rl", "load_from=nowhere", "rl_row_tokens=256", "rl_clip=0.2", "rl_kl=0.1")
    sizes = [word for word in TINY if not word.startswith(("steps", "global_batch_tokens"))]
    _, values = report(tmp_path, *sizes, *words, *stage, **LEAST_EFFORT)
    assert values["config"]["global_batch_tokens"] == 16 * 16 * 256
    assert values["programs"]["train"]["run_seconds"] is None
    train = values["programs"]["train"]
    assert train["chips"] == 8
    between = [c for c in train["collectives"] if c["network"] == "dcn"]
    assert between and all(c["axes"] == ["data"] and c["group_size"] == 2 for c in between)


@pytest.mark.tpu_compile
@pytest.mark.timeout(900)
@pytest.mark.long
def test_too_much_for_the_memory_is_one_line_with_a_batch_that_fits(tmp_path):
    """32003 is prime, so that a batch of one row is the only smaller one."""
    rows = 32003
    words = (f"global_batch_tokens={8 * rows * 256}", f"per_device_batch_size={rows}")
    _, err = run(tmp_path, *TINY, *words, status=2)
    last = err.splitlines()[-1]
    assert last.startswith("error: the train program of d4 does not fit in a chip of v6e-8"), err
    assert last.endswith("set per_device_batch_size=1, the largest that fits"), err
    assert "Traceback" not in err
    assert not (tmp_path / "report.json").exists()


@pytest.mark.tpu_compile
@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.parametrize("fsdp", [1, 8])
@pytest.mark.parametrize("model", ["d4", "d12", "d24"])
def test_the_real_models_fit_a_v6e_8(tmp_path, model, fsdp):
    """Both kinds of sharding. d4 and d12 with the compiler's least effort: slower code of the same
    memory, collectives and flags.
    """
    words = [f"model={model}", f"ici_fsdp_parallelism={fsdp}"]
    _, values = report(tmp_path, *words, **({} if model == "d24" else LEAST_EFFORT))
    train = values["programs"]["train"]
    assert train["memory"]["total"] < train["memory"]["limit"]
    micro_batches = None if fsdp == 1 else values["accumulation_steps"]
    check_that_weights_travel_once(train["collectives"], words, micro_batches)
    if (model, fsdp) != ("d24", 8):  # where all layers recompute
        # Kernels compute an MLP's hidden layer twice, d24 half of its projections, as memory needs.
        computed = train["matmul_flops"] + train["pallas_flops"]
        assert computed <= 1.18 * train["model_flops"]
        assert values["accumulation_steps"] == 1

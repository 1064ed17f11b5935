"""The train step: nanochat's numbers over several updates, accumulation, layouts, and updates that
must not happen.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from test_model import random_params

from MaxNano import pyconfig
from MaxNano.compile import programs as compile_programs
from MaxNano.distributed import hardware
from MaxNano.interop import nanochat
from MaxNano.models import setup as model_setup
from MaxNano.models.setup import architecture
from MaxNano.models.transformer import Numerics
from MaxNano.optimizers import groups
from MaxNano.training import memory_plan
from MaxNano.training import state as train_state
from MaxNano.training.memory_plan import (
    compile_train,
    describe_memory_plan,
    explain_out_of_memory,
    fit_memory,
)
from MaxNano.training.setup import (
    check_memory,
    check_sharding,
    describe_plan,
    needed_bytes,
    plan_batch,
    set_up,
)
from MaxNano.training.start import with_start
from MaxNano.training.step import build_programs, jit_train

ROOT = Path(__file__).parents[1]


def make_config(*overrides):
    return pyconfig.initialize([str(ROOT / "configs/base.yml"), "num_cpu_devices=1", *overrides])


TINY = (
    "vocab_size=50",
    "max_target_length=32",
    "emb_dim=32",
    "head_dim=16",
    "num_query_heads=2",
    "steps=20",
    "short_window_multiple=8",
    "num_decoder_layers=4",
    "global_batch_tokens=256",
    "warmup_steps=2",
    "muon_iterations=2",  # compiles faster; test_eight_updates_are_nanochats has all five
)


def batch_of(config, step=0):
    rng = np.random.default_rng(step)
    rows = config.global_batch_tokens // config.max_target_length
    tokens = rng.integers(
        0, config.vocab_size, (rows, config.max_target_length + 1), dtype=np.int32
    )
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(tokens[:, 1:].shape, np.float32),
    }


def start(config, devices=None):
    devices = devices or jax.devices()[:1]
    setup = set_up(config, devices)
    state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)
    programs = build_programs(setup, jit_train(setup), np.ones(config.vocab_size, np.int32))
    return setup, state, programs


@pytest.fixture(scope="module")
def tiny():
    """() -> what start() returns for TINY, compiled once."""
    setup, state, programs = start(make_config(*TINY))
    kept = jax.device_get(state)
    return lambda: (setup, jax.tree.map(jnp.asarray, kept), programs)


def relative(got, expected):
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-12)


def test_eight_updates_are_nanochats():
    """Losses within 1e-5; parameters after 1 and after 8 updates within 1e-3 relative:
    tests/golden.
    """
    with np.load(ROOT / "tests/golden/nanochat_small.npz") as file:
        golden = dict(file)
    fields, rates = (json.loads(str(golden[name])) for name in ("config", "lr"))
    config = make_config(
        f"max_target_length={fields['sequence_len']}",
        f"vocab_size={fields['vocab_size']}",
        f"num_decoder_layers={fields['n_layer']}",
        f"emb_dim={fields['n_embd']}",
        f"num_query_heads={fields['n_head']}",
        f"head_dim={fields['n_embd'] // fields['n_head']}",
        f"global_batch_tokens={2 * fields['sequence_len']}",
        f"unembedding_lr={rates['unembedding_lr']}",
        f"embedding_lr={rates['embedding_lr']}",
        f"matrix_lr={rates['matrix_lr']}",
        f"scalar_lr={rates['scalar_lr']}",
        f"weight_decay={rates['weight_decay']}",
        # What the recording scaled by hand, and its schedules over 60 steps.
        "learning_rate_scale=1",
        "weight_decay_scale=1",
        "steps=60",
        "warmup_steps=5",
        "muon_momentum_warmup_steps=12",
    )
    setup, state, programs = start(config)

    def named(prefix):
        return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}

    params = nanochat.to_params(named("init/"), config)
    state = train_state.TrainState(
        state.step, jax.tree.map(jax.numpy.asarray, params), state.opt_state
    )

    def check(prefix):
        got = nanochat.from_params(jax.device_get(state.params), config)
        for name, value in named(prefix).items():
            assert relative(got[name], value) < 1e-3, name

    for step, (inputs, targets) in enumerate(zip(golden["idx"], golden["targets"], strict=True)):
        batch = {
            "inputs": inputs,
            "targets": targets,
            "weights": np.ones(targets.shape, np.float32),
        }
        state, metrics = programs.train(state, batch)
        np.testing.assert_allclose(metrics["loss"], golden["losses"][step], atol=1e-5)
        if step == 0:
            check("step1/")
    check("final/")


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(tiny):
    """Also where they have different numbers of targets: the mean is over the targets of all."""
    states = []
    one_row = start(make_config(*TINY, "per_device_batch_size=1"))
    for rows, (setup, state, compiled) in ((8, tiny()), (1, one_row)):
        assert setup.plan.accumulation_steps == 8 // rows
        batch = batch_of(setup.config)
        batch["targets"][0, :20] = -1
        state = train_state.TrainState(state.step, random_params(setup.model), state.opt_state)
        state, metrics = compiled.train(state, batch)
        states.append((metrics["loss"], state))
    for loss, state in states[1:]:
        np.testing.assert_allclose(loss, states[0][0], rtol=1e-5)
        assert max(jax.tree.leaves(jax.tree.map(relative, state, states[0][1]))) < 1e-4


def test_weights_scale_the_loss_and_ignored_targets_count_nowhere(tiny):
    setup, state, programs = tiny()
    batch = batch_of(setup.config)
    half = {**batch, "weights": batch["weights"] / 2}
    ignored = {**batch, "targets": batch["targets"].copy()}
    ignored["targets"][:, ::2] = -1
    losses = []
    for b in (batch, half, ignored):
        _, metrics = programs.train(jax.tree.map(lambda x: x.copy(), state), b)
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2), "a mean over the targets that are left"


def test_an_update_that_is_not_finite_changes_nothing(tiny):
    setup, state, programs = tiny()
    batch = batch_of(setup.config)
    for poison in (np.nan, np.inf, -np.inf):
        state, _ = programs.train(state, batch)
        before = jax.device_get(state)
        bad = {**batch, "weights": batch["weights"].copy()}
        bad["weights"][3, 5] = poison
        state, metrics = programs.train(state, bad)
        assert metrics["skipped"] == 1 and state.step == before.step + 1
        jax.tree.map(np.testing.assert_array_equal, before.params, state.params)
        jax.tree.map(np.testing.assert_array_equal, before.opt_state, state.opt_state)
        state, metrics = programs.train(state, batch)
        assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


def test_a_batch_that_devices_cannot_share_is_refused():
    config = make_config(*TINY)
    with pytest.raises(ValueError, match="global_batch_tokens"):
        plan_batch(config, 3)
    with pytest.raises(ValueError, match="per_device_batch_size=3"):
        plan_batch(make_config(*TINY, "per_device_batch_size=3"), 2)


def test_a_model_that_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch):
    """d24 on a CPU host of 24 GB; d4 fits there."""
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 24 * 10**9)
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=r"d24 needs about .* GB .* of 24.0 GB: choose"):
        check_memory(set_up(make_config("model=d24"), jax.devices()[:1]))
    check_memory(set_up(make_config("model=d4"), jax.devices()[:1]))
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize(("steps", "told"), [(40, True), (41, False)])
def test_the_plan_tells_that_a_short_run_is_all_warm_up(steps, told):
    """Two learning rates were compared in 30 steps that never reached them."""
    setup = set_up(make_config(*TINY, f"steps={steps}", "warmup_steps=40"), jax.devices()[:1])
    assert ("all are warm-up" in describe_plan(setup)["horizon"]) == told


def test_rows_that_do_not_fit_into_memory_are_halved(monkeypatch, capsys):
    """The compiler's own word decides; a number that was asked for is not changed."""
    compiled = []

    class Lowered:
        def __init__(self, setup):
            self.rows = setup.plan.micro_rows

        def compile(self):
            compiled.append(self.rows)
            if self.rows > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
            return "step"

    monkeypatch.setattr(memory_plan, "lower_train", Lowered)
    setup, step = compile_train(set_up(make_config(*TINY), jax.devices()[:1]))
    assert step == "step" and compiled == [8, 4, 2] and setup.plan == (1, 4, 2)
    out = capsys.readouterr().out
    assert "8 rows per device do not fit in memory\nCompiling for 4 rows per device" in out
    asked = set_up(make_config(*TINY, "per_device_batch_size=4"), jax.devices()[:1])
    with pytest.raises(ValueError, match="a step with 4 rows per device does not fit"):
        compile_train(asked)


def on_a_gpu(monkeypatch, memory_bytes, *overrides):
    """The set-up that train.py would choose on one GPU of this much memory; JAX takes 3/4 of it."""
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: memory_bytes * 3 // 4)
    setup = set_up(make_config("dtype=bfloat16", *overrides), jax.devices()[:1])
    return fit_memory(replace(setup, numerics=setup.numerics._replace(backend="gpu")))


@pytest.mark.parametrize("model,memory_gb", [("d12", 24), ("d8", 8)])
def test_small_cards_need_no_setting(monkeypatch, model, memory_gb):
    setup = on_a_gpu(monkeypatch, memory_gb * 10**9, f"model={model}")
    check_memory(setup)
    whole = plan_batch(setup.config, 1)
    assert setup.plan.rows == whole.rows and 4 <= setup.plan.micro_rows < whole.micro_rows
    assert setup.config.remat_policy == "none"


def test_a_memory_plan_also_recomputes_and_takes_small_chunks(monkeypatch):
    """Only after fewer rows; and not what was asked for."""
    setup = on_a_gpu(monkeypatch, 23 * 10**8, "model=d8")
    check_memory(setup)
    config = setup.config
    assert setup.plan.micro_rows == 1
    assert (config.remat_policy, config.vocab_chunk_size) == ("full", 2048)
    words = "1 rows per device, remat_policy=full, vocab_chunk_size=2048"
    assert describe_memory_plan(setup) == words
    keys = ("per_device_batch_size=2", "remat_policy=none", "vocab_chunk_size=0")
    asked = on_a_gpu(monkeypatch, 23 * 10**8, "model=d8", *keys)
    assert asked.plan.micro_rows == 2 and asked.config.remat_policy == "none"
    with pytest.raises(ValueError, match="d8 needs about"):
        check_memory(asked)


@pytest.mark.parametrize(
    "memory_bytes,words,expected",
    [
        (84_942_979_072, (), (16, "none")),  # an H100
        (151_397_597_184, (), (32, "none")),  # an H200
        (60 * 10**9, (), (8, "none")),
        (48 * 10**9, (), (32, "names")),  # four rows would fit with none
        (24 * 10**9, (), (1, "names")),
        (84_942_979_072, ("per_device_batch_size=4",), (4, "none")),
        (84_942_979_072, ("per_device_batch_size=32",), (32, "names")),
        (151_397_597_184, ("remat_policy=names",), (32, "names")),
        (48 * 10**9, ("remat_policy=none",), (4, "none")),
    ],
)
def test_null_recomputes_nothing_on_a_gpu_where_eight_rows_fit(
    monkeypatch, memory_bytes, words, expected
):
    """Model d24, whose file has remat_policy=null."""
    setup = on_a_gpu(monkeypatch, memory_bytes, "model=d24", *words)
    assert (setup.plan.micro_rows, setup.config.remat_policy) == expected
    assert setup.plan.rows == plan_batch(setup.config, 1).rows


def test_null_recomputes_nothing_only_on_a_gpu_of_known_memory(monkeypatch):
    config = make_config("model=d24", "dtype=bfloat16")
    setup = set_up(config, jax.devices()[:1])
    names = set_up(
        make_config("model=d24", "dtype=bfloat16", "remat_policy=names"), jax.devices()[:1]
    )
    assert needed_bytes(setup) == needed_bytes(names), "where no memory plan is made"
    for backend, memory_bytes in (("cpu", 2**40), ("tpu", 2**40), ("gpu", None)):
        monkeypatch.setattr(hardware, "memory_limit_bytes", lambda size=memory_bytes: size)
        numerics = setup.numerics._replace(backend=backend)
        fitted = fit_memory(replace(setup, numerics=numerics))
        assert (fitted.plan.micro_rows, fitted.config.remat_policy) == (32, "names"), backend


def on_a_tpu(monkeypatch, memory_gib, *overrides):
    """The set-up that train.py would choose on a v6e with this much memory."""

    def numerics_of(config, mesh):
        name = "pallas" if config.layer_products == "auto" else config.layer_products
        return numerics_here(config, mesh)._replace(backend="tpu", products=name)

    numerics_here = model_setup.numerics_of
    monkeypatch.setattr(model_setup, "numerics_of", numerics_of)
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: int(memory_gib * 2**30))
    return fit_memory(set_up(make_config("dtype=bfloat16", *overrides), jax.devices()[:1]))


@pytest.mark.parametrize(
    "memory_gib,words,rows,layers",
    [
        (80, (), 32, 0),
        (42, (), 32, 12),
        (33, (), 32, 24),
        (26, (), 16, 21),
        (42, ("remat_layers=15",), 32, 15),
        (42, ("remat_policy=names",), 32, None),
        (42, ("scan_layers=true",), 32, None),
        (42, ("layer_products=xla",), 32, None),
    ],
)
def test_as_few_layers_recompute_on_a_tpu_as_its_memory_needs(
    monkeypatch, memory_gib, words, rows, layers
):
    """Model d24 on one chip, with a whole optimizer state."""
    setup = on_a_tpu(monkeypatch, memory_gib, "model=d24", *words)
    assert (setup.plan.micro_rows, setup.config.remat_layers) == (rows, layers)
    assert setup.config.remat_policy == "names"
    plan = describe_memory_plan(setup)
    assert (f"remat_layers={layers}" in plan) == (
        layers is not None and "remat_layers=15" not in words
    )


def test_a_step_that_proves_too_large_recomputes_more_layers_then_has_fewer_rows(
    monkeypatch, capsys
):
    tried = []

    class Lowered:
        def __init__(self, setup):
            tried.append((setup.plan.micro_rows, setup.config.remat_layers))

        def compile(self):
            if tried[-1] != (16, 0):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
            return "step"

    setup = on_a_tpu(monkeypatch, 40, "model=d24")
    monkeypatch.setattr(memory_plan, "lower_train", Lowered)
    compiled_for, _ = compile_train(setup)
    assert tried == [(32, 15), (32, 18), (32, 21), (32, 24), (16, 0)]
    assert compiled_for.plan.micro_rows == 16
    out = capsys.readouterr().out
    assert "Compiling for 32 rows per device, remat_layers=18, remat_policy=names\n" in out


def test_train_compile_also_recomputes_more_layers_where_the_rows_are_set(monkeypatch):
    """As train.py does; its own compilation only names the largest batch that fits."""
    tried = []
    setup = on_a_tpu(monkeypatch, 42, "model=d24", "per_device_batch_size=32")

    def compile_train(setup):
        tried.append(setup.config.remat_layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_programs, "compile_train", compile_train)
    with pytest.raises(KeyboardInterrupt):
        compile_programs.compile_program(setup, "train")
    assert tried == [12]


def test_layers_in_a_loop_have_one_remat_policy():
    """A set-up for something else than training has no use for the key."""
    setup = set_up(make_config(*TINY, "remat_layers=1", "remat_policy=full"), jax.devices()[:1])
    with pytest.raises(
        ValueError, match="remat_layers=1 needs unrolled layers: set scan_layers=false"
    ):
        fit_memory(setup)


def test_remat_layers_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="remat_layers=5 is larger than num_decoder_layers=4"):
        make_config("model=d4", "remat_layers=5", "remat_policy=full")
    with pytest.raises(ValueError, match="remat_layers=1 has no effect with remat_policy=none"):
        make_config("model=d4", "remat_layers=1")


def test_out_of_memory_while_layers_recompute_nothing_names_remat_layers(monkeypatch):
    setup = on_a_tpu(monkeypatch, 42, "model=d24")
    remedy = "remat_layers=12.*: set remat_layers=15, with the same losses"
    with pytest.raises(ValueError, match=remedy), explain_out_of_memory(lambda: setup):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_a_step_without_recomputation_that_proves_too_large_has_fewer_rows_then_recomputes(
    monkeypatch, capsys
):
    tried = []

    class Lowered:
        def __init__(self, setup):
            tried.append((setup.plan.micro_rows, setup.config.remat_policy))

        def compile(self):
            if tried[-1][1] == "none":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return "step"

    setup = on_a_gpu(monkeypatch, 151_397_597_184, "model=d24")
    monkeypatch.setattr(memory_plan, "lower_train", Lowered)
    compiled_for, _ = compile_train(setup)
    assert tried == [(32, "none"), (16, "none"), (8, "none"), (32, "names")]
    assert compiled_for.plan == setup.plan
    out = capsys.readouterr().out
    assert out.endswith("Compiling for 32 rows per device, remat_policy=names\n")


def test_a_run_that_began_with_a_remat_policy_of_its_models_file_keeps_it(tmp_path):
    """d24.yml had names before it had null."""
    words = ("model=d24", f"base_output_directory={tmp_path}")
    config = make_config(*words)
    text = pyconfig.to_yaml(config)
    assert "\nremat_policy: null  # d24.yml\n" in text
    saved = tmp_path / "d24/config.yml"
    saved.parent.mkdir()
    for before, origin, expected in (
        ("names", "d24.yml", "names"),
        ("names", pyconfig.RUN_ORIGIN, "names"),
        ("null", "d24.yml", None),
        ("full", "command line", None),
        ("full", "tuned/some-card-1-d24.yml", None),  # of other devices
    ):
        line = f"remat_policy: {before}  # {origin}"
        saved.write_text(text.replace("remat_policy: null  # d24.yml", line))
        assert with_start(config).remat_policy == expected, line
        assert with_start(make_config(*words, "remat_policy=none")).remat_policy == "none"


def test_a_memory_plan_leaves_a_cpu_and_what_fits_alone(monkeypatch):
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 10**9)
    setup = set_up(make_config("model=d12"), jax.devices()[:1])
    assert fit_memory(setup) is setup
    assert on_a_gpu(monkeypatch, 80 * 10**9, "model=d12").plan.micro_rows == 32


class FailingStep:
    """A compiled step whose first call consumes the state and runs out of the device's memory."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, state, *args):
        self.calls += 1
        if self.calls == 1:
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"
            )
        return self.step(state, *args)


@pytest.mark.slow
def test_a_first_step_out_of_memory_is_repeated_with_half_the_rows(capsys):
    """State and loss are bit for bit those of a run that was told to take half the rows."""
    tiny = (*(word for word in TINY if "layers" not in word), "num_decoder_layers=1")
    half = make_config(*tiny, "per_device_batch_size=4")
    _, state, programs = start(half)
    expected = programs.train(state, batch_of(half))

    config = make_config(*tiny)
    setup, state, _ = start(config)
    failing = FailingStep(None)
    token_bytes = np.ones(config.vocab_size, np.int32)
    run = SimpleNamespace(
        setup=setup,
        state=state,
        say=print,
        tokenizer=SimpleNamespace(token_bytes=lambda: token_bytes),
        programs=build_programs(setup, failing, token_bytes),
    )

    def restart():
        run.state = train_state.initialize(config, setup.numerics, setup.optimizer, setup.abstract)

    metrics, compiled = memory_plan.take_first_step(run, batch_of(config), restart)
    assert failing.calls == 1 and compiled is not None
    assert setup.plan == (1, 1, 8) and run.setup.plan == (1, 2, 4)
    jax.tree.map(np.testing.assert_array_equal, (run.state, metrics), expected)
    out = capsys.readouterr().out
    assert "Out of memory with 8 rows per device\nCompiling for 4 rows per device\n" in out


def test_other_errors_of_the_first_step_are_raised():
    config = make_config(*TINY)
    setup = set_up(config, jax.devices()[:1])

    def broken(state, batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    run = SimpleNamespace(setup=setup, state={}, programs=SimpleNamespace(train=broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory_plan.take_first_step(run, {}, None)


@pytest.mark.parametrize(
    "overrides,remedy",
    [
        ((), "with 8 rows per device: set per_device_batch_size=4,"),
        (("per_device_batch_size=1",), "with 1 rows per device: set remat_policy=full,"),
        (("per_device_batch_size=1", "remat_policy=full"), "choose a smaller model"),
    ],
)
def test_out_of_memory_names_the_setting_to_change(overrides, remedy):
    setup = set_up(make_config(*TINY, *overrides), jax.devices()[:1])
    with pytest.raises(ValueError, match=remedy), explain_out_of_memory(lambda: setup):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError), explain_out_of_memory(lambda: setup):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_gpus_program_that_needs_more_than_the_card_is_compiled_smaller(monkeypatch):
    """XLA compiles it all the same for a GPU; its buffers tell."""
    peaks = {8: 90, 4: 49, 2: 40, 1: 20}  # 49 of 50 leave too little for anything else
    devices = jax.devices()[:1]

    class Lowered:
        def __init__(self, setup):
            self.peak = peaks[setup.plan.micro_rows]

        def compile(self):
            return SimpleNamespace(
                memory_analysis=lambda: SimpleNamespace(peak_memory_in_bytes=self.peak)
            )

    monkeypatch.setattr(memory_plan, "lower_train", Lowered)
    monkeypatch.setattr(hardware, "memory_limit_bytes", lambda: 50)
    setup = set_up(make_config(*TINY), devices)
    gpu = replace(setup, numerics=setup.numerics._replace(backend="gpu"))
    assert compile_train(gpu)[0].plan.micro_rows == 2
    asked = set_up(make_config(*TINY, "per_device_batch_size=4"), devices)
    asked = replace(asked, numerics=gpu.numerics)
    assert compile_train(asked)[0].plan.micro_rows == 4


def test_parameters_left_whole_on_every_device_are_refused():
    """Unless the rules ask for it."""
    mesh = jax.sharding.AbstractMesh((3, 1, 1), ("data", "fsdp", "tensor"))
    odd = make_config(*TINY)
    model = architecture(odd, Numerics("float32", "float32", "reference", "scatter", "cpu"))
    optimizer = groups.make_optimizer(odd, dtype="float32")
    abstract = train_state.abstract_state(odd, model, optimizer, mesh)
    with pytest.raises(
        ValueError, match=r"100% of the parameters would be replicated on each of 3 devices"
    ):
        check_sharding(odd, mesh, abstract)
    check_sharding(
        make_config(*TINY, "logical_axis_rules=[[activation_batch, data, fsdp]]"), mesh, abstract
    )


# Every mix of data, fsdp and tensor on eight devices.
LAYOUTS = {
    f"data {8 // fsdp // tensor} x fsdp {fsdp} x tensor {tensor}": [
        f"ici_fsdp_parallelism={fsdp}",
        f"ici_tensor_parallelism={tensor}",
        "per_device_batch_size=1",
    ]
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if fsdp * tensor <= 8
}
MIXED = "data 2 x fsdp 2 x tensor 2"

TEN_LOSSES = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import jax
jax.config.update("jax_num_cpu_devices", 8)
import test_train_step as t
from MaxNano.distributed import sharding
from MaxNano.data.loader import put_global

def losses(devices, *overrides):
    config = t.make_config(*t.TINY, "num_query_heads=4", "head_dim=8", *overrides)
    setup, state, programs = t.start(config, devices)
    place = sharding.batch_sharding(setup.mesh, config.logical_axis_rules)
    result = []
    with jax.set_mesh(setup.mesh):
        for step in range(10):
            state, metrics = programs.train(state, put_global(t.batch_of(config, step), place))
            result += [float(metrics["loss"]), float(metrics["grad_norm"])]
    return result

expected = losses(jax.devices()[:1])
for name in sys.argv[2:]:
    overrides = t.LAYOUTS[name]
    got = losses(jax.devices(), *overrides)
    worst = max(abs(a / b - 1) for a, b in zip(got, expected))
    print(name, worst)
    assert worst < 1e-5, (name, got, expected)
print("equal")
"""


@pytest.mark.parametrize(
    "layouts",
    [(MIXED,), pytest.param(tuple(LAYOUTS.keys() - {MIXED}), marks=pytest.mark.long)],
    ids=["mixed", "others"],
)
def test_every_layout_gives_the_losses_of_one_device(layouts):
    """Ten steps on eight virtual devices, losses and norms of gradients within 1e-5; most layouts
    accumulate gradients.
    """
    done = programs.run("-c", TEN_LOSSES, ROOT, *layouts)
    assert done.stdout.endswith("equal\n"), done.stdout + done.stderr


COLLECTIVES = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import json, math
from functools import partial
import jax, jax.extend
jax.config.update("jax_num_cpu_devices", 8)
import test_train_step as t
from MaxNano.training.setup import needed_bytes, set_up
from MaxNano.training.step import abstract_batch, train_step

def collectives(jaxpr, times=1):
    # [name, elements of the whole array, times per step] of collectives over arrays.
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ("all_gather", "reduce_scatter"):
            whole = eqn.outvars[0] if name == "all_gather" else eqn.invars[0]
            yield name, math.prod(whole.aval.shape), times
        if name == "psum" and max(v.aval.size for v in eqn.invars) > 256:
            yield name, max(v.aval.size for v in eqn.invars), times
        inner = times * eqn.params["length"] if name == "scan" else times
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from collectives(sub, inner)

def report(*overrides):
    config = t.make_config(*t.TINY, "per_device_batch_size=1", "global_batch_tokens=512", *overrides)
    setup = set_up(config, jax.devices())
    assert setup.plan.accumulation_steps == 2
    step = jax.jit(partial(train_step, setup=setup))
    with jax.sharding.use_abstract_mesh(setup.mesh.abstract_mesh):
        traced = step.trace(setup.abstract, *abstract_batch(setup))
    return {
        "collectives": list(collectives(traced.jaxpr.jaxpr)),
        "needed": needed_bytes(setup),
        "sizes": {k: [math.prod(x.shape) for x in jax.tree.leaves(v)] for k, v in setup.params.items()},
    }

print(json.dumps([report(), report("ici_fsdp_parallelism=8"), report("ici_fsdp_parallelism=4")]))
"""


def test_data_gathers_once_per_step_and_fsdp_layer_by_layer():
    """In the forward pass, again in the backward pass, and gradients leave their layer at once."""
    done = programs.run("-c", COLLECTIVES, ROOT)
    assert done.returncode == 0, done.stderr
    data, fsdp, mixed = json.loads(done.stdout)
    sizes = data["sizes"]
    layers, tables = sum(sizes["layers"]), sum(sizes["value_embeds"])
    ends = sum(sizes["token_embed"]) + sum(sizes["lm_head"])

    def moved(report, name, largest=math.inf):
        rows = report["collectives"]
        return sum(n * times for kind, n, times in rows if kind == name and n <= largest)

    assert moved(data, "all_gather") == moved(data, "reduce_scatter") == layers + tables + ends
    assert all(times == 1 for _, _, times in data["collectives"])
    # Two micro-batches; embedding and head are gathered once in each.
    assert moved(fsdp, "all_gather") == 2 * (2 * (layers + tables) + ends)
    assert moved(fsdp, "reduce_scatter") == 2 * (layers + tables + ends)
    # Nothing larger than a table or the largest matrix of one layer is ever whole.
    largest = max(n for _, n, _ in fsdp["collectives"])
    assert largest == max(*sizes["token_embed"], max(sizes["layers"]) // 4), fsdp["collectives"]
    # With both, half a layer's stack is gathered once, and the gradients of the halves are summed.
    assert moved(mixed, "all_gather", largest) >= moved(fsdp, "all_gather", largest)
    for report in fsdp, mixed:
        for kind in "working copy", "gradients":
            assert report["needed"][kind] < data["needed"][kind] / 2, kind
    assert fsdp["needed"]["parameters"] == data["needed"]["parameters"]


PLANS = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import json
from dataclasses import replace
import jax
jax.config.update("jax_num_cpu_devices", 16)
import test_train_step as t
from MaxNano.distributed import hardware
from MaxNano.training.memory_plan import fit_memory
from MaxNano.training.setup import needed_bytes, set_up

V6E = 125 * 2**28  # what a program may use on a v6e

def plan(memory_bytes, *overrides, devices=8):
    # As on accelerators with this much memory.
    hardware.memory_limit_bytes = lambda: memory_bytes
    setup = set_up(t.make_config("dtype=bfloat16", *overrides), jax.devices()[:devices])
    setup = fit_memory(replace(setup, numerics=setup.numerics._replace(backend="tpu")))
    needed = needed_bytes(setup)
    shape = setup.mesh.shape
    fits = sum(needed.values()) <= memory_bytes
    choices = setup.plan.micro_rows, setup.config.remat_policy
    return shape["data"], shape["fsdp"], fits, needed["working copy"], *choices

print(json.dumps([
    plan(V6E, "model=d24"),
    plan(V6E, "model=d32"),
    plan(2**37, "model=d32", "remat_policy=full"),
    plan(V6E, "model=d32", "remat_policy=full", "ici_fsdp_parallelism=1"),
    plan(V6E, "model=d32", "remat_policy=full", "ici_data_parallelism=8"),
    plan(V6E, "model=d40", "remat_policy=full", "ici_tensor_parallelism=2"),
    plan(V6E, "model=d32", "remat_policy=full", "logical_axis_rules=" + t.STACKED_FSDP),
    plan(2**31, "model=d16", "emb_dim=780", "num_query_heads=10", "head_dim=78"),
    plan(2**29, "model=d16", "emb_dim=256", "num_query_heads=2"),
    plan(V6E, "model=d32", "remat_policy=full", devices=16),
    plan(2**32, "model=d32", "remat_policy=full", devices=16),
]))
"""
STACKED_FSDP = "[[layers, fsdp, data], [vocab, fsdp, data], [activation_batch, data, fsdp]]"


def test_fsdp_is_chosen_where_data_parallelism_does_not_leave_half_of_the_memory():
    done = programs.run("-c", PLANS, ROOT)
    assert done.returncode == 0, done.stderr
    plans = json.loads(done.stdout)
    d24, d32, large, fsdp_1, data_8, tensor, stacked, odd, narrow, sixteen, tight = plans
    assert d24[:3] == [8, 1, True] and d24[4:] == [32, "names"]
    assert d32[:3] == [1, 8, True] and large[:3] == [8, 1, True]
    assert d32[3] < 2**29 < 5 * 2**30 < large[3]
    assert d32[4:] == [32, "full"], "more micro-batches would send more"
    # What was asked for stays, and so do rules that gather once per step in any case.
    assert fsdp_1[:2] == data_8[:2] == stacked[:2] == [8, 1]
    assert tensor[:2] == [1, 4], "over the devices that tensor leaves"
    assert odd[:2] == [2, 4], "eight do not divide a width of 780"
    assert narrow[:2] == [4, 2], "128 columns each"
    assert sixteen[:2] == [2, 8], "more parts would send more"
    assert tight[:2] == [1, 16], "where eight leave too little memory"

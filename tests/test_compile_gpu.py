"""Compiling for an NVIDIA GPU that is not there: targets, the patch of JAX, kinds and cost of
kernels, what fits; behind the marker gpu_compile with NVIDIA's compiler.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import xla_bridge
from test_train_compile import TINY, report, run

from MaxNano import pyconfig
from MaxNano.compile import gpu_report, hlo, programs, roofline, topologies
from MaxNano.compile.report import ProgramWork
from MaxNano.distributed import gpus, hardware
from MaxNano.training.setup import BatchPlan

H100 = "NVIDIA H100 80GB HBM3"
GIB = 2**30

# ---- Targets ------------------------------------------------------------------------------------


def fields(text):
    return dict(re.findall(r"(\w+): (\S+)", text))


def test_the_target_of_an_h100_has_the_figures_of_the_card():
    values = fields(gpus.target_text(gpus.GPUS["h100"]))
    assert values["core_count"] == "132" and values["fpus_per_core"] == "128"
    assert values["shared_memory_per_core"] == "233472"
    assert values["shared_memory_per_block_optin"] == "232448"
    assert values["l2_cache_size"] == "52428800" and values["memory_bandwidth"] == "3350000000000"
    assert (values["major"], values["minor"]) == ("9", "10"), "the last ones are cuDNN's"
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in gpus.target_text(
        gpus.GPUS["h100"]
    )
    assert f'device_description_str: "{H100}"' in gpus.target_text(gpus.GPUS["h100"])


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_gpu_has_a_chip_an_architecture_and_a_target(name):
    gpu = gpus.GPUS[name]
    chip = hardware.CHIPS[gpu.device_kind]
    assert gpus.gpu_of(gpu.device_kind) is gpu
    assert 0.9 < gpu.memory_bytes / chip.memory_bytes < 1.1
    # What tensor cores of this generation multiply per clock and SM, dense; a GeForce half of it.
    flops = chip.peak_flops / (gpu.multiprocessors * gpu.clock_ghz * 1e9)
    per_clock = {"8.0": 2048, "8.9": 1024, "9.0": 4096, "10.0": 8192, "12.0": 1024}
    expected = per_clock[gpu.compute_capability] / (2 if "GeForce" in gpu.device_kind else 1)
    assert flops == pytest.approx(expected, rel=0.08)
    text = gpus.target_text(gpu)
    assert text.count("{") == text.count("}") == 3
    assert "None" not in text
    assert f"{name}-1" in gpus.topology_names()
    assert (f"{name}-8" in gpus.topology_names()) == (gpu.link_bandwidth is not None)


def test_a_device_that_is_only_compiled_for_has_the_capability_of_its_table():
    known = SimpleNamespace(device_kind=H100)
    assert gpus.compute_capability(known) == "9.0"
    real = SimpleNamespace(device_kind=H100, compute_capability="9.1")
    assert gpus.compute_capability(real) == "9.1"
    assert gpus.compute_capability(SimpleNamespace(device_kind="Some chip")) == ""


def test_unknown_names_list_slices_and_gpus():
    with pytest.raises(
        ValueError, match=r"compile_topology=h100-3 is no TPU slice.*h100-1, h100-8"
    ):
        topologies.topology_devices("h100-3")
    with pytest.raises(ValueError, match="compile_num_slices=2 is for TPU slices"):
        topologies.topology_devices("h100-8", 2)


def test_without_the_plugin_the_error_names_the_extra(monkeypatch):
    def missing(**options):
        assert options["topology"] == "1x1x8" and "core_count: 108" in options["target_config"]
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    with pytest.raises(
        ValueError, match=r"compile_topology=a100-8 needs .* DEVICE=gpu bash setup.sh$"
    ):
        topologies.topology_devices("a100-8")


# ---- The patch of JAX ---------------------------------------------------------------------------


def test_jax_takes_gpu_for_cuda_only_inside():
    before = xla_bridge.canonicalize_platform
    with pytest.raises(RuntimeError):
        before("gpu")
    with pytest.raises(KeyError), topologies.cuda_without_gpu():
        assert xla_bridge.canonicalize_platform("gpu") == "cuda"
        assert xla_bridge.canonicalize_platform("cpu") == "cpu"
        raise KeyError
    assert xla_bridge.canonicalize_platform is before


def test_an_answer_of_jax_counts(monkeypatch):
    """As on a machine with an AMD GPU; other errors pass."""

    def answer(platform):
        if platform == "gpu":
            return "rocm"
        raise RuntimeError(f"Unknown backend: {platform}")

    monkeypatch.setattr(xla_bridge, "canonicalize_platform", answer)
    with topologies.cuda_without_gpu():
        assert xla_bridge.canonicalize_platform("gpu") == "rocm"
        with pytest.raises(RuntimeError, match="Unknown backend: tpu"):
            xla_bridge.canonicalize_platform("tpu")


def test_a_jax_without_the_function_is_one_line(monkeypatch):
    monkeypatch.delattr(xla_bridge, "canonicalize_platform")
    with pytest.raises(ValueError, match="cannot compile for a GPU"), topologies.cuda_without_gpu():
        pass


# ---- Kernels ------------------------------------------------------------------------------------

# Shortened lines of d12's train step as compiled for an H100, with a loop of three trips.
PROGRAM = (Path(__file__).parent / "gpu_step.hlo").read_text()


def kernels(text=PROGRAM):
    walk = roofline.walk(hlo.parse(text), hardware.CHIPS[H100])
    return {kernel.name: kernel for kernel in walk.operations}


def test_kernels_are_told_apart():
    assert {name: kernel.kind for name, kernel in kernels().items()} == {
        "wrapped_slice": "copy",
        "gemm_fusion": "Triton GEMM",
        "lt": "cuBLAS GEMM",
        "attention": "cuDNN",
        "gradients": "cuDNN",
        "wrapped_square": "fusion",
        "copied": "copy",
        "scatter_fusion": "gather/scatter",
        "update_fusion": "copy",
        "reduce_fusion": "reduction",
    }
    assert set(roofline.KINDS) >= {kernel.kind for kernel in kernels().values()}


def test_flops_are_those_of_the_products():
    found = kernels()
    assert found["gemm_fusion"].flops == 2 * 512 * 768 * 3072
    assert found["lt"].flops == 2 * 6 * 8 * 8 * 8
    # A window of 65 keys: 1, 2, ... 65, 65, ... of 256 queries.
    scores = sum(min(t + 1, 65) for t in range(256))
    assert found["attention"].flops == 2 * 2 * 2 * 6 * 128 * scores
    assert found["gradients"].flops == 5 * 2 * 2 * 6 * 128 * (256 * 257 // 2)
    assert all(not kernel.flops for kernel in found.values() if kernel.kind in ("fusion", "copy"))


def test_attention_without_a_mask_sees_all_keys():
    text = PROGRAM.replace('"mask_type": "CAUSAL"', '"mask_type": "NO_MASK"')
    assert kernels(text)["gradients"].flops == 5 * 2 * 2 * 6 * 128 * 256 * 256


def test_bytes_are_those_of_slices_and_updates():
    found = kernels()
    weight = 768 * 3072 * 2
    assert found["wrapped_slice"].bytes == 2 * weight, "not all twelve layers"
    assert found["gemm_fusion"].bytes == 512 * 768 * 2 + weight + 512 * 3072 * 2
    assert found["copied"].bytes == 2 * 512 * 768 * 4
    assert found["update_fusion"].bytes == 2 * 512 * 4 + 4, "not all four rows"
    rows = 512 * 768 * 4
    assert found["scatter_fusion"].bytes == 512 * 4 + rows + 2 * rows, "not the whole table"
    assert found["reduce_fusion"].bytes == 512 * 768 * 4 + 512 * 4


def test_of_an_array_only_the_elements_that_a_kernel_needs_are_read():
    """It computes the soft cap of the targets' logits, not of all."""
    text = PROGRAM.replace(
        "  ROOT %slice = bf16[1,768,3072]{2,1,0} slice(%param_0)",
        "  %cap = bf16[12,768,3072]{2,1,0} tanh(%param_0)\n"
        "  ROOT %slice = bf16[1,768,3072]{2,1,0} slice(%cap)",
    )
    weight = 768 * 3072 * 2
    assert kernels(text)["wrapped_slice"].bytes == 2 * weight
    twice = text.replace("slice(%cap)", "add(%cap, %cap)").replace("bf16[1,768", "bf16[12,768")
    assert kernels(twice)["wrapped_slice"].bytes == 2 * 12 * weight


def test_a_kernel_takes_the_larger_of_two_times():
    chip, found = hardware.CHIPS[H100], kernels()
    square = found["wrapped_square"]
    assert (square.count, square.bytes) == (3, 2 * 512 * 3072 * 2)
    assert square.total == pytest.approx(3 * square.bytes / chip.memory_bandwidth)
    gemm, lt = found["gemm_fusion"], found["lt"]
    by_bytes = gemm.bytes / chip.memory_bandwidth
    assert gemm.cycles == pytest.approx(max(gemm.flops / chip.peak_flops, by_bytes))
    assert lt.cycles == pytest.approx(lt.bytes / chip.memory_bandwidth)
    slow = chip._replace(peak_flops=1e9)
    walk = roofline.walk(hlo.parse(PROGRAM), slow)
    by_name = {kernel.name: kernel for kernel in walk.operations}
    assert by_name["gemm_fusion"].cycles == pytest.approx(gemm.flops / 1e9)
    assert by_name["lt"].cycles == pytest.approx(2 * lt.flops / 1e9), "float32 at half the rate"
    assert walk.pallas_flops == found["attention"].flops + found["gradients"].flops


def test_collectives_go_over_nvlink():
    device = SimpleNamespace(device_kind=H100, platform="gpu")
    mesh = SimpleNamespace(
        devices=np.array([device] * 8).reshape(8, 1), size=8, axis_names=("data", "tensor")
    )
    text = PROGRAM.replace(
        "  ROOT %reduce_fusion",
        "  %start = f32[512,768]{1,0} all-reduce-start(%f), replica_groups=[1,8]<=[8], to_apply=%sum\n"
        "  %done = f32[512,768]{1,0} all-reduce-done(%start)\n"
        "  ROOT %reduce_fusion",
    )
    (collective,) = roofline.walk(hlo.parse(text), hardware.CHIPS[H100], mesh=mesh).collectives
    size = 512 * 768 * 4
    assert (collective.kind, collective.bytes, collective.axes) == ("all-reduce", size, ("data",))
    assert collective.cycles == pytest.approx(2 * 7 / 8 * size / 450e9)


# ---- The report ---------------------------------------------------------------------------------


def compiled(temporaries=3 * GIB, text=PROGRAM):
    stats = SimpleNamespace(
        argument_size_in_bytes=2 * GIB,
        output_size_in_bytes=GIB,
        alias_size_in_bytes=GIB,
        temp_size_in_bytes=temporaries,
        generated_code_size_in_bytes=0,
    )
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: stats)


def mesh_of(device_kind):
    device = SimpleNamespace(device_kind=device_kind, platform="gpu")
    return SimpleNamespace(devices=np.array([[device]]), size=1, axis_names=("data", "tensor"))


def test_the_report_adds_up(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    made = gpu_report.analyze(
        compiled(), mesh_of(H100), work=ProgramWork(1e9, 4096, 100), compile_seconds=16.0
    )
    assert made.memory.total == 5 * GIB
    assert made.memory.limit == int(0.75 * made.card_bytes)
    assert made.step_seconds == pytest.approx(sum(cost.seconds for cost in made.kinds.values()))
    assert made.matmul_flops == sum(cost.flops for cost in made.kinds.values())
    assert made.kinds["fusion"].kernels == 3
    assert made.mfu == pytest.approx(1e9 / made.step_seconds / 989e12)
    totals = [kernel.total for kernel in made.kernels]
    assert totals == sorted(totals, reverse=True) and len(totals) == 10
    values = json.loads(json.dumps(made.to_json()))
    assert values["kernels"][0]["seconds"] and "cycles" not in values["kernels"][0]
    assert values["assumptions"]
    text = str(made.tables())
    for word in ("79.109", "59.332", "(estimate)", "Triton GEMM", "wrapped_square"):
        assert word in text, word
    assert "collectives" not in text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    assert gpus.program_memory_bytes(gpus.GPUS["h100"]) == int(0.95 * 84_942_979_072)


# ---- What fits ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What compile_program reads of a RunSetup."""

    plan: BatchPlan
    config: Any
    mesh: Any
    vocab_chunk: int = 8192


def a_setup(monkeypatch, gib_per_row, rows, per_device_batch_size=None):
    """256 rows a step on an RTX 4090, with a compiler whose programs need 2 GiB and so much a row."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")
    tried = []

    def lower(setup):
        tried.append(setup.plan.micro_rows)
        size = int(setup.plan.micro_rows * gib_per_row * GIB)
        return SimpleNamespace(compile=lambda: compiled(size))

    row = programs.Program(
        lower, lambda setup: ProgramWork(1e9, 4096, 100), "per_device_batch_size"
    )
    monkeypatch.setitem(programs.PROGRAMS, "train", row)
    words = [
        "model=d12",
        "compile_topology=rtx4090-1",
        "remat_policy=full",
        "vocab_chunk_size=2048",
    ]
    if per_device_batch_size:
        words.append(f"per_device_batch_size={per_device_batch_size}")
    config = pyconfig.initialize([str(pyconfig.BASE), *words])
    plan = BatchPlan(1, 256 // rows, rows)
    return Setup(plan, config, mesh_of("NVIDIA GeForce RTX 4090")), tried


@pytest.mark.parametrize("gib_per_row,rows", [(0.9, 16), (0.1, 128), (0.4, 32), (0.01, 256)])
def test_the_largest_batch_that_fits_is_compiled_or_reported(monkeypatch, gib_per_row, rows):
    """15.99 GiB remain for temporaries of 18 of the card's 24."""
    setup, _ = a_setup(monkeypatch, gib_per_row, 32)
    used, made = programs.compile_program(setup, "train")
    assert made.largest_micro_batch == rows
    assert used.plan.micro_rows == min(rows, 32)
    assert used.plan.rows == 256
    assert ("largest per_device_batch_size that fits", str(rows)) in made.tables()[-1][2]


def test_a_batch_that_the_user_set_is_refused_with_sizes(monkeypatch):
    setup, tried = a_setup(monkeypatch, 1.0, 32, per_device_batch_size=32)
    line = r"does not fit in a chip of rtx4090-1 \(34.0 GiB of 18.0 GiB\) with per_device_batch_size=32"
    with pytest.raises(programs.OutOfMemory, match=line):
        programs.compile_program(setup, "train")
    assert tried == [32]


def test_nothing_fits(monkeypatch):
    setup, _ = a_setup(monkeypatch, 30.0, 32)
    with pytest.raises(programs.OutOfMemory):
        programs.compile_program(setup, "train")


def test_what_the_compiler_refuses_is_one_line(monkeypatch):
    setup, _ = a_setup(monkeypatch, 0.1, 32)

    def lower(setup):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such engine\nbacktrace")

    row = programs.PROGRAMS["train"]._replace(lower=lower)
    monkeypatch.setitem(programs.PROGRAMS, "train", row)
    with pytest.raises(
        ValueError, match=r"refuses the train program: UNIMPLEMENTED: no such engine$"
    ):
        programs.compile_program(setup, "train")


# ---- With NVIDIA's compiler ---------------------------------------------------------------------

HAS_CUDA = any(
    importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.xla_{kind}")
    for kind in ("cuda12", "cuda13")
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="JAX's plugin for CUDA is missing (extra gpu)")


@pytest.mark.skipif(HAS_CUDA, reason="JAX's plugin for CUDA is installed")
def test_a_gpu_without_the_extra_is_one_line_and_status_2(tmp_path):
    _, err = run(tmp_path, *TINY, "compile_topology=h100-1", status=2)
    assert err.startswith("error: compile_topology=h100-1 needs JAX's plugin for CUDA"), err
    assert err.count("\n") == 1, err


@pytest.mark.gpu_compile
@needs_cuda
@pytest.mark.timeout(900)
def test_all_programs_compile_for_an_h100(tmp_path):
    words = ("compile_topology=h100-1", "decode_slots=16", "stream_interval=4", "prefill_rows=1")
    names = ("train", "evaluate", "prefill", "decode")
    keys = ("per_device_batch_size=128", f"compile_programs=[{','.join(names)}]")
    out, values = report(tmp_path, *TINY, *words, *keys)
    for text in ("train: memory", "roofline by kind of kernel (estimate)", "79.109", "cuDNN"):
        assert text in out, text
    assert values["versions"]["jax"] and any("cuda" in name for name in values["versions"])
    for name in names:
        program = values["programs"][name]
        assert 0 < program["memory"]["total"] < program["memory"]["limit"] < program["card_bytes"]
        assert program["step_seconds"] == pytest.approx(sum(k["total"] for k in program["kernels"]))
        assert program["matmul_flops"] > 0
    train = values["programs"]["train"]
    # Two layers, two micro-batches, forward and backward.
    assert train["kinds"]["cuDNN"]["kernels"] == 8
    assert train["matmul_flops"] >= 0.5 * train["model_flops"]
    assert train["largest_micro_batch"] == 256
    assert train["memory"]["aliased"] > 0, "the state is updated in place"
    assert any(".py:" in kernel["source"] for kernel in train["kernels"][:10])


@pytest.mark.gpu_compile
@needs_cuda
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["deterministic", "cublas", "cuda_graphs"])
@pytest.mark.long
def test_the_train_step_compiles_with_every_flag_group(tmp_path, name):
    words = ("compile_topology=h100-1", "per_device_batch_size=128", f"xla_flags=[{name}]")
    _, values = report(tmp_path, *TINY, *words)
    kinds = values["programs"]["train"]["kinds"]
    assert ("Triton GEMM" in kinds) == (name != "cublas"), kinds


@pytest.mark.gpu_compile
@needs_cuda
@pytest.mark.timeout(900)
@pytest.mark.parametrize("topology", [n for n in gpus.topology_names() if n != "h100-1"])
@pytest.mark.long
def test_the_train_step_compiles_for_every_topology(tmp_path, topology):
    _, values = report(tmp_path, *TINY, f"compile_topology={topology}", "per_device_batch_size=32")
    train = values["programs"]["train"]
    assert train["chips"] == int(topology.rpartition("-")[2])
    assert train["device"] == gpus.GPUS[topology.rpartition("-")[0]].device_kind
    if train["chips"] > 1:
        assert {c["kind"] for c in train["collectives"]} & {"all-reduce", "reduce-scatter"}
        assert all(c["axes"] for c in train["collectives"])


@pytest.mark.gpu_compile
@needs_cuda
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model,card_gib", [("d12", 24), ("d8", 8)])
@pytest.mark.long
def test_the_step_fits_on_a_small_card_without_a_setting(tmp_path, model, card_gib):
    """A card of 8 GiB, with JAX's three quarters of it: a quarter of an RTX 4090."""
    words = (f"model={model}", "compile_topology=rtx4090-1")
    share = str(0.75 * card_gib / 24)
    _, values = report(tmp_path, *words, XLA_CLIENT_MEM_FRACTION=share)
    memory = values["programs"]["train"]["memory"]
    assert memory["total"] < memory["limit"] < 0.75 * card_gib * GIB
    assert values["micro_batch_rows"] >= 4 and memory["aliased"] > 0

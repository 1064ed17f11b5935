"""Profiles: which operations a trace of any backend has, where they are in the model, and its scopes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from jax.profiler import ProfileData

from MaxNano import pyconfig
from MaxNano.compile import profile
from MaxNano.training import setup, step

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs" / "base.yml")

PROGRAM = """HloModule jit_train_step, is_scheduled=true

FileNames
1 "/x/MaxNano/models/layers.py"

FunctionNames
1 "mlp"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.9 = f32[4]{0} add(%p, %p), metadata={op_name="jit(train_step)/jvp(layer)/mlp/add" stack_frame_id=1}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
  %while.2 = f32[4]{0} while(%fusion.1), condition=%c, body=%b
  ROOT %copy.3 = f32[4]{0} copy(%while.2)
}
"""

# Microseconds of each event, by the plane and line on which it is.
STEPS = [("fusion.1", 3), ("while.2", 9), ("copy.3", 1)] * 2


def trace_of(plane, line, events, module="jit_train_step"):
    """An xplane with events [(name, statistics {name: text}, microseconds)]."""
    names = sorted({name for name, _, _ in events})
    stats = ["hlo_op", "hlo_module"]
    text = [f'name: "{plane}" lines {{ name: "{line}"']
    for name, values, spent in events:
        shown = "".join(
            f' stats {{ metadata_id: {stats.index(key) + 1} str_value: "{value}" }}'
            for key, value in values.items()
        )
        text.append(
            f"events {{ metadata_id: {names.index(name) + 1} duration_ps: {spent * 10**6}{shown} }}"
        )
    text.append("}")
    for kind, known in (("event", names), ("stat", stats)):
        for number, name in enumerate(known, 1):
            text.append(
                f"{kind}_metadata {{ key: {number} value {{ id: {number} name: '{name}' }} }}"
            )
    return ProfileData.text_proto_to_serialized_xspace(f"planes {{ {' '.join(text)} }}")


CPU_EVENTS = [(name, {"hlo_op": name, "hlo_module": "jit_train_step"}, t) for name, t in STEPS]
TRACES = {
    # Events of the host, and of another program, are no operations of the step.
    "cpu": (
        "/host:CPU",
        "tf_XLAEigen/1",
        [
            *CPU_EVENTS,
            ("end: copy.3", {}, 50),
            ("copy.3", {"hlo_op": "copy.3", "hlo_module": "jit_eval_step"}, 50),
        ],
    ),
    "gpu": (
        "/device:GPU:0",
        "Stream #13(Compute)",
        [(f"kernel_{name}", stats, t) for name, stats, t in CPU_EVENTS],
    ),
    "tpu": ("/device:TPU:0", "XLA Ops", [(f"%{name} = f32[4] x()", {}, t) for name, t in STEPS]),
}


@pytest.mark.parametrize("backend", TRACES)
def test_the_most_expensive_operations_of_a_trace(backend):
    listed = profile.operations(trace_of(*TRACES[backend]), PROGRAM, steps=2, devices=1)
    first, second = listed
    assert (first.name, first.scope, first.source) == ("fusion.1", "layer/mlp add", "layers.py:7")
    assert (first.seconds, first.calls, first.share) == pytest.approx((3e-6, 1, 0.75))
    assert (second.name, second.scope, second.source) == ("copy.3", "", "")
    assert "0.003" in profile.table(listed) and "layers.py:7" in profile.table(listed)


def test_kernels_of_a_gpu_that_name_no_operation_count_too():
    """Those of a CUDA graph: a kernel of XLA has the name of its operation, one of cuBLAS has not."""
    kernels = [("fusion_1", {}, 4), ("cutlass_gemm", {}, 12)]
    trace = trace_of("/device:GPU:0", "Stream #13(Compute)", kernels)
    listed = profile.operations(trace, PROGRAM, steps=1, devices=1)
    assert [(row.name, row.share, row.scope) for row in listed] == [
        ("cutlass_gemm", pytest.approx(0.75), ""),
        ("fusion.1", pytest.approx(0.25), "layer/mlp add"),
    ]


def test_times_are_per_step_and_device():
    listed = profile.operations(trace_of(*TRACES["gpu"]), PROGRAM, steps=1, devices=2)
    assert (listed[0].seconds, listed[0].calls) == pytest.approx((3e-6, 1))


def test_lines_that_repeat_operations_of_a_tpu_are_not_counted():
    trace = trace_of("/device:TPU:0", "Steps", TRACES["tpu"][2])
    with pytest.raises(ValueError, match="no operation"):
        profile.operations(trace, PROGRAM, steps=2, devices=1)


def test_a_program_whose_text_cannot_be_parsed_still_has_times():
    text = "HloModule jit_train_step"
    listed = profile.operations(trace_of(*TRACES["cpu"]), text, steps=2, devices=1)
    assert [(operation.name, operation.scope, operation.source) for operation in listed] == [
        ("fusion.1", "", ""),
        ("copy.3", "", ""),
    ]


@pytest.mark.parametrize(
    "op_name, scope",
    [
        ("jit(train_step)/jvp(layer)/attention/dot_general", "layer/attention dot_general"),
        (
            "jit(train_step)/shard_map/transpose(jvp(layer))/while/body/closed_call/mlp/jit(relu)/max",
            "layer/mlp max, backward",
        ),
        ("jit(train_step)/optimizer/muon/mul;jit(train_step)", "optimizer/muon mul"),
        ("jit(train_step)/jvp()/slice", "slice"),
        ("reduce_sum", "reduce_sum"),
        ("", ""),
    ],
)
def test_scopes_in_the_words_of_the_model(op_name, scope):
    assert profile.scope_of(op_name) == scope


@pytest.mark.parametrize("scan", ["true", "false"])
def test_the_scopes_of_a_step_read_like_the_model(scan):
    words = "model=d2 emb_dim=32 head_dim=16 num_query_heads=2 vocab_size=64 max_target_length=16"
    words += " short_window_multiple=8 global_batch_tokens=32 steps=2 window_pattern=L"
    words += f" scan_layers={scan} value_embed_gate_channels=4 smear_gate_channels=4"
    made = setup.set_up(pyconfig.initialize([BASE, *words.split()]))
    text = step.lower_train(made).as_text(debug_info=True)
    scopes = {profile.scope_of(name) for name in re.findall(r'loc\("([^"]*)"', text)}
    scopes = {scope.partition(" ")[0] for scope in scopes}
    assert scopes >= {
        "embed",
        "layer/attention",
        "layer/attention/attend",
        "layer/mlp",
        "layer/value_embed",
        "final_norm",
        "loss",
        "loss/head",
        "optimizer/muon",
        "optimizer/token_embed",
    }


@pytest.mark.parametrize(
    "value, problem",
    [
        ("[3]", "is not [first, end]"),
        ("[3, 3]", "is not [first, end]"),
        ("[5, 2]", "is not [first, end]"),
        ("[9, 12]", "begins after the last of steps=9"),
        ("[-1, 2]", "out of range"),
    ],
)
def test_wrong_profile_steps(value, problem):
    with pytest.raises(pyconfig.ConfigError, match=re.escape(problem)):
        pyconfig.initialize([BASE, "steps=9", f"profile_steps={value}"])


@pytest.mark.parametrize("fault", [None, "start", "stop"])
def test_a_profile_is_no_part_of_a_step_and_its_error_no_end_of_the_run(
    fault, tmp_path, monkeypatch, caplog
):
    calls, folders = [], []

    def note(name):
        calls.append(name)
        if name == fault:
            raise OSError("no space left")

    def start_trace(folder, **_):
        folders.append(Path(folder))
        note("start")

    def stop_trace():
        (folders[-1] / "host.xplane.pb").write_bytes(trace_of(*TRACES["cpu"]))
        note("stop")

    monkeypatch.setattr(profile.jax.profiler, "start_trace", start_trace)
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", stop_trace)
    logger = SimpleNamespace(flush=lambda: note("flush"), message=lambda text: note("message"))
    run = SimpleNamespace(
        config=SimpleNamespace(profile_steps=(2, 4)),
        directory=tmp_path,
        setup=SimpleNamespace(mesh=SimpleNamespace(local_devices=["cpu"])),
    )
    with profile.StepProfiler(run, SimpleNamespace(as_text=lambda: PROGRAM), logger) as profiler:
        for at in range(7):
            profiler.stop(at)
            profiler.start(at)
            note(at)
    if fault is None:
        calls = [call for call in calls if call != "message"]
        assert calls == [0, 1, "flush", "start", "flush", 2, 3, "flush", "stop", "flush", 4, 5, 6]
        assert (tmp_path / "tensorboard" / "host.xplane.pb").exists() and not caplog.text
    else:
        assert [call for call in calls if isinstance(call, int)] == list(range(7))
        assert "No profile: OSError: no space left" in caplog.text
        assert calls.count(fault) == 1

"""The report counts what a TPU program says: trips, estimates, FLOPs, what overlaps; and guesses
nothing silently.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from MaxNano.compile import calibration, collectives, costs, hlo
from MaxNano.compile import report as compile_report
from MaxNano.distributed import hardware

CHIP = hardware.CHIPS["TPU v6 lite"]


def cost(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


def program(entry, *others):
    """The text of a program whose entry computation has the given lines."""
    lines = "\n".join(f"  {line}" for line in entry)
    return "HloModule jit_f, is_scheduled=true\n\n" + "\n\n".join(
        [*others, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}"]
    )


def computation(name, *lines, arguments="p: f32[8]", result="f32[8]"):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} ({arguments}) -> {result} {{\n{body}\n}}"


def walk(text, **options):
    return costs.walk(hlo.parse(text), CHIP, **options)


STATE = "(s32[], f32[4096])"
ADD = computation("fused", "%p = f32[4096]{0} parameter(0)", "ROOT %a = f32[4096]{0} add(%p, %p)")


def loop(name, inside, trips=5, note=""):
    """A `while` over (counter, array), with its body and condition."""
    body = computation(
        f"{name}_body",
        f"%b = {STATE} parameter(0)",
        "%x = f32[4096]{0} get-tuple-element(%b), index=1",
        *inside,
        arguments="b: (s32[], f32[4096])",
        result=STATE,
    )
    condition = computation(
        f"{name}_condition",
        f"%c = {STATE} parameter(0)",
        "%i = s32[] get-tuple-element(%c), index=0",
        f"%limit = s32[]{{:T(128)}} {trips}",
        "ROOT %lt = pred[] compare(%i, %limit), direction=LT",
        arguments="c: (s32[], f32[4096])",
        result="pred[]",
    )
    line = (
        f"%{name} = {STATE} while(%state), condition=%{name}_condition, body=%{name}_body, "
        f'metadata={{op_name="jit(f)/while"}}{note}'
    )
    return line, body, condition


def fusion(name, operand, cycles, calls="fused"):
    return (
        f"%{name} = f32[4096]{{0}} fusion(%{operand}), kind=kLoop, calls=%{calls}, {cost(cycles)}"
    )


def test_loops_multiply_by_the_constant_of_their_condition_and_by_each_other():
    inner, *parts = loop("inner", [fusion("f", "x", 100)], "constant(3)")
    outer, *more = loop(
        "outer",
        ["%state = (s32[], f32[4096]) tuple(%x)", inner, fusion("g", "x", 7)],
        "constant(5)",
    )
    result = walk(program(["%state = (s32[], f32[4096]) parameter(0)", outer], ADD, *parts, *more))
    assert {(o.name, o.count, o.cycles) for o in result.operations if o.basis == "compiler"} == {
        ("f", 15, 100),
        ("g", 5, 7),
    }
    assert result.cycles == pytest.approx(15 * 100 + 5 * 7, abs=1)


def test_the_compilers_own_trip_count_comes_first():
    note = ', backend_config={"known_trip_count":{"n":"11"}}'
    line, *parts = loop("w", [fusion("f", "x", 100)], "parameter(1)", note)
    result = walk(program(["%state = (s32[], f32[4096]) parameter(0)", line], ADD, *parts))
    assert next(o.count for o in result.operations if o.name == "f") == 11


def test_a_loop_of_unknown_length_is_an_error():
    line, *parts = loop("w", [fusion("f", "x", 100)], "get-tuple-element(%c), index=0")
    with pytest.raises(hlo.HloError, match=r"trip count of the loop w \(jit\(f\)/while\)"):
        walk(program(["%state = (s32[], f32[4096]) parameter(0)", line], ADD, *parts))


def test_of_branches_the_dearest_counts():
    parts = [
        computation(
            f"branch{n}",
            "%x = f32[4096]{0} parameter(0)",
            fusion("f", "x", n),
            arguments="x: f32[4096]",
        )
        for n in (100, 900, 300)
    ]
    line = "%c = f32[4096]{0} conditional(%i, %x), branch_computations={%branch100, %branch900, %branch300}"
    assert walk(program(["%x = f32[4096]{0} parameter(0)", line], ADD, *parts)).cycles == 900


def test_what_is_near_two_to_the_63_is_unknown_and_costed_by_its_rows():
    gather = computation(
        "gathering",
        "%t = bf16[1000,512]{1,0} parameter(0)",
        "%i = s32[64]{0} parameter(1)",
        "ROOT %g = bf16[64,512]{1,0} gather(%t, %i), offset_dims={1}, slice_sizes={1,512}",
    )
    scatter = computation(
        "scattering",
        "%t = bf16[1000,512]{1,0} parameter(0)",
        "%i = s32[64]{0} parameter(1)",
        "%u = bf16[64,512]{1,0} parameter(2)",
        "ROOT %s = bf16[1000,512]{1,0} scatter(%t, %i, %u), to_apply=%sum",
    )
    text = program(
        [
            "%t = bf16[1000,512]{1,0} parameter(0)",
            "%i = s32[64]{0} parameter(1)",
            f"%g = bf16[64,512]{{1,0}} fusion(%t, %i), kind=kCustom, calls=%gathering, {cost(2**63 - 5)}",
            "ROOT %s = bf16[1000,512]{1,0} fusion(%t, %i, %g), kind=kCustom, calls=%scattering",
        ],
        gather,
        scatter,
    )
    rows = 64 * 512 * 2
    per_byte = CHIP.clock_hz / CHIP.memory_bandwidth / costs.ROW_BANDWIDTH_SHARE
    operations = {o.name: o for o in walk(text).operations}
    assert operations["g"].kind == operations["s"].kind == "gather/scatter"
    assert operations["g"].basis == operations["s"].basis == "bytes"
    assert operations["g"].cycles == pytest.approx(2 * rows * per_byte)
    assert operations["s"].cycles == pytest.approx(3 * rows * per_byte)


def test_operations_are_told_apart_by_what_they_make():
    bodies = [
        computation(
            "product",
            "%p = f32[8,16]{1,0} parameter(0)",
            "ROOT %d = f32[8,8]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf",
        ),
        computation(
            "batch", "%p = f32[4,24]{1,0} parameter(0)", "ROOT %t = f32[4,24]{1,0} negate(%p)"
        ),
        computation("tanh", "%p = f32[4,8]{1,0} parameter(0)", "ROOT %t = f32[4,8]{1,0} tanh(%p)"),
        computation(
            "weight",
            "%p = f32[32,64]{1,0} parameter(0)",
            "ROOT %t = f32[3,32,64]{2,1,0} negate(%p)",
        ),
        computation(
            "table", "%p = f32[100,64]{1,0} parameter(0)", "ROOT %t = f32[100,64]{1,0} negate(%p)"
        ),
        computation(
            "move",
            "%p = f32[4,8]{1,0} parameter(0)",
            "%i = s32[] constant(1)",
            "%j = s32[] add(%i, %i)",
            "ROOT %t = f32[1,8]{1,0} dynamic-slice(%p, %j, %i), dynamic_slice_sizes={1,8}",
        ),
    ]
    shapes = {
        "product": "f32[8,8]",
        "tanh": "f32[4,8]",
        "batch": "f32[4,24]",
        "weight": "f32[3,32,64]",
        "table": "f32[100,64]",
        "move": "f32[1,8]",
    }
    entry = [
        "%p = f32[8,16]{1,0} parameter(0)",
        "%w = f32[3,4,64]{2,1,0} parameter(1), sharding={devices=[1,8,1]<=[8]}",
        "%e = f32[25,64]{1,0} parameter(2), sharding={devices=[4,1,2]<=[8] last_tile_dim_replicate}",
        "%tokens = s32[4,24]{1,0} parameter(3)",
        "%token_weights = f32[4,24]{1,0} parameter(4)",
        *(
            f"%{n} = {s}{{1,0}} fusion(%p), kind=kLoop, calls=%{n}, {cost(1)}"
            for n, s in shapes.items()
        ),
    ]
    kinds = {o.name: o.kind for o in walk(program(entry, *bodies), vocab_size=100).operations}
    assert kinds == {
        "product": "matmul",
        "tanh": "activation",
        "batch": "activation",
        "weight": "weight",
        "table": "table",
        "move": "copy",
    }


GATHER = "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
SCATTER = f"{GATHER}, to_apply=%add"
RING = collectives.RING_LINKS * CHIP.ici_link_bandwidth / CHIP.clock_hz  # bytes a cycle


@pytest.mark.parametrize("compute", [1000, 10_000_000])
def test_a_collective_costs_what_nothing_hides(compute):
    text = program(
        [
            "%x = bf16[1024,1024]{1,0} parameter(0)",
            f"%s = (bf16[1024,1024]{{1,0}}, bf16[4096,1024]{{1,0}}) all-gather-start(%x), {GATHER}",
            fusion("f", "x", compute),
            "ROOT %d = bf16[4096,1024]{1,0} all-gather-done(%s)",
        ],
        ADD,
    )
    result = walk(text)
    (gather,) = result.collectives
    whole = 0.75 * 4096 * 1024 * 2 / RING
    assert (gather.kind, gather.bytes, gather.group_size, gather.overlapped) == (
        "all-gather",
        2**23,
        4,
        True,
    )
    assert gather.cycles == pytest.approx(whole)
    assert gather.exposed_cycles == pytest.approx(max(0, whole - compute))
    assert result.cycles == pytest.approx(max(whole, compute))


def test_collectives_at_the_same_time_share_the_network():
    start = "(bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) all-gather-start(%x), " + GATHER
    text = program(
        [
            "%x = bf16[1024,1024]{1,0} parameter(0)",
            f"%s = {start}",
            f"%t = {start}",
            "%d = bf16[4096,1024]{1,0} all-gather-done(%s)",
            "ROOT %e = bf16[4096,1024]{1,0} all-gather-done(%t)",
        ],
    )
    assert walk(text).cycles == pytest.approx(2 * 0.75 * 2**23 / RING)


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter():
    fused = computation(
        "all-reduce-scatter",
        "%p = bf16[4096,1024]{1,0} parameter(0)",
        "%zero = s32[] constant(0)",
        "%r = bf16[4096,1024]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum",
        "ROOT %s = bf16[512,1024]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={512,1024}",
    )
    line = "ROOT %f = bf16[512,1024]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter"
    result = walk(program(["%p = bf16[4096,1024]{1,0} parameter(0)", line], fused))
    (collective,) = result.collectives
    assert (collective.kind, collective.bytes, collective.overlapped) == (
        "reduce-scatter",
        2**23,
        False,
    )
    assert result.cycles == pytest.approx(7 / 8 * 2**23 / RING)


def test_a_collective_that_goes_on_inside_fusions_starts_and_ends_once():
    """As libtpu writes it with asynchronous collective fusion."""
    inside = "all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}"
    parts = [
        computation(
            "starting",
            "%p = bf16[1024,1024]{1,0} parameter(0)",
            f"%g = bf16[4096,1024]{{1,0}} {inside}",
            "ROOT %c = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0:S(1)}) custom-call(%g), "
            'custom_call_target="AsyncCollectiveStart"',
        ),
        computation(
            "going_on",
            "%p = bf16[1024,1024]{1,0} parameter(0)",
            f"%g = bf16[4096,1024]{{1,0}} {inside}",
            "%d = bf16[1024,1024]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf",
            "ROOT %t = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) tuple(%d, %g)",
        ),
        computation(
            "ending",
            "%p = bf16[4096,1024]{1,0} parameter(0)",
            f"%g = bf16[4096,1024]{{1,0}} {inside}",
            'ROOT %c = bf16[4096,1024]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"',
        ),
    ]
    text = program(
        [
            "%p = bf16[1024,1024]{1,0} parameter(0)",
            "%s = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0:S(1)}) fusion(%p), kind=kCustom, calls=%starting",
            "%a = bf16[1024,1024]{1,0} get-tuple-element(%s), index=0",
            "%m = (bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0}) fusion(%a), kind=kOutput, calls=%going_on, "
            + cost(9000),
            "%b = bf16[4096,1024]{1,0} get-tuple-element(%m), index=1",
            "ROOT %e = bf16[4096,1024]{1,0} fusion(%b), kind=kCustom, calls=%ending",
        ],
        *parts,
    )
    result = walk(text)
    (gather,) = result.collectives
    assert (gather.overlapped, gather.bytes) == (True, 2**23)
    assert gather.exposed_cycles == pytest.approx(0.75 * 2**23 / RING - 9000)
    assert [(o.name, o.kind) for o in result.operations] == [("m", "matmul")]


SHARD, WHOLE = "f32[1024,1024]{1,0}", "f32[4096,1024]{1,0}"


@pytest.mark.parametrize("is_passed_later", [False, True])
@pytest.mark.parametrize(
    "kind,attributes,source,result",
    [
        ("all-gather", GATHER, SHARD, WHOLE),
        ("reduce-scatter", SCATTER, WHOLE, SHARD),
        ("all-reduce", SCATTER, WHOLE, WHOLE),
    ],
)
def test_a_collective_started_on_another_core_is_one(
    kind, attributes, source, result, is_passed_later
):
    """As libtpu writes it for the SparseCores, with the operands at the start or, for a v7x, in an
    update, so that the start's own result is a few bytes.
    """
    offloaded = computation(
        "offloaded",
        f"%p = {source} parameter(0)",
        f"ROOT %g = {result} {kind}(%p), {attributes}",
    )
    where = 'async_execution_thread="sparsecore", to_apply=%offloaded'
    start = [f"%s = (({source}), {result}) call-start(%x), {where}"]
    if is_passed_later:
        start = [
            f"%s = ((), (), (s32[1]{{0:S(2)}})) call-start(), {where}",
            f"%u = (({source}), {result}) call-update(%s, %x)",
        ]
    text = program(
        [
            f"%x = {source} parameter(0)",
            *start,
            fusion("f", "x", 1000),
            f"ROOT %d = {result} call-done(%{'u' if is_passed_later else 's'})",
        ],
        offloaded + ', execution_thread="sparsecore"',
        ADD,
    )
    walked = walk(text)
    (found,) = walked.collectives
    assert (found.kind, found.bytes, found.overlapped) == (kind, 2**24, True)
    sent = (1.5 if kind == "all-reduce" else 0.75) * 2**24
    assert found.exposed_cycles == pytest.approx(sent / RING - 1000)
    assert not walked.copies


@pytest.mark.parametrize("compute", [1000, 10**6])
def test_a_gather_started_on_the_sparse_cores_counts_where_nothing_hides_it(compute):
    """As libtpu 0.0.50 writes it: a start without operands, an update that passes them, and the
    gather two calls deep.
    """
    rows = "bf16[4096,1024]{1,0}"
    lines = ("%t = bf16[8192,1024]{1,0} parameter(0)", "%i = s32[4096]{0} parameter(1)")
    gather = f"ROOT %g = {rows} gather(%t, %i), slice_sizes={{1,1024}}"
    calls = {
        "kernel": gather,
        "called": f"ROOT %k = {rows} fusion(%t, %i), kind=kCustom, calls=%kernel",
        "offloaded": f"%c = ((), {rows}, u32[]) call-start(%t, %i), to_apply=%called\n"
        f"  ROOT %d = {rows} call-done(%c)",
    }
    text = program(
        [
            "%x = bf16[1024,1024]{1,0} parameter(0)",
            *(line.replace("(1)", "(2)").replace("(0)", "(1)") for line in lines),
            "%s = ((), (), (s32[1]{0:S(2)})) call-start(), "
            'async_execution_thread="sparsecore", to_apply=%offloaded',
            f"%u = ((bf16[8192,1024]{{1,0}}, s32[4096]{{0}}), {rows}) call-update(%s, %t, %i)",
            fusion("f", "x", compute),
            f"ROOT %d = {rows} call-done(%u)",
        ],
        *(
            computation(name, *lines, line) + ', execution_thread="sparsecore"'
            for name, line in calls.items()
        ),
        ADD,
    )
    result = walk(text)
    whole = 2 * 2**23 / (costs.ROW_BANDWIDTH_SHARE * CHIP.memory_bandwidth) * CHIP.clock_hz
    assert [(o.name, o.kind, o.shape) for o in result.operations] == [
        ("f", "activation", "f32[4096]"),
        ("s", "gather/scatter", "bf16[4096,1024]"),
    ]
    assert result.operations[1].cycles == pytest.approx(max(0, whole - compute))
    assert result.cycles == pytest.approx(max(whole, compute))
    assert not result.copies


def test_between_slices_the_receiving_half_stands_for_the_collective():
    attributes = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = program(
        [
            "%x = bf16[1024,1024]{1,0} parameter(0)",
            "%t = token[] after-all()",
            f"%s = (bf16[1024,1024]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=2, {attributes}",
            f"%r = (bf16[1024,1024]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {attributes}",
            "%u = token[] send-done(%s), channel_id=2",
            "ROOT %d = (bf16[1024,1024]{1,0}, token[]) recv-done(%r), channel_id=1",
        ]
    )
    (reduce,) = walk(text).collectives
    assert (reduce.kind, reduce.network, reduce.group_size, reduce.bytes) == (
        "all-reduce",
        "dcn",
        4,
        2**21,
    )
    assert reduce.cycles == pytest.approx(1.5 * 2**21 / CHIP.dcn_bandwidth * CHIP.clock_hz)


@pytest.mark.parametrize(
    "notation,groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3}}", [[0, 2, 4]]),
    ],
)
def test_groups_in_every_notation(notation, groups):
    line = f"%g = f32[8]{{0}} all-gather(%p), channel_id=1, {notation}, use_global_device_ids=true"
    module = hlo.parse(program(["%p = f32[8]{0} parameter(0)", line]))
    assert hlo.replica_groups(module.computations["main"].instructions["g"]) == groups


def test_groups_in_another_notation_are_an_error():
    line = "%g = f32[8]{0} all-gather(%p), replica_groups=@list<7>, dimensions={0}"
    with pytest.raises(hlo.HloError, match="collective g"):
        walk(program(["%p = f32[8]{0} parameter(0)", line]))


def test_collectives_know_their_mesh_axes_and_network():
    devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)]).reshape(2, 2, 2)
    mesh = SimpleNamespace(devices=devices, axis_names=("data", "fsdp", "tensor"), size=8)
    lines = [
        f"%g{i} = bf16[64]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%sum"
        for i, groups in enumerate(
            ["[4,2]<=[8]", "[2,4]<=[8]", "[4,2]<=[2,4]T(1,0)", "{{0,1,2,3,4,5,6,7}}"]
        )
    ]
    result = walk(program(["%p = bf16[64]{0} parameter(0)", *lines]), mesh=mesh)
    assert [(c.axes, c.network) for c in result.collectives] == [
        (("tensor",), "ici"),
        (("fsdp", "tensor"), "ici"),
        (("data",), "dcn"),
        (("data", "fsdp", "tensor"), "dcn"),
    ]


def test_copies_beside_the_computation_are_listed_and_cost_nothing():
    text = program(
        [
            "%x = f32[4096]{0} parameter(0)",
            "%s = (f32[4096]{0:S(1)}, f32[4096]{0}, u32[]{:S(2)}) copy-start(%x)",
            fusion("f", "x", 50),
            "%d = f32[4096]{0:S(1)} copy-done(%s)",
            "%y = ((f32[4096]{0}), f32[1024]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1024]}",
            "ROOT %z = f32[1024]{0:S(1)} slice-done(%y)",
        ],
        ADD,
    )
    result = walk(text)
    assert result.cycles == 50
    assert [copy.bytes for copy in result.copies] == [4096 * 4, 1024 * 4]


# ---- Pallas -------------------------------------------------------------------------------------


def pallas(attributes):
    return walk(
        program(
            [
                "%q = bf16[4,2048,128]{2,1,0} parameter(0)",
                "%m = s8[1,4,3]{2,1,0} parameter(1)",
                '%o = bf16[4,2048,128]{2,1,0} custom-call(%m, %q, %q), custom_call_target="tpu_custom_call", '
                + attributes,
            ]
        )
    )


def test_a_kernel_that_says_what_it_costs():
    estimate = '"cost_estimate":{"flops":"%d","transcendentals":"7","bytes_accessed":"%d"}'
    by_flops = pallas(
        f'backend_config={{"custom_call_config":{{"body":"",{estimate % (10**12, 10)}}}}}'
    )
    assert by_flops.pallas_flops == 10**12
    peak = costs.PALLAS_FLOPS_SHARE * CHIP.peak_flops / CHIP.clock_hz
    assert by_flops.cycles == pytest.approx(10**12 / peak)
    assert by_flops.operations[0].basis == "flops"
    by_bytes = pallas(f'backend_config={{"custom_call_config":{{{estimate % (10, 10**9)}}}}}')
    assert by_bytes.cycles == pytest.approx(10**9 / CHIP.memory_bandwidth * CHIP.clock_hz)


def test_the_kernels_of_products_reach_the_share_that_their_bundles_say():
    estimate = '"cost_estimate":{"flops":"1000000000000","bytes_accessed":"10"}'
    for name, share in costs.KERNEL_FLOPS_SHARES.items():
        result = pallas(
            f'metadata={{op_name="jit(f)/jit(_{name})/{name}/pallas_call"}}, '
            f'backend_config={{"custom_call_config":{{"body":"",{estimate}}}}}'
        )
        peak = share * CHIP.peak_flops / CHIP.clock_hz
        assert result.cycles == pytest.approx(10**12 / peak)


def test_a_kernel_that_says_nothing_costs_its_bytes():
    result = pallas("metadata={}")
    assert (result.pallas_flops, result.operations[0].kind, result.operations[0].basis) == (
        0,
        "pallas",
        "bytes",
    )
    size = 3 * 4 * 2048 * 128 * 2 + 12
    assert result.cycles == pytest.approx(size / CHIP.memory_bandwidth * CHIP.clock_hz)


def test_splash_counts_the_tiles_of_its_grid():
    """And its attributes hold line ends, which the parser must see through."""
    result = pallas(
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"\n}}, '
        'metadata={op_name="jit(f)/splash_mha_fwd_residuals/pallas_call"}'
    )
    assert result.pallas_flops == 4 * (4 * 3) * 512 * 512 * 128 * 2 * 2


# ---- FLOPs --------------------------------------------------------------------------------------


def flops(*lines):
    module = hlo.parse(program(lines))
    return hlo.matmul_flops(module, module.computations["main"])


@given(st.tuples(*[st.integers(1, 300)] * 4))
def test_flops_of_a_batched_dot(sizes):
    b, m, k, n = sizes
    counted = flops(
        f"%x = f32[{b},{m},{k}]{{2,1,0}} parameter(0)",
        f"%y = f32[{b},{k},{n}]{{2,1,0}} parameter(1)",
        f"%d = f32[{b},{m},{n}]{{2,1,0}} dot(%x, %y), lhs_batch_dims={{0}}, rhs_batch_dims={{0}}, "
        "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
    )
    assert counted == 2 * b * m * k * n


@pytest.mark.parametrize(
    "left,right,out,window,expected",
    [
        # Heads as a window that reaches into the padding: of each place one element counts.
        (
            "512,1,1,4096",
            "4,1,512,128",
            "4,1,128,4096",
            "window={size=4x1 pad=3_3x0_0 rhs_reversal=1x0}, dim_labels=f01b_01io->01fb",
            2 * 4096 * 512 * 4 * 128,
        ),
        (
            "4,1024,512",
            "1,512,2048",
            "4,1024,2048",
            "window={size=1}, dim_labels=0bf_0io->0bf",
            2 * 4 * 1024 * 512 * 2048,
        ),
        (
            "2048,4,512",
            "512,4,1024",
            "2048,7,1024",  # 16 pairs of four elements and a window of four meet
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_i0o->b0f",
            2 * 2048 * 512 * 1024 * 16,
        ),
        (
            "2,16,8",
            "3,8,5",
            "2,7,5",
            "window={size=3 stride=2}, dim_labels=b0f_0io->b0f",
            2 * 2 * 8 * 5 * 7 * 3,
        ),
        (
            "2,4,8",
            "3,8,5",
            "2,5,5",
            "window={size=3 lhs_dilate=2}, dim_labels=b0f_0io->b0f",
            2 * 2 * 8 * 5 * (2 + 1 + 2 + 1 + 2),
        ),
    ],
)
def test_flops_of_a_convolution(left, right, out, window, expected):
    counted = flops(
        f"%x = bf16[{left}]{{0}} parameter(0)",
        f"%y = bf16[{right}]{{0}} parameter(1)",
        f"%c = bf16[{out}]{{0}} convolution(%x, %y), {window}",
    )
    assert counted == expected


def test_a_computation_of_another_core_is_read_to_its_end():
    """The SparseCores' end with their thread's name; what follows them is not theirs."""
    lines = ("%p = f32[8]{0} parameter(0)", "%q = f32[8]{0} parameter(1)")
    dot = "ROOT %d = f32[] dot(%p, %q), lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    text = program(
        [
            "%p = f32[8]{0} parameter(0)",
            "ROOT %f = f32[] fusion(%p, %p), kind=kLoop, calls=%product",
        ],
        computation("offloaded", *lines, "ROOT %s = f32[8]{0} add(%p, %q)")
        + ', execution_thread="sparsecore"',
        computation("product", *lines, dot),
    )
    module = hlo.parse(text)
    assert set(module.computations) == {"offloaded", "product", "main"}
    assert list(module.computations["offloaded"].instructions) == ["p", "q", "s"]
    assert hlo.matmul_flops(module, module.computations["main"]) == 16


def test_flops_count_fusions_and_trips():
    product = computation(
        "product",
        "%p = f32[64,64]{1,0} parameter(0)",
        "ROOT %d = f32[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    )
    call = f"%f = f32[64,64]{{1,0}} fusion(%x), kind=kOutput, calls=%product, {cost(10)}"
    line, *parts = loop("w", [call], "constant(9)")
    text = program(
        [
            "%state = (s32[], f32[4096]) parameter(0)",
            "%x = f32[64,64]{1,0} parameter(1)",
            call,
            line,
        ],
        product,
        *parts,
    )
    assert walk(text).matmul_flops == 10 * 2 * 64**3


# ---- Source lines, whole reports ----------------------------------------------------------------

FRAMES = """
FileNames
1 "/home/me/repository/MaxNano/models/transformer.py"
2 "/venv/site-packages/jax/numpy.py"
3 "/home/me/benchmark.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=3 function_name_id=1 line=5 end_line=5 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=77 end_line=77 column=1 end_column=2}
3 {file_name_id=2 function_name_id=1 line=900 end_line=900 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=3 parent_frame_id=2}
5 {file_location_id=3 parent_frame_id=1}
"""


@pytest.mark.parametrize(
    "frame,line",
    [
        (1, "benchmark.py:5"),
        (2, "transformer.py:77"),
        (3, "transformer.py:77"),
        (4, "benchmark.py:5"),
        (5, "numpy.py:900"),
    ],
)
def test_operations_name_our_innermost_line(frame, line):
    line_of_f = fusion("f", "x", 5) + f", metadata={{stack_frame_id={frame}}}"
    text = program(["%x = f32[4096]{0} parameter(0)", line_of_f], ADD)
    module = hlo.parse(text.replace("\n\n", FRAMES + "\n", 1))
    assert hlo.source_line(module, module.computations["main"].instructions["f"]) == line


def compiled(text, **sizes):
    names = ("argument", "output", "alias", "temp", "generated_code")
    stats = SimpleNamespace(**{f"{name}_size_in_bytes": sizes.get(name, 0) for name in names})
    stats.peak_memory_in_bytes = sizes.get("peak", 0)
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: stats)


def test_the_report_of_a_compiled_function():
    entry = ["%x = f32[4096]{0} parameter(0)", *(fusion(f"f{i}", "x", 1750 * i) for i in range(30))]
    report = compile_report.analyze(
        compiled(
            program(entry, ADD),
            argument=100,
            output=70,
            alias=60,
            temp=9000,
            peak=1110,
            generated_code=5,
        ),
        CHIP,
        work=compile_report.ProgramWork(model_flops=1e9, tokens=87, steps=1000),
        compile_seconds=3.0,
    )
    assert (
        report.memory.temporaries == 1000
        and report.memory.total == 1115
        and report.memory.limit == 31.25 * 2**30
    )
    assert report.cycles == 1750 * 435
    assert report.step_seconds == pytest.approx(435e-6)
    assert report.mfu == pytest.approx(1e9 / 435e-6 / 918e12)
    assert report.tokens_per_second == pytest.approx(87 / 435e-6)
    assert report.run_seconds == pytest.approx(0.435)
    assert report.run_price == pytest.approx(0.435 / 3600 * 0.540137)
    assert [o.name for o in report.most_expensive] == [f"f{i}" for i in range(29, 19, -1)]
    values = json.loads(json.dumps(report.to_json()))
    assert values["memory"]["total"] == 1115
    assert values["most_expensive"][0]["total"] == 1750 * 29
    assert sum(values["cycles_by_class"].values()) == pytest.approx(values["cycles"])
    assert values["assumptions"]
    text = str(report.tables())
    for word in ("31.25", "f29", "activation", "200,000", "estimated MFU"):
        assert word in text, word


def test_what_is_not_known_is_null():
    text = program(["%x = f32[4096]{0} parameter(0)", fusion("f", "x", 10)], ADD)
    report = compile_report.analyze(compiled(text), hardware.CHIPS["TPU v5 lite"])
    assert (report.mfu, report.run_seconds, report.run_price, report.model_flops) == (None,) * 4
    assert "unknown" in str(report.tables())


def test_text_that_is_no_program_is_refused():
    with pytest.raises(hlo.HloError, match="ENTRY"):
        hlo.parse("hello")


def test_measurements_on_a_v6e_correct_its_estimates_and_no_other_chips():
    table = calibration.FACTORS
    assert set(table) == set(costs.CLASSES)  # no class is left out, none is counted twice
    assert all(factor.low <= factor.value <= factor.high for factor in table.values())
    cycles = {"matmul": 1000.0, "copy": 100.0, "collective": 10.0}
    products, copies, collective = (table[kind] for kind in cycles)
    estimate = calibration.calibrate(cycles, CHIP)
    assert estimate == pytest.approx(
        [
            1000 * a + 100 * b + 10 * c
            for a, b, c in zip(products[:3], copies[:3], collective[:3], strict=True)
        ]
    )
    assert calibration.calibrate(cycles, hardware.CHIPS["TPU v5 lite"]) is None


def test_the_report_has_the_calibrated_range_beside_each_estimate():
    text = program(["%x = f32[4096]{0} parameter(0)", fusion("f", "x", 1_750_000)], ADD)
    # The steps are those of a run: 1,000 of 1 ms each, at 0.54 USD per hour and chip.
    work = compile_report.ProgramWork(model_flops=4e11, tokens=3, steps=1000, bytes=8e8)
    report = compile_report.analyze(compiled(text), CHIP, work=work)
    factor = calibration.FACTORS["activation"]
    assert report.cycles == 1_750_000  # as the compiler has it
    seconds, run, price = map(report.calibrated, ("step_seconds", "run_seconds", "run_price"))
    assert seconds == pytest.approx([1e-3 * part for part in factor[:3]])
    assert run == pytest.approx([1000 * part for part in seconds])
    assert price == pytest.approx([part / 3600 * CHIP.price for part in run])
    # What the chip gets done per second falls where the step takes longer.
    for name in ("mfu", "bandwidth_utilization", "tokens_per_second"):
        value, low, high = report.calibrated(name)
        assert [value * factor.value, low * factor.high, high * factor.low] == pytest.approx(
            [getattr(report, name)] * 3
        )
    rows = {row[0]: row for _, _, rows in report.tables() for row in rows}
    assert f"{factor.low * 1.75:,.1f} to {factor.high * 1.75:,.1f}" in rows["calibrated"][1]
    estimates = {name.removeprefix("estimated ") for name in rows if name.startswith("estimated")}
    calibrated = {name for name in rows if name.startswith("calibrated ")}
    assert calibrated == {f"calibrated {name}" for name in estimates} and len(estimates) == 6
    assert rows["calibrated run"][1] == run.times(1 / 60).text(",.1f", " min")
    values = json.loads(json.dumps(report.to_json()))
    assert values["calibrated_seconds"]["low"] == pytest.approx(1e-3 * factor.low)
    assert values["calibrated_tokens_per_second"]["high"] == pytest.approx(3e3 / factor.low)
    assert {"calibrated_cycles", "calibrated_mfu", "calibrated_run_price"} <= set(values)
    assert report.assumptions[-1] == calibration.ASSUMPTION and "matmul x" in calibration.ASSUMPTION
    other = compile_report.analyze(compiled(text), hardware.CHIPS["TPU v5 lite"], work=work)
    assert other.assumptions == costs.ASSUMPTIONS
    assert other.calibrated("step_seconds") is None and "calibrated" not in str(other.tables())
    assert other.to_json()["calibrated_seconds"] is None

"""The benchmarks: they start, they compare like with like, and they go on where they were stopped."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import ByteTokenizer
from test_model import random_params

from MaxNano import pyconfig
from MaxNano.compile import calibration, costs
from MaxNano.training.setup import flops_per_token, set_up
from MaxNano.training.step import batch_losses

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no package to install

from benchmarks import (  # noqa: E402
    alternatives,
    common,
    input_pipeline,
    loss,
    pods,
    step_time,
    straightforward,
)
from benchmarks import calibration as calibrate  # noqa: E402

SCRIPTS = sorted(
    path for path in (ROOT / "benchmarks").glob("*.py") if "pyconfig.launch" in path.read_text()
)
BASE = str(ROOT / "configs/base.yml")
TINY = (
    "num_decoder_layers=2",
    "emb_dim=32",
    "head_dim=16",
    "num_query_heads=2",
    "vocab_size=60",
    "max_target_length=32",
    "short_window_multiple=8",
    "global_batch_tokens=128",
    "steps=20",
    "num_cpu_devices=1",
)


def make_config(*words):
    return pyconfig.initialize([BASE, *words])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_refuses_a_wrong_key_before_anything_slow(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), BASE, "no_such_key=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no_such_key" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_there_are_scripts():
    names = {path.stem for path in SCRIPTS}
    assert {
        "step_time",
        "attention",
        "optimizer",
        "loss",
        "input_pipeline",
        "alternatives",
        "pods",
    } <= names


# ---- Alternatives: what is kept -----------------------------------------------------------------


def test_alternatives_are_valid_and_differ():
    configs = alternatives.configs([BASE, "model=d24"])
    assert len(configs) >= 10
    values = {
        json.dumps({key: own[key] for key in pyconfig.keys_of(own)}, default=str)
        for own in configs.values()
    }
    assert len(values) == len(configs)
    assert all(own.per_device_batch_size for own in configs.values())


def test_alternatives_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    words = [BASE, *TINY, f"compile_report={path}"]
    compiled = []

    def compile_step(config):
        compiled.append(config)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        one_hot = config.embedding_gradient == "one_hot"
        return {"failure": "too large"} if one_hot else {"all": 1.0 * len(compiled), "GiB": 2.0}

    def run():
        compiled.clear()
        alternatives.main(make_config(*TINY, f"compile_report={path}"))

    monkeypatch.setattr(sys, "argv", ["alternatives.py", *words])
    monkeypatch.setattr(
        alternatives, "ALTERNATIVES", dict(list(alternatives.ALTERNATIVES.items())[:4])
    )
    monkeypatch.setattr(common, "compile_step", compile_step)
    with pytest.raises(KeyboardInterrupt):
        run()
    with path.open("a") as file:
        file.write('{"key": "half a li')
    assert len(path.read_text().splitlines()) == 3
    run()
    assert len(compiled) == 2  # of the four, two were there
    run()
    assert not compiled
    out = capsys.readouterr().out
    assert "splash" in out and len(json.loads(out.splitlines()[-1])["rows"]) == 4
    monkeypatch.setattr(common, "source_hash", lambda: "another program")
    monkeypatch.setattr(
        common, "compile_step", lambda config: compiled.append(config) or {"failure": "too large"}
    )
    run()
    assert len(compiled) == 4
    assert "too large" in capsys.readouterr().out


# ---- Variants compute the same ------------------------------------------------------------------


def test_the_straightforward_loss_is_the_products():
    """And so are its gradients, in float32."""
    config = make_config(*TINY)
    setup = set_up(config, jax.devices()[:1])
    recipe = straightforward.set_up(config, jax.devices()[:1], kernel="reference", rows=1)
    assert recipe.plan.accumulation_steps == 4
    params = random_params(setup.model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 33), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def product(params):
        return jnp.mean(batch_losses(setup, params, batch))

    def plain(params):
        apart = straightforward.unstack(params)
        assert jax.tree.structure(straightforward.stack(apart)) == jax.tree.structure(params)
        return straightforward.mean_loss(recipe, apart, batch["inputs"], batch["targets"])

    (expected, grads), (got, others) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (product, plain)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # Scalars' gradients are sums that all but cancel: they are compared with the size of what was
    # summed.
    total = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(others), strict=True
    ):
        assert np.linalg.norm(other - leaf) < 1e-4 * np.linalg.norm(leaf) + 1e-6 * total, path


def test_all_losses_are_one():
    config = make_config(*TINY, "vocab_size=3000")
    rng = np.random.default_rng(0)
    hidden, head, targets = (
        np.asarray(
            rng.normal(size=x.shape) if x.dtype == np.float32 else rng.integers(0, 3000, x.shape),
            x.dtype,
        )
        for x in loss.shapes(config, 8, "float32")
    )
    results = {
        name: jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(hidden, head, targets)
        for name, function in loss.variants(config, 8, "cpu").items()
    }
    assert len(results) >= 4
    value, grads = results.pop("plain")
    for name, (other, others) in results.items():
        np.testing.assert_allclose(other, value, rtol=1e-5, err_msg=name)
        for a, b in zip(others, grads, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


# ---- Past one host ------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("rows", [256, 8192])
@pytest.mark.parametrize("topology,slices", pods.SLICES)
def test_a_layout_uses_every_chip_and_cuts_the_rows(topology, slices, rows, tensor):
    chips = int(topology.partition("-")[2]) * slices
    layout = pods.Layout.choose(chips, slices, rows, tensor)
    assert layout.tensor >= tensor
    assert layout.data * layout.fsdp * layout.tensor * layout.slices == chips
    assert rows % (layout.data * layout.fsdp * layout.slices) == 0
    config = make_config("model=d24", *layout.words())
    assert config.dcn_data_parallelism == slices


def test_a_step_is_put_together_of_its_parts():
    config = make_config("model=d24")
    whole = {
        "step cycles": 1.75e6,
        "micro-batch cycles": 0.875e6,
        "token cycles": 1.75e3,
        "working GiB": 1.0,
        "rows": 32,
        "tensor": 2,
        "calibration": (0.5, 0.25, 1.0),
    }
    seconds = {"fsdp ici": 0.002, "data dcn": 0.003, "tensor ici": 0.001}
    short = {"state GiB": 2.0, "seconds": seconds, "GB": {}}
    layout = pods.Layout(data=4, fsdp=8, tensor=2, slices=1)
    row = pods.estimate(config, whole, short, layout, tokens=64 * 256)
    assert row["tokens ms"] == pytest.approx(256e-3)
    assert row["weights ms"] == pytest.approx(1.5)
    # Two chips share a row's tokens, so activations are those of twice the tokens of a chip.
    assert (row["ICI ms"], row["DCN ms"]) == pytest.approx((2 + 2 * 1, 3))
    assert row["step ms"] == pytest.approx(1.756 + 4 + 3)
    assert row["at most GiB"] == 3
    network = calibration.COLLECTIVES
    assert row["calibrated ms"] == "{:,.0f} ({:,.0f} to {:,.0f})".format(
        *(
            1.756 * part + 7 * factor
            for part, factor in zip(whole["calibration"], network[:3], strict=True)
        )
    )
    # Rates fall where the step takes longer: 918e12 FLOP/s of 64 chips are the peak.
    step = [
        1.756 * part + 7 * factor
        for part, factor in zip((0.5, 0.25, 1.0), network[:3], strict=True)
    ]
    rates = [64 * 256 / step[part] / 1e3 for part in (0, 2, 1)]
    assert row["calibrated M tokens/s"] == "{:,.2f} ({:,.2f} to {:,.2f})".format(*rates)
    flops = flops_per_token(config) * 64 * 256 / (64 * 918e12 / 1e3)
    assert row["calibrated MFU"] == "{:.1%} ({:.1%} to {:.1%})".format(
        *(flops / step[part] for part in (0, 2, 1))
    )
    # 32 rows on two chips are a micro-batch: three times as many tokens are three of them.
    row = pods.estimate(config, whole, short, layout, tokens=3 * 32 * 2048 * 32)
    assert row["weights ms"] == pytest.approx(1 + 3 * 0.5)


def test_work_on_weights_is_told_from_work_on_tokens():
    def operation(kind, op_name):
        return costs.Operation("x", kind, 1.0, 1, "compiler", "", "", op_name)

    assert pods.unit_of(operation("matmul", "jit(train_step)/optimizer/dot_general")) == "step"
    assert pods.unit_of(operation("table", "jit(train_step)/add")) == "micro-batch"
    assert (
        pods.unit_of(operation("matmul", "jit(train_step)/shard_map/loss/dot_general")) == "token"
    )


# ---- Calibration --------------------------------------------------------------------------------


def test_a_class_gets_what_the_classes_before_it_leave(monkeypatch):
    def factor(value):
        return calibration.Factor(value, value, value, "")

    table = {kind: factor(0.5) for kind in costs.CLASSES} | {"matmul": factor(0.9)}
    monkeypatch.setattr(calibration, "FACTORS", table)
    assert calibrate.class_factor("matmul", {"matmul": 2.0}, 3.0) == pytest.approx(1.5)
    # 10 of products become 9; the 4 that remain are 8 by estimate.
    parts = {"matmul": 10.0, "activation": 6.0, "copy": 2.0}
    assert calibrate.class_factor("activation", parts, 13.0) == pytest.approx(0.5)
    # 4 of transposes become 2; the kernel's 3 are 6 by its bundles.
    parts = {"weight": 4.0, "pallas": 6.0}
    assert calibrate.class_factor("pallas", parts, 5.0) == pytest.approx(0.5)
    rows = [{"class": "matmul", "of its class": ratio} for ratio in (0.8, 1.0, 0.7)]
    assert calibrate.sum_up(rows) == [
        {"class": "matmul", "programs": 3, "median": 0.8, "lowest": 0.7, "highest": 1.0}
    ]


def test_every_measured_program_is_of_a_calibrated_class_and_names_its_source():
    programs = calibrate.programs()
    assert {program.kind for program in programs} <= set(calibration.FACTORS)
    assert len({program.name for program in programs}) == len(programs)
    assert all(program.milliseconds > 0 and "@" in program.source for program in programs)
    copy = next(program for program in programs if program.name.startswith("copy"))
    ((shape, _),) = copy.shapes
    # tpu-recipes: 1,359.6 GB/s, read and written.
    assert 2 * 2 * np.prod(shape) / copy.milliseconds / 1e6 == pytest.approx(1359.6, rel=1e-3)


def test_the_measured_attention_is_attention():
    q, k, v = (
        jax.random.normal(key, (1, 128, 2, 16)) for key in jax.random.split(jax.random.key(0), 3)
    )
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / 4
    expected = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(calibrate.plain_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


# ---- Measured on this machine -------------------------------------------------------------------


def test_step_time_takes_steps(monkeypatch, capsys):
    monkeypatch.setattr(step_time, "TURNS", 1)
    plain = (
        "value_embed_gate_channels=0",
        "smear_gate_channels=0",
        "use_backout=false",
        "muon_iterations=1",
    )
    step_time.main(make_config(*TINY, *plain, "num_decoder_layers=1"))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert 0 < row["best s"] <= row["median s"] <= row["worst s"]
    assert row["tokens/s"] == pytest.approx(128 / row["median s"], rel=0.1)
    assert row["GiB"] > 0


def test_step_time_of_a_large_model_is_an_estimate(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        step_time.train_compile, "main", lambda config: asked.append(config.model) or 0
    )
    monkeypatch.delenv("NANOCHAT", raising=False)
    assert step_time.main(make_config("model=d24", "num_cpu_devices=1")) == 0
    assert asked == ["d24"] and capsys.readouterr().out.startswith("ESTIMATED for v6e-8")
    assert not step_time.is_too_large(make_config(*TINY))


def test_the_input_pipeline_says_what_a_million_tokens_need(tmp_path, monkeypatch, capsys):
    texts = ["word " * (n % 40 + 1) for n in range(60)]
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=15)
    for name, value in (("WARM_TOKENS", 100), ("MEASURED_TOKENS", 2000), ("REPEATS", 1)):
        monkeypatch.setattr(input_pipeline, name, value)
    monkeypatch.setattr(input_pipeline, "load_tokenizer", lambda config: ByteTokenizer())
    monkeypatch.setattr(input_pipeline.os, "cpu_count", lambda: 1)
    monkeypatch.delenv("NANOCHAT", raising=False)
    input_pipeline.main(
        make_config(
            *TINY,
            f"dataset_path={tmp_path}",
            "data_readers=2",
            "tokenize_batch_documents=5",
            "packing_buffer_documents=10",
        )
    )
    out = capsys.readouterr().out
    rows = {row["what"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert {"encoding", "packing", "transfer", "loader, a thread", "loader, 1 process"} <= set(rows)
    assert all(row["tokens/s"] > 0 and row["CPU s a million"] >= 0 for row in rows.values())
    assert "A million tokens/s needs " in out and "data_workers=" in out


# ---- Compiled -----------------------------------------------------------------------------------


@pytest.mark.tpu_compile
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "script",
    ["straightforward", "loss", "alternatives", "pods", "step_time", "calibration", "products"],
)
def test_a_small_model_is_compiled(script, tmp_path):
    words = (
        "num_decoder_layers=8 window_pattern=SL emb_dim=128 head_dim=128 num_query_heads=1 vocab_size=16384 "
        "max_target_length=512 global_batch_tokens=262144 steps=100"
    ).split()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / f"benchmarks/{script}.py"),
            BASE,
            *words,
            f"compile_report={tmp_path}/rows.json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ESTIMATED for" in done.stdout

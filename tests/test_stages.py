"""A new stage and a new evaluation are a row each: a DPO-like stage and a toy evaluation, trained
by train.train.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import ByteTokenizer
from test_sources import make_config

from MaxNano import evaluate, pyconfig, train
from MaxNano.data.loader import put_global
from MaxNano.distributed.preemption import Preemption
from MaxNano.evals.base import EVALS, measured_steps
from MaxNano.evals.results import ResultTable
from MaxNano.stage_configs import STAGE_CONFIGS, StageConfig, stage_config
from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer
from MaxNano.training import stages
from MaxNano.training.setup import set_up
from MaxNano.training.stages import STAGES, Stage, stage_of

ROOT = Path(__file__).parents[1]
BETA = 0.5


# ---- The stage: pairs of rows, of which the first is preferred ----------------------------------


class Pairs:
    """Rows 2i that count up, which are preferred, and rows 2i + 1 of random tokens."""

    def __init__(self, run, state):
        if run.setup.plan.micro_rows % 2:
            raise ValueError("pairs need an even per_device_batch_size")
        self.run, self.place = run, state["place"] if state else 0
        self.reference = jax.tree.map(jnp.copy, run.params)
        self.ready = None

    def draw(self, seed):
        rows, length = self.run.setup.plan.rows, self.run.config.max_target_length
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 250, (rows, length + 1), np.int32)
        ids[::2] = (ids[::2, :1] + np.arange(length + 1)) % 250
        host = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
        host["weights"] = np.ones((rows, length), np.float32)
        return put_global(host, self.run.rows_sharding)

    def fill(self):
        batch = self.draw(self.place)
        self.ready = batch | {"reference_losses": self.run.programs.score(self.reference, batch)}

    def shortage(self):
        return None

    def __next__(self):
        self.fill()
        self.place += 1
        return self.ready

    def state(self):
        return {"place": self.place, "readers": {}}

    def position(self):
        return {"pairs": self.place * self.run.setup.plan.rows // 2}

    def close(self):
        pass


def margins(nll, reference):
    """How much more likely than under the reference the preferred row is than the other one, in
    nats.
    """
    rewards = jnp.sum(reference - nll, axis=1)
    return rewards[::2] - rewards[1::2]


def preference_losses(config, nll, batch):
    return -jax.nn.log_sigmoid(BETA * margins(nll, batch["reference_losses"]))


def count_pairs(batch):
    return jnp.float32(batch["targets"].shape[0] / 2)


def evaluate_preference(run):
    batch = run.batches.draw(10**6)
    before, now = (run.programs.score(p, batch) for p in (run.batches.reference, run.params))
    return {"preferred": float(jnp.mean(margins(now, before) > 0))}


DPO = Stage(
    Pairs,
    evaluate_preference,
    preference_losses,
    count_pairs,
    batch_columns=lambda config: {"reference_losses": jnp.float32},
)


# ---- Stages that read text ----------------------------------------------------------------------


@pytest.mark.parametrize("split,words", [("train", "2 readers"), ("validation", "1 reader")])
def test_fewer_readers_than_asked_for_are_said(tmp_path, split, words):
    """Small data were read by fewer readers, which decide the batches, and no line said so."""
    for name, groups in (("a", 2), ("b", 1)):
        table = pa.table({"text": [f"{name} {number}" for number in range(4 * groups)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    sizes = {"max_target_length": 16, "global_batch_tokens": 128, "data_readers": 4}
    config = make_config("parquet", tmp_path, **sizes)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plan = SimpleNamespace(plan=SimpleNamespace(rows=8))
    lines = []
    run = SimpleNamespace(setup=plan, config=config, tokenizer=ByteTokenizer(), say=lines.append)
    run.rows_sharding = sharding
    with stages.open_loader(run, split) as batches:
        assert next(batches)["inputs"].shape == (8, 16)
    what = {"train": "training"}.get(split, split)
    assert lines == [f"Reading the {what} data with {words}: too little for data_readers=4"]
    lines.clear()
    run.config = pyconfig.replace(config, "test", data_readers=int(words[0]))
    stages.open_loader(run, split).close()
    assert lines == []


# ---- The evaluation -----------------------------------------------------------------------------


class HeadNorm:
    """The norm of the output head."""

    event = "head"
    at_start = True

    def __init__(self, run):
        self.run = run

    @staticmethod
    def interval(config):
        return 4

    def measure(self, results):
        values = {"norm": float(jnp.linalg.norm(self.run.params["lm_head"]))}
        results.put("head", {}, values)
        return values

    def table(self, results):
        return ResultTable("head", ("metric", "value"), list(self.measure(results).items()))


# ---- Rows added ---------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setitem(
        STAGE_CONFIGS, "dpo", StageConfig("dpo", ("synthetic",), lambda values: "toy pairs")
    )
    monkeypatch.setitem(STAGES, "dpo", DPO)
    monkeypatch.setitem(EVALS, "head", HeadNorm)


@pytest.fixture
def words(tmp_path):
    """The command line of a run of the stage, whose file is beside a copy of base.yml."""
    configs = tmp_path / "configs"
    (configs / "models").mkdir(parents=True)
    (configs / "stages").mkdir()
    shutil.copy(ROOT / "configs/base.yml", configs)
    (configs / "stages/dpo.yml").write_text("dataset_type: synthetic\neval_interval: 4\n")
    tokenizer = BpeTokenizer(NANOCHAT_PATTERN, {bytes([i]): i for i in range(256)})
    tokenizer.save(tmp_path / "tokenizer")
    return [
        str(configs / "base.yml"),
        "model=d2",
        "stage=dpo",
        "emb_dim=32",
        "head_dim=16",
        "num_query_heads=2",
        "max_target_length=16",
        "global_batch_tokens=256",
        "per_device_batch_size=4",
        f"vocab_size={tokenizer.vocab_size}",
        "steps=12",
        "learning_rate_scale=1",
        "sample_interval=0",
        "checkpoint_interval_steps=5",
        f"tokenizer_path={tmp_path}/tokenizer",
        f"base_output_directory={tmp_path}/runs",
        "num_cpu_devices=1",
        "tensorboard=false",
        "jax_cache_dir=''",
    ]


def train_with(config):
    setup = set_up(config, jax.devices()[:1])
    with Preemption() as preemption, jax.set_mesh(setup.mesh):
        return train.train(setup, config, preemption)


def events_of(path, name):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.get("event") == name]


@pytest.mark.slow
def test_a_stage_and_an_evaluation_are_a_row_each(rows, words, tmp_path, monkeypatch, capsys):
    config = pyconfig.initialize(words)
    assert stage_config(config).name == "dpo" and stage_of(config) is DPO
    assert train_with(config) == 0
    metrics = tmp_path / "runs/d2_dpo/metrics.jsonl"
    preferred = events_of(metrics, "validation")
    assert [row["step"] for row in preferred] == [0, 4, 8, 12]
    assert preferred[0]["preferred"] == 0 and preferred[-1]["preferred"] == 1
    steps = [row for row in map(json.loads, metrics.read_text().splitlines()) if "event" not in row]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-3), "it begins at the reference"
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and steps[-1]["pairs"] == 12 * 8
    norms = events_of(metrics, "head")
    assert [row["step"] for row in norms] == [0, 4, 8, 12]

    # evaluate.py knows the row too, and measures the same.
    monkeypatch.setattr(evaluate.runtime, "initialize", lambda config: None)
    monkeypatch.setattr(evaluate, "set_up", lambda config: set_up(config, jax.devices()[:1]))
    evaluate.evaluate(pyconfig.initialize([*words, "evals=head"]))
    assert f"{norms[-1]['norm']}" in capsys.readouterr().out


def test_without_the_row_the_stage_is_that_of_the_data(words):
    """`stage` names a file of values; the row is chosen by it if there is one, else by
    dataset_type.
    """
    assert stage_config(pyconfig.initialize(words)).name == "pretrain"
    base = str(ROOT / "configs/base.yml")
    for more, name in {
        (): "pretrain",
        ("stage=sft",): "sft",
        ("stage=rl",): "rl",
        ("dataset_type=chat",): "sft",
        ("dataset_type=rollouts",): "rl",
        ("stage=sft", "dataset_type=rollouts"): "rl",
        ("stage=sft", "dataset_type=parquet"): "pretrain",
    }.items():
        assert stage_config(pyconfig.initialize([base, "model=d2", *more])).name == name


def test_older_checkpoints_tell_when_their_evaluations_ran():
    old = {"data": None, "metrics": None, "evaluated_step": 8, "core_step": 4, "chat_step": None}
    assert measured_steps(old) == {"bpb": 8, "samples": 8, "core": 4, "chat": None}
    assert measured_steps({"measured_steps": {"bpb": 3}}) == {"bpb": 3}
    assert set(measured_steps({}).values()) == {None}

"""The table of docs/guides/change.md is true: each row's change, made in a copy of the tree,
works.

A test edits only the files that its row names and then uses the change in a new process.
"""

import json
import math
import os
import re
import shutil
import textwrap
from pathlib import Path

import programs
import pytest

from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer

ROOT = Path(__file__).parents[1]

TINY = (
    "model=d2 emb_dim=32 head_dim=16 num_query_heads=2 max_target_length=32 vocab_size=300"
    " global_batch_tokens=256 steps=4 muon_iterations=1 num_cpu_devices=1 dataset_type=synthetic"
    f" jax_cache_dir={os.environ['MAXNANO_TEST_CACHE']}"
).split()
HELPERS = f"""
import numpy as np
from MaxNano import pyconfig

TINY = {TINY}

def config_of(*words):
    return pyconfig.initialize(["configs/base.yml", *TINY, *words])

def model_of(*words):
    from MaxNano.models.setup import set_up_model
    return set_up_model(config_of(*words))

def hidden_of(setup):
    import jax
    rng = np.random.default_rng(0)
    def draw(x):
        return jax.numpy.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)
    params = jax.tree.map(draw, setup.model.shapes)
    tokens = np.arange(setup.config.max_target_length, dtype=np.int32)[None]
    return jax.jit(lambda params: setup.model.bind(params)(tokens))(params)
"""


class Copy:
    """A copy of the files that a contributor edits."""

    def __init__(self, folder):
        self.folder = folder
        self.touched = set()
        for name in ("MaxNano", "configs"):
            shutil.copytree(ROOT / name, folder / name)  # with the modules as bytecode

    def write(self, path, text):
        """Adds a file."""
        assert not (self.folder / path).exists()
        self.touched.add(path)
        (self.folder / path).write_text(textwrap.dedent(text).lstrip())

    def append(self, path, text):
        """Adds text to the end of a file."""
        self.touched.add(path)
        with open(self.folder / path, "a") as file:
            file.write("\n\n" + textwrap.dedent(text).strip() + "\n")

    def replace(self, path, pattern, text):
        """Replaces what a regular expression matches, which must be there once."""
        self.touched.add(path)
        old = (self.folder / path).read_text()
        new, count = re.subn(pattern, text, old, flags=re.MULTILINE)
        assert count == 1, f"{path}: {pattern} matches {count} times"
        (self.folder / path).write_text(new)

    def python(self, code):
        """What code prints in the copy."""
        command = ["-c", HELPERS + textwrap.dedent(code)]
        return self._run(command).stdout

    def program(self, name, *words):
        """What a program of the copy prints."""
        return self._run([f"MaxNano/{name}", "configs/base.yml", *words]).stdout

    def _run(self, command):
        env = {**os.environ, "PYTHONPATH": str(self.folder)}
        done = programs.run(*command, cwd=self.folder, env=env)
        assert done.returncode == 0, done.stderr
        return done


@pytest.fixture
def tree(tmp_path):
    return Copy(tmp_path)


def test_an_attention_kernel(tree):
    """A function and a row of KERNELS; `attention` lists its name."""
    path = "MaxNano/models/attention.py"
    tree.replace(path, r"^KERNELS: .*\{$", r'\g<0>\n    "twin": Kernel(twin, EVERYWHERE),')
    tree.replace(
        path,
        r"^class Kernel\(NamedTuple\):",
        "def twin(q, k, v, window, settings, rules):\n"
        "    return 2 * reference(q, k, v, window, settings, rules)\n\n\n\\g<0>",
    )
    tree.replace("configs/base.yml", r"^(attention: .* one of auto)", r"\1 twin")
    tree.python("""
        plain, twin = (hidden_of(model_of(f"attention={name}")) for name in ("reference", "twin"))
        assert not np.allclose(plain, twin)
        assert model_of("attention=auto").numerics.attention == "chunked"
    """)
    assert tree.touched == {path, "configs/base.yml"}


def test_the_mlp(tree):
    """SwiGLU: the function `activation` and the row of the MLP's matrices, in a TPU's kernels too.

    tests/test_swiglu.py tests the rest.
    """
    tree.replace("MaxNano/scaling.py", r'^    "mlp": \{', r'\g<0>"gate": ("embed", "mlp"), ')
    path = "MaxNano/models/layers.py"
    tree.replace(path, r"activation\(hidden: jax.Array\)", "activation(gate, hidden)")
    tree.replace(path, r"jnp.square\(jax.nn.relu\(hidden\)\)", "jax.nn.silu(gate) * hidden")
    tree.python("""
        from MaxNano import scaling
        setup = model_of()
        assert setup.model.shapes["layers"]["mlp"]["gate"].shape[-2:] == (32, 128)
        WIDE = ["max_target_length=128", "emb_dim=128", "num_query_heads=8"]
        plain, kernels = (
            hidden_of(model_of(f"layer_products={name}", *WIDE))
            for name in ("xla", "pallas")
        )
        assert np.all(np.isfinite(plain))
        np.testing.assert_allclose(plain, kernels, rtol=0, atol=1e-5 * np.abs(plain).max())
        import jax
        counted = scaling.parameter_counts(scaling.shape_of(setup.config)).total
        assert counted == sum(x.size for x in jax.tree.leaves(setup.model.shapes))
    """)


def test_the_optimizer_of_a_parameter_group(tree):
    """One row: the head gets plain SGD from optax."""
    path = "MaxNano/optimizers/groups.py"
    tree.replace(
        path,
        r'ParameterGroup\("lm_head", r"lm_head", use_adamw, ',
        'ParameterGroup("lm_head", r"lm_head", lambda *_: optax.identity(), ',
    )
    tree.python("""
        import jax, optax
        from MaxNano.optimizers import groups
        config = config_of()
        params = jax.tree.map(lambda x: jax.numpy.ones(x.shape), model_of().model.shapes)
        optimizer = groups.make_optimizer(config, dtype="float32")
        with jax.set_mesh(model_of().mesh):
            state = optimizer.init(params)
            updates, _ = jax.jit(optimizer.update)(params, state, params, step=3)
        rate = groups.parameter_groups(config)[0].learning_rate
        from MaxNano.optimizers import schedules
        factor = schedules.lr_multiplier(
            3, config.steps, config.warmup_steps, config.warmdown_ratio, config.final_lr_fraction
        )
        np.testing.assert_allclose(updates["lm_head"], -rate * factor, rtol=1e-6)
        assert not np.allclose(updates["token_embed"], -rate * factor)
    """)


def test_a_schedule(tree):
    """A kind of weight decay schedule: a case in schedules.py; the key lists its name."""
    tree.replace(
        "MaxNano/optimizers/schedules.py",
        r'^        case "constant":',
        '        case "half":\n            return 0.5 * jnp.ones_like(done)\n\\g<0>',
    )
    tree.replace("configs/base.yml", r"^(weight_decay_schedule: .* one of)", r"\1 half")
    tree.python("""
        from MaxNano.optimizers import schedules
        config = config_of("weight_decay_schedule=half")
        assert float(schedules.weight_decay_multiplier(3, 9, config.weight_decay_schedule)) == 0.5
    """)


def test_a_layout_over_devices(tree):
    """No code: heads over one axis and the MLP over another, by the config alone."""
    tree.python("""
        from MaxNano.models.setup import set_up_model
        words = ["ici_tensor_parallelism=2", "ici_fsdp_parallelism=2", "num_cpu_devices=4"]
        from MaxNano.distributed import runtime
        config = config_of(*words)
        runtime.initialize(config)
        rules = [list(map(str, rule)) for rule in config.logical_axis_rules]
        before = set_up_model(config).params["layers"]["mlp"]["wi"].sharding.spec
        moved = [[name, "fsdp" if name == "mlp" else "" if name == "embed" else axes]
                 for name, *axes in config.logical_axis_rules]
        moved = [[name, *([axes] if isinstance(axes, str) else axes)] for name, axes in moved]
        text = "[" + ", ".join("[" + ", ".join(map(str, filter(None, row))) + "]" for row in moved) + "]"
        after = set_up_model(config_of(*words, f"logical_axis_rules={text}"))
        after = after.params["layers"]["mlp"]["wi"].sharding.spec
        assert before != after and "fsdp" in str(after), (before, after)
    """)


def test_a_data_format(tree):
    """A class and a row of SOURCES; `dataset_type` lists its name."""
    path = "MaxNano/data/sources.py"
    tree.replace(path, r"^SOURCES = \{", r'\g<0>\n    "echo": EchoSource,')
    tree.replace(
        path,
        r"^class SyntheticSource:",
        textwrap.dedent("""
            class EchoSource:
                def __init__(self, config, split):
                    self.where, self.files = "echo", [split]

                def open(self, file):
                    return self

                def __len__(self):
                    return 1

                def documents(self, group):
                    yield from ("hello", "again")


            class SyntheticSource:""").strip(),
    )
    tree.replace("configs/base.yml", r"^(dataset_type: .* one of)", r"\1 echo")
    tree.python("""
        import itertools
        from MaxNano.data import stream
        texts = stream.iterate_texts(config_of("dataset_type=echo"), "train")
        assert list(itertools.islice(texts, 2)) == ["hello", "again"]
    """)


def test_a_chat_task(tree):
    """A file in tasks/ and a row of TASKS."""
    tree.write(
        "MaxNano/tasks/shout.py",
        """
        from MaxNano.tasks.base import Task, dialogue


        class Shout(Task):
            kind = "generative"

            def __init__(self, config, split):
                self.words = ("yes", "no")

            def __len__(self):
                return len(self.words)

            def conversation(self, index):
                return dialogue(f"Shout {self.words[index]}", self.words[index].upper())

            def evaluate(self, conversation, completion):
                return completion == conversation["messages"][-1]["content"]
        """,
    )
    path = "MaxNano/tasks/__init__.py"
    tree.replace(path, r"^(from MaxNano.tasks import .*), spelling$", r"\1, shout, spelling")
    tree.replace(path, r"^TASKS: .*\{$", r'\g<0>\n    "Shout": shout.Shout,')
    tree.python("""
        from MaxNano import tasks
        config = config_of("chat_tasks=[Shout/test]", "stage=sft", "dataset_type=chat")
        task = tasks.open_task(config, config.chat_tasks[0])
        assert task.evaluate(task.conversation(1), "NO") and not task.evaluate(task.conversation(1), "no")
    """)


def test_a_model_size(tree):
    """A file of overrides."""
    tree.write("configs/models/wide.yml", "num_decoder_layers: 4\naspect_ratio: 128\n")
    tree.python("""
        config = pyconfig.initialize(["configs/base.yml", "model=wide"])
        assert (config.num_decoder_layers, config.emb_dim) == (4, 512)
    """)


def test_a_scaling_law(tree):
    """A function in scaling.py: width per depth."""
    tree.replace(
        "MaxNano/scaling.py",
        r"return round_up\(depth \* aspect_ratio, head_dim\)",
        "return round_up(2 * depth * aspect_ratio, head_dim)",
    )
    tree.python("""
        assert pyconfig.initialize(["configs/base.yml", "model=d8"]).emb_dim == 1024
    """)


def test_a_config_key(tree):
    """One line in base.yml: parsed, checked and shown in --help."""
    tree.append("configs/base.yml", "patience: 3   # [train] int >= 0 | evaluations to wait for")
    tree.python("""
        import pytest
        assert config_of().patience == 3 and config_of("patience=5").patience == 5
        with pytest.raises(pyconfig.ConfigError, match="patience"):
            config_of("patience=-1")
    """)
    assert "patience" in tree.program("train.py", "--help=all")


def test_a_chip(tree):
    """A row of the chip table."""
    path = "MaxNano/distributed/hardware.py"
    tree.replace(path, r"^CHIPS = \{", r'\g<0>\n    "TPU v9": Chip(5e15, 2**38, 9e12),')
    tree.python("""
        import types
        from MaxNano.distributed import hardware
        device = types.SimpleNamespace(device_kind="TPU v9")
        assert hardware.peak_flops([device, device]) == 1e16
    """)


FOCAL = """
def focal_losses(config, nll, batch):
    return (1 - jnp.exp(-nll)) * weigh_losses(config, nll, batch)


STAGES["focal"] = Stage(open_text_batches, evaluate_text, focal_losses, count_targets)
"""
HEAD_NORM = """
import jax.numpy as jnp

from MaxNano.evals.results import ResultTable


class HeadNorm:
    event = "head"
    at_start = True

    def __init__(self, run):
        self.run = run

    @staticmethod
    def interval(config):
        return 2

    def measure(self, results):
        return {"norm": float(jnp.linalg.norm(self.run.params["lm_head"]))}

    def table(self, results):
        return ResultTable("head", ("metric", "value"), list(self.measure(results).items()))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of metrics.jsonl of a tiny run of a new stage with a new evaluation, in a copy."""
    tree = Copy(tmp_path_factory.mktemp("trained"))
    tree.append("MaxNano/training/stages.py", FOCAL)
    row = 'STAGE_CONFIGS["focal"] = StageConfig("focal", ("synthetic",), _describe_text)'
    tree.append("MaxNano/stage_configs.py", row)
    tree.write("configs/stages/focal.yml", "dataset_type: synthetic\n")

    tree.write("MaxNano/evals/head_norm.py", HEAD_NORM)
    path = "MaxNano/evals/base.py"
    tree.replace(
        path,
        r"^from MaxNano.evals.results import",
        "from MaxNano.evals.head_norm import HeadNorm\n\\g<0>",
    )
    tree.replace(path, r"^EVALS: .*\{$", r'\g<0>\n    "head": HeadNorm,')

    BpeTokenizer(NANOCHAT_PATTERN, {bytes([i]): i for i in range(256)}).save(tree.folder / "bytes")
    tree.program(
        "train.py",
        *TINY,
        "stage=focal",
        "run_name=run",
        "vocab_size=265",
        "tokenizer_path=bytes",
        "sample_interval=0",
        "eval_interval=0",
        "tensorboard=false",
    )
    lines = (tree.folder / "runs/run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_training_stage(rows):
    """A row of STAGE_CONFIGS, a row of STAGES and a file of overrides. DPO is in test_stages.py."""
    steps = [row for row in rows if "event" not in row]
    assert len(steps) == 4
    # At the start every token has about the same probability, 1 / vocab_size.
    assert steps[0]["loss"] == pytest.approx((1 - 1 / 265) * math.log(265), rel=0.01)


def test_an_evaluation(rows):
    """A file in evals/ and a row of EVALS."""
    norms = [row for row in rows if row.get("event") == "head"]
    assert [row["step"] for row in norms] == [0, 2, 4]
    assert norms[0]["norm"] != norms[-1]["norm"]


def test_every_row_of_the_guide_has_a_test():
    """The tests above, by the words of the guide's table."""
    table = (ROOT / "docs/guides/change.md").read_text()
    rows = re.findall(r"^\| ([^|]+?) \| ", table, re.MULTILINE)[1:]
    tested = {
        name.removeprefix("test_").replace("_", " ")
        for name in globals()
        if name.startswith(("test_a_", "test_an_", "test_the_"))
    }
    assert rows and {row.lower() for row in rows} == tested

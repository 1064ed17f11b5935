"""What a TPU or GPU computes beside the CPU: python -m pytest -m "gpu or tpu" on a machine that has
one.

Everything runs in processes of its own, since the test process keeps to the CPU.
"""

from pathlib import Path

import pytest
from test_gpu import losses, run

HAS_ACCELERATOR = any(
    list(Path(folder).glob(names))
    for folder, names in (
        ("/dev", "nvidia[0-9]*"),
        ("/dev", "accel[0-9]*"),
        ("/dev/vfio", "[0-9]*"),
    )
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tpu,
    pytest.mark.skipif(not HAS_ACCELERATOR, reason="there is no TPU or GPU here"),
]


def test_every_kernel_trains_as_the_cpu_does():
    """Eight steps in float32, and in 16 bits with each attention kernel and with the layers'
    products in kernels and by the compiler, within the rounding of float32 on the CPU.
    """
    [expected] = losses('[["dtype=float32"]]', JAX_PLATFORMS="cpu").values()
    assert expected[-1] < expected[0]
    found = losses(
        '[["dtype=float32"], *(["attention=" + name] for name in kernels()),'
        ' *(["layer_products=" + name] for name in products())]'
    )
    assert len(found) > 2
    for words, values in found.items():
        assert values == pytest.approx(expected, rel=0.01), words


DECODE = """
    import json
    import numpy as np
    import jax
    from MaxNano import pyconfig
    from MaxNano.distributed import runtime
    from MaxNano.inference.engine import Engine
    from MaxNano.inference.requests import Request
    from MaxNano.models.setup import set_up_model

    jax.config.update("jax_default_matmul_precision", "highest")
    config = pyconfig.initialize([
        str(pyconfig.BASE), "model=d4", "max_target_length=512", "vocab_size=4096", "dtype=float32",
        "jax_cache_dir=", "stream_interval=16",
    ])
    runtime.initialize(config)
    setup = set_up_model(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), setup.params)
    params["resid_lambdas"] = np.ones_like(params["resid_lambdas"])
    prompt = rng.integers(0, 4000, 200).tolist()
    engine = Engine(setup, params, None, slots=2, max_length=512)
    [[completion]] = engine.generate([Request(prompt=prompt, max_tokens=64, temperature=0)])
    tokens = np.zeros((1, 512), np.int32)
    whole = [*prompt, *completion.tokens]
    tokens[0, : len(whole)] = whole

    @jax.jit
    def forward(params, tokens):
        bound = setup.model.bind(params)
        return bound.logits(bound(tokens))

    logits = np.asarray(forward(params, tokens))[0]
    ahead = logits[len(prompt) - 1 : len(whole) - 1]
    chosen = np.take_along_axis(ahead, np.asarray(completion.tokens)[:, None], 1)[:, 0]
    print(json.dumps({"tokens": len(completion.tokens), "short": float(np.max(ahead.max(1) - chosen))}))
"""


def test_decoding_takes_the_tokens_of_the_full_forward_pass():
    """Greedy, in float32: the token taken has the largest logit, up to rounding."""
    found = run(DECODE)
    assert found["tokens"] == 64 and found["short"] < 1e-3, found


RESUME = """
    import json, tempfile
    from pathlib import Path
    from MaxNano import pyconfig, train
    from MaxNano.tokenization.bpe import NANOCHAT_PATTERN, BpeTokenizer

    folder = Path(tempfile.mkdtemp())
    BpeTokenizer(NANOCHAT_PATTERN, {bytes([byte]): byte for byte in range(256)}).save(folder / "tokenizer")

    def losses(name, *words):
        config = pyconfig.initialize([
            str(pyconfig.BASE), "model=d2", "max_target_length=256", "vocab_size=265", "global_batch_tokens=4096",
            "dataset_type=synthetic", f"tokenizer_path={folder / 'tokenizer'}", f"base_output_directory={folder}",
            f"run_name={name}", "eval_interval=0", "sample_interval=0", "tensorboard=false", "jax_cache_dir=",
            "xla_flags=[vmem,deterministic]", "checkpoint_interval_steps=4", *words,
        ])
        status = train.main(config)
        assert status == 0, status
        rows = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "event" not in row]

    whole = losses("whole", "steps=8")
    import shutil
    shutil.copytree(folder / "whole", folder / "again")
    for name in ("8",):
        shutil.rmtree(folder / "again/checkpoints" / name)
    print(json.dumps({"whole": whole, "again": losses("again", "steps=8")}))
"""


def test_a_run_resumes_from_its_checkpoint_with_the_same_losses():
    """Bit for bit, with xla_flags=[deterministic] on a GPU."""
    found = run(RESUME)
    assert len(found["whole"]) == 8 and found["again"] == found["whole"]

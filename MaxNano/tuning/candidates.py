"""What tune.py tries: one Knob per choice, with the values that make sense on a backend.

To try another setting, add a value to a row here, or a knob to `knobs`. Its keys must be in
TUNABLE: keys that change a run's numbers only by rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from MaxNano import pyconfig

Overrides = dict[str, Any]
"""Config keys and their values, which replace the config's."""

ATTENTION_KEYS = (
    "attention",
    "attention_chunk",
    "flash_block",
    "splash_short_forward",
    "splash_short_backward",
    "splash_long_forward",
    "splash_long_backward",
    "splash_fused_backward",
)
TUNABLE = (
    *ATTENTION_KEYS,
    "per_device_batch_size",
    "remat_policy",
    "remat_names",
    "xla_flags",
    "ici_fsdp_parallelism",
    "ici_tensor_parallelism",
    "vocab_chunk_size",
    "scan_layers",
    "embedding_gradient",
    "layer_products",
    "data_workers",
)

# Block sizes that are tried for a kernel besides those of the config.
BLOCKS: dict[str, Sequence[Overrides]] = {
    "flash": [{"flash_block": size} for size in (128, 256, 512)],
    "chunked": [{"attention_chunk": size} for size in (64, 128, 256, 512)],
    "splash": [
        {"splash_fused_backward": False},
        *(
            {
                "splash_short_forward": (short, short, short),
                "splash_short_backward": (short, short, short),
                "splash_long_forward": (long, long, 512),
                "splash_long_backward": (long, long, part),
            }
            for short, long, part in ((256, 512, 512), (512, 2048, 1024), (1024, 1024, 512))
        ),
    ],
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
REMAT: Sequence[Overrides] = [
    {"remat_policy": "none"},
    {"remat_policy": "names", "remat_names": ("attention_out",)},
    {"remat_policy": "names", "remat_names": ("qkv", "attention_out")},
    {"remat_policy": "minimal"},
    {"remat_policy": "full"},
]
VOCAB_CHUNKS = (0, 4096, 8192, 16384)
EMBEDDING_GRADIENTS = {"tpu": ("sorted", "scatter", "one_hot"), "gpu": ("scatter", "one_hot")}
DATA_WORKERS = (0, 1, 2, 4)
# Groups of flags that change more than speed, which a user asks for.
KEPT_FLAG_GROUPS = ("deterministic",)
# What is tried where the defaults do not fit in memory.
SMALLER: Sequence[Overrides] = [
    {"per_device_batch_size": 8},
    {"per_device_batch_size": 4, "remat_policy": "names", "remat_names": ("attention_out",)},
    {"per_device_batch_size": 1, "remat_policy": "full"},
]


# Steps that are measured are shorter than this, if two micro-batches are, and have at most MOST_ROWS
# rows on a device.
LONGEST_STEP_SECONDS = 4.0
MOST_ROWS = 128
RATES = {"cpu": 3e10, "gpu": 2e13}  # FLOP/s of a device that the chip table does not have, roughly


class Facts(NamedTuple):
    """What only a process that holds the devices knows, JSON-able; measure.probe makes it."""

    backend: str  # cpu, gpu or tpu
    device: str  # its kind
    devices: int
    cores: int  # of the host
    dtype: str  # of activations
    kernels: list[str]  # names of the attention kernels that run here
    resolved: dict[str, Any]  # key whose value is derived on the devices -> its value
    device_rows: int  # rows of the global batch on each data-parallel device
    micro_rows: int  # of these, rows of a micro-batch
    data_parallel_size: int
    flops_per_token: int
    peak_flops: float | None  # of all devices
    versions: dict[str, str | None]


class Knob(NamedTuple):
    """Alternative settings: one of them is chosen while all others stay the same."""

    name: str
    choices: Sequence[Overrides]
    with_data: bool = False  # measured with the run's text, not with random tokens


def is_free(config: Mapping[str, Any], key: str) -> bool:
    """Whether a search may change a key: its value is from base.yml or from the model's file."""
    return config[pyconfig.ORIGIN][key] in ("base", f"{config['model']}.yml")


def attention_choices(config: Mapping[str, Any], facts: Facts) -> list[Overrides]:
    """Every attention kernel that runs here with its block sizes; all ATTENTION_KEYS are set."""
    shipped = {key: config[key] for key in ATTENTION_KEYS}
    length, choices = config["max_target_length"], []
    for name in facts.kernels:
        for blocks in ({}, *BLOCKS.get(name, ())):
            choice = shipped | blocks | {"attention": name}
            is_short = any(type(size) is int and size > length for size in blocks.values())
            if choice not in choices and not is_short:
                choices.append(choice)
    return allowed(config, choices)


def gradient_choices(config: Mapping[str, Any], facts: Facts) -> list[Overrides]:
    """The embedding gradients that are worth a try on this backend."""
    names = EMBEDDING_GRADIENTS.get(facts.backend, ())
    return allowed(config, [{"embedding_gradient": name} for name in names])


def product_choices(config: Mapping[str, Any], facts: Facts) -> list[Overrides]:
    """The layers' products that are worth a try: two where the kernels, which come first, are the
    default.
    """
    names = ("pallas", "xla") if facts.resolved["layer_products"] == "pallas" else ()
    return allowed(config, [{"layer_products": name} for name in names])


def measured_rows(config: Mapping[str, Any], facts: Facts) -> int:
    """Rows on each data-parallel device of the steps that are measured: those of a run, or fewer
    micro-batches, at least two, if its step is long.
    """
    rate = RATES.get(facts.backend, RATES["gpu"])
    if facts.peak_flops:
        rate = 0.3 * facts.peak_flops / facts.devices
    row_flops = facts.flops_per_token * pyconfig.row_length(config)
    rows = min(MOST_ROWS, int(LONGEST_STEP_SECONDS * rate / row_flops))
    return facts.micro_rows * min(
        facts.device_rows // facts.micro_rows, max(2, rows // facts.micro_rows)
    )


def knobs(
    config: Mapping[str, Any],
    facts: Facts,
    attention: Sequence[Overrides],
    others: Sequence[Overrides],
) -> list[Knob]:
    """What to choose on these devices, the choices that matter most first.

    attention: those of attention_choices that are correct; others: those of gradient_choices and
    product_choices. Keys that the command line or the stage sets are left alone.
    """
    measured = measured_rows(config, facts)
    # A step of several micro-batches also has an array of gradients; so must the measured one.
    most = measured if measured == facts.device_rows else measured // 2
    rows = [n for n in ROWS if n <= most and facts.device_rows % n == 0 == measured % n]
    chunks = [n for n in VOCAB_CHUNKS if n < config["vocab_size"]]
    workers = [n for n in DATA_WORKERS if n < facts.cores]
    listed = [
        Knob("attention", attention),
        Knob("rows", [{"per_device_batch_size": n} for n in rows]),
        Knob("remat", [{"remat_names": config["remat_names"], **choice} for choice in REMAT]),
        Knob("XLA flags", list(_flag_choices(config, facts))),
        Knob("layout", list(_layouts(config, facts))),
        Knob("loss chunk", [{"vocab_chunk_size": n} for n in chunks]),
        Knob("layers", [{"scan_layers": scan} for scan in (True, False)]),
        Knob("embedding gradient", [c for c in others if "embedding_gradient" in c]),
        Knob("layer products", [c for c in others if "layer_products" in c]),
        Knob("data workers", [{"data_workers": n} for n in workers], with_data=True),
    ]
    listed = [knob._replace(choices=allowed(config, knob.choices)) for knob in listed]
    return [knob for knob in listed if knob.choices]


def changes(config: Mapping[str, Any], facts: Facts, overrides: Overrides) -> Overrides:
    """The overrides that change something: not those that the config has, or derives, anyway."""
    return {
        key: value
        for key, value in overrides.items()
        if value not in (config[key], facts.resolved.get(key, config[key]))
    }


def allowed(config: Mapping[str, Any], choices: Sequence[Overrides]) -> list[Overrides]:
    """The choices that change no key that the user has set."""
    return [
        choice
        for choice in choices
        if all(is_free(config, key) or config[key] == value for key, value in choice.items())
    ]


def _flag_choices(config: Mapping[str, Any], facts: Facts) -> Iterator[Overrides]:
    """xla_flags without one of its groups, or with one more, which replaces those that set the same
    flags.
    """
    groups = {
        name: {flag.partition("=")[0] for flag in flags}
        for name, backend, *flags in config["xla_flag_groups"]
        if backend == facts.backend and name not in KEPT_FLAG_GROUPS
    }
    chosen = tuple(config["xla_flags"])
    for name, flags in groups.items():
        others = tuple(
            other for other in chosen if other != name and not flags & groups.get(other, set())
        )
        yield {"xla_flags": others if name in chosen else (*others, name)}


def _layouts(config: Mapping[str, Any], facts: Facts) -> Iterator[Overrides]:
    """FSDP over all devices, and tensor parallelism over 2 or 4 of them."""
    if facts.devices == 1 or config["ici_data_parallelism"] is not None:
        return
    sizes = [(facts.devices, 1)]
    sizes += [(1, n) for n in (2, 4) if facts.devices % n == 0 and config["num_kv_heads"] % n == 0]
    for fsdp, tensor in sizes:
        yield {"ici_fsdp_parallelism": fsdp, "ici_tensor_parallelism": tensor}

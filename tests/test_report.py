"""The report of a run: everything that its folder holds is in it, nothing in it can act, it is
whole or absent.
"""

import csv
import json
import math
import random
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import programs
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from MaxNano import pyconfig
from MaxNano import report as command
from MaxNano.data import fingerprint
from MaxNano.reporting import blocks, charts, evaluations, gpt2, render, report, run_history
from MaxNano.reporting.blocks import Missing
from MaxNano.reporting.charts import Series
from MaxNano.reporting.evaluations import distinct_ngrams

ROOT = Path(__file__).resolve().parents[1]
BASE = str(ROOT / "configs" / "base.yml")
VERSIONS = {"python": "3.11.7", "jax": "0.10.2", "libtpu": None, "commit": "0123456789abcdef"}
V6E = {"kind": "TPU v6 lite", "count": 8, "processes": 2, "host_cores": 180}
PROBLEM = {"problem": 0, "messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}


# ---- Made-up runs -------------------------------------------------------------------------------


def rows_of(steps, **more):
    """Rows of train steps of two seconds each, with half a second beside each of them."""
    return [
        {
            "step": step,
            "loss": 4.0 - 0.01 * step,
            "smoothed_loss": 4.0 - 0.005 * step,
            "bpb": 1.5,
            "lr_multiplier": 1.0,
            "skipped_in_all": 1,
            "milliseconds": 2000.0,
            "tokens_per_second": 1e6,
            "elapsed_seconds": 2.5 * (step + 1),
            **more,
        }
        for step in range(steps)
    ]


def validation(step, bpb):
    return {"step": step, "event": "validation", "bpb": bpb, "lowest_bpb": bpb}


def make_run(folder, *words, rows=(), devices=V6E, evals=None, run_id="abc", step=30):
    """A run's folder; `rows` go into metrics.jsonl, and `evals` is {step: {name: values}}."""
    where = [f"run_name={folder.name}", f"base_output_directory={folder.parent}"]
    config = pyconfig.initialize([BASE, "model=d4", "vocab_size=4096", "steps=30", *where, *words])
    folder.mkdir(parents=True)
    pyconfig.save(config, folder / "config.yml")
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if devices:
        checkpoint = folder / "checkpoints" / str(step)
        (checkpoint / "extra").mkdir(parents=True)
        run = {"step": step, "versions": VERSIONS, "devices": devices, "tokenizer": "feed" * 16}
        (checkpoint / "extra" / "metadata").write_text(
            json.dumps({"metrics": {"run_id": run_id}, "run": run})
        )
        (checkpoint / "MANIFEST.json").write_text("{}")
    for at, entries in (evals or {}).items():
        write_evals(folder, at, entries, run_id)
    return folder


def write_evals(folder, at, entries, run_id):
    (folder / "evals").mkdir(exist_ok=True)
    found = {name: {"of": {"run": run_id}, "values": values} for name, values in entries.items()}
    (folder / "evals" / f"step_{at:06}.json").write_text(json.dumps({"evals": found}))


def core_entries():
    """All tasks halfway between the two GPT-2 that are compared, and the score that this makes."""
    entries = {}
    for label in gpt2.GPT2:
        between = sum(gpt2.scores_of(label)) / 2
        entries[f"core {label}"] = {
            "shots": 10,
            "examples": 100,
            "accuracy": 0.5,
            "centered": between,
            "seconds": 60.0,
        }
    score = sum(values["centered"] for values in entries.values()) / len(entries)
    return entries | {"core": {"core": score, "seconds": 22 * 60.0}}


def chat_entries(accuracy, **more):
    task = {
        "problems": 40,
        "accuracy": accuracy,
        "centered": (accuracy - 0.25) / 0.75,
        "seconds": 30.0,
        **more,
    }
    return {"chat ARC-Easy/test": task, "chat": {"chatcore": (accuracy - 0.25) / 0.75}}


def test_bits_per_byte_of_other_text_are_not_those_of_the_run(tmp_path):
    """`evaluate.py run_name=a dataset_path=OTHER` changed the number at a glance."""
    folder = make_run(tmp_path / "a", rows=[validation(0, 3.0), *rows_of(30), validation(30, 1.75)])
    contents = {"last.parquet": "8321837c97863977"}
    path = folder / "checkpoints/30/extra/metadata"
    extra = json.loads(path.read_text()) | {"inputs": {"data": {"validation": contents}}}
    path.write_text(json.dumps(extra))
    (folder / "evals").mkdir()
    for data, bpb in (("8654", 1.75), (fingerprint.summary(contents), 3.5)):
        entry = {"of": {"run": "abc", "data": data}, "values": {"bpb": 3.5}}
        (folder / "evals/step_000030.json").write_text(
            json.dumps({"evals": {"bpb validation": entry}})
        )
        assert evaluations.validation_bpb(run_history.read_run(folder)) == bpb


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with base, sft and rl, each started from the one before."""
    runs = tmp_path_factory.mktemp("chain") / "runs"
    samples = {"step": 30, "event": "samples", "The capital of France is": " Paris <b>"}
    make_run(
        runs / "base",
        "matrix_lr=0.01",
        rows=[validation(0, 3.0), *rows_of(30, mfu=0.4), validation(30, 1.25), samples],
        evals={30: core_entries() | chat_entries(0.25, stopped=0.0)},
    )
    make_run(
        runs / "sft",
        "stage=sft",
        "load_from=base",
        rows=rows_of(30),
        evals={30: chat_entries(0.55, stopped=0.9)},
    )
    records = runs / "sft" / "evals" / "step_000030"
    records.mkdir()
    answers = [{"text": "<|output_start|>4", "tokens": 3, "finish": "stop", "right": True}]
    wrong = {
        **PROBLEM,
        "problem": 1,
        "said": "B",
        "answer": [{"type": "text", "text": "A"}],
        "right": False,
    }
    right = {**PROBLEM, "completions": answers, "right": True}
    (records / "GSM8K-test.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (right, wrong, wrong))
    )
    passes = [
        {"step": at, "event": "validation", "pass@1": 0.1 + at / 100, "pass@2": 0.5}
        for at in (0, 30)
    ]
    make_run(
        runs / "rl",
        "stage=rl",
        f"load_from={runs}/sft",
        rows=[passes[0], *rows_of(30, reward=0.5), passes[1]],
    )
    return runs


def report_of(folder):
    return report.make_report(*run_history.read_chain(epath.Path(folder)))


def texts_of(made):
    """{title of a section: all its text}, as Markdown has it without entities."""
    text = render.to_markdown(made)
    text = re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), text)
    return {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}


def missing_of(made):
    return [
        block.text
        for section in made.sections
        for block in section.blocks
        if isinstance(block, Missing)
    ]


class Tags(HTMLParser):
    """What a browser would see of a page: its tags, its attributes and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text.append(data)


# ---- What is in it ------------------------------------------------------------------------------


def test_the_whole_way(chain):
    made = report_of(chain / "rl")
    parts = texts_of(made)
    assert (
        made.subtitle
        == "pretraining, 30 steps → fine-tuning, 30 steps → reinforcement learning, 30 steps"
    )
    ran = parts["What ran"]
    assert "| pretraining | fine-tuning | reinforcement learning |" in ran
    assert "| started from | no other run | base |" in ran
    assert (
        "| hardware | 8 x TPU v6 lite on 2 hosts |" in ran
        and "jax 0.10.2" in ran
        and "libtpu" not in ran
    )
    assert "| commit | 0123456789ab |" in ran and "| parameters | 7,340,114 |" in ran
    assert "GSM8K/train x 4" in ran and "16 answers to each of 16 problems" in ran

    # 30 steps of 2.5 s, of which 2 s each are the step's; evaluate.py took 22 minutes and 30 s.
    time = parts["Time and price"]
    hours = (30 * 2.5 + 22 * 60 + 30) / 3600
    assert f"8 chips x {hours:.3f} h x $0.540137 per chip-hour" in time and "computed" in time
    spent = f"1 min 15 s | 22 min 30 s | 23 min 45 s | ${hours * 8 * 0.540137:,.2f} |"
    assert f"| pretraining | 2 s | 1,000,000 | 40.0 % | 80.0 % | {spent}" in time
    assert "| all |  |  |  |  | 3 min 45 s | 23 min 00 s | 26 min 45 s |" in time

    curves = parts["Curves"]
    stages = ("pretraining (base)", "fine-tuning (sft)", "reinforcement learning (rl)")
    order = [curves.index(f"### {name}") for name in stages]
    assert order == sorted(order)
    assert "| bits per byte, validation | 3 | 1.25 | 1.25 | 3 | █▁ |" in curves
    shown = (
        "loss, smoothed | 4 | 3.855",
        "learning rate | 0.0",
        "MFU, %, median | 40 | 40",
        "goodput, % | 80 | 80",
    )
    assert all(curve in curves for curve in shown)
    assert "| reward, median | 0.5 | 0.5 |" in curves and "| pass@k, pass@1 | 0.1 | 0.4 |" in curves

    core = parts["CORE"]
    small, largest = gpt2.core()
    assert f"| CORE |  |  |  | {(small + largest) / 2:.4f} | {small:.4f} | {largest:.4f} |" in core
    assert "| boolq | 10 | 100 | 50.0 % |" in core and "0.2565" in core

    chat = parts["Chat tasks"]
    assert "| ARC-Easy/test | 40 | 25.0 % | 25.0 % | 55.0 % | +30.0 |" in chat
    assert "| ChatCORE |  |  | 0.0000 | 0.4000 | +0.4000 |" in chat
    assert (
        "| answers that the model ended itself | after pretraining | after fine-tuning | change |"
        in chat
    )
    assert "| ARC-Easy/test | 0.0 % | 90.0 % | +90.0 |" in chat
    assert (
        "GSM8K/test before and after reinforcement learning" in chat
        and "| after step 30 | 40.0 % | 50.0 % |" in chat
    )

    samples = parts["Samples"]
    assert (
        " Paris <b>" in samples
        and "<|output_start|>4" in samples
        and "right; expected: 4" in samples
    )
    assert "distinct n-grams" in samples and "100.0 %" in samples
    assert samples.count("wrong; expected: A") == 1

    config = parts["Config"]
    assert (
        "| matrix_lr | 0.01 | command line |" in config
        and "| stage | sft | command line |" in config
    )
    assert re.search(r"eval_interval: +250  # base", config) and re.search(
        r"eval_interval: +200  # sft.yml", config
    )
    assert "| chat_interval | 200 | sft.yml |" in config and "| emb_dim | 256 | derived |" in config

    assert missing_of(made) == [
        "No validation of sft: eval_interval=200.",
        "No MFU of sft: its rows have none; tokens/s are shown.",
        "No MFU of rl: its rows have none; tokens/s are shown.",
        "No chat task of rl was evaluated: evaluate.py with evals=chat does it.",
    ]


def test_the_page_has_what_the_text_has(chain):
    """Every curve is drawn, every table is there; nothing is fetched and nothing can run."""
    made = report_of(chain / "rl")
    page = render.to_html(made)
    tags = Tags(page)
    curves = [
        block
        for section in made.sections
        for block in section.blocks
        if isinstance(block, blocks.Curves)
    ]
    assert tags.tags.count("figure") == len(curves) == 17
    assert {curve.title for curve in curves} >= {
        "loss",
        "bits per byte",
        "learning rate",
        "MFU, %",
        "goodput, %",
        "reward",
    }
    assert tags.tags.count("section") == 9 and tags.text.count("ChatCORE") == 2
    assert not set(tags.tags) & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not tags.attributes & {"src", "srcset", "onload", "onclick", "style"}
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    assert all(link.startswith("#") for link in re.findall('href="([^"]*)"', page))


def test_a_stage_and_an_evaluation_that_the_report_does_not_know(tmp_path):
    """Their names and numbers are shown without a line of code for them."""
    passes = [{"step": step, "event": "toy", "toy_score": step / 100} for step in (0, 20)]
    evals = {20: {"toy first": {"accuracy": 0.25}, "toy": {"score": 2}}}
    folder = make_run(tmp_path / "new", rows=[passes[0], *rows_of(20), passes[1]], evals=evals)
    chain, _ = run_history.read_chain(epath.Path(folder))
    chain[0].config["stage"] = "dpo"
    made = report.make_report(chain)
    assert made.subtitle == "dpo, 20 of 30 steps"
    parts = texts_of(made)
    assert "| toy while training | 0 | 0.2 |" in parts["Curves"]
    assert (
        parts["toy"].splitlines()[2:]
        == [
            "|  | after dpo |",
            "| --- | --: |",
            "| first accuracy | 0.25 |",
            "| score | 2 |",
            "",
        ][: len(parts["toy"].splitlines()) - 2]
    )


def test_scores_of_gpt2():
    with open(ROOT / "tests/golden/core_gpt2.csv", newline="") as file:
        *rows, score = csv.DictReader(file)
    assert [row["task"] for row in rows] == list(gpt2.GPT2)
    for row in rows:
        theirs = (float(row["guessing"]) / 100, float(row["gpt2"]), float(row["gpt2-xl"]))
        assert gpt2.GPT2[row["task"]] == pytest.approx(theirs)
    assert gpt2.core() == pytest.approx((float(score["gpt2"]), float(score["gpt2-xl"])), abs=1e-6)


# ---- What is not there --------------------------------------------------------------------------


def test_a_run_that_has_only_begun(tmp_path):
    make_run(tmp_path / "new", devices=None)
    assert missing_of(report_of(tmp_path / "new")) == [
        "new has no checkpoint, so versions and hardware are unknown.",
        "No fine-tuning: no run of stage sft is in this chain.",
        "No reinforcement learning: no run of stage rl is in this chain.",
        "No training is recorded: metrics.jsonl has no step.",
        "new has no curves: metrics.jsonl has no step.",
        "No CORE was evaluated: evaluate.py with evals=core computes it.",
        "No chat task of new was evaluated: evaluate.py with evals=chat does it.",
        "No samples were taken: sample_interval, or evaluate.py with evals=samples, does it.",
    ]


def test_a_run_on_a_cpu_that_is_under_way(tmp_path):
    devices = {"kind": "cpu", "count": 2, "processes": 1, "host_cores": 2}
    left_out = {"discarded_share": 0.263, "rows_without_text": 1200, "damaged_parts": 0}
    rows = [validation(0, 3.0), *rows_of(12, **left_out)]
    folder = make_run(tmp_path / "cpu", rows=rows, devices=devices)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # is being written
    (folder / "checkpoints" / "40" / "extra").mkdir(parents=True)  # never finished
    made = report_of(folder)
    missing = missing_of(made)
    assert made.subtitle == "pretraining, 12 of 30 steps"
    assert "No price of cpu: the chip table has none for cpu." in missing
    assert "No MFU of cpu: the chip table has no peak FLOP/s of cpu; tokens/s are shown." in missing
    assert "2 x cpu (2 cores)" in texts_of(made)["What ran"]
    assert "26.3 % of the tokens, 1,200 rows without text" in texts_of(made)["What ran"]
    assert not any("damaged" in line for line in missing)


def test_what_is_damaged_or_of_another_run_is_told_or_left_out(tmp_path):
    bad = {
        "step": 3,
        "loss": None,
        "milliseconds": 2000.0,
        "elapsed_seconds": 10.0,
        "skipped_in_all": 1,
    }
    folder = make_run(
        tmp_path / "odd", "load_from=gone", rows=[*rows_of(3), bad], evals={30: core_entries()}
    )
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(f"{rows}garbage\n{rows}")
    write_evals(folder, 40, {"core": {"core": 0.9, "seconds": 1.0}}, run_id="another")
    (folder / "evals" / "step_000050.json").write_text("{")
    made = report_of(folder)
    missing = missing_of(made)
    assert missing[0].startswith("odd was started from gone, which cannot be read: ")
    assert missing[1:3] == [
        "metrics.jsonl of odd is damaged from line 5 on",
        "step_000050.json of odd is damaged",
    ]
    assert made.subtitle == "pretraining, 4 of 30 steps"
    assert "0.9000" not in texts_of(made)["CORE"]


def test_an_unfinished_core_has_no_score(tmp_path):
    folder = make_run(tmp_path / "run", rows=rows_of(3), evals={30: core_entries()})
    path = folder / "evals" / "step_000030.json"
    found = json.loads(path.read_text())
    found["evals"]["core boolq"]["values"]["centered"] += 0.1  # done again, with more questions
    path.write_text(json.dumps(found))
    made = report_of(folder)
    assert "CORE of run is not finished: 22 tasks are done." in missing_of(made)
    assert "| CORE |" not in texts_of(made)["CORE"] and "CORE" not in texts_of(made)["At a glance"]


def test_runs_that_start_from_each_other_end(tmp_path):
    make_run(tmp_path / "a", "load_from=b")
    make_run(tmp_path / "b", "load_from=a")
    runs, problem = run_history.read_chain(epath.Path(tmp_path / "a"))
    assert [run.name for run in runs] == ["b", "a"] and "started from a, which itself" in problem


# ---- No text becomes markup ---------------------------------------------------------------------

NASTY = st.one_of(
    st.text(st.characters(codec=None), max_size=40),
    st.text(st.sampled_from("<>&\"'`|\\*_[]()!#~$@:/.-=+1 \n\t\x00\u2028x"), max_size=40),
    st.sampled_from(
        [
            "</pre><script>alert(1)</script>",
            "<img src=x onerror=alert(1)>",
            "`````\n<b>",
            "\\|<img src=x>|`",
            "-->",
            "</style><script>",
            "[x](javascript:alert(1))",
            "![x](https://evil.example/x.png)",
            "https://evil.example",
            "www.evil.example",
            "<https://evil.example>",
            "&lt;b&gt;",
            "]]>",
            "\ud800",
            "- - -",
            "1. x",
            "\n\n# x",
            "~~~",
            "| a |\n|---|",
            "</details><details open ontoggle=alert(1)>",
            "<!--",
            "\x1b]8;;https://evil.example\x07",
        ]
    ),
).filter(lambda text: charts.clean(text).strip())  # nothing leaves no paragraph


def document_of(text):
    """A document that holds a text wherever one can be."""
    points = [(0, 1.0), (1, 2.0)]
    parts = [
        blocks.Note(text),
        blocks.Missing(text),
        blocks.Heading(text),
        blocks.Tiles([blocks.Tile(text, text, text)]),
        blocks.Table([text, "b"], [[text, text]]),
        blocks.Table(["a", text], [[text, text]], numeric=False),
        blocks.Curves(text, [Series(text, points, "dots"), Series(text, points, "faint")], text),
        blocks.Speech(text, [("user", text), (text, text)], text),
        blocks.Folded(text, text),
    ]
    return blocks.Report(text, text, [blocks.Section(text, parts)])


PLAIN = document_of("plain")
PLAIN_TAGS = Tags(render.to_html(PLAIN))
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def markup_of(text):
    """The kinds of all pieces that Markdown is made of, those of lines too, without the texts."""
    kinds = []
    for token in PARSER.parse(text):
        kinds.append((token.type, token.content if token.type == "html_block" else None))
        kinds += [
            (child.type, child.content)
            for child in token.children or ()
            if child.type not in ("text", "text_special")
        ]
    return kinds


def plain_words(text):
    """The markup, without the texts that may stand in it."""
    return [
        (kind, re.sub(r"<summary>.*</summary>", "", content or ""))
        for kind, content in markup_of(text)
    ]


PLAIN_WORDS = plain_words(render.to_markdown(PLAIN))


@given(NASTY)
@settings(max_examples=120)
def test_every_text_is_escaped_on_the_page(text):
    page = render.to_html(document_of(text))
    page.encode()
    tags = Tags(page)
    assert tags.tags == PLAIN_TAGS.tags and tags.attributes == PLAIN_TAGS.attributes
    assert "".join(tags.text).count(charts.clean(text)) >= 15


@given(NASTY)
@settings(max_examples=120)
def test_every_text_is_escaped_in_markdown(text):
    made = render.to_markdown(document_of(text))
    made.encode()
    assert plain_words(made) == PLAIN_WORDS
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", made, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"://|www\.", outside, re.IGNORECASE)  # which GitHub makes links of


def make_odd_run(text):
    """A run that has a text in all its files, read without files."""
    return run_history.Run(
        folder=epath.Path("/runs/x"),
        config=RUN_CONFIG | {"dataset_path": f"{text}!", "load_from": text},
        lines={"dataset_path": (text, f"{text}!")},
        steps=rows_of(2),
        events=[{"step": 1, "event": "samples", "a prompt": text, f"prompt {text}": text}],
        saved={
            "step": 1,
            "versions": {f"{text}!": text},
            "devices": {**V6E, "kind": f"{text}!"},
            "tokenizer": text,
        },
        evaluations=[],
        problems=[text],
        history=[
            {
                "event": "start",
                "time": text,
                "step": 0,
                "versions": {"commit": text},
                "devices": {"count": 1, "kind": f"{text}!"},
            },
            {"event": "end", "status": text, "step": 1, "error": f"{text}!"},
            {"event": "refused", "time": text, "step": 1, "error": text},
            {
                "event": "start",
                "time": text,
                "step": 1,
                "changes": {"a key": [text, f"{text}!"]},
                "data": text,
            },
        ],
    )


RUN_CONFIG = pyconfig.initialize([BASE, "steps=2"]).to_dict()


@given(NASTY)
@settings(max_examples=12)
def test_every_text_of_a_run_is_escaped(text):
    """The way from what was read to the page: prompts, answers, config values, versions."""
    plain, odd = (
        Tags(render.to_html(report.make_report([make_odd_run(one)]))) for one in ("plain", text)
    )
    assert odd.tags == plain.tags and odd.attributes == plain.attributes


# ---- Charts -------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.none(), st.floats(-1e12, 1e12), st.floats(-2, 2), st.sampled_from([0.0, 1e-12, 1e-300, 3.0])
)


@given(
    st.lists(NUMBERS, max_size=50),
    st.sampled_from(["line", "faint", "dots"]),
    st.booleans(),
    st.integers(0, 20_000),
)
@settings(max_examples=200)
def test_any_numbers_can_be_drawn(values, style, from_zero, start):
    points = [(start + 3 * i, value) for i, value in enumerate(values)]
    chart = charts.line_chart([Series("a", points, style)], label="x", from_zero=from_zero)
    for one in chart.iter():
        for name in ("x1", "x2", "cx", "x"):
            assert -1 <= float(one.get(name, 0)) <= charts.WIDTH
        for name in ("y1", "y2", "cy", "y"):
            assert -1 <= float(one.get(name, 0)) <= charts.HEIGHT
    path = chart.find("path").get("d")
    drawn = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", path)]
    assert len(drawn) == 2 * sum(value is not None for value in values)
    assert all(map(math.isfinite, drawn)) and path.count("M") == count_pieces(values)
    assert set(charts.sparkline(points)) <= set(charts.BLOCKS)


def count_pieces(values):
    return sum(
        value is not None and (i == 0 or values[i - 1] is None) for i, value in enumerate(values)
    )


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_told_apart(low, span):
    found = charts.ticks(low, low + span)
    if len(found) > 1 and span > 1e-4 * abs(low):
        assert len(found) <= 7
        assert all(low - 1e-6 * span <= tick <= low + 1.000001 * span for tick in found)
        labels = charts.tick_labels(found)
        assert len(set(labels)) == len(labels) or max(map(abs, found)) / span > 50


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 5000, 10000, 15000], ["0", "5k", "10k", "15k"]),
        ([0.0, 0.001, 0.002], ["0.000", "0.001", "0.002"]),
        ([500, 1000, 1500], ["500", "1,000", "1,500"]),
        ([0, 500_000, 1_000_000], ["0.0", "0.5M", "1.0M"]),
    ],
)
def test_tick_labels(values, expected):
    assert charts.tick_labels(values) == expected


@given(st.integers(700, 1200), st.integers(0, 699), st.integers(0, 99))
@settings(max_examples=20)
def test_thinning_keeps_what_stands_out(count, place, seed):
    draw = random.Random(seed).random
    points = [(i, 99.0 if i == place else draw()) for i in range(count)]
    thinned = charts.thin(points, 50)
    assert len(thinned) <= 100 and (place, 99.0) in thinned and thinned == sorted(thinned)
    assert min(y for _, y in points) == min(y for _, y in thinned)


def test_a_spike_does_not_hide_the_rest():
    points = [(i, 1.0 + 0.01 * (i % 10)) for i in range(1000)]
    points[500] = (500, 1e6)
    low, high = charts.y_range([Series("a", points, "faint")], False)
    assert 0.9 < low < 1.0 and 1.09 < high < 1.3
    assert charts.y_range([Series("a", points)], False)[1] > 1e6


# ---- The command --------------------------------------------------------------------------------


def run_report(*arguments, before=""):
    """A process of the command; `before` is run in it first."""
    code = f"import os, runpy, signal, sys\n{before}\nsys.argv[0] = 'MaxNano/report.py'\n"
    code += "runpy.run_path('MaxNano/report.py', run_name='__main__')"
    command = ["-c", code] if before else ["MaxNano/report.py"]
    return programs.run(*command, *arguments)


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
IN_THE_MIDDLE_OF_WRITING = f"""
from etils import epath
write = type(epath.Path('.')).write_bytes
def half(path, text, *rest):
    write(path, text[:len(text) // 2])
    {DIE}
type(epath.Path('.')).write_bytes = half
"""
BEFORE_THE_NAME = f"""
from etils import epath
def replace(path, target):
    {DIE}
type(epath.Path('.')).replace = replace
"""


def test_the_command_and_kills_in_its_middle(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "runs")
    folder = tmp_path / "runs" / "sft"
    words = [BASE, f"base_output_directory={tmp_path}/runs", "run_name=sft"]
    assert run_report(*words, before=IN_THE_MIDDLE_OF_WRITING).returncode == -signal.SIGKILL
    assert not (folder / "report.html").exists() and not (folder / "report.md").exists()

    done = run_report(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Wrote {folder}/report.md\nWrote {folder}/report.html\n"
    whole = {name: (folder / name).read_text() for name in ("report.md", "report.html")}
    assert whole["report.html"].endswith("</html>\n") and "+30.0" in whole["report.md"]
    assert whole == {
        "report.md": render.to_markdown(report_of(folder)),
        "report.html": render.to_html(report_of(folder)),
    }
    assert not list(folder.glob(".*.partial"))

    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(validation(30, 1.125)) + "\n")
    assert run_report(*words, before=BEFORE_THE_NAME).returncode == -signal.SIGKILL
    assert whole == {name: (folder / name).read_text() for name in whole}
    assert pyconfig.launch(command.main, words) == 0
    assert (
        "1.125" in (folder / "report.md").read_text()
        and "1.125" in (folder / "report.html").read_text()
    )
    assert not list(folder.glob(".*.partial"))


def test_a_run_that_does_not_exist(tmp_path, capsys):
    assert (
        pyconfig.launch(
            command.main, [BASE, f"base_output_directory={tmp_path}", "run_name=nothing"]
        )
        == 2
    )
    line = f"error: no run in {tmp_path}/nothing: give run_name and base_output_directory of a run that was started\n"
    assert capsys.readouterr() == ("", line)
    assert not list(tmp_path.iterdir())
    (tmp_path / "something").mkdir()
    (tmp_path / "something/config.yml").touch()
    for name, hint in (
        ("somthing", "; did you mean something?"),
        ("x", "; runs with a config: something"),
    ):
        words = [BASE, f"base_output_directory={tmp_path}", f"run_name={name}"]
        assert pyconfig.launch(command.main, words) == 2
        out, told = capsys.readouterr()
        assert out == "" and told.endswith(f" of a run that was started{hint}\n")


# ---- In a browser -------------------------------------------------------------------------------

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(chain, tmp_path):
    """It fits a phone, its style is allowed, dark is not light, and it asks nobody for anything."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the package playwright drives the browser"
    )
    page_file = tmp_path / "report.html"
    page_file.write_text(render.to_html(report_of(chain / "rl")))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        colors = set()
        for width, scheme in ((1100, "light"), (360, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            faults = []
            page.on("console", lambda message, faults=faults: faults.append(message.text))
            page.on("request", lambda request, faults=faults: faults.append(request.url))
            page.goto(page_file.as_uri())
            assert faults == [page_file.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.locator("svg.chart").first.bounding_box()["width"] > 0.4 * min(width, 800)
            colors.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colors) == 2
        browser.close()


def test_distinct_ngrams_are_counted_over_all_texts():
    texts = ["and the 19th and the 19th", "and the end", "", "word"]
    assert distinct_ngrams(texts, 1) == pytest.approx(5 / 10)
    assert distinct_ngrams(texts, 2) == pytest.approx(4 / 7)
    assert distinct_ngrams(texts, 3) == pytest.approx(4 / 5)
    assert distinct_ngrams(texts, 7) is None and distinct_ngrams([], 1) is None

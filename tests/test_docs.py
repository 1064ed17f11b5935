"""The documentation is true: its commands, names, messages and links exist, and the site builds."""

import html.parser
import json
import re
import shlex
from pathlib import Path

import pages
import programs
import pytest
from pages import ROOT

from MaxNano import compare, config_schema, pyconfig, tasks
from MaxNano.tasks.custom_json import CustomJson

KEYS = config_schema.base_keys()
# Commands of other projects.
OTHERS = "curl docker gcloud git kubectl lm_eval pip sky tail xpk".split()
SHARED_SCRIPTS = ["setup.sh", "end_to_end/common.sh", "end_to_end/tpu/cloud.sh"]
MODULES = ["mkdocs", "pytest", "ruff"]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.md"))
# Words like keys that are others': of MaxText, of lm-eval, and fields of requests.
FOREIGN = "quantization_local_shard_count base_url logit_bias max_tokens repetition_penalty".split()


# ---- Commands -----------------------------------------------------------------------------------


def check_program(path, words):
    """The words of a program are keys that it reads, with values that fit."""
    program = Path(path).stem
    arms = [""]
    if program == "compare":
        options, words = compare.make_parser().parse_known_args(words)
        arms = options.arm or [""]
    if words and words[0].startswith("--help"):
        return
    first = words[0]
    if not (ROOT / first).is_file():
        assert re.fullmatch(r"runs/\w+/config\.yml", first), f"no config file {first}"
        first = "configs/base.yml"
    for arm in arms:
        given = [*words[1:], *shlex.split(arm)]
        pyconfig.initialize([first, *given])
        reader = "train" if program in ("compare", "tune") else program
        if reader in config_schema.PROGRAMS:
            for word in given:
                key = KEYS[word.partition("=")[0]]
                assert {reader, program} & set(key.programs), f"{program} does not read {key.name}"


def check_script(words, environment):
    """A script exists, and has the options and settings that a command gives it."""
    path = ROOT / words[1]
    assert path.is_file(), f"no file {words[1]}"
    texts = "".join(pages.read(file) for file in (path, *(ROOT / name for name in SHARED_SCRIPTS)))
    for name in environment:
        assert re.search(rf"\b{name}\b", texts), f"{words[1]} does not read {name}"
    for word in words[2:]:
        if word.startswith("--"):
            assert word in texts, f"{words[1]} has no {word}"
        elif word.startswith(("MaxNano/", "configs/", "end_to_end/", "tests/")):
            assert (ROOT / word).exists(), f"no {word}"


def check(command):
    program, *words = command.words
    if program == ".venv/bin/python":
        if words[0] == "-m":
            assert words[1] in MODULES
            return
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
        if words[0].startswith(("MaxNano/", "benchmarks/")):
            check_program(words[0], words[1:])
    elif program == "bash":
        if words[0].startswith("tests/run"):  # its arguments are pytest's
            assert (ROOT / words[0]).is_file()
        else:
            check_script(command.words, command.environment)
    elif program == "sbatch":  # its options, the script, and the words of train.py
        script, *words = [word for word in words if not word.startswith("--")]
        assert (ROOT / script).is_file(), f"no file {script}"
        check_program("MaxNano/train.py", ["configs/base.yml", *words])
    elif program == "export":
        texts = "".join(pages.read(path) for path in (ROOT / "end_to_end").rglob("*.sh"))
        for word in words:
            assert re.search(rf"\b{word.partition('=')[0]}\b", texts), f"nothing reads {word}"
    else:
        assert program in OTHERS, f"{program} is no command of ours; .venv/bin/python starts Python"
    for word in words:
        address = re.match(r"http://127\.0\.0\.1:8000(/[\w/]*)", word)
        if address:
            assert address[1] in endpoints(), f"the server has no {address[1]}"


def endpoints():
    source = pages.read(ROOT / "MaxNano/serving/app.py")
    return set(re.findall(r'"(/(?:v1/)?[a-z_/]+(?:/\{name\})?)"', source)) | {"/"}


def test_every_command_exists_and_parses():
    """Programs, scripts, their options and settings, config keys and values, endpoints."""
    problems = []
    for command in pages.commands():
        try:
            if command.words:
                check(command)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            problems.append(f"{command.where}: {shlex.join(command.words)}: {error}")
    assert problems == []
    assert len(pages.commands()) > 60


@pytest.mark.parametrize(
    "words",
    [
        [".venv/bin/python", "MaxNano/trian.py", "configs/base.yml"],
        [".venv/bin/python", "MaxNano/train.py", "configs/base.yml", "modle=d4"],
        [".venv/bin/python", "MaxNano/train.py", "configs/base.yml", "steps=-1"],
        [".venv/bin/python", "MaxNano/chat.py", "configs/base.yml", "matrix_lr=0.1"],
        [".venv/bin/python", "MaxNano/compare.py", "configs/base.yml", "--arm", "lr=1"],
        ["python", "MaxNano/train.py", "configs/base.yml"],
        ["bash", "end_to_end/tpu/launch.sh", "--dryrun"],
        ["sbatch", "end_to_end/clusters/slurm.sbatch", "modle=d4"],
        ["curl", "http://127.0.0.1:8000/v1/chat"],
    ],
)
def test_a_wrong_command_is_noticed(words):
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check(pages.Command("here", {}, words))


def test_a_setting_that_a_script_does_not_read_is_noticed():
    with pytest.raises(AssertionError):
        check_script(["bash", "end_to_end/tpu/d24_speedrun.sh"], {"ITERATIONS": "3"})


def test_the_dry_run_of_the_laptop_page_runs(tmp_path):
    """In a folder without data and runs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    [command] = {
        tuple(command.words)
        for command in pages.commands()
        if "start/laptop.md" in command.where and "dry_run=true" in command.words
    }
    result = programs.run(ROOT / command[1], *command[2:], cwd=tmp_path)
    # The plan is printed on every machine; on a small one a line says that the model does not fit.
    fits = result.returncode == 0 and result.stderr == ""
    assert fits or (result.returncode == 2 and "d12 needs about" in result.stderr), result.stderr
    assert "524,288 tokens" in result.stdout and "2520" in result.stdout.replace(",", "")
    assert [path.name for path in tmp_path.iterdir()] == ["configs"]


TINY = """num_decoder_layers=2 emb_dim=32 head_dim=16 num_query_heads=2 max_target_length=64 vocab_size=300
    global_batch_tokens=512 num_cpu_devices=1 data_readers=1 steps=4 eval_tokens=512 eval_interval=2 sample_tokens=2
    tensorboard=false""".split()
DECODING = ["prompt=One", "max_new_tokens=4", "decode_slots=1"]
SFT = """max_target_length=64 num_cpu_devices=1 data_readers=1 steps=2 eval_tokens=512 eval_interval=2 tensorboard=false
    base_output_directory=runs load_from=notes""".split()


def steps_of(page, pattern):
    """The programs of a page that a pattern finds, each as its words."""
    for command in pages.commands():
        if page in command.where and re.search(pattern, " ".join(command.words)):
            yield command.words[1:]


def run_step(folder, words, *added):
    result = programs.run(ROOT / words[0], *words[1:], *added, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_guides_run_with_a_tiny_model(tmp_path):
    """Your own text; your own conversations, after it; compare two ideas."""
    for name in ("configs", "MaxNano"):
        (tmp_path / name).symlink_to(ROOT / name)
    notes = tmp_path / "data/notes"
    notes.mkdir(parents=True)
    for number in range(4):
        text = "\n\n".join(f"Note {number} {line}: the sea is wide." for line in range(400))
        (notes / f"{number}.txt").write_text(text)
    programs_run = []
    added = {"train_tokenizer": ["vocab_size=300"], "train": TINY, "chat": DECODING}
    for words in steps_of("guides/text.md", "=data/notes( |$)|run_name=notes"):
        programs_run.append(Path(words[0]).stem)
        run_step(tmp_path, words, *added.get(programs_run[-1], []))
    assert programs_run == "train_tokenizer train chat report".split()
    assert (tmp_path / "runs/notes/report.html").is_file()

    conversations = [block for block in pages.blocks("json") if block.page.stem == "conversations"]
    lines = "".join(block.text for block in conversations) * 40
    for name in ("my_conversations", "my_validation"):
        (tmp_path / f"data/{name}.jsonl").write_text(lines)
    [words] = steps_of("guides/conversations.md", "stage=sft")
    tokenizer = ["tokenizer_path=data/notes_tokenizer", "vocab_size=300"]
    run_step(tmp_path, words, *TINY, *SFT, *tokenizer)
    assert (tmp_path / "runs/nano_sft/checkpoints/2").is_dir()

    [words] = steps_of("guides/compare.md", "--arm")
    data = ["dataset_type=text", "dataset_path=data/notes", "--seeds", "1"]
    out = run_step(tmp_path, words, *TINY, *tokenizer, *data).stdout
    assert "matrix_lr=0.03" in out and list(tmp_path.glob("runs/comparisons/rates/*"))


# ---- What pages name ----------------------------------------------------------------------------


def inline_code(page):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", pages.prose(page))


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_and_files_in_the_text_exist(page):
    if page.name == "cpu_speedrun_report.md":  # a recorded run's
        return
    problems = []
    for code in inline_code(page):
        word = re.fullmatch(r"([a-z][a-z0-9]*_[a-z0-9_]+)=(\S*)", code)
        if word and "coming" not in page.parts and word[1] not in [*KEYS, *FOREIGN]:
            problems.append(code)
        path = re.match(
            r"(?:\.venv/bin/python |bash )?((?:MaxNano|configs|end_to_end|tests|benchmarks)/[\w./-]*)",
            code,
        )
        if path and "<" not in code and not path[1].startswith("configs/tuned"):
            there = path[1].rstrip(".") if path[1].endswith("...") else path[1]
            if not (ROOT / there).exists():
                problems.append(code)
    assert problems == []


def anchors(path):
    """The anchors of a Markdown file's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", pages.prose(path), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_links_lead_somewhere():
    problems = []
    for page in [*pages.PAGES, *BENCHMARKS]:
        for target in re.findall(r"\]\(([^()\s]+)\)", pages.prose(page)):
            path, _, anchor = target.partition("#")
            there = (page.parent / path) if path else page
            if "://" in target:
                continue
            if not there.exists() or (
                anchor and there.stem != "config" and anchor not in anchors(there)
            ):
                problems.append(f"{page.relative_to(ROOT)}: {target}")
    assert problems == []


def test_the_list_of_benchmarks_has_every_result():
    """The pages' sections with their dates, newest first, in the order of the list."""
    index = pages.read(ROOT / "benchmarks/README.md")
    lines = re.findall(r"^- ([\d-]+): \[(.+)\]\((\w+\.md)#", index, re.MULTILINE)
    topics = re.findall(r"^## \[.+\]\((\w+\.md)\)$", index, re.MULTILINE)
    assert sorted(topics) == [page.name for page in BENCHMARKS if page.stem != "README"]
    for topic in topics:
        headings = re.findall(r"^## (.+)$", pages.prose(ROOT / "benchmarks" / topic), re.MULTILINE)
        assert [f"{date}: {title}" for date, title, page in lines if page == topic] == headings
        dates = [heading[:10] for heading in headings]
        assert dates == sorted(dates, reverse=True) and dates, topic


def test_code_of_the_pages_is_python_and_json(tmp_path):
    for block in pages.blocks("python"):
        compile(block.text, block.where, "exec")
    conversations = [block for block in pages.blocks("json") if block.page.stem == "conversations"]
    assert len(conversations) == 2
    for block in pages.blocks("json"):
        for line in block.text.splitlines():
            json.loads(line)
    for number, block in enumerate(conversations):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(block.text)
        assert len(CustomJson(None, str(path))) == len(block.text.splitlines())


def test_the_task_of_the_guide_to_rl_works(monkeypatch):
    [block] = [block for block in pages.blocks("python") if block.page.stem == "rl"]
    names = {}
    exec(compile(block.text, block.where, "exec"), names)
    monkeypatch.setitem(tasks.TASKS, "Products", names["Products"])
    train, test = (tasks.open_task(None, f"Products/{split}") for split in ("train", "test"))
    assert len(train) + len(test) == 100
    problem = train.conversation(1)
    answer = problem["messages"][-1]["content"]
    assert train.evaluate(problem, answer) and not train.evaluate(problem, answer + "!")
    assert train.reward(problem, answer) > train.reward(problem, "It is " + answer) > 0.5
    assert train.reward(problem, "") == 0


def test_messages_of_the_error_page_are_in_the_sources():
    page = ROOT / "docs/reference/errors.md"
    messages = re.findall(r"^\| `([^`]+)` \|", pages.prose(page), re.MULTILINE)
    assert len(messages) > 30
    texts = pages.strings()
    for message in messages:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        assert all(any(part in text for text in texts) for part in parts), message


def test_the_page_of_the_api_lists_every_endpoint():
    page = pages.prose(ROOT / "docs/reference/api.md")
    assert endpoints() > {"/v1/models", "/v1/chat/completions", "/tokenize"}
    for path in endpoints():
        assert f" {path}`" in page, path


def test_the_page_of_metrics_lists_the_keys_of_a_step():
    source = pages.read(ROOT / "MaxNano/training/metrics.py")
    row = source.split("def _row(")[1].split("\n    def ")[0]
    step = pages.read(ROOT / "MaxNano/training/step.py")
    written = re.findall(r'^ +"(\w+)":|row\["(\w+)"\]', row, re.MULTILINE)
    keys = {name for pair in written for name in pair if name}
    keys |= {"loss", "bpb", "grad_norm", "lr_multiplier", "skipped"}
    assert all(f'"{key}":' in step or f'"{key}"' in row for key in keys) and len(keys) > 12
    page = pages.prose(ROOT / "docs/reference/metrics.md")
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_readme_is_short():
    assert len(pages.read(ROOT / "README.md").splitlines()) < 220


# ---- The site -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    pages.build_site(folder)
    return folder


class Loads(html.parser.HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self):
        super().__init__()
        self.addresses, self.ids = [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        loading = tag == "link" and values.get("rel") in (
            "stylesheet",
            "icon",
            "preload",
            "preconnect",
        )
        if loading and values.get("href"):
            self.addresses.append(values["href"])
        if tag in ("script", "img", "iframe", "source", "video") and values.get("src"):
            self.addresses.append(values["src"])


def test_the_site_loads_nothing_from_elsewhere(site):
    built = list(site.rglob("*.html"))
    assert len(built) > 30
    for path in built:
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        assert loads.addresses
        for address in loads.addresses:
            assert not re.match(r"(\w+:)?//", address), f"{path.name} loads {address}"


def test_the_reference_has_every_key_and_program(site):
    loads = Loads()
    loads.feed((site / "reference/config.html").read_text(encoding="utf-8"))
    assert set(KEYS) <= loads.ids
    programs_page = Loads()
    programs_page.feed((site / "reference/cli.html").read_text(encoding="utf-8"))
    assert set(config_schema.PROGRAMS) <= programs_page.ids


def test_pages_of_other_folders_are_on_the_site(site):
    text = (site / "results/benchmarks/index.html").read_text(encoding="utf-8")
    assert "input_pipeline.py" in text
    for page in BENCHMARKS:
        if page.stem != "README":
            assert f'href="{page.stem}.html#2' in text
            assert (site / f"results/benchmarks/{page.stem}.html").is_file()
    assert (site / "start/cloud.html").is_file()

"""MkDocs hooks: pages from other folders, links into the repository, generated reference lists.

Pages link to files of the repository as on GitHub. On the site a link to a page leads to that page,
and a link to any other file is its text alone. A link to a file that does not exist is an error.
"""

import ast
import html
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from MaxNano import config_schema  # noqa: E402

TOPICS = sorted(page for page in (ROOT / "benchmarks").glob("*.md") if page.stem != "README")
# Files outside docs/ that are pages of the site.
PAGES = {
    "benchmarks/README.md": "results/benchmarks/index.md",
    **{f"benchmarks/{page.name}": f"results/benchmarks/{page.name}" for page in TOPICS},
    "end_to_end/cloud/README.md": "start/cloud.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "guides/contributing.md",
}
SECTIONS = {
    "reference/changelog.md": ("Reference", "Changes"),
    "guides/contributing.md": ("Guides", "Contribute"),
}
SOURCES = {page: source for source, page in PAGES.items()}
FENCE = re.compile(r"(?ms)^ *(?P<fence>```+|~~~+).*?^ *(?P=fence)[ \t]*$")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_config(config):
    """Adds the pages of PAGES that not every version of the repository has."""
    for page, (section, title) in SECTIONS.items():
        if (ROOT / SOURCES[page]).is_file():
            next(entry[section] for entry in config.nav if section in entry).append({title: page})
    return config


def on_files(files, config):
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if "─" in markdown:  # drawings are as wide as the page
        page.meta.setdefault("hide", ["toc"])
    for mark, text in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return outside_code(markdown, lambda text: LINK.sub(lambda link: to_site(link, uri), text))


def outside_code(markdown, change):
    """`change` applied to the text outside of fenced code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def to_site(link, page):
    """The text of a Markdown link on the site's page `page`."""
    image, text, target = link.groups()
    path, hash_sign, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return link[0]
    source = SOURCES.get(page, f"docs/{page}")
    there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if there == "README.md":
        there = "docs/index.md"
    if there.startswith("..") or not (ROOT / there).exists():
        raise PluginError(f"{source} links to {target}, which does not exist")
    goal = PAGES.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
    if goal is None:
        return text
    goal = posixpath.relpath(goal, posixpath.dirname(page) or ".")
    return f"{image}[{text}]({goal}{hash_sign}{anchor})"


# ---- Generated lists ----------------------------------------------------------------------------


def config_keys():
    """Every key of configs/base.yml: type, range, default, programs and meaning, by section."""
    keys = config_schema.base_keys()
    defaults = config_schema.default_values(keys, config_schema.BASE.name)
    lines, section = [], None
    for name, key in keys.items():
        if key.section != section:
            section = key.section
            lines += [f"## {section}", ""]
        facts = " ".join(filter(None, (key.type_text, key.range_text)))
        default = config_schema.format_value(defaults[name])
        programs = (
            "all programs"
            if set(key.programs) == set(config_schema.PROGRAMS)
            else ", ".join(key.programs)
        )
        lines += [
            f'<span id="{name}"></span>`{name}: {default}`',
            f":   {html.escape(key.help, quote=False)}",
            f"    <small>{html.escape(facts)}; read by {programs}</small>",
            "",
        ]
    return "\n".join(lines)


def programs():
    """The programs: what each one does and how it is started, from its first lines."""
    lines = []
    for name in config_schema.PROGRAMS:
        path = f"MaxNano/{'data/' if name == 'download' else ''}{name}.py"
        text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        summary, _, rest = text.partition("\n\n")
        keys = [key.name for key in config_schema.base_keys().values() if name in key.common_in]
        lines += [f"## {name}", "", escape(summary), "", as_blocks(rest), ""]
        lines += [
            "Keys that `--help` shows: "
            + ", ".join(f"[`{key}`](config.md#{key})" for key in keys)
            + ".",
            "",
        ]
    return "\n".join(lines)


def as_blocks(text):
    """Text of a docstring as Markdown: indented lines are code."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        code = all(line.startswith("    ") for line in block.splitlines())
        blocks.append(block if code else escape(block))
    return "\n\n".join(blocks)


def escape(text):
    return (
        html.escape(text, quote=False).replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    )


def sharding_rules():
    """The default of logical_axis_rules as a table."""
    keys = config_schema.base_keys()
    rules = config_schema.default_values(keys, config_schema.BASE.name)["logical_axis_rules"]
    rows = [f"| `{name}` | {', '.join(f'`{axis}`' for axis in axes)} |" for name, *axes in rules]
    return "\n".join(["| logical axis | mesh axes, in order |", "|---|---|", *rows])


MARKS = {
    "<!-- sharding rules -->": sharding_rules,
    "<!-- config keys -->": config_keys,
    "<!-- programs -->": programs,
}

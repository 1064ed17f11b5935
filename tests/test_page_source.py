"""The chat page's files, without a browser: no HTML from text, nothing from elsewhere, and what the
page reads from the server.
"""

import re

import pytest
from fake_engine import FakeEngine
from serving import Server

from MaxNano import scaling
from MaxNano.serving.app import STATIC

SCRIPTS = sorted(STATIC.glob("*.js"))
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_make_nodes_only(path):
    text = path.read_text("utf-8")
    makers = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function"
    )
    assert re.findall(makers, text) == []
    assert len(text.splitlines()) <= 600
    assert text.startswith("// ")  # what the module is for


def test_all_is_served_from_here():
    """Every import and link is a file of the page."""
    names = {path.name for path in STATIC.iterdir()}
    for path in SCRIPTS:
        text = path.read_text("utf-8")
        assert set(re.findall(r'from "([^"]+)"', text)) <= {f"./{name}" for name in names}, path
        assert set(re.findall(r'"(https?://[^"]*)"', text)) <= NAMESPACES, path
    for path in (STATIC / "index.html", *STATIC.glob("*.css")):
        text = path.read_text("utf-8")
        links = re.findall(r'(?:src|href)="([^"#]+)"', text)
        assert set(links) <= {f"/static/{name}" for name in names}, path
        assert "http" not in text and "url(" not in text, path
        assert "<script>" not in text and not re.search(r"<[^>]*\son\w+=", text), path


def test_a_model_has_details():
    """/v1/models, and each file of the page with its type."""
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    with Server(FakeEngine(lambda request, sample: b"x"), "stage=sft") as server:
        [model] = server.client.models.list().data
        counts = scaling.parameter_counts(scaling.shape_of(server.config))
        assert model.details == {
            "run": "tiny",
            "stage": "sft",
            "step": server.engine.trained_steps,
            "parameters": counts.total,
        }
        for path in STATIC.iterdir():
            name = "" if path.name == "index.html" else f"static/{path.name}"
            status, headers, content = server.request("GET", f"/{name}")
            assert status == 200 and content == path.read_bytes()
            assert headers["content-type"].startswith(kinds.get(path.suffix, "text/html"))
            assert "default-src 'self'" in headers["content-security-policy"]

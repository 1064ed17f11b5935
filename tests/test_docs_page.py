"""The built documentation in a browser, on a desktop and on a phone."""

import pages
import pytest
from browser import MARKS, launched

pytestmark = MARKS


@pytest.mark.parametrize("size", [(1280, 860), (390, 800)], ids=["desktop", "phone"])
def test_pages_load_nothing_from_elsewhere_and_fit(tmp_path, size):
    pages.build_site(tmp_path)
    built = sorted(tmp_path.rglob("*.html"))
    assert len(built) > 30
    with launched() as browser:
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        loaded, faults = [], []
        page.on("request", lambda request: loaded.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        for path in built:
            page.goto(path.as_uri())
            page.wait_for_load_state("load")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= size[0], f"{path.name} is {width} wide"
    assert [url for url in loaded if not url.startswith(("file:", "data:"))] == []
    assert faults == []

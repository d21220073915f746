"""The documentation site is built without a network, with every link checked, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.slow  # `make site` checks the links; the package needs no site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; every request of the build would go to a port that is closed."""
    folder = tmp_path_factory.mktemp("site")
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | closed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_have_the_layout_of_the_repository(site: Path) -> None:
    for page in ("", "CONTRIBUTING", "docs/quickstart", "docs/jobs", "docs/api", "benchmarks", "jobs"):
        assert (site / page / "index.html").is_file(), page
    assert (site / "docs/images/demo.png").is_file()
    assert "Predictor.predict_many" in (site / "docs/api/index.html").read_text()


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\" >]+)", page.read_text())
        loaded += re.findall(r"<link[^>]* href=\"?([^\" >]+)", page.read_text())
        assert [address for address in loaded if re.match(r"(?:https?:)?//", address)] == [], page

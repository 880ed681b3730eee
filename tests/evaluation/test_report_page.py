"""The report's page in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from line_world import TASKS, full_precision, line_benchmark, quantized

from omega_qvla.evaluation import report
from omega_qvla.evaluation.layer_error import LayerError
from omega_qvla.evaluation.results import Evaluation
from omega_qvla.evaluation.run import Candidate, evaluate_policies

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESK = 390, 1280

_FRAME = """<!doctype html>
<iframe id="page" width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").addEventListener("load", event => {{
  const inside = event.target.contentWindow, page = inside.document;
  document.getElementById("found").textContent = JSON.stringify({{
    "width": page.documentElement.scrollWidth,
    "pictures": [...page.images].map(image => image.naturalWidth),
    "plots": [...page.querySelectorAll("svg")].map(plot => plot.getBoundingClientRect().height),
    "titles": [...page.querySelectorAll("h2")].map(title => title.textContent),
    "fetched": inside.performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 60)),
  }});
}});
</script>"""

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: scripts/install-browser may not install one here (it needs root and apt-get)"
)


@pytest.fixture(scope="module")
def page() -> str:
    evaluation = evaluate_policies(
        [Candidate(full_precision), Candidate(quantized)],
        line_benchmark(),
        episodes_per_task=6,
        lanes=4,
        latency_repeats=2,
    )
    return report.html(_with_layers(evaluation))


def _with_layers(evaluation: Evaluation) -> Evaluation:
    """The stand-in policies have no layers and no files."""
    reference, policy = evaluation.policies
    layers = tuple(
        LayerError(f"model.layers.{block}.{kind}", part, block, 0.001 * (block + 1))
        for part in ("language", "action")
        for block in range(3)
        for kind in ("q_proj", "down_proj")
    )
    sizes = {"language": 4_000_000, "action": 1_000_000, "all else": 300_000}
    quarter = {part: size // 4 for part, size in sizes.items()}
    policies = (replace(reference, bytes_by_part=sizes), replace(policy, layers=layers, bytes_by_part=quarter))
    return replace(evaluation, policies=policies)


def browse(address: Path, profile: Path) -> tuple[str, list[str]]:
    """The document as the browser has it once it is loaded, and what the browser complains of."""
    assert BROWSER is not None
    options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=10000"]
    options += ["--no-sandbox", f"--user-data-dir={profile}"]  # tests may run as root
    ended = subprocess.run(
        [BROWSER, *options, "--enable-logging=stderr", "--dump-dom", address.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ended.stdout, re.findall(r".*:CONSOLE.*", ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_opens_without_errors(width: int, page: str, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(_FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    document, complaints = browse(frame, tmp_path / "profile")
    assert not complaints
    match = re.search(r'<pre id="found">(.+?)</pre>', document, re.DOTALL)
    assert match is not None
    found = json.loads(html.unescape(match[1]))
    assert not [name for name in found["fetched"] if not name.startswith("data:")]
    assert found["width"] <= width  # wide tables and plots scroll by themselves, the page does not
    assert len(found["plots"]) == 6 and min(found["plots"]) > 50
    assert len(found["pictures"]) == page.count("<img") >= len(TASKS) and min(found["pictures"]) > 0
    assert found["titles"] == [
        "Success per task",
        "Action error against the reference",
        "Actions along an episode",
        "Error of each quantized linear",
        "Bytes on disk",
        "Latency",
        "Episodes",
        "Where and how",
    ]


@pytest.mark.slow
def test_a_page_that_is_broken_is_noticed(tmp_path: Path) -> None:
    """The browser does complain, and does so where the test above looks."""
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><svg><path d='nonsense'/></svg>", encoding="utf-8")
    _, complaints = browse(broken, tmp_path / "profile")
    assert any("attribute d" in complaint for complaint in complaints)

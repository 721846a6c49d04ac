"""Headless Chromium, as far as tests of pages need it."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="NOT TESTED in a browser: no chromium here (apt install chromium)"
)

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--enable-logging=stderr",
    "--force-color-profile=srgb",
)


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its document, what it said, what it asked the network for."""

    dom: str
    console: list[str]
    requests: list[str]


def look(page: Path, folder: Path, *, dark: bool = False, screenshot: Path | None = None) -> Seen:
    """Opens a page; `folder` takes the browser's profile and log."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    arguments = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    arguments += ["--window-size=800,1200"]
    arguments += ["--blink-settings=preferredColorScheme=" + ("0" if dark else "1")]
    arguments += ["--dump-dom"] if screenshot is None else [f"--screenshot={screenshot}"]
    done = subprocess.run(
        [*arguments, page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout, console, _requests(json.loads(log.read_text())))


def _requests(log: dict[str, Any]) -> list[str]:
    """URLs of the network that a page asked for; the browser's own have no page behind them."""
    found = set()
    for event in log["events"]:
        values = event.get("params", {})
        url = values.get("url", "")
        asked = "initiator" in values and values["initiator"] != "not an origin"
        if url.startswith(("http:", "https:", "ws:", "wss:", "ftp:")) and asked:
            found.add(url)
    return sorted(found)

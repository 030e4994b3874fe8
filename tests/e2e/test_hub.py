"""Models by their Hub ids, from a Hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hub import Hub
from processes import free_port, script


@pytest.fixture
def hub(llama: Path, tmp_path: Path) -> Iterator[Hub]:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    (model / "consolidated.safetensors").write_bytes(b"the same weights")
    refusals = {"org/secret": "RepoNotFound", "org/gated": "GatedRepo", "org/old": "RevisionNotFound", "org/busy": ""}
    with Hub({"org/model": model, "org/cut": model}, refusals).running() as running:
        yield running


def environment(hub: Hub, home: Path) -> dict[str, str]:
    local = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "XDG_STATE_HOME": str(home)}
    return {**os.environ, **local, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@contextmanager
def serving(hub: Hub, home: Path) -> Iterator[httpx.Client]:
    state = home / "state.json"
    command = [*script("pagewire"), "serve", "org/model", f"--port={free_port()}", f"--state-file={state}", "--both=1"]
    with subprocess.Popen([*command, "--prefill=0", "--decode=0"], env=environment(hub, home)) as process:
        try:
            while not state.exists() and process.poll() is None:
                time.sleep(0.05)
            with httpx.Client(base_url=json.loads(state.read_text())["base_url"]) as client:
                yield client
        finally:
            process.send_signal(signal.SIGINT)


def test_a_model_is_downloaded_once_and_served_when_the_hub_has_gone(hub: Hub, tmp_path: Path) -> None:
    answers = []
    for gone in (False, True):
        if gone:
            hub.refusals["org/model"] = ""
        with serving(hub, tmp_path / "home") as client:
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["org/model"]
            body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            answers.append(client.post("/v1/completions", json=body).json()["choices"][0]["token_ids"])
    assert answers[0] == answers[1] and len(answers[0]) == 8
    fetched = [asked for asked in hub.asked if asked.startswith("GET /org/model/")]
    assert len(fetched) == len(set(fetched)) and any("model.safetensors" in asked for asked in fetched)
    assert not any("consolidated" in asked for asked in fetched), "the same weights were downloaded twice"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("org/secret", "org/secret was not found: check the name, give a local directory, or set HF_TOKEN"),
        ("org/gated", "access to org/gated is gated: accept its licence on the Hub and set HF_TOKEN"),
        ("org/old", "org/old has no revision 'v1'; check --revision"),
        ("org/busy", "org/busy is not in the local cache and the Hub cannot be reached"),
        ("org/cut", "the connection to the Hub broke while org/cut was downloaded"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_sentence(
    hub: Hub, tmp_path: Path, model: str, sentence: str
) -> None:
    hub.cut = "org/cut"
    command = [sys.executable, "-m", "pagewire_cli.main", "serve", model, "--port=0", "--revision=v1"]
    told = subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 1 and told.stderr.splitlines()[-1].startswith(f"pagewire: {sentence}")
    assert "Traceback" not in told.stderr

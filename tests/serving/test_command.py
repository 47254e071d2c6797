"""`decausal serve` as a user starts it, and the page that it shows."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import httpx
import openai
import pytest

from decausal.cli import main
from decausal.models.checkpoint import save_converted
from tests.hangs import PATIENCE
from tests.runs import environment
from tests.serving.running import converted, running

SCRIPT = "import sys; from decausal.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model") / "tiny-diffusion"
    save_converted(found, *converted())
    return found


def test_the_command_prints_its_address_answers_and_ends_when_asked(directory: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "serve", str(directory), "--port", "0", "--max_rows", "2"]
    variables = environment() | {"DECAUSAL_API_KEY": "secret"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("tiny-diffusion: http://127.0.0.1:"), line
        url = re.findall(r"http://\S+/v1", line)[0]
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            found = client.completions.create(model="tiny-diffusion", prompt="import", max_tokens=4)
        assert found.usage.completion_tokens == 4
        assert httpx.get(f"{url}/models", timeout=PATIENCE).status_code == 401
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=PATIENCE)
    assert server.returncode in (0, 130)
    assert "Traceback" not in errors
    assert "warning" not in errors


def test_whoever_opens_the_server_to_others_without_a_key_is_warned(directory: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "serve", str(directory), "--port", "0", "--host", "0.0.0.0"]
    command += ["--allowed_hosts", "llm.example.com, decausal"]
    variables = {name: value for name, value in environment().items() if name != "DECAUSAL_API_KEY"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        assert server.stdout is not None
        port = re.findall(r":([0-9]+)/v1", server.stdout.readline())[0]
        url = f"http://127.0.0.1:{port}/v1/models"
        hosts = {"decausal:80": 200, "LLM.example.com": 200, "203.0.113.7": 200, "evil.example": 403}
        assert {host: httpx.get(url, headers={"Host": host}).status_code for host in hosts} == hosts
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=PATIENCE)
    assert errors.splitlines()[0] == (
        "warning: whoever reaches 0.0.0.0 can use this server: set a key in DECAUSAL_API_KEY"
    )


def test_what_stands_in_the_way_is_reported_in_one_line(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in [
            ([str(directory), "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            ([str(tmp_path / "none"), "--port", "0"], "does not exist"),
            ([str(directory), "--host", "no such host", "--port", "0"], "give an address of this machine"),
            ([str(directory), "--max_rows", "0"], "--max_rows=0 is not accepted"),
            ([str(directory), "--max_rows", "many"], "invalid int value"),
            ([str(directory), "--prot", "3"], "unrecognized arguments"),
        ]:
            assert main(["serve", *arguments]) == 2
            errors = capsys.readouterr().err
            assert errors.count("\n") == 1
            assert says in errors
    serve = import_module("decausal.verbs.serve")
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", str(directory)]) == 2
    assert "serve needs uvicorn" in (reported := capsys.readouterr().err)
    assert "pip install 'decausal[serve]'" in reported


class Resources(HTMLParser):
    """Collects what a page loads, and the labels and ids of its controls."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_and_all_that_it_loads_come_from_the_server_itself() -> None:
    with running([converted()]) as server, server.client() as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        resources = Resources()
        resources.feed(page.text)
        assert resources.links
        texts = [page.text]
        for link in resources.links:
            if link.startswith(("#", "data:")):
                continue
            answer = client.get(f"/{link}")
            assert answer.status_code == 200, link
            texts.append(answer.text)
        scripts = re.findall(r'from "\./(.+?)"', "".join(texts))
        assert scripts
        texts += [client.get(f"/{script}").text for script in scripts]
        assert not re.search(r"https?://", "".join(texts))


def test_the_server_can_hold_as_many_clients_as_the_system_allows() -> None:
    if os.name == "nt":
        return
    import resource

    from decausal.serving.server import _raise_file_limit

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        _raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(4096, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

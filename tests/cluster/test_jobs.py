"""The job files as people start them: alone, stopped by ctrl-C and started again, and submitted to a cluster."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from kddata import commands
from kddata.config import LabelFile, label_job, load
from kddata.errors import StoreBusyError
from kddata.labelling import label_store
from kddata.store.lock import LEASE_S
from kddata.testing import make_images

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
SLEEP_S = LEASE_S + 2
JOBS = Path(__file__).parents[2] / "jobs"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def work(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, the two job scripts, and a job file for each."""
    root = tmp_path_factory.mktemp("jobs")
    for name in ("label.py", "train.py"):
        shutil.copy(JOBS / name, root / name)
    label = {
        "images": make_images(root / "images", num_images=24),
        "store": str(root / "labels"),
        "teacher": {"arch": "python:networks_of_tests:Slow", "num_classes": 10, "size_px": 16, "batch_size": 4},
        "views": {"per_image": 2},
        "labels": {"k": 3, "temperatures": [1, 2]},
        "units": {"images": 4},
    }
    train = {
        "store": str(root / "labels"),
        "student": {"arch": "python:kddata.nets:small_cnn", "num_classes": 10},
        "method": {"name": "kd", "temperature": 2},
        "data": {"batch_size": 16, "size_px": 16},
        "optimizer": {"lr": 0.05, "epochs": 2},
        "run": {"name": "s1", "storage": str(root / "runs")},
    }
    (root / "label.yaml").write_text(yaml.safe_dump(label))
    (root / "train.yaml").write_text(yaml.safe_dump(train))
    return root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_alone_stopped_and_started_again(
    number: signal.Signals, code: int, word: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "labels"
    command = [sys.executable, "label.py", "label.yaml", f"store={store}"]
    first = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while first.poll() is None and not list(store.glob("receipts/*.json")):
            time.sleep(0.05)
        first.send_signal(number)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert (first.returncode, out) == (code, ""), err
    assert err.splitlines()[-1] == f"{word}; the same command goes on from here"
    assert re.search(r"labelling: \d+ of 48 views are finished and kept", err)
    assert "Traceback" not in err
    assert not list(store.glob("lock-*"))
    assert not (store / "manifest-000001.json").exists()

    again = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"{store}: 48 views at ")
    wanted = label_store(label_job(load(LabelFile, work / "label.yaml", [f"store={tmp_path / 'wanted'}"])))
    assert files(store) == files(Path(wanted.store.url))

    commands.label(str(work / "label.yaml"), [f"store={store}"])
    assert capsys.readouterr().out == f"{store} is finished already; nothing was done\n"


def test_alone_put_to_sleep_it_is_alive_and_goes_on_when_it_wakes(work: Path, tmp_path: Path) -> None:
    """The driver, as by ctrl-Z; its Ray and its actors are awake, and find nobody who gives them units."""
    store = tmp_path / "labels"
    command = [sys.executable, "label.py", "label.yaml", f"store={store}"]
    first = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while first.poll() is None and not list(store.glob("receipts/*.json")):
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        second = subprocess.run(command, cwd=work, capture_output=True, text=True)
        assert second.returncode == StoreBusyError.exit_code, second.stderr
        assert f"a store has one driver; got process {first.pid} on " in second.stderr
        time.sleep(max(0.0, SLEEP_S - (time.monotonic() - begin)))
        assert not (store / "manifest-000001.json").exists()
        first.send_signal(signal.SIGCONT)
        out, err = first.communicate(timeout=120)
    finally:
        first.kill()
    assert first.returncode == 0, err
    assert out.startswith(f"{store}: 48 views at ")
    wanted = label_store(label_job(load(LabelFile, work / "label.yaml", [f"store={tmp_path / 'wanted'}"])))
    assert files(store) == files(Path(wanted.store.url))


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray that was started by `ray start --head`, and what a client of it has in its environment."""

    url: str
    token: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def head(networks: Path) -> Iterator[Head]:
    """On free ports and in a folder of its own; its processes are ended by id."""
    ports = free_ports(5)
    token = secrets.token_hex(32)
    temp = Path(tempfile.mkdtemp(prefix="kd"))  # short: Ray puts sockets below it
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": f"{BIN}:{os.environ['PATH']}"}
    env.pop("RAY_ADDRESS", None)
    names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    names += ("--metrics-export-port",)
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    options += [f"--temp-dir={temp}", "--num-cpus=2", "--disable-usage-stats", "--block"]
    with open(temp / "start.log", "wb") as log:
        process = subprocess.Popen([BIN / "ray", "start", "--head", *options], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{ports[1]}"
    try:
        for _ in range(600):
            assert process.poll() is None, (temp / "start.log").read_text()
            try:
                if status(url, token) == 200:
                    break
            except OSError:
                time.sleep(0.2)
        yield Head(url=url, token=token, env=env)
    finally:
        mine = [process.pid, *below(process.pid)]
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in mine:
            if Path(f"/proc/{pid}").exists() and str(temp) in cmdline(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def below(root: int) -> list[int]:
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    return [pid for child in map(int, children) for pid in (child, *below(child))]


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def status(url: str, token: str | None) -> int:
    """Of the answer to a question for the list of jobs."""
    request = urllib.request.Request(f"{url}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def submit(head: Head, work: Path, *command: str) -> subprocess.CompletedProcess[str]:
    line = [BIN / "ray", "job", "submit", "--address", head.url, "--working-dir", work, "--", *command]
    return subprocess.run(line, env=head.env, capture_output=True, text=True)


def test_the_job_server_wants_the_token(head: Head, work: Path) -> None:
    assert status(head.url, None) == 401
    assert status(head.url, "0" * 64) in (401, 403)
    assert status(head.url, head.token) == 200
    stranger = {**head.env, "RAY_AUTH_MODE": "disabled"}
    refused = submit(Head(url=head.url, token="", env=stranger), work, "python", "label.py", "label.yaml")
    assert refused.returncode != 0
    assert not (work / "labels").exists()


def test_jobs_run_under_ray_job_submit(head: Head, work: Path) -> None:
    labelled = submit(head, work, "python", "label.py", "label.yaml", "--json")
    assert labelled.returncode == 0, labelled.stdout + labelled.stderr
    (line,) = [line for line in labelled.stdout.splitlines() if line.startswith('{"new_units"')]
    assert json.loads(line)["rows"] == 48
    trained = submit(head, work, "python", "train.py", "train.yaml", "cluster.workers=2")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert f"{work}/runs/s1: training loss " in trained.stdout
    assert (work / "runs" / "s1" / "model.safetensors").stat().st_size > 0


def test_a_submitted_job_that_is_wrong_says_so_and_fails(head: Head, work: Path) -> None:
    refused = submit(head, work, "python", "label.py", "label.yaml", "labels.kk=9")
    assert refused.returncode != 0
    assert "labels.kk: no such key; the nearest is labels.k" in refused.stdout
    assert "Traceback" not in refused.stdout

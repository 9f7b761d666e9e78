"""The parts of SglangServer that need no running server: ports, early death, clean-up. tests/serving runs real ones."""

import socket
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import servers
from benchmarks.servers import ServerError, SglangServer


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is taken"), SglangServer("m", port=port, log_path=tmp_path / "log"):
            pass
    assert not (tmp_path / "log").exists()


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Make SglangServer run a Python program of ours instead of SGLang."""

    def use(source: str) -> None:
        program = tmp_path / "program"
        program.write_text(f"#!{servers.sys.executable}\nimport sys, time, subprocess\n{source}\n")
        program.chmod(0o755)
        monkeypatch.setattr(servers.sys, "executable", str(program))

    return use


def test_a_server_that_dies_shows_the_end_of_its_log(script, tmp_path):
    script("print('first'); print('the reason'); sys.exit(3)")
    with pytest.raises(ServerError, match=r"ended with status 3 while starting(.|\n)*the reason"), SglangServer(
        "m", log_path=tmp_path / "log", progress=None
    ):
        pass


def test_a_server_that_dies_shows_the_first_failure(script, tmp_path):
    script("print('[09:00] rank 1: Traceback (most recent call last):\\nthe cause'); print('consequence\\n' * 50); sys.exit(3)")
    server = SglangServer("m", log_path=tmp_path / "log", progress=None)
    with pytest.raises(ServerError, match=r"First failure:\n\[09:00\] rank 1: Traceback.*\nthe cause\n"):
        server.__enter__()


def test_a_server_that_never_answers_is_ended_with_its_children(script, tmp_path):
    # The child ignores SIGTERM and leaves the process group, as a stubborn worker would.
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    interpreter = servers.sys.executable
    script(f"print(subprocess.Popen([{interpreter!r}, '-c', {child!r}], start_new_session=True).pid, flush=True); time.sleep(600)")
    server = SglangServer("m", log_path=tmp_path / "log", start_timeout_s=1.5, progress=None)
    with pytest.raises(ServerError, match="did not answer within 2 s"):
        server.__enter__()
    assert not server.alive()
    pid = int(server.log_tail(1))
    assert not _runs(pid)


def test_kv_quant_of_a_bf16_server_is_an_error(monkeypatch, tmp_path):
    server = SglangServer("m", log_path=tmp_path / "log", name="plain")
    monkeypatch.setattr(server, "server_info", lambda: {"internal_states": [{}]})
    with pytest.raises(ServerError, match="plain has no kv_quant"):
        server.kv_quant()


def test_the_server_does_not_outlive_a_killed_caller():
    # DIE_WITH_PARENT is what starts the server; here it starts a sleeper for a caller that is killed at once.
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    caller = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {servers.DIE_WITH_PARENT!r}, '-c', {sleeper!r}])"
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

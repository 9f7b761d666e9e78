"""A real SGLang server as a context manager, on the CPU unless told otherwise. Used by the demo, the tests and the GPU benchmarks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil
import requests

CPU_ARGS = (
    *("--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-overlap-schedule", "--sleep-on-idle", "--enable-cache-report", "--skip-server-warmup"),
)
"""Flags with which stock SGLang 0.5.17 serves without a GPU."""

CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""SGLang's own switches. Without the passive wait, idle OpenMP threads starve whatever else uses the cores."""

DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG, kept across exec
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)
"""Runs Python with the given arguments so that the kernel ends it when the process that asked for it is gone, even by SIGKILL (Linux)."""

FAILURES = ("Traceback (most recent call last)", "Fatal Python error", "terminate called")
"""What is in the first lines that say why a process ended."""

STOP_GRACE_S = 10.0
HEARTBEAT_S = 10.0


class ServerError(RuntimeError):
    """The server did not start, died, or refused a request; the message ends with the tail of its log where that helps."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SglangServer:
    """`python -m sglang.launch_server` from start to death.

    Example:
        with SglangServer(model, ["--max-total-tokens", "4096", "--kv-quant", "oscar"]) as server:
            answer = server.generate([1, 2, 3], max_new_tokens=8)

    Args:
        model: Hugging Face folder.
        extra_args: flags after `base_args`; a repeated flag wins over them.
        port: TCP port; a free one when None.
        log_path: file that takes the server's output.
        name: how progress lines call this server.
        threads: OpenMP threads of the server; None leaves them to the environment.
        start_timeout_s: give up when /health does not answer by then.
        progress: called with one line now and then while the server starts; None for silence.
        base_args: flags before `extra_args`; none for a server on a GPU.
        environment: variables set on top of the caller's environment.
        stop_grace_s: what the server has for an orderly end before it is killed.
    """

    def __init__(
        self,
        model: Path | str,
        extra_args: Iterable[str] = (),
        *,
        port: int | None = None,
        log_path: Path | str = "build/server.log",
        name: str = "server",
        threads: int | None = 2,
        start_timeout_s: float = 300.0,
        progress: Callable[[str], None] | None = print,
        base_args: Iterable[str] = CPU_ARGS,
        environment: Mapping[str, str] = CPU_ENVIRONMENT,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        self.model = str(model)
        self.arguments = [str(argument) for argument in (*base_args, *extra_args)]
        self.environment = dict(environment)
        self.asked_port = port
        self.log_path = Path(log_path)
        self.name = name
        self.threads = threads
        self.start_timeout_s = start_timeout_s
        self.stop_grace_s = stop_grace_s
        self._progress = progress or (lambda line: None)
        self._process: subprocess.Popen | None = None
        self._sessions = threading.local()

    def __enter__(self) -> "SglangServer":
        self.port = self._claim_port()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["-m", "sglang.launch_server", "--model-path", self.model, "--host", "127.0.0.1"]
        arguments += ["--port", str(self.port), *self.arguments]
        environment = {**os.environ, **self.environment}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with self.log_path.open("wb") as log:
            log.write((" ".join([sys.executable, *arguments]) + "\n").encode())
            log.flush()
            command = [sys.executable, "-c", DIE_WITH_PARENT, *arguments]
            # A session of its own, so that the whole process group can be ended without touching ours.
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def generate(
        self, input_ids: list[int], max_new_tokens: int, *, temperature: float = 0.0, ignore_eos: bool = False, timeout_s=300.0, **fields
    ) -> dict:
        """POST /generate with token ids; `fields` are further keys of the request. Returns the decoded answer.

        Thread-safe: every thread has a connection of its own.

        Raises:
            ServerError: the server answered with an error or is gone.
        """
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
        body = {"input_ids": input_ids, "sampling_params": sampling, **fields}
        return self._call("POST", "/generate", json=body, timeout=timeout_s).json()

    def server_info(self) -> dict:
        """The whole of /server_info: flags, `max_total_num_tokens`, `version`, `internal_states`."""
        return self._call("GET", "/server_info", timeout=60).json()

    def kv_quant(self) -> dict:
        """What the plugin reports under `kv_quant` of the first rank's internal state.

        Raises:
            ServerError: there is no such report, so the server does not run with `--kv-quant oscar`.
        """
        state = self.server_info()["internal_states"][0]
        if "kv_quant" not in state:
            raise ServerError(f"/server_info of {self.name} has no kv_quant: the server serves bf16. {self._log_hint()}")
        return state["kv_quant"]

    def flush_cache(self) -> None:
        """Empty the radix cache, as soon as nothing runs: the scheduler is busy a moment longer than an answer takes to come back."""
        self._call("POST", "/flush_cache?timeout=30", timeout=60)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's output."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def stop(self) -> None:
        """End the server and every process it started. Safe to call twice."""
        if self._process is None:
            return
        family = _descendants(self._process.pid)
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.stop_grace_s)
        self._signal_group(signal.SIGKILL)
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=STOP_GRACE_S)
        self._process.wait()
        self._process = None

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # raised when all of them have ended
            os.killpg(self._process.pid, number)

    def _claim_port(self) -> int:
        if self.asked_port is None:
            return free_port()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.asked_port))
            except OSError as error:
                hint = "choose another, or leave it out for a free one"
                raise ServerError(f"port {self.asked_port} is taken ({error.strerror}): {hint}") from error
        return self.asked_port

    def _wait_until_healthy(self) -> None:
        begun = time.monotonic()
        next_line = begun + HEARTBEAT_S
        while True:
            if not self.alive():
                raise ServerError(f"{self.name} ended with status {self._process.returncode} while starting. {self._log_hint()}")
            try:
                if requests.get(f"{self.url}/health", timeout=20).status_code == 200:
                    break
            except requests.RequestException:
                pass  # not listening yet
            now = time.monotonic()
            if now - begun > self.start_timeout_s:
                raise ServerError(f"{self.name} did not answer within {self.start_timeout_s:.0f} s. {self._log_hint()}")
            if now >= next_line:
                self._progress(f"  {self.name}: starting, {now - begun:.0f} s")
                next_line = now + HEARTBEAT_S
            time.sleep(0.5)
        self._progress(f"  {self.name}: up after {time.monotonic() - begun:.0f} s on port {self.port}")

    def _call(self, method: str, path: str, **arguments) -> requests.Response:
        session = getattr(self._sessions, "value", None)
        if session is None:
            session = self._sessions.value = requests.Session()
        try:
            response = session.request(method, self.url + path, **arguments)
        except requests.RequestException as error:
            raise ServerError(f"{method} {path} on {self.name} failed: {error}. {self._log_hint()}") from error
        if response.status_code != 200:
            raise ServerError(f"{method} {path} on {self.name} answered {response.status_code}: {response.text[:500]}")
        return response

    def _log_hint(self) -> str:
        first = self._first_failure()
        return f"{first}Last lines of {self.log_path}:\n{self.log_tail()}"

    def _first_failure(self, lines: int = 40) -> str:
        """What the log has from the first traceback or crash on: other processes of the server fail later, because of that one."""
        text = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        starts = [i for i, line in enumerate(text) if any(sign in line for sign in FAILURES)]
        return "\n".join(["First failure:", *text[starts[0] : starts[0] + lines], ""]) if starts else ""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []

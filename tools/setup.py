"""Set up this checkout: `.venv` with stock SGLang for the CPU, the project itself, and the embedded model.

Every step first looks at what is really there (installed versions, files) and does only what is missing, so a second run takes a
second. Standard library only: it runs on the system's Python before anything is installed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, "build")
LOG = os.path.join(BUILD, "setup.log")
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
PROJECT_STAMP = os.path.join(VENV, "project.sha256")

OLDEST, NEWEST_TRIED = (3, 11), (3, 12)
GIB_FOR_EVERYTHING = 8.0
GIB_FOR_REST = 1.0
TORCH = {"torch": "2.11.0", "torchvision": "0.26.0"}
STANDIN = "sgl-kernel-cpu-standin"
HEARTBEAT_S = 15

# Log fragments -> what went wrong, in the order in which they are looked for.
CAUSES = (
    (("No space left on device",), "the disk is full"),
    (
        ("Temporary failure in name resolution", "Name or service not known", "Network is unreachable", "Connection refused",
         "Max retries exceeded", "ConnectTimeoutError", "NewConnectionError", "ProxyError", "Read timed out", "(from versions: none)"),
        "the package index cannot be reached: check the network, or pip's index and proxy settings",
    ),
    (("No matching distribution found",), "the package index has no build of that version for this Python and platform"),
    (("externally-managed-environment",), "pip refused to touch the system's Python"),
    (
        ("ensurepip is not available", "No module named ensurepip", "No module named venv"),
        "this Python cannot make virtual environments: install its venv package (Debian: python3-venv)",
    ),
)


class SetupError(Exception):
    """A step failed; the message is for the user."""


def main():
    started = time.time()
    try:
        os.makedirs(BUILD, exist_ok=True)
        with open(LOG, "w"):
            pass
        todo = [step for step in STEPS if not step[1]()]
        if not todo:
            print("setup: everything is in place")
            return 0
        check_space(todo)
        for number, (title, done, act) in enumerate(todo, 1):
            print(f"setup [{number}/{len(todo)}] {title}", flush=True)
            begun = time.time()
            act()
            if not done():
                raise SetupError(f"the step ran, but its result is not there; see {os.path.relpath(LOG, ROOT)}")
            print(f"setup [{number}/{len(todo)}] done in {time.time() - begun:.0f} s", flush=True)
    except (SetupError, OSError) as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup interrupted; run it again to go on", file=sys.stderr)
        return 1
    print(f"setup: finished in {time.time() - started:.0f} s")
    return 0


def check_space(todo):
    """Refuse before the first download when the disk cannot hold what is missing."""
    need = GIB_FOR_EVERYTHING if any(act is install_torch for _, _, act in todo) else GIB_FOR_REST
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < need:
        raise SetupError(f"{free:.1f} GiB free on the disk of {ROOT}, {need:.1f} GiB needed: free some space and run again")


# --- what is installed ---------------------------------------------------------------------------------------------------------------


def installed():
    """{normalised name: version} of the packages in .venv, local version parts (+cpu) removed."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps([(d.metadata['Name'], d.version) for d in m.distributions() if d.metadata['Name']]))"
    )
    result = subprocess.run([PYTHON, "-c", code], capture_output=True, cwd=BUILD, check=False)
    if result.returncode:
        raise SetupError(f"{PYTHON} does not work ({result.stderr.decode().strip()[-200:]}): delete .venv and run again")
    return {normalise(name): version.split("+")[0] for name, version in json.loads(result.stdout.decode())}


def normalise(name):
    return name.lower().replace("_", "-").replace(".", "-")


def pins(filename):
    """{normalised name: version} of a requirements file in which every line is `name==version`."""
    with open(os.path.join(ROOT, filename)) as file:
        lines = [line.split("#")[0].strip() for line in file]
    pairs = [line.split("==") for line in lines if line]
    return {normalise(name): version for name, version in pairs}


def has(wanted):
    if not os.path.exists(PYTHON):
        return False
    found = installed()
    return all(found.get(name) == version for name, version in wanted.items())


# --- steps ---------------------------------------------------------------------------------------------------------------------------


def venv_done():
    return os.path.exists(PYTHON)


def make_venv():
    run([find_python(), "-m", "venv", VENV])


def find_python():
    """An interpreter of a supported version: this one, or one on PATH."""
    if sys.version_info >= OLDEST:
        if sys.version_info[:2] > NEWEST_TRIED:
            print(f"setup: Python {dotted(sys.version_info)} is newer than what was tried ({dotted(NEWEST_TRIED)})", flush=True)
        return sys.executable
    for minor in range(NEWEST_TRIED[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    oldest, newest = dotted(OLDEST), dotted(NEWEST_TRIED)
    found = dotted(sys.version_info)
    raise SetupError(f"Python {found} is too old: {oldest} to {newest} is needed. Install one and run: make PYTHON=python{newest} ...")


def dotted(version):
    return ".".join(str(part) for part in version[:2])


def install_torch():
    pip([f"{name}=={version}" for name, version in TORCH.items()])


def install_sglang():
    pip(["--no-deps", "-r", "requirements-cpu.txt"])


def install_dev():
    pip(["--no-deps", "-r", "requirements-dev.txt"])


def standin_done():
    return has({STANDIN: "1.0"})


def install_standin():
    pip(["--no-deps", "--no-build-isolation", os.path.join("tools", "sgl_kernel_cpu")])


def project_done():
    """The editable install answers from this checkout and was made from this very pyproject.toml."""
    if not os.path.exists(PYTHON) or not os.path.exists(PROJECT_STAMP):
        return False
    with open(PROJECT_STAMP) as file:
        if file.read() != project_hash():
            return False
    code = (
        "import importlib.util as u\n"
        "for name in ('oscar_radix', 'oscar_radix.kernels', 'oscar_radix.patches'): print(u.find_spec(name).origin)"
    )
    result = subprocess.run([PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=BUILD, check=False)
    wanted = [os.path.join(ROOT, folder, "__init__.py") for folder in ("oscar_radix", "kernels", "patches")]
    return result.stdout.decode().split("\n")[:-1] == wanted


def project_hash():
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def install_project():
    pip(["--no-deps", "--no-build-isolation", "-e", "."])
    with open(PROJECT_STAMP, "w") as file:
        file.write(project_hash())


def model_done():
    if not os.path.exists(PYTHON):
        return False
    code = "import sys\nfrom oscar_radix import model\nsys.exit(not model.is_complete(model.root() / 'model' / model.FOLDER))"
    return subprocess.run([PYTHON, "-c", code], stderr=subprocess.DEVNULL, cwd=ROOT, check=False).returncode == 0


def prepare_model():
    run([PYTHON, "-m", "oscar_radix.cli", "model"])


STEPS = (
    ("virtual environment .venv", venv_done, make_venv),
    ("torch 2.11.0 (about 3 GB with its libraries)", lambda: has(TORCH), install_torch),
    ("stock SGLang 0.5.17 for the CPU", lambda: has(pins("requirements-cpu.txt")), install_sglang),
    ("tools: pytest, hypothesis, ruff, matplotlib", lambda: has(pins("requirements-dev.txt")), install_dev),
    ("stand-in for sgl_kernel", standin_done, install_standin),
    ("oscar_radix, editable", project_done, install_project),
    ("embedded model SmolLM2-135M-Instruct (93 MB)", model_done, prepare_model),
)


# --- running commands ----------------------------------------------------------------------------------------------------------------


def pip(arguments):
    run([PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off", *arguments])


def run(command):
    """Run `command` with its output in LOG, a sign of life every HEARTBEAT_S seconds, and its last lines when it fails."""
    begun = time.time()
    with open(LOG, "ab") as log:
        log.write(("\n$ " + " ".join(command) + "\n").encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT)
        try:
            while True:
                try:
                    code = process.wait(timeout=HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    last = (tail(start, 1) or ["..."])[-1]
                    print(f"  {time.time() - begun:4.0f} s  {last[:110]}", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
    if code:
        lines = tail(start, 12)
        text = "\n".join(tail(start, 200))
        cause = next((cause for fragments, cause in CAUSES if any(part in text for part in fragments)), None)
        head = cause or f"exit status {code}"
        parts = [head, "command: " + " ".join(command), *lines, "whole log: " + os.path.relpath(LOG, ROOT)]
        raise SetupError("\n  ".join(parts))


def tail(start, count):
    """The last `count` non-empty lines of LOG after byte `start`."""
    with open(LOG, "rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


if __name__ == "__main__":
    sys.exit(main())

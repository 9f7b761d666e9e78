"""The set-up script: what it finds installed, when it refuses, and how it explains a failed step."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A fresh copy of the script's module whose log lies in a temporary folder."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "tools" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOG", str(tmp_path / "setup.log"))
    (tmp_path / "setup.log").touch()
    return module


def free(module, monkeypatch, gib):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 50, 0, int(gib * 2**30)))


def test_every_requirement_is_pinned(setup):
    for name in ("requirements-cpu.txt", "requirements-dev.txt"):
        wanted = setup.pins(name)
        assert len(wanted) > 10
        assert all(version for version in wanted.values())
    assert setup.pins("requirements-cpu.txt")["sglang"] == "0.5.17"


def test_a_wrong_version_counts_as_missing(setup):
    assert setup.has({"pytest": setup.pins("requirements-dev.txt")["pytest"]})
    assert not setup.has({"pytest": "0.1"})
    assert not setup.has({"no-such-package": "1"})


def test_this_environment_is_complete(setup):
    assert [title for title, done, _ in setup.STEPS if not done()] == []


def test_disk_space_is_checked_against_what_is_missing(setup, monkeypatch):
    everything, rest = setup.STEPS, setup.STEPS[-1:]
    free(setup, monkeypatch, 5)
    setup.check_space(rest)
    with pytest.raises(setup.SetupError, match=r"5\.0 GiB free .* 8\.0 GiB needed"):
        setup.check_space(everything)


def test_an_old_python_looks_for_a_newer_one_first(setup, monkeypatch):
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/found" if name == "python3.11" else None)
    assert setup.find_python() == "/found"
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"Python 3\.9 is too old: 3\.11 to 3\.12 is needed"):
        setup.find_python()


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Failed to establish: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
        ("No matching distribution found for torch==2.11.0", "no build of that version"),
        ("something new", "exit status 1"),
    ],
)
def test_a_failed_command_names_its_cause_and_shows_its_last_lines(setup, printed, cause):
    with pytest.raises(setup.SetupError) as error_info:
        setup.run([sys.executable, "-c", f"import sys; print({printed!r}); sys.exit(1)"])
    message = str(error_info.value)
    assert cause in message.splitlines()[0]
    assert printed in message


def test_output_of_an_earlier_command_is_not_blamed(setup):
    setup.run([sys.executable, "-c", "print('No space left on device')"])
    with pytest.raises(setup.SetupError, match=r"^exit status 2"):
        setup.run([sys.executable, "-c", "import sys; sys.exit(2)"])


def test_a_step_without_a_result_fails(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "STEPS", (("nothing", lambda: False, lambda: None),))
    assert setup.main() == 1
    assert "setup failed: the step ran, but its result is not there" in capsys.readouterr().err

"""Dispatch, exit codes and error lines of `oscar-radix`; the work behind the subcommands has tests of its own."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from oscar_radix import cli, model


def test_model_prints_nothing_but_the_folder(monkeypatch, capsys, tmp_path):
    def prepare(progress):
        progress("downloading")
        return tmp_path / "model"

    monkeypatch.setattr(model, "prepare", prepare)
    assert cli.main(["model"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'model'}\n"
    assert captured.err == "downloading\n"


def test_a_failure_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def prepare(progress):
        raise model.ModelError("no network\ntry again")

    monkeypatch.setattr(model, "prepare", prepare)
    assert cli.main(["model"]) == 2
    assert capsys.readouterr().err == "oscar-radix: no network try again\n"


def test_calibrate_passes_every_argument_on(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setitem(sys.modules, "oscar_radix.calibration.collect", SimpleNamespace(calibrate=lambda *args: calls.append(args)))
    (tmp_path / "config.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("é text", encoding="utf-8")
    out = tmp_path / "out.safetensors"
    argv = ["calibrate", "--model", str(tmp_path), "--text", str(text), "-o", str(out), "--recipe", "mulm", "--max-tokens", "100"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert calls == [(tmp_path, "é text", "mulm", out, 100, cli._say)]


@pytest.mark.parametrize("missing", ["model", "text", "out"])
def test_calibrate_names_what_does_not_exist(missing, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("text")
    paths = {"model": tmp_path, "text": text, "out": tmp_path / "out"} | {missing: tmp_path / "absent" / "absent"}
    argv = ["calibrate", "--model", str(paths["model"]), "--text", str(paths["text"]), "-o", str(paths["out"])]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "absent" in error
    assert error.count("\n") == 1


def test_inspect_prints_the_description(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "oscar_radix.calibration.report", SimpleNamespace(describe=lambda path: f"about {path.name}"))
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"")
    assert cli.main(["inspect", str(file)]) == 0
    assert capsys.readouterr().out == "about c.safetensors\n"


def test_inspect_of_a_missing_file(capsys, tmp_path):
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "none is not a file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["unknown"], ["calibrate"], ["inspect"]])
def test_usage_errors_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(argv)
    assert exit_info.value.code == 2


def test_max_tokens_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--model", "m", "--text", "t", "-o", "o", "--max-tokens", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_runs_as_a_module():
    """As tools/setup.py runs it."""
    command = [sys.executable, "-m", "oscar_radix.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ("model", "calibrate", "inspect", "tree"))

"""What the plugin asks of SGLang, and that it says so when it does not get it."""

import json
import subprocess
import sys

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry

from oscar_radix.patches import targets

FRESH_PROCESS = """
import json
from oscar_radix.patches.targets import problems
before = problems(expect_hooks=True)
from sglang.srt.plugins import load_plugins
load_plugins()
print(json.dumps({"before": before, "after": problems(expect_hooks=True)}))
"""


def test_a_fresh_process_has_all_hooks_once_plugins_are_loaded():
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found["before"]) == sorted(f"hook on {target} is not applied" for target in targets.HOOKED), "nothing else is wrong"
    assert found["after"] == []


@pytest.mark.usefixtures("plugin")
class TestProblems:
    """One planted fault each; without one, the list is empty."""

    def test_none(self):
        assert targets.problems(expect_hooks=True) == []

    def test_wrong_version(self, monkeypatch):
        monkeypatch.setattr(targets, "SUPPORTED_VERSIONS", ("9.9.8", "9.9.9"))
        assert targets.problems(expect_hooks=True) == ["SGLang is 0.5.17; supported: 9.9.8, 9.9.9"]

    @pytest.mark.parametrize("target", [*targets.HOOKED, *targets.CALLED])
    def test_changed_signature(self, monkeypatch, target):
        table = targets.HOOKED if target in targets.HOOKED else targets.CALLED
        actual = table[target]
        monkeypatch.setitem(table, target, (*actual, "added"))
        assert targets.problems(expect_hooks=True) == [f"{target} takes {actual}, expected {(*actual, 'added')}"]

    @pytest.mark.parametrize(
        "target", ["sglang.srt.server_args.ServerArgs.renamed", "sglang.srt.no_such_module.f", "sglang.srt.server_args.NoSuchClass.f"]
    )
    def test_missing_function(self, monkeypatch, target):
        monkeypatch.setitem(targets.CALLED, target, ("self",))
        (found,) = targets.problems(expect_hooks=True)
        assert found.startswith(f"{target} does not exist: ")

    def test_hook_that_sglang_did_not_apply(self, monkeypatch):
        monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {targets.SCHEDULER_INIT})
        assert targets.problems(expect_hooks=True) == [f"hook on {targets.SCHEDULER_INIT} is not applied"]
        assert targets.problems(expect_hooks=False) == []

    def test_all_of_them_at_once(self, monkeypatch):
        monkeypatch.setattr(targets, "SUPPORTED_VERSIONS", ("9.9.9",))
        monkeypatch.setitem(targets.CALLED, "sglang.srt.server_args.ServerArgs.renamed", ("self",))
        monkeypatch.setattr(HookRegistry, "_patched", set())
        assert len(targets.problems(expect_hooks=True)) == 2 + len(targets.HOOKED)

"""What `--kv-quant oscar` refuses, through SGLang's own command line parser; and that `--kv-quant none` changes nothing."""

import argparse
import dataclasses
import inspect
import re
from types import SimpleNamespace

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs, prepare_server_args

from oscar_radix.codec import DEFAULT_RECIPE, RECIPES
from oscar_radix.config import OscarConfig
from oscar_radix.patches import targets
from oscar_radix.patches.flags import _host_gib, config_of
from oscar_radix.patches.refusals import FLAG_RULES, Refused, refuse_device, refuse_flags

pytestmark = pytest.mark.usefixtures("plugin")

CPU = ["--device", "cpu"]
OSCAR = ["--kv-quant", "oscar", *CPU]

REFUSED_FLAGS = [
    ["--kv-cache-dtype", "fp8_e5m2"],
    ["--page-size", "16"],
    ["--speculative-algorithm", "EAGLE"],
    ["--disaggregation-mode", "prefill"],
    ["--enable-hierarchical-cache"],
    ["--enable-lmcache"],
    ["--enable-flexkv"],
    ["--pipeline-parallel-size", "2"],
    ["--decode-context-parallel-size", "2"],
    ["--attn-cp-size", "2"],
    ["--enable-deterministic-inference"],
    ["--enable-streaming-session"],
    ["--enable-session-radix-cache"],
    ["--enable-hisparse"],
    ["--enable-unified-memory"],
    ["--enable-page-major-kv-layout"],
    ["--prefill-only-disable-kv-cache"],
    ["--enable-two-batch-overlap"],
    ["--enable-pdmux"],
    ["--enable-dp-attention"],
    ["--enable-torch-compile"],
    ["--enable-mixed-chunk"],
    ["--enable-memory-saver"],
    ["--kv-canary", "log"],
    ["--dllm-algorithm", "LowConfidence"],
    ["--radix-cache-backend", "other"],
    ["--attention-backend", "triton"],
    ["--prefill-attention-backend", "triton"],
    ["--decode-attention-backend", "triton"],
]
ACCEPTED_FLAGS = [
    ["--kv-cache-dtype", "auto"],
    ["--kv-cache-dtype", "bf16"],
    ["--page-size", "32"],
    ["--disaggregation-mode", "null"],
    ["--tensor-parallel-size", "2"],
    ["--chunked-prefill-size", "512"],
    ["--radix-eviction-policy", "lfu"],
    ["--disable-radix-cache"],
]
WHAT_TO_DO = ("drop", "use", "serve", "set")


def parse(*arguments: str, model: str = "no-model") -> ServerArgs:
    return prepare_server_args(["--model-path", model, *arguments])


def refusal(*arguments: str) -> str:
    """The message of a refused command line."""
    with pytest.raises(SystemExit) as error:
        parse(*arguments)
    return str(error.value)


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", REFUSED_FLAGS, ids=" ".join)
def test_refused_flag(flag):
    """One line for the flag: with its value, a reason, and what to do instead."""
    head, line = refusal(*OSCAR, *flag).split("\n")
    assert head == "error: --kv-quant oscar does not go with:"
    named, reason = line.strip().split(": ", 1)
    assert named == " ".join(flag)
    assert any(word in reason.replace(";", " ").split() for word in WHAT_TO_DO), reason
    assert len(reason.split()) > 5, "a reason and what to do instead"


def test_every_rule_has_a_case_and_a_message_of_its_own():
    rules = [rule.message.split(":")[0].split()[0] for rule in FLAG_RULES]
    assert sorted(rules) == sorted(flag[0] for flag in REFUSED_FLAGS)
    assert len({rule.message for rule in FLAG_RULES}) == len(FLAG_RULES)


def test_all_broken_rules_are_listed_at_once():
    flags = [flag for flag in REFUSED_FLAGS if flag[0] in ("--page-size", "--enable-hisparse", "--kv-canary")]
    lines = refusal(*OSCAR, *(word for flag in flags for word in flag)).split("\n")[1:]
    assert [line.strip().split(":")[0] for line in lines] == [" ".join(flag) for flag in flags]


def _namespace(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(["--model-path", "no-model", *arguments])


@pytest.mark.parametrize("flag", ACCEPTED_FLAGS, ids=" ".join)
def test_accepted_flag(flag):
    refuse_flags(_namespace(*OSCAR, *flag))


@pytest.mark.parametrize("flag", REFUSED_FLAGS, ids=" ".join)
def test_without_oscar_no_rule_is_consulted(flag, monkeypatch):
    def never(args):
        raise AssertionError("the rules belong to --kv-quant oscar")

    monkeypatch.setattr("oscar_radix.patches.flags.refuse_flags", never)
    monkeypatch.setattr(ServerArgs, "__post_init__", lambda self: None)
    parse(*CPU, *flag)


# Our own flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--oscar-recent-tokens", "100"], "--oscar-recent-tokens 100 must be a multiple of the page size 32"),
        (["--oscar-recent-tokens", "0"], "--oscar-recent-tokens 0 must be a multiple of the page size 32 and at least 32"),
        (["--oscar-hot-fraction", "0"], "--oscar-hot-fraction 0.0 must be above 0 and at most 0.9"),
        (["--oscar-hot-fraction", "0.95"], "--oscar-hot-fraction 0.95 must be above 0 and at most 0.9"),
    ],
)
def test_wrong_value(flag, message):
    assert message in refusal(*OSCAR, *flag)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--kv-quant", "int3"], "invalid choice: 'int3'"),
        (["--oscar-recipe", "gptq"], "invalid choice: 'gptq'"),
        (["--oscar-policy", "magic"], "invalid choice: 'magic'"),
        (["--oscar-recent-tokens", "many"], "invalid int value: 'many'"),
        (["--oscar-hot-fraction", "half"], "invalid float value: 'half'"),
    ],
)
def test_value_that_argparse_refuses(flag, message, capsys):
    refusal(*OSCAR, *flag)
    error = capsys.readouterr().err
    assert message in error
    assert flag[0] in error


def test_help_documents_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    section = text[text.index("oscar_radix: a radix prefix cache") :]
    flags = [name.replace("_", "-") for name in vars(_namespace()) if name.startswith("oscar_")]
    assert len(flags) == len(dataclasses.fields(OscarConfig)) - 1, "all but log_interval"
    for flag in ("kv-quant", *flags):
        assert f"--{flag} " in section
    for default in (DEFAULT_RECIPE, "attention", "256", "0.12"):
        assert f"Default: {default}." in section


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_can_be_chosen(recipe):
    assert _namespace(*OSCAR, "--oscar-recipe", recipe).oscar_recipe == recipe


def test_flags_become_the_configuration(model_folder):
    flags = ["--oscar-recipe", "mulm", "--oscar-policy", "attention", "--oscar-recent-tokens", "128", "--oscar-hot-fraction", "0.2"]
    flags += ["--oscar-policy-interval", "50", "--oscar-calibration", "some-file", "--oscar-hot-rows", "2.5", "--oscar-host-gib", "0.5"]
    server_args = parse(*OSCAR, *flags, model=model_folder)
    expected = OscarConfig(
        *("mulm", "some-file", "attention"), policy_interval=50, hot_rows=2.5, recent_tokens=128, hot_fraction=0.2, host_gib=0.5
    )
    assert config_of(server_args) == expected
    assert server_args.page_size == 32
    assert server_args.radix_cache_backend == "oscar"


# Device --------------------------------------------------------------------------------------------------------------


def test_other_devices_are_refused():
    assert "cannot serve on device 'xpu'" in refusal("--kv-quant", "oscar", "--device", "xpu")


def test_cuda_needs_a_recipe_with_kernels():
    with pytest.raises(Refused, match=r"--oscar-recipe oscar has no GPU kernels.*use one of tck, mulm"):
        refuse_device("cuda", "oscar")
    refuse_device("cuda", DEFAULT_RECIPE)
    refuse_device("cpu", "oscar")


def test_a_host_store_must_fit_the_machine_and_be_of_use():
    """An exbibyte."""
    assert "copies would never be read" in refusal(*OSCAR, "--oscar-host-gib", "0.1", "--disable-radix-cache", "--oscar-policy", "none")
    said = refusal(*OSCAR, "--oscar-host-gib", "1e9")
    assert re.search(r"--oscar-host-gib 1e\+09: this machine has \d+\.\d GiB of memory available; ask for less", said)


def test_copies_take_a_share_of_the_memory_on_gpu_hosts(monkeypatch):
    monkeypatch.setattr("oscar_radix.patches.flags.available_bytes", lambda: 50 * 2**30)
    wanted = lambda device, *args: _host_gib(_namespace(*OSCAR, *args), device, used=True)  # noqa: E731
    assert wanted("cuda") == 5.0
    assert wanted("cuda", "--oscar-host-gib", "2") == 2.0
    assert wanted("cuda", "--oscar-host-gib", "0") == 0.0
    assert wanted("cuda", "--nnodes", "2") == 0.0, "stores of all ranks must be equal"
    assert wanted("cpu") == 0.0
    assert _host_gib(_namespace(*OSCAR), "cuda", used=False) == 0.0
    monkeypatch.setattr("oscar_radix.patches.flags.available_bytes", lambda: 5 * 2**30)
    assert wanted("cuda") == 0.0, "too little to be of use"


# --kv-quant none -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--kv-quant", "none"], ["--kv-quant", "none", "--oscar-policy", "random"]], ids=str)
def test_none_leaves_server_args_as_they_are(flags, model_folder):
    """Field by field, against SGLang's own functions under our hooks."""
    common = ["--model-path", model_folder, *CPU, "--attention-backend", "torch_native", "--random-seed", "1"]
    parser = argparse.ArgumentParser(prog="sglang serve")
    inspect.unwrap(ServerArgs.add_cli_args)(parser)
    stock = inspect.unwrap(ServerArgs.from_cli_args.__func__)(ServerArgs, parser.parse_args(common))
    ours = prepare_server_args([*common, *flags])
    for field in dataclasses.fields(ServerArgs):
        assert getattr(ours, field.name) == getattr(stock, field.name), field.name
    assert vars(ours).keys() == vars(stock).keys(), "no attribute more"
    assert config_of(ours) is None


# Fail closed ---------------------------------------------------------------------------------------------------------


def test_oscar_does_not_start_on_an_sglang_that_does_not_fit(monkeypatch, capsys):
    signature = targets.HOOKED[targets.BUILD_KV_POOL]
    renamed = targets.BUILD_KV_POOL + "_renamed"
    monkeypatch.delitem(targets.HOOKED, targets.BUILD_KV_POOL)
    monkeypatch.setitem(targets.HOOKED, renamed, signature)
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {targets.SCHEDULER_INIT})
    assert refusal(*OSCAR) == "2"
    error = capsys.readouterr().err
    assert "--kv-quant oscar cannot start on this SGLang:" in error
    assert f"{renamed} does not exist" in error
    assert f"hook on {renamed} is not applied" in error
    assert f"hook on {targets.SCHEDULER_INIT} is not applied" in error


def test_the_scheduler_checks_again(monkeypatch):
    """The scheduler runs in a process of its own, with hooks of its own."""
    from oscar_radix.patches.scheduler import scheduler_init

    def never(*args, **kwargs):
        raise AssertionError("the scheduler must not start")

    monkeypatch.setattr(HookRegistry, "_patched", set())
    server_args = SimpleNamespace(_oscar_config=OscarConfig(recipe=DEFAULT_RECIPE))
    with pytest.raises(RuntimeError, match="cannot start on this SGLang") as error:
        scheduler_init(never, None, server_args)
    for target in targets.HOOKED:
        assert f"hook on {target} is not applied" in str(error.value)

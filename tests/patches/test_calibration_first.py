"""What SGLang captures is calibrated and folded already, whatever it is asked to capture again; nothing is served uncalibrated."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.scheduler import Scheduler

from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec import DEFAULT_RECIPE, CalibrationError, get_recipe
from oscar_radix.codec.parameters import placeholder
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry
from oscar_radix.patches import runtime as shared
from oscar_radix.patches import scheduler as hooks
from oscar_radix.patches import startup_calibration
from oscar_radix.patches.attention import OscarAttentionBackend
from oscar_radix.patches.fold_values import prepare_to_fold
from oscar_radix.patches.refusals import FOLDED
from oscar_radix.patches.runtime import Runtime
from tests.helpers import make_store, random_qkv
from tests.patches.layers import DIM, arguments, attention, model

GEOMETRY = Geometry(layers=1, kv_heads=2, query_heads=4, head_dim=DIM)
TOKENIZER = object()


def rank_of(*others: bool) -> SimpleNamespace:
    """SGLang's parallel context of a rank beside others that have a cached calibration or not; it is alone with one."""
    size = len(others)
    group = SimpleNamespace(world_size=size, all_gather_object=lambda here: [here, *others[1:]])
    return SimpleNamespace(attn_tp_rank=0, attn_tp_size=size, attn_tp_group=group)


class FakeWorker:
    """SGLang's TpModelWorker, which notes what a graph would keep whenever it is told to capture."""

    def __init__(self, whole: torch.nn.Module, codec):
        self.model_runner = SimpleNamespace(model=whole)
        self.codec = codec
        self.captured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def init_cuda_graphs(self) -> None:
        self.captured.append((self.codec.key_basis.clone(), self.model_runner.model["layers"][0]["self_attn"].o_proj.weight.clone()))


@pytest.fixture
def calibration():
    moments = MomentAccumulator(GEOMETRY)
    moments.add(0, *random_qkv(GEOMETRY, 16 * DIM, torch.Generator().manual_seed(7)))
    return get_recipe(DEFAULT_RECIPE).fit(moments.finish())


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    """As it is once the attention backend is built."""
    store = make_store(geometry=GEOMETRY, recipe=DEFAULT_RECIPE)
    store.codec = placeholder(get_recipe(DEFAULT_RECIPE), GEOMETRY, "cpu")
    made = Runtime(OscarConfig(recipe=DEFAULT_RECIPE), GEOMETRY, sizes=None, store=store, attention=object())
    monkeypatch.setattr(shared, "_runtime", made)
    return made


@pytest.fixture
def calibrated(monkeypatch, calibration) -> list[tuple]:
    """Calls of `load_or_calibrate`, which is not what is tested here."""
    calls = []

    def load_or_calibrate(*call):
        calls.append(call)
        return calibration, "made in a test"

    monkeypatch.setattr(hooks, "load_or_calibrate", load_or_calibrate)
    return calls


def scheduler_with(runtime: Runtime, **changes: object) -> SimpleNamespace:
    """A scheduler between its attention backends and its CUDA graphs."""
    whole, server_args = model(attention(4, 2, False, 0)), arguments(**changes)
    prepare_to_fold(runtime.store.codec, whole, server_args)
    worker = FakeWorker(whole, runtime.store.codec)
    return SimpleNamespace(server_args=server_args, tokenizer=TOKENIZER, tp_worker=worker, draft_worker=None)


@pytest.mark.usefixtures("plugin")
class TestInitAllCudaGraphs:
    """SGLang's own Scheduler.init_all_cuda_graphs with our hook on it."""

    @pytest.mark.parametrize("lora", [None, True], ids=["folded", "unfolded"])
    def test_captures_what_is_calibrated(self, runtime, calibrated, calibration, lora):
        scheduler = scheduler_with(runtime, enable_lora=lora)
        unfolded = scheduler.tp_worker.model_runner.model["layers"][0]["self_attn"].o_proj.weight.clone()
        # A codec on the CPU shares the calibration's tensors, and folding changes them.
        tensors = {name: tensor.clone() for name, tensor in calibration.tensors.items()}
        Scheduler.init_all_cuda_graphs(scheduler)
        ((basis, weight),) = scheduler.tp_worker.captured
        assert torch.equal(basis, tensors["key_basis"].float())
        rotation = tensors["value_rotation"][0].double().repeat_interleave(2, 0)
        expected = unfolded if lora else torch.einsum("nhd,hde->nhe", unfolded.unflatten(1, (4, DIM)), rotation).flatten(1)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
        assert calibrated == [(scheduler.tp_worker.model_runner, TOKENIZER, runtime.config, GEOMETRY)]
        assert runtime.calibration_source == "made in a test"

    def test_captures_again_what_was_calibrated_once(self, runtime, calibrated):
        scheduler = scheduler_with(runtime)
        for _ in range(2):
            Scheduler.init_all_cuda_graphs(scheduler)
        first, second = scheduler.tp_worker.captured
        assert len(calibrated) == 1
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)), "and folded once"

    def test_captures_nothing_without_a_calibration(self, runtime, monkeypatch, tmp_path, model_folder):
        """--skip-tokenizer-init, and no file in the cache."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(startup_calibration, "get_parallel", lambda: rank_of(True))
        scheduler = scheduler_with(runtime)
        scheduler.tokenizer = None
        scheduler.tp_worker.model_runner.model_config = SimpleNamespace(model_path=model_folder)
        with pytest.raises(CalibrationError, match=r"^--skip-tokenizer-init leaves no tokenizer to calibrate with"):
            Scheduler.init_all_cuda_graphs(scheduler)
        assert not scheduler.tp_worker.captured

    @pytest.mark.parametrize(("part", "name"), [("store", "store"), ("attention", "attention backend")])
    def test_captures_nothing_of_another_backend(self, runtime, calibrated, part, name):
        scheduler = scheduler_with(runtime)
        setattr(runtime, part, None)
        with pytest.raises(RuntimeError, match=f"SGLang did not build our {name}; refusing to serve bf16 silently"):
            Scheduler.init_all_cuda_graphs(scheduler)
        assert not calibrated
        assert not scheduler.tp_worker.captured

    def test_is_sglangs_without_kv_quant(self, runtime, calibrated):
        scheduler = scheduler_with(runtime)
        scheduler.server_args = SimpleNamespace()
        Scheduler.init_all_cuda_graphs(scheduler)
        assert len(scheduler.tp_worker.captured) == 1
        assert not calibrated


@pytest.mark.parametrize("others_have", [True, False])
def test_ranks_take_cached_calibrations_together_or_not_at_all(runtime, calibration, monkeypatch, tmp_path, model_folder, others_have):
    """A rank that took its own while another calibrates would wait for that one's sums for ever."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(startup_calibration, "get_parallel", lambda: rank_of(True, True, others_have))
    monkeypatch.setattr(startup_calibration, "load_cached", lambda *args: calibration)
    monkeypatch.setattr(startup_calibration, "_calibrate", lambda *args: calibration)
    runner = SimpleNamespace(model_config=SimpleNamespace(model_path=model_folder))
    _, source = startup_calibration.load_or_calibrate(runner, TOKENIZER, runtime.config, GEOMETRY)
    assert source.startswith("cached in" if others_have else "made from")


@pytest.fixture
def started(monkeypatch, runtime):
    """`scheduler_init` around a constructor that leaves a scheduler as it is; metrics are not what is tested here."""
    monkeypatch.setattr(hooks, "problems", lambda expect_hooks: [])
    monkeypatch.setattr(hooks, "Metrics", lambda *args: SimpleNamespace(args=args, startup_lines=list))

    def start(scheduler: SimpleNamespace) -> None:
        scheduler.tree_cache, scheduler.server_args.disable_radix_cache = object(), True
        scheduler._request_dispatcher = None
        hooks.scheduler_init(lambda *args: None, scheduler, scheduler.server_args)

    return start


@pytest.mark.usefixtures("plugin")
class TestSchedulerInit:
    """What follows once SGLang's scheduler is complete."""

    def test_reports_the_calibration_and_freezes_folded_weights(self, runtime, calibrated, started):
        scheduler = scheduler_with(runtime)
        Scheduler.init_all_cuda_graphs(scheduler)
        started(scheduler)
        assert runtime.metrics.args[-1] == "made in a test"
        with pytest.raises(ValueError, match=FOLDED[:40]):
            scheduler.save_sharded_model()

    def test_leaves_other_weights_alone(self, runtime, calibrated, started):
        scheduler = scheduler_with(runtime, enable_lora=True)
        Scheduler.init_all_cuda_graphs(scheduler)
        started(scheduler)
        assert not hasattr(scheduler, "save_sharded_model")

    def test_refuses_to_serve_uncalibrated(self, runtime, started):
        with pytest.raises(RuntimeError, match="nothing is calibrated"):
            started(scheduler_with(runtime))

    def test_refuses_another_radix_cache(self, runtime, calibrated, monkeypatch):
        monkeypatch.setattr(hooks, "problems", lambda expect_hooks: [])
        scheduler = scheduler_with(runtime, disable_radix_cache=False)
        Scheduler.init_all_cuda_graphs(scheduler)
        scheduler.tree_cache = object()
        with pytest.raises(RuntimeError, match="SGLang did not build our radix cache; refusing to serve bf16 silently"):
            hooks.scheduler_init(lambda *args: None, scheduler, scheduler.server_args)


def test_no_attention_backend_over_another_pool():
    """SGLang kept its own pool: there is no store to attend to."""
    runtime = Runtime(OscarConfig(recipe=DEFAULT_RECIPE), GEOMETRY, sizes=None)
    with pytest.raises(RuntimeError, match="SGLang did not build our store; refusing to serve bf16 silently"):
        OscarAttentionBackend(SimpleNamespace(), runtime)

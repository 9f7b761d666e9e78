"""A scheduler whose weights are folded refuses whatever would replace, export or compare them, and passes on everything else."""

import logging
from types import SimpleNamespace

import pytest
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler
from sglang.utils import TypeBasedDispatcher

from oscar_radix.patches.refusals import FOLDED, Refused, freeze_weights

GROUP = {"master_address": "localhost", "group_name": "trainer"}
REFUSED = [
    io_struct.UpdateWeightFromDiskReqInput(model_path="new"),
    io_struct.InitWeightsUpdateGroupReqInput(**GROUP, master_port=1, rank_offset=0, world_size=2),
    io_struct.UpdateWeightsFromDistributedReqInput(names=["w"], dtypes=["bfloat16"], shapes=[[1]]),
    io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b""]),
    io_struct.UpdateWeightsFromIPCReqInput(zmq_handles={}),
    io_struct.InitWeightsSendGroupForRemoteInstanceReqInput(**GROUP, ports="1", group_rank=0, world_size=2),
    io_struct.SendWeightsToRemoteInstanceReqInput(**GROUP, ports="1"),
    io_struct.CheckWeightsReqInput(action="checksum"),
]


@pytest.fixture
def scheduler() -> SimpleNamespace:
    """SGLang's dispatcher with handlers that say they ran."""
    kinds = [*map(type, REFUSED), io_struct.GetWeightsByNameReqInput, io_struct.FlushCacheReqInput]
    scheduler = SimpleNamespace(_request_dispatcher=TypeBasedDispatcher([(kind, lambda request: "handled") for kind in kinds]))
    freeze_weights(scheduler)
    return scheduler


@pytest.mark.parametrize("request_", REFUSED, ids=lambda request: type(request).__name__)
def test_refused_with_the_reason(scheduler, request_):
    answer = scheduler._request_dispatcher(request_)
    assert type(answer).__name__ == type(request_).__name__.replace("Input", "Output")
    assert not answer.success
    assert answer.message == FOLDED
    assert answer.message.endswith("start it with --oscar-fold-values off")


def test_weights_by_name_fail_and_the_log_says_why(scheduler, caplog):
    with caplog.at_level(logging.ERROR, logger="oscar_radix"):
        answer = scheduler._request_dispatcher(io_struct.GetWeightsByNameReqInput(name="model.layers.0.self_attn.o_proj.weight"))
    assert answer.parameter is None
    assert FOLDED in caplog.text


@pytest.mark.parametrize("method", ["save_remote_model", "save_sharded_model"])
def test_exports_are_refused(scheduler, method):
    with pytest.raises(Refused, match="start it with --oscar-fold-values off"):
        getattr(scheduler, method)(path="somewhere")
    assert hasattr(Scheduler, method), "the name that a remote procedure call uses"


def test_everything_else_is_handled(scheduler):
    assert scheduler._request_dispatcher(io_struct.FlushCacheReqInput()) == "handled"

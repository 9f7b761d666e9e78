"""With --kv-quant none, a server is the one that SGLang starts without the plugin."""

VOLATILE = {"port", "random_seed", "internal_states", "startup_time", "nccl_port", "status", "last_receive_tstamp"}
TIMES = {"e2e_latency", "id", "prefill_launch_delay", "prefill_launch_latency", "queue_time", "response_sent_to_client_ts"}


def test_settings_are_those_of_stock(stock, kv_quant_none):
    before, after = stock.behaviour.info, kv_quant_none.info
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differing <= VOLATILE
    assert before["max_total_num_tokens"] == after["max_total_num_tokens"]
    assert "kv_quant" not in after["internal_states"][0]


def test_answers_are_those_of_stock_to_the_last_bit(stock, kv_quant_none):
    for before, after in zip(stock.behaviour.answers, kv_quant_none.answers, strict=True):
        assert before["output_ids"] == after["output_ids"]
        keys = before["meta_info"].keys() | after["meta_info"].keys()
        for key in keys:
            if not (key in TIMES or key.endswith(("_ts", "_time", "_latency"))):
                assert before["meta_info"].get(key) == after["meta_info"].get(key), key


def test_the_cache_works_in_both(stock, kv_quant_none):
    # A repetition is cached but for its last token: page size 1, as SGLang chooses by itself.
    for behaviour in (stock.behaviour, kv_quant_none):
        assert [answer["meta_info"]["cached_tokens"] for answer in behaviour.answers[:2]] == [0, 149]
        assert behaviour.info["page_size"] == 1

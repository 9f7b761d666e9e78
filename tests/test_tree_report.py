"""`oscar-radix tree` against small HTTP servers that answer like SGLang, or do not."""

import http.server
import json
import threading

import pytest

from oscar_radix.cli import main
from oscar_radix.tree_report import render


def node(number, parent, tokens, **other):
    levels = {"0": tokens // 32 - 1, "2": 0, "4": 0, "8": 0, "32": 1}
    about = {"id": number, "parent": parent, "tokens": tokens, "readers": 0, "idle_s": 1.5}
    return {**about, "levels": levels, "copied": None, "mass": None, **other}


TREE = {
    "nodes": [node(3, None, 128, readers=2, mass=3.0), node(9, 3, 32, mass=1.0), node(4, 3, 64, readers=1, copied=2), node(7, None, 1024)],
    "left_out": 5,
}


@pytest.fixture
def serving():
    """Serves what is put into it, as /server_info."""
    answer = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/server_info"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer["body"]).encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield answer, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_lines():
    lines = render(TREE).splitlines()
    assert lines[0] == "1,248 tokens in 4 nodes, 5 nodes that were idle longest are left out"
    assert [line.split(":")[0] for line in lines[1:]] == ["node 7", "node 3", "  node 4", "  node 9"]
    assert lines[2] == "node 3: 128 tokens (96 at level 0, 32 at level 32), 2 readers, idle 2 s, 75.0 % of the attention mass"
    assert lines[3] == "  node 4: 64 tokens (32 at level 0, 32 at level 32, 64 copied to the host), 1 reader, idle 2 s"


def test_empty_tree():
    assert render({"nodes": [], "left_out": 0}) == "0 tokens in 0 nodes"


def test_command(serving, capsys):
    answer, url = serving
    answer["body"] = {"internal_states": [{"kv_quant": {"tree": TREE}}, {"kv_quant": {"tree": {"nodes": [], "left_out": 0}}}]}
    assert main(["tree", "--url", url]) == 0
    assert capsys.readouterr().out == f"{render(TREE)}\n\n0 tokens in 0 nodes\n"
    assert main(["tree", "--url", url + "/", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == TREE


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"internal_states": [{}]}, "runs without --kv-quant oscar"),
        ({"internal_states": []}, "runs without --kv-quant oscar"),
        ([], "runs without --kv-quant oscar"),
        ({"internal_states": [{"kv_quant": {"tree": None}}]}, "runs with --disable-radix-cache: it has no tree"),
    ],
)
def test_servers_without_a_tree(serving, capsys, body, message):
    answer, url = serving
    answer["body"] = body
    assert main(["tree", "--url", url]) == 2
    assert message in capsys.readouterr().err


def test_nothing_there(capsys):
    assert main(["tree", "--url", "http://127.0.0.1:9"]) == 2
    assert "http://127.0.0.1:9/server_info does not answer like an SGLang server" in capsys.readouterr().err

"""`oscar-radix tree`: the radix tree of a running server, as it says of itself in /server_info."""

import json
import urllib.error
import urllib.request
from typing import Any

from oscar_radix.geometry import PAGE_TOKENS

TIMEOUT_S = 30.0


def fetch_trees(url: str) -> list[dict[str, Any]]:
    """`tree` of each data-parallel rank's report.

    Raises:
        ValueError: nothing answers at `url`, or something that is not a server with --kv-quant oscar and a radix cache.
    """
    address = f"{url.rstrip('/')}/server_info"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            info = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ValueError(f"{address} does not answer like an SGLang server: {error}") from error
    states = info.get("internal_states") if isinstance(info, dict) else None
    reports = [state.get("kv_quant") for state in states or ()]
    if not reports or None in reports:
        raise ValueError(f"the server at {url} runs without --kv-quant oscar: there is no tree of ours to show")
    trees = [report.get("tree") for report in reports]
    if None in trees:
        raise ValueError(f"the server at {url} runs with --disable-radix-cache: it has no tree")
    return trees


def render(tree: dict[str, Any]) -> str:
    """One line a node, children below their parent, most tokens first.

    Args:
        tree: nodes, parents before children, each with id, parent (None at the top), tokens, readers, idle_s, pages by level, copied pages
            (None without a host store), mass (None where none is known), and the number of nodes left out.
    """
    nodes = tree["nodes"]
    children: dict[Any, list[dict[str, Any]]] = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)
    known = [node["mass"] for node in nodes if node["mass"] is not None]
    total, tokens = sum(known), sum(node["tokens"] for node in nodes)
    left_out = f", {tree['left_out']} nodes that were idle longest are left out" if tree["left_out"] else ""
    lines = [f"{tokens:,} tokens in {len(nodes)} nodes{left_out}"]

    stack = [(node, "") for node in reversed(_by_size(children.get(None, [])))]
    while stack:
        node, indent = stack.pop()
        lines.append(f"{indent}{_line(node, total)}")
        stack += [(child, indent + "  ") for child in reversed(_by_size(children.get(node["id"], [])))]
    return "\n".join(lines)


def _by_size(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(nodes, key=lambda node: (-node["tokens"], node["id"]))


def _line(node: dict[str, Any], total_mass: float) -> str:
    levels = ", ".join(f"{int(pages) * PAGE_TOKENS:,} at level {level}" for level, pages in node["levels"].items() if pages)
    copied = f", {node['copied'] * PAGE_TOKENS:,} copied to the host" if node["copied"] else ""
    mass = "" if node["mass"] is None or not total_mass else f", {100 * node['mass'] / total_mass:.1f} % of the attention mass"
    readers = "no reader" if not node["readers"] else f"{node['readers']} reader{'s' if node['readers'] > 1 else ''}"
    return f"node {node['id']}: {node['tokens']:,} tokens ({levels}{copied}), {readers}, idle {node['idle_s']:.0f} s{mass}"

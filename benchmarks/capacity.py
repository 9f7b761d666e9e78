"""Token capacity against bf16 at the same bytes, computed from the bytes that the pools would allocate.

    python -m benchmarks.capacity [--budget-gib 40] [--recipe tck] [--json OUT]

No model is loaded: the figures follow from geometry, recipe and default settings, and are what a server prints at start.
"""

import argparse
import json
from pathlib import Path

from oscar_radix.budget import split_budget
from oscar_radix.codec import DEFAULT_RECIPE, RECIPES, get_recipe
from oscar_radix.codec.parameters import parameter_bytes
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry
from oscar_radix.policy import POLICIES

SHAPES = {
    "SmolLM2-135M (D 64)": Geometry(layers=30, kv_heads=3, query_heads=9, head_dim=64),
    "Llama-3.2-1B (D 64)": Geometry(layers=16, kv_heads=8, query_heads=32, head_dim=64),
    "Qwen3-8B (D 128)": Geometry(layers=36, kv_heads=8, query_heads=32, head_dim=128),
    "Llama-3.1-8B (D 128)": Geometry(layers=32, kv_heads=8, query_heads=32, head_dim=128),
    "D 256, 8 KV heads": Geometry(layers=32, kv_heads=8, query_heads=16, head_dim=256),
}


def measure(recipe_name: str, budget_bytes: int) -> dict[str, dict[str, float]]:
    """Capacity ratio and effective bits of every shape, at the default settings on a GPU."""
    recipe = get_recipe(recipe_name)
    config = OscarConfig(recipe=recipe_name)
    by_mass = POLICIES[config.policy].by_mass
    rows = {}
    for name, geometry in SHAPES.items():
        layout = recipe.layout(geometry.head_dim)
        held, refined = parameter_bytes(recipe, geometry), recipe.refined_layers(geometry.layers)
        load = {"running_requests": None, "prefill_tokens": 8192, "by_mass": by_mass, "graphs": True, "refined": refined}
        sizes = split_budget(budget_bytes, geometry, layout, config.hot_fraction, held, **load)
        rows[name] = {
            "bf16_tokens": sizes.bf16_tokens,
            "tokens": sizes.tokens,
            "capacity_ratio": sizes.capacity_ratio,
            "record_bits": layout.bits_per_element(geometry.head_dim, refined / geometry.layers),
            "effective_bits": budget_bytes * 8 / (sizes.tokens * geometry.kv_elements_per_token),
        }
    return rows


def main() -> None:
    """Print the table; write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-gib", type=float, default=40.0)
    parser.add_argument("--recipe", choices=list(RECIPES), default=DEFAULT_RECIPE)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args.recipe, int(args.budget_gib * 2**30))
    print(f"recipe {args.recipe}, KV budget {args.budget_gib} GiB, hot pool and tables included")
    print(f"{'model shape':24} {'bf16 tokens':>12} {'tokens':>12} {'ratio':>6} {'record bits':>12} {'effective bits':>15}")
    for name, row in rows.items():
        print(
            f"{name:24} {row['bf16_tokens']:12,} {row['tokens']:12,} {row['capacity_ratio']:6.2f} "
            f"{row['record_bits']:12.3f} {row['effective_bits']:15.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

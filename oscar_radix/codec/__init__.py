"""KV codecs: what the 2 bits mean. Plain torch, the specification of every kernel."""

from oscar_radix.codec.base import Codec, Recipe
from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.codec.int8_rows import dequantise_rows, quantise_rows
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.moments import Moments
from oscar_radix.codec.mulm import MulmRecipe
from oscar_radix.codec.oscar import OscarRecipe
from oscar_radix.codec.tck import TckRecipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (OscarRecipe(), MulmRecipe(), TckRecipe())
}
DEFAULT_RECIPE = "tck"


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError lists the names there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe '{name}'; recipes: {', '.join(RECIPES)}")
    return RECIPES[name]


__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Calibration",
    "CalibrationError",
    "Codec",
    "Moments",
    "Recipe",
    "RecordLayout",
    "dequantise_rows",
    "get_recipe",
    "quantise_rows",
]

"""What `oscar-radix inspect FILE` prints."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from oscar_radix.calibration.file import load_calibration
from oscar_radix.codec import Calibration, get_recipe
from oscar_radix.codec.allocation import LOW_BITS


def describe(path: Path | str) -> str:
    """Model, geometry, recipe, bits, widths and predicted error per layer; CalibrationError when the file cannot be read."""
    calibration = load_calibration(path)
    g = calibration.geometry
    layout = get_recipe(calibration.recipe).layout(g.head_dim)
    bits = layout.bits_per_element(g.head_dim, sum(_refined(calibration)) / g.layers)
    lines = [
        f"model        {calibration.model_name or '(unnamed)'}, fingerprint {calibration.model_fingerprint or '(none)'}",
        f"geometry     {g.layers} layers, {g.kv_heads} KV heads, {g.query_heads} query heads, head dim {g.head_dim}",
        f"recipe       {calibration.recipe}: {bits:.3f} bits per element, scales included",
        f"calibrated   on {calibration.tokens} tokens, text {calibration.text_hash or '(none)'}, "
        f"{calibration.report.get('skipped_rows', 0)} rows with NaN or Inf left out",
        "",
        "layer  K error  V error  channels at 6/5/4/3/2/1/0 bits, by KV head",
    ]
    return "\n".join(lines + _layers(calibration))


def _layers(calibration: Calibration) -> list[str]:
    unknown = [float("nan")] * calibration.geometry.layers
    key_error, value_error = (calibration.report.get(name, unknown) for name in ("key_error", "value_error"))
    widths = calibration.tensors.get("key_widths")
    rows = [
        f"{layer:5d}  {key_error[layer]:7.4f}  {value_error[layer]:7.4f}  {_histogram(widths[layer]) if widths is not None else 'all at 2'}"
        + (f"; refined, {LOW_BITS} more in K and V" if refined else "")
        for layer, refined in enumerate(_refined(calibration))
    ]
    rows.append(f" mean  {sum(key_error) / len(key_error):7.4f}  {sum(value_error) / len(value_error):7.4f}")
    rows.append("K error: in the query metric, relative to the centred keys. Both are predicted for Gaussian rows.")
    return rows


def _refined(calibration: Calibration) -> list[bool]:
    """Of each layer, whether it keeps low bits."""
    layers = calibration.tensors.get("refined")
    return [False] * calibration.geometry.layers if layers is None else layers.bool().any(1).tolist()


def _histogram(widths: Tensor) -> str:
    """'0/2/6/10/26/10/10 x2, 2/2/4/8/26/8/14': how many heads of uint8 [H, D] have how many channels of 6 to 0 bits."""
    counts = Counter("/".join(str(int((head == width).sum())) for width in range(6, -1, -1)) for head in widths)
    return ", ".join(text + (f" x{number}" if number > 1 else "") for text, number in counts.most_common())

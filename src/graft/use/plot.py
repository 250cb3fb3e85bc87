"""Loss and learning rate as a picture. Speaks curves and matplotlib; reads no files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import LogLocator, NullLocator

from graft.errors import InputError
from graft.use.curves import Curves, Point, smooth

# Okabe and Ito's colours, told apart with colour-blind eyes too; the order suits both grounds.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
ON_DARK = ("#4aa8e0", "#ff8a3d", "#2fc79b", "#e29ac5", "#f0b73e", "#8fd0f5")
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans CJK JP", "Arial Unicode MS",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ink:
    """Colours of everything but the curves."""

    text: str
    faint: str
    grid: str
    ground: str
    curves: tuple[str, ...]


LIGHT = Ink(text="#1f2328", faint="#59636e", grid="#d8dee4", ground="#ffffff", curves=COLOURS)
DARK = Ink(text="#e6edf3", faint="#9198a1", grid="#30363d", ground="#0d1117", curves=ON_DARK)


def draw(curves: Sequence[Curves], log: bool = False, dark: bool = False) -> Figure:
    """Training loss (raw faint, smoothed strong) and validation loss above, the learning rate in a strip below."""
    ink = DARK if dark else LIGHT
    if log:
        curves = [_above_zero(curve) for curve in curves]
    figure = Figure(figsize=(8, 4.8), dpi=160, facecolor=ink.ground, layout="constrained")
    FigureCanvasAgg(figure)
    with_lr = any(curve.lr for curve in curves)
    if with_lr:
        loss, lr = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    else:
        loss, lr = figure.subplots(), None
    names = _labels([curve.name for curve in curves])
    for index, (curve, name) in enumerate(zip(curves, names, strict=True)):
        colour = ink.curves[index % len(ink.curves)]
        _draw_loss(loss, curve, name if len(curves) > 1 else "", colour, ink.curves[1] if len(curves) == 1 else colour)
        if lr is not None and curve.lr:
            lr.plot(*_xy(curve.lr), color=colour, linewidth=1.2, label=f"{name} lr")
    if log:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_locator(NullLocator())
    else:
        _leave_spikes_out(loss, curves)
    _dress(loss, ink, "loss")
    loss.legend(frameon=False, labelcolor=ink.text, prop={"family": _families(), "size": 9})
    bottom = loss
    if lr is not None:
        _dress(lr, ink, "learning rate")
        lr.set_ylim(bottom=0)
        peak = max(value for curve in curves for _, value in curve.lr)
        lr.set_yticks([0, peak], ["0", np.format_float_scientific(peak, precision=2, trim="-", exp_digits=1)])
        figure.align_ylabels([loss, lr])
        bottom = lr
    bottom.set_xlabel("optimizer step", color=ink.faint, fontsize=9)
    if len(curves) == 1:
        loss.set_title(names[0], color=ink.text, fontsize=11, loc="left", family=_families())
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture; the ending of the name decides its kind.

    Raises:
        InputError: the ending is of no known kind, or the place cannot be written.
    """
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise InputError(f"{path}: unknown kind of picture; the name should end in .png, .svg or .pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def svg_data_uri(figure: Figure) -> str:
    """The picture as a data URI for an <img>; letters are outlines, so that no font is needed to show it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _above_zero(curve: Curves) -> Curves:
    """Without the losses that a logarithmic axis has no place for.

    Raises:
        InputError: there is no other loss.
    """
    train, val = ([point for point in points if point[1] > 0] for points in (curve.train, curve.val))
    if not train and not val:
        raise InputError(
            f"{curve.name}: no loss above 0, so that a logarithmic axis has nothing to show; leave --log out"
        )
    return replace(curve, train=train, val=val)


def _draw_loss(axes: Axes, curve: Curves, name: str, colour: str, val_colour: str) -> None:
    prefix = f"{name}: " if name else ""
    if curve.train:
        smoothed = smooth(curve.train)
        if smoothed is not curve.train:
            axes.plot(*_xy(curve.train), color=colour, linewidth=0.8, alpha=0.28, label="_raw")
        axes.plot(*_xy(smoothed), color=colour, linewidth=1.8, label=f"{prefix}training")
    if curve.val:
        axes.plot(
            *_xy(curve.val),
            color=val_colour,
            linewidth=1.6,
            linestyle="-" if not name else (0, (4, 2)),
            marker="o",
            markersize=4,
            label=f"{prefix}validation",
        )
        best = min(curve.val, key=lambda point: point[1])
        if not name:
            axes.annotate(
                f"{best[1]:.3g}",
                best,
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=val_colour,
            )


def _leave_spikes_out(axes: Axes, curves: Sequence[Curves]) -> None:
    """The axis starts at 0 and a few wild raw values do not flatten the rest; they leave the picture at the top."""
    drawn = [value for curve in curves for _, value in (*smooth(curve.train), *curve.val)]
    top = max(drawn, default=1.0)
    raw = max((value for curve in curves for _, value in curve.train), default=top)
    if min(drawn, default=0.0) >= 0:
        axes.set_ylim(0, max(top, raw if raw < 1.5 * top else 0.0) * 1.06 or 1.0)


def _dress(axes: Axes, ink: Ink, label: str) -> None:
    axes.set_facecolor("none")
    axes.set_ylabel(label, color=ink.faint, fontsize=9)
    axes.tick_params(colors=ink.faint, labelsize=8.5, length=0)
    axes.grid(axis="y", color=ink.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink.grid)


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _families() -> list[str]:
    """The default font, then whatever here can write Chinese."""
    there = {entry.name for entry in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in there)]


def _labels(names: Sequence[str]) -> list[str]:
    """Names that the fonts here can write; letters that none of them has would be drawn as empty boxes."""
    known: set[int] = set()
    for family in _families():
        known |= set(FT2Font(font_manager.findfont(family)).get_charmap())
    readable = ["".join(letter if ord(letter) in known else "?" for letter in name) for name in names]
    # A dollar sign would start a formula.
    plain = [name.replace("$", r"\$") for name in readable]
    return [
        name if set(name) - {"?", "-", "_"} and plain.count(name) == 1 else f"run {index}"
        for index, name in enumerate(plain, start=1)
    ]

"""Images are checked by their pixels: tiles of known colour on grids that are not square."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from llb.core.errors import InputError
from llb.plots import charts, maps
from llb.plots.maps import colour_of, GREYS, MAX_OPACITY, object_colours, pale
from llb.plots.style import OKABE_ITO, to_png

RNG = np.random.default_rng(0)
GRIDS = [(3, 5, 16), (3, 5, 14), (7, 2, 14), (1, 4, 16), (6, 6, 8)]  # h, w, patch


def probe(ax, points, dpi=100):
    "Colours 0..1 of a drawing at data coordinates (x, y)."
    figure = ax.get_figure()
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    return np.array([pixels[len(pixels) - 1 - int(y), int(x)] for x, y in ax.transData.transform(points)])


def tiles(h, w, patch):
    """An image whose patches each have one colour, the colours [h,w,3], objects [N] and confidence [N]."""
    colours = RNG.random((h, w, 3))
    objects = RNG.permutation(h * w) % 11
    return np.kron(colours, np.ones((patch, patch, 1))), colours, objects, RNG.uniform(.2, 1, h * w)


def centres(h, w):
    return [(x + .3, y + .7) for y in range(h) for x in range(w)]


def over(colour, opacity, below):
    return opacity * np.array(colour) + (1 - opacity) * below


@pytest.mark.parametrize("h,w,patch", GRIDS)
def test_every_patch_of_a_map_has_its_objects_colour(h, w, patch):
    image, below, objects, confidence = tiles(h, w, patch)
    colours = object_colours([3, 1, 4])
    ax = maps.plot_assignment_map(image, (objects, confidence), (h, w), colours, max_labels=0)
    expected = [over(to_rgb(colour_of(i, colours)), MAX_OPACITY * c, b)
                for i, c, b in zip(objects, confidence, pale(below).reshape(-1, 3))]
    assert np.abs(probe(ax, centres(h, w)) - expected).max() < .02


@pytest.mark.parametrize("h,w,patch", GRIDS)
def test_soft_map_agrees_with_its_colour_bar(h, w, patch):
    image, below, _, p = tiles(h, w, patch)
    ax = maps.plot_soft_map(image, p, (h, w))
    heat = ax.images[1]
    expected = [over(heat.cmap(float(v))[:3], .8, b) for v, b in zip(p, pale(below).reshape(-1, 3))]
    assert heat.cmap.name == "viridis" and np.abs(probe(ax, centres(h, w)) - expected).max() < .02
    bar = [a for a in ax.get_figure().axes if a is not ax]
    assert len(bar) == 1 and "fixed scale 0 to 1" in bar[0].get_ylabel()
    own = maps.plot_soft_map(image, p, (h, w), vmax=None)
    assert own.images[1].get_clim()[1] == pytest.approx(p.max())
    assert "own scale" in own.get_figure().axes[1].get_ylabel()


def test_mask_comparison_repeats_the_masks_colours_where_a_map_agrees():
    mask = np.kron([[0, 1, 1, 2], [0, 1, 1, 2]], np.ones((14, 14), int))
    right, wrong = np.array([7, 40, 41, 9, 7, 40, 41, 9]), np.array([5] * 8)
    axes = maps.plot_mask_comparison(np.ones((28, 56, 3)), mask, (right, np.ones(8)), (wrong, np.ones(8)), (2, 4))
    points = [(x + .2, 1.2) for x in range(4)]
    assert np.abs(probe(axes[1], points) - probe(axes[2], points)).max() < .02
    assert np.ptp(probe(axes[3], points), axis=0).max() < .02


def test_pixel_masks_of_any_size_are_seen_on_the_grid():
    mask = np.zeros((37, 50), int)
    mask[:, 26:] = 4
    assert maps.mask_on_grid(mask, (3, 4)).tolist() == [[0, 0, 4, 4]] * 3


def test_colours_stay_from_image_to_image():
    colours, there, back = object_colours([70, 71]), (np.array([70, 71]), np.ones(2)), (np.array([71, 70]), np.ones(2))
    one = maps.plot_assignment_map(np.ones((16, 32, 3)), there, (1, 2), colours, max_labels=0)
    two = maps.plot_assignment_map(np.ones((32, 16, 3)), back, (2, 1), colours, max_labels=0)
    assert np.allclose(probe(one, centres(1, 2)), probe(two, centres(2, 1))[::-1], atol=.01)
    gallery = maps.plot_map_gallery([np.ones((16, 32, 3))] * 2, [there, (np.array([71, 5]), np.ones(2))], (1, 2))
    a, b = (probe(ax, [(x + .1, .1) for x in range(2)]) for ax in gallery[:, 1])
    assert np.allclose(a[1], b[0], atol=.01)


def test_beyond_eight_objects_there_are_greys():
    objects = np.arange(12)
    ax = maps.plot_assignment_map(np.ones((48, 64, 3)), (objects, np.linspace(1, .9, 12)), (3, 4), max_labels=0)
    seen = probe(ax, centres(3, 4))
    grey = np.ptp(seen, axis=1) < .02
    assert grey.tolist() == [False] * 7 + [True] * 5  # the eighth colour is black
    assert seen[7].max() < .4 and seen[8:].min() > .75
    assert len(object_colours(range(50))) == 8 and set(object_colours(range(50)).values()) == set(OKABE_ITO)
    assert all(colour_of(i, {}) in GREYS for i in range(3000))


DEUTERANOPIA = np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413],
                         [-.011820, .042940, .968881]])   # Machado, Oliveira and Fernandes, 2009
XYZ = np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]])   # of linear sRGB


def lab_colours(rgb):
    "CIELAB of linear RGB in 0..1."
    xyz = np.clip(rgb, 0, 1) @ XYZ.T / np.array([.9505, 1, 1.089])
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("eye", [np.eye(3), DEUTERANOPIA], ids=["common", "deuteranopia"])
def test_the_eight_colours_of_objects_can_be_told_apart(eye):
    shown = over([to_rgb(c) for c in OKABE_ITO], MAX_OPACITY, .95)   # where the model is certain, over a pale image
    linear = np.where(shown <= .04045, shown / 12.92, ((shown + .055) / 1.055) ** 2.4) @ eye.T
    lab = lab_colours(linear)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(8, 1)]
    assert distance.min() > 10, distance.min()   # 2.3 can just be noticed
    assert np.ptp([to_rgb(c) for c in GREYS], axis=1).max() < .01


def test_ids_are_written_once_a_region_and_never_over_each_other():
    objects = np.repeat([2047, 5, 2047], 12).reshape(6, 6)
    ax = maps.plot_assignment_map(np.ones((84, 84, 3)), (objects.ravel(), np.ones(36)), (6, 6))
    assert sorted(t.get_text() for t in ax.texts) == ["2047", "2047", "5"]
    noise = RNG.integers(0, 2048, 256)
    ax = maps.plot_assignment_map(np.ones((224, 224, 3)), (noise, np.ones(256)), (16, 16), max_labels=40)
    FigureCanvasAgg(ax.get_figure()).draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    frame = ax.get_window_extent()
    assert len(boxes) > 10 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(frame.x0 - 1 <= b.x0 and b.x1 <= frame.x1 + 1 for b in boxes)
    assert all(frame.y0 - 3 <= b.y0 and b.y1 <= frame.y1 + 3 for b in boxes)


def test_regions_are_those_of_a_flood_fill():
    objects = RNG.integers(0, 3, (9, 14))
    region = maps.connected_regions(objects)
    for start in np.ndindex(objects.shape):
        seen, todo = set(), [start]
        while todo:
            y, x = todo.pop()
            if (y, x) in seen or not (0 <= y < 9 and 0 <= x < 14) or objects[y, x] != objects[start]: continue
            seen.add((y, x))
            todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert {tuple(p) for p in np.argwhere(region == region[start]).tolist()} == seen


def test_the_figure_states_scale_and_n():
    ax = maps.plot_assignment_map(np.ones((28, 42, 3)), np.full((6, 4), .25), (2, 3))
    assert "2 x 3 patches" in ax.get_xlabel() and "mean p 0.25" in ax.get_xlabel() and "opacity" in ax.get_xlabel()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0  100%"]
    assert "n = 300 patches" in charts.plot_usage([100, 200, 0]).get_ylabel()
    assert "1 dead" in charts.plot_usage([100, 200, 0]).get_title()
    assert "perplexity 4.0" in charts.plot_usage([5, 5, 5, 5]).get_title()
    assert "n = 10" in charts.plot_agreement_table(4, 3, 2, 1).get_title()


def test_a_gallery_marks_right_and_wrong_without_colour():
    images, assignments = np.ones((3, 28, 28, 3)), np.full((3, 4, 5), .2)
    axes = maps.plot_map_gallery(images, assignments, (2, 2), "abc", "axc", "abx", columns=2)
    assert axes.shape == (3, 2) and axes[1, 0].get_title(loc="left") == "true: b"
    assert axes[1, 1].get_title(loc="left") == "label: x ✗\nfused: b ✓"


NASTY = r"$\frac{$", "a$b$c", r"\$x\$", "_hidden", "<b>&amp;", "x" * 300, "tab\tnew\nline\0"


def test_names_from_anyone_are_drawn_as_written():
    n, one = len(NASTY), np.ones((4, 1))
    images, halves = np.ones((n, 8, 8, 3)), np.ones((n, 4, 2)) / 2
    drawings = [
        maps.plot_map_gallery(images, halves, (2, 2), NASTY, NASTY, NASTY, title=NASTY[0]),
        charts.plot_class_object_heatmap(np.eye(n), NASTY, NASTY),
        charts.plot_similarity_matrices(np.eye(n), np.eye(n), NASTY),
        charts.plot_ablation_bars([1., 2], [1, 2], [0., .1], label=NASTY[1]),
        maps.plot_mask_comparison(images[0], np.ones((8, 8)), one, one, (2, 2), NASTY[:2]),
        charts.plot_bars(range(n), NASTY),
    ]
    for drawing in drawings: assert to_png(drawing, dpi=30).startswith(b"\x89PNG")


ONES, SURE, NAN = np.ones((28, 28, 3)), np.ones((4, 1)), float("nan")
BAD = {
    "no patches": lambda: maps.plot_assignment_map(ONES, np.ones((0, 3)), (0, 0)),
    "grid does not fit": lambda: maps.plot_assignment_map(ONES, np.full((5, 2), .5), (2, 2)),
    "prefix tokens": lambda: maps.plot_soft_map(ONES, np.full(5, .5), (2, 2)),
    "NaN": lambda: maps.plot_assignment_map(ONES, np.full((4, 2), NAN), (2, 2)),
    "logits": lambda: maps.plot_assignment_map(ONES, np.full((4, 2), 3.), (2, 2)),
    "normalised image": lambda: maps.plot_assignment_map(ONES * -2, np.full((4, 2), .5), (2, 2)),
    "channels first": lambda: maps.plot_soft_map(np.ones((3, 28, 28)), np.full(4, .5), (2, 2)),
    "empty scale": lambda: maps.plot_soft_map(ONES, np.zeros(4), (2, 2), vmax=None),
    "no images": lambda: maps.plot_map_gallery([], [], (2, 2)),
    "captions missing": lambda: maps.plot_map_gallery([ONES], np.ones((1, 4, 2)) / 2, (2, 2), labels=[]),
    "names of bars missing": lambda: charts.plot_bars([1., 2.], [1]),
    "mask of another size": lambda: maps.plot_mask_comparison(ONES, np.ones((4, 4)), SURE, SURE, (2, 2)),
    "no events": lambda: charts.plot_training_curves([]),
    "all dead": lambda: charts.plot_usage([0, 0]),
    "NaN usage": lambda: charts.plot_usage([1, NAN]),
    "infinite loss": lambda: charts.plot_training_curves([dict(epoch=1, loss=float("inf"))]),
    "no support": lambda: charts.plot_class_object_heatmap(np.ones((1, 2)), "a", [1, 2], support=np.ones((1, 2))),
    "names missing": lambda: charts.plot_similarity_matrices(np.eye(2), np.eye(2), ["a"]),
    "no images counted": lambda: charts.plot_agreement_table(0, 0, 0, 0),
    "alpha": lambda: charts.plot_alpha_curve([0, 2], [1, 1], [1, 1], .5, 10),
    "effects": lambda: charts.plot_ablation_bars([1.], [1, 2], [0.]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(case):
    with pytest.raises(InputError, match=r"^\w.*;.*\.$"): BAD[case]()


def test_tensors_go_in_as_they_are():
    a = torch.rand(6, 4, dtype=torch.bfloat16, requires_grad=True).softmax(-1)
    assert isinstance(maps.plot_assignment_map(torch.ones(28, 42, 3), a, (2, 3)), Axes)
    assert isinstance(charts.plot_usage(torch.arange(5)), Axes)


def test_the_callers_axes_are_used():
    axes = Figure().subplots(2, 4)
    assert maps.plot_soft_map(ONES, np.full(4, .5), (2, 2), ax=axes[0, 0]) is axes[0, 0]
    assert charts.plot_object_attention([.5, .5], ax=axes[0, 1]) is axes[0, 1]
    assert (charts.plot_training_curves([dict(epoch=1, loss=1.)], axes=axes[1]) == axes[1]).all()


def test_training_curves_leave_out_what_was_not_recorded():
    events = [dict(kind="start"), dict(epoch=1, terms=dict(loss=2.), objects=dict(entropy=1., patch_entropy=.5)),
              dict(epoch=2, terms=dict(loss=1.), objects=dict(entropy=None, patch_entropy=.4),
                   selection=dict(label=dict(top1=.5))),
              dict(kind="end", reason="done")]
    axes = charts.plot_training_curves(events, num_objects=8, n=7)
    assert axes[0].lines[0].get_xdata().tolist() == [1, 2] and axes[2].lines[0].get_xdata().tolist() == [2]
    assert [t.get_text() for t in axes[3].texts] == ["not recorded"] and "n = 7" in axes[2].get_title()
    assert to_png(axes, dpi=30)


def test_alpha_curve_says_which_data_are_diagnostic():
    ax = charts.plot_alpha_curve([0, .5, 1], [.1, .3, .2], [3, 1, 2], .5, 10, ([.1, .2, .1], [3, 2, 2], 20))[0]
    assert [line.get_label() for line in ax.lines] == [
        "selection split, n = 10", "chosen alpha 0.5", "diagnostic: reported data, n = 20"]


def test_plots_leave_no_global_state():
    code = """
import sys
import matplotlib
import numpy as np
before = matplotlib.rcParams.copy()
from llb.plots import charts, maps
maps.plot_soft_map(np.ones((4, 4, 3)), np.ones(4) / 2, (2, 2))
charts.plot_usage([1, 2])
assert "matplotlib.pyplot" not in sys.modules and matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)

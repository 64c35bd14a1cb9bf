"""The explorer's answers without a browser: names from anyone, images that are gone, two threads, colours that everybody can tell apart."""
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NASTY, peak_memory
from matplotlib.colors import to_rgb

from llb.analysis.catalog import Catalog, find_objects, predictions
from llb.analysis.index import open_index
from llb.apps.explorer import Explorer
from llb.core.errors import InputError
from llb.data.preprocessing import Preprocessing
from llb.plots.maps import GREYS, MAX_OPACITY
from llb.plots.style import OKABE_ITO

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture
def explorer(nasty_index):
    for path in nasty_index.folder.parent.glob("notes-*"): path.unlink()
    return Explorer(nasty_index)


def shown(explorer):
    "All HTML that the explorer shows, and all its texts."
    parts = explorer.image_part, explorer.object_part, explorer.list_part, explorer.class_part, explorer.branch_part, explorer.export_part
    return "".join(w.value for p in parts for w in vars(p).values() if type(w).__name__ == "HTML") + explorer.alert.value + explorer.stand_in()


def test_names_from_anyone_stay_text(explorer, nasty_index, tmp_path):
    for name in reversed(NASTY):
        explorer.object_part.name.value = name
        explorer.open(int(nasty_index.patches.argmin()))
        explorer.open(int(nasty_index.patches.argmax()))
    explorer.branch_part.forward_with_tokens.click()
    explorer.object_part.link.value = NASTY[0]
    explorer.export_part.export()
    page = explorer.export("gallery", "html", tmp_path).read_text()
    for text in shown(explorer), page:
        assert "<img src=x" not in text and "&lt;img src=x" in text
    for view in "image", "object", "class", "branches": assert explorer.export(view, "svg", tmp_path).stat().st_size > 1000


def test_the_object_under_a_click_is_the_index_s(explorer, nasty_index):
    for i in 0, 17, 59:
        explorer.show(i)
        for patch in 0, 7, 14:
            explorer.image_part.picker.patch = patch
            assert explorer.object == nasty_index.map(i)[0][patch] and f"object {explorer.object}" in explorer.object_part.numbers.value
            assert f"row {patch // 5 + 1}, column {patch % 5 + 1}: p {nasty_index.map(i)[1][patch]:.2f}" in explorer.object_part.numbers.value
    assert explorer.image_part.picker.grid == [3, 5]


def test_the_slider_gives_the_model_s_own_fusion(explorer, nasty_index):
    for alpha in 0., .3, 1.:
        explorer.image_part.alpha.value = alpha
        visual, label = (torch.tensor(nasty_index.rows[f"{n}_logits"][0]).softmax(-1) for n in ("visual", "label"))
        p = alpha * visual + (1 - alpha) * label
        name, q = predictions(explorer.catalog, 0, alpha)["fused"][0]
        assert name == NASTY[int(p.argmax())] and abs(q - p.max()) < 1e-5 and f"fused at alpha {alpha:.2f}" in explorer.image_part.prediction.value
    with pytest.raises(InputError, match="0..1"): predictions(explorer.catalog, 0, 1.5)


def test_search_and_filter(explorer):
    explorer.list_part.text.value, explorer.list_part.kind.value = "3", "live"
    assert [k for _, k in explorer.list_part.list.options] == find_objects(explorer.catalog, "3", "live").tolist()
    explorer.list_part.text.value = "no such object"
    assert "0 of 12 objects" in explorer.list_part.count.value and explorer.list_part.list.options == ()


def test_images_that_are_gone_close_nothing(nasty_index):
    lost = Explorer(Catalog(replace(nasty_index, images=replace(nasty_index.images, root=Path("/nowhere")))))
    lost.show(5, 3)
    assert lost.alert.value == "" and lost.object_part.sheet.image.startswith(b"\xff\xd8") and lost.stand_in()


def test_two_threads_leave_one_state(explorer, nasty_index):
    def walk(seed):
        for i in np.random.default_rng(seed).integers(0, len(nasty_index), 12): explorer.act(explorer.show, int(i), 4)
    threads = [threading.Thread(target=walk, args=(s,)) for s in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    i, picker = explorer.i, explorer.image_part.picker
    assert picker.number == i == explorer.image_part.number.value and picker.objects == nasty_index.map(i)[0].tolist()
    assert explorer.object == picker.chosen == nasty_index.map(i)[0][4] and f"Image {i}, row 1" in explorer.object_part.numbers.value


def test_what_cannot_be_explored_is_named(small_llb, tmp_path):
    with pytest.raises(InputError, match="give them too"): Explorer(small_llb)
    with pytest.raises(InputError, match="no trained model"): Explorer(tmp_path)
    with pytest.raises(InputError, match="no object index"): open_index(tmp_path)


DEUTERANOPIA = np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]])   # Machado, Oliveira and Fernandes, 2009


def lab_colours(rgb):
    "CIELAB of linear RGB in 0..1."
    xyz = np.clip(rgb, 0, 1) @ np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]).T / np.array([.9505, 1, 1.089])
    f = np.where(xyz > .008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("eye", [np.eye(3), DEUTERANOPIA], ids=["common", "deuteranopia"])
def test_the_eight_colours_of_objects_can_be_told_apart(eye):
    shown = np.array([[MAX_OPACITY * v + (1 - MAX_OPACITY) * .95 for v in to_rgb(c)] for c in OKABE_ITO])   # certain, over a pale image
    linear = np.where(shown <= .04045, shown / 12.92, ((shown + .055) / 1.055) ** 2.4) @ eye.T
    distance = np.linalg.norm((lab := lab_colours(linear))[:, None] - lab, axis=-1)[np.triu_indices(8, 1)]
    assert distance.min() > 10, distance.min()   # 2.3 can just be noticed
    grey = np.ptp([to_rgb(c) for c in GREYS], axis=1)
    assert grey.max() < .01


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    from explorer import synthetic_index
    return synthetic_index(tmp_path_factory.mktemp("big") / "index")


@pytest.mark.slow
def test_a_click_takes_less_than_200_ms_of_work(big):
    "50,000 images, K = 2,048, 1,000 classes; processor time, for others share the machine."
    made, rng = Explorer(big), np.random.default_rng(0)
    work = []
    for i in rng.integers(0, len(big), 8):
        made.show(int(i))
        for patch in rng.permutation(196)[:5]:
            began = time.process_time()
            made.image_part.picker.patch = int(patch)
            work.append(time.process_time() - began)
    print(f"median {1e3 * np.median(work):.0f} ms, slowest {1e3 * max(work):.0f} ms of {len(work)} clicks")
    assert np.median(work) < .2


@pytest.mark.slow
def test_a_catalog_of_50_000_images_is_small(big):
    most, _ = peak_memory(lambda: Catalog(open_index(big.folder)))
    assert most < 500, most   # MB: tables of K x K and C x K, not of images; the two tables of logits alone have 400


def test_the_preprocessing_of_an_index_survives_json(nasty_index):
    again = Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(json.dumps(nasty_index.info["preprocessing"])).items()})
    assert again.image_size == (48, 80) and nasty_index.image(0).shape == (48, 80, 3)

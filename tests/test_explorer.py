"""The explorer without a browser: names from anyone, images that are gone, two threads, a click on a large index."""
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from conftest import NASTY, peak_memory

from llb.analysis.catalog import Catalog, find_objects, predictions
from llb.analysis.index import open_index
from llb.apps.explorer import Explorer
from llb.core.errors import InputError
from llb.data.preprocessing import Preprocessing


@pytest.fixture
def explorer(nasty_index):
    for path in nasty_index.folder.parent.glob("notes-*"): path.unlink()
    return Explorer(nasty_index)


def all_html(explorer):
    "All HTML that the explorer shows."
    shown = [w.value for panel in explorer.panels.values() for w in vars(panel).values() if isinstance(w, widgets.HTML)]
    return "".join([*shown, explorer.alert.value, explorer.stand_in()])


def test_names_from_anyone_stay_text(explorer, nasty_index, tmp_path):
    panels = explorer.panels
    for name in reversed(NASTY):
        panels["object"].name.value = name
        explorer.open(int(nasty_index.patches.argmin()))
        explorer.open(int(nasty_index.patches.argmax()))
    panels["branch"].count.click()
    panels["object"].link.value = NASTY[0]
    panels["export"].write.click()
    page = explorer.export("gallery", "html", tmp_path).read_text()
    for text in all_html(explorer), page:
        assert "<img src=x" not in text and "&lt;img src=x" in text
    for view in "image", "object", "class", "branches":
        assert explorer.export(view, "svg", tmp_path).stat().st_size > 1000


def test_the_object_under_a_click_is_the_index_s(explorer, nasty_index):
    picker, numbers = explorer.panels["image"].picker, explorer.panels["object"].numbers
    assert picker.grid == [3, 5]
    for i in 0, 17, 59:
        explorer.show(i)
        objects, p = nasty_index.map(i)
        for patch in 0, 7, 14:
            picker.patch = patch
            assert explorer.state.object_id == objects[patch] and f"object {objects[patch]}" in numbers.value
            assert f"row {patch // 5 + 1}, column {patch % 5 + 1}: p {p[patch]:.2f}" in numbers.value


def test_the_slider_gives_the_model_s_own_fusion(explorer, nasty_index):
    panel = explorer.panels["image"]
    visual, label = (torch.tensor(nasty_index.rows[f"{n}_logits"][0]).softmax(-1) for n in ("visual", "label"))
    for alpha in 0., .3, 1.:
        panel.alpha.value = alpha
        p = alpha * visual + (1 - alpha) * label
        name, q = predictions(explorer.catalog, 0, alpha)["fused"][0]
        assert name == NASTY[int(p.argmax())] and abs(q - p.max()) < 1e-5
        assert f"fused at alpha {alpha:.2f}" in panel.prediction.value
    with pytest.raises(InputError, match="0..1"): explorer.fuse(1.5)


def test_search_and_filter(explorer):
    panel = explorer.panels["list"]
    panel.text.value, panel.kind.value = "3", "live"
    assert [k for _, k in panel.list.options] == find_objects(explorer.catalog, "3", "live").tolist()
    panel.text.value = "no such object"
    assert "0 of 12 objects" in panel.count.value and panel.list.options == ()


def test_what_is_asked_for_in_vain_changes_nothing(explorer):
    explorer.show(3, 2)
    before, panels = replace(explorer.state), explorer.panels
    for what, *args in [(explorer.show, 60), (explorer.show, 0, 15), (explorer.open, "99"), (explorer.fuse, -1),
                        (explorer.search, "", "odd"), (explorer.choose_class, 4), (explorer.choose_cell, "nobody")]:
        with pytest.raises(InputError): what(*args)
    panels["object"].link.value = "99"
    assert "There is no object 99" in explorer.alert.value and explorer.state == before
    panels["image"].next.click()
    assert explorer.alert.value == "" and explorer.state.image == 4


def test_images_that_are_gone_close_nothing(nasty_index):
    gone = replace(nasty_index, images=replace(nasty_index.images, root=Path("/nowhere")))
    lost = Explorer(Catalog(gone))
    lost.show(5, 3)
    assert lost.alert.value == "" and lost.panels["object"].gallery.image.startswith(b"\xff\xd8") and lost.stand_in()


def test_two_threads_leave_one_state(explorer, nasty_index):
    def walk(seed):
        for i in np.random.default_rng(seed).integers(0, len(nasty_index), 12): explorer.ask("show", int(i), 4)
    threads = [threading.Thread(target=walk, args=(s,)) for s in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    i, panel = explorer.state.image, explorer.panels["image"]
    objects = nasty_index.map(i)[0].tolist()
    assert panel.picker.number == i == panel.number.value and panel.picker.objects == objects
    assert explorer.state.object_id == panel.picker.chosen == objects[4]
    assert f"Image {i}, row 1" in explorer.panels["object"].numbers.value


def test_what_cannot_be_explored_is_named(small_llb, tmp_path):
    with pytest.raises(InputError, match="give them too"): Explorer(small_llb)
    with pytest.raises(InputError, match="no trained model"): Explorer(tmp_path)
    with pytest.raises(InputError, match="no object index"): open_index(tmp_path)


@pytest.mark.slow
def test_a_click_takes_less_than_200_ms_of_work(big_index):
    "50,000 images, K = 2,048, 1,000 classes; processor time, for others use the machine, too."
    explorer, rng = Explorer(big_index), np.random.default_rng(0)
    work = []
    for i in rng.integers(0, len(big_index), 8):
        explorer.show(int(i))
        for patch in rng.permutation(196)[:5]:
            began = time.process_time()
            explorer.panels["image"].picker.patch = int(patch)
            work.append(time.process_time() - began)
    print(f"median {1e3 * np.median(work):.0f} ms, slowest {1e3 * max(work):.0f} ms of {len(work)} clicks")
    assert np.median(work) < .2


@pytest.mark.slow
def test_a_catalog_of_50_000_images_is_small(big_index):
    most, _ = peak_memory(lambda: Catalog(open_index(big_index.folder)))
    assert most < 500, most   # MB: tables of K x K and C x K, not of images; the two tables of logits alone have 400


def test_the_preprocessing_of_an_index_survives_json(nasty_index):
    stored = json.loads(json.dumps(nasty_index.info["preprocessing"]))
    again = Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    assert again.image_size == (48, 80) and nasty_index.image(0).shape == (48, 80, 3)

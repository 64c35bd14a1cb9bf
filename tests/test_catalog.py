"""Questions to an index, their answers as figures and HTML: right numbers, and names from anyone that stay text."""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import NASTY

import llb.apps.html
from llb.analysis.catalog import Album, Catalog, cell_images, elsewhere, find_objects, Notes, objects_of
from llb.analysis.index import open_effects
from llb.apps.cards import gallery_page, object_html, prediction_html
from llb.apps.figures import figure_of_branches, figure_of_class, figure_of_image, figure_of_object, save_figure
from llb.apps.html import results_html
from llb.core.errors import InputError


@pytest.fixture
def catalog(nasty_index):
    notes = Notes(names={k: NASTY[k % 4] for k in range(12)})
    return Catalog(nasty_index, open_effects(nasty_index), notes, name=NASTY[0])


def test_names_from_anyone_stay_text(catalog):
    k, i = int(catalog.index.patches.argmax()), 3
    scored = dict(top1=.5, nll=1., brier=.5, ece=.1)
    metrics = {"visual": scored, "alpha": {"value": .5, "chosen": NASTY[0]}, "seen": {"scored": 9}}
    catalog.chosen = NASTY[0]
    pages = (gallery_page(catalog, range(12), NASTY[0]), object_html(catalog, k, i, 0),
             object_html(catalog, k, i, None), prediction_html(catalog, i, .5), results_html(metrics))
    for text in pages:
        assert "<img src=x" not in text and "&lt;img src=x" in text and "\0" not in text and "c" * 99 not in text


def test_no_template_lets_text_through_unescaped():
    "What is HTML already comes as `Markup`; a template that trusts a value would trust a name."
    templates = list((Path(llb.apps.html.__file__).parent / "templates").glob("*.html"))
    assert len(templates) > 5
    for path in templates: assert not re.search(r"\|\s*safe\b|autoescape", path.read_text()), path.name


def test_names_from_anyone_are_drawn_as_written(catalog, tmp_path):
    k = int(catalog.index.patches.argmax())
    figures = (figure_of_image(catalog, 0, .5, k), figure_of_object(catalog, k, 1), figure_of_class(catalog, 2),
               figure_of_class(Catalog(catalog.index), 1), figure_of_branches(catalog))
    for figure in figures: assert save_figure(figure, tmp_path / "a.svg").stat().st_size > 1000


def test_search_filter_and_sort(nasty_index):
    catalog = Catalog(nasty_index, notes=Notes(names={3: "Wheels"}))
    assert find_objects(catalog, "WHEEL").tolist() == [3] and 3 in find_objects(catalog, "3")
    for kind, column in ("dead", "dead"), ("dense", "dense"), ("label-specific", "label_specific"):
        assert np.array_equal(np.sort(find_objects(catalog, kind=kind)), np.flatnonzero(catalog.table[column]))
    assert (np.diff(catalog.table["images"][find_objects(catalog, order="most images")]) <= 0).all()
    with pytest.raises(InputError, match="must be one of"): find_objects(catalog, kind="odd")


def test_effects_of_a_class_are_the_index_s(catalog):
    c, effects = 2, catalog.effects
    for use in objects_of(catalog, c, "effect", min_support=1):
        mine = (np.asarray(effects["objects"]) == use.object_id) & (catalog.labels == c)[:, None]
        assert use.images == mine.sum() and np.isclose(use.value, np.asarray(effects["effect"])[mine].mean(), atol=1e-5)


def test_the_same_object_elsewhere_is_elsewhere(nasty_index):
    catalog, index = Catalog(nasty_index), nasty_index
    for k in range(12):
        for i in 3, 8:
            rows = {where: elsewhere(catalog, k, i, where, 4) for where in ("same class", "other classes", "anywhere")}
            assert all(i not in e.image for e in rows.values())
            assert (catalog.labels[rows["same class"].image] == catalog.labels[i]).all()
            assert (catalog.labels[rows["other classes"].image] != catalog.labels[i]).all()
            for e in rows.values(): assert all(index.map(int(n))[0][int(p)] == k for n, p in zip(e.image, e.patch))
    assert sum(len(cell_images(catalog, "neither", 7, page)) for page in range(20)) == len(catalog.cells()["neither"])
    assert "Dead" in object_html(catalog, int(np.argmin(index.patches)), 0, None) or index.patches.min() > 0


def test_an_album_forgets(nasty_index):
    album = Album(nasty_index, keep=5)
    for i in range(20): album[i]
    album.load(range(20, 40))
    assert np.array_equal(album[3], (nasty_index.image(3) * 255).round().astype(np.uint8)) and len(album._decoded) <= 5


def test_images_that_are_gone_leave_a_gallery(nasty_index):
    lost = Catalog(replace(nasty_index, images=replace(nasty_index.images, root=Path("/nowhere"))))
    assert "<section" in gallery_page(lost, range(12)) and (lost.album[0] == 0xcc).mean() > .5


def test_notes_are_about_one_model(nasty_index, tmp_path):
    notes = Notes(tmp_path / "notes.json")
    notes.name(3, "  a \n b " + "c" * 200)
    assert json.loads(notes.path.read_text())["names"] == {"3": ("a b " + "c" * 200)[:80]}

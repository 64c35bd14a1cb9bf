"""Whatever people bring is refused with one sentence about it, or used rightly (see `bad_input`)."""
import json
import re

import pytest
from bad_input import CASES, numbers
from bad_input.workshop import GOOD, judge, Shared, Workshop


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "The images, the run and the cache of all cases."
    return Shared(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def shop(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("LLB_CACHE", str(shared.folder / "cache"))
    return Workshop(shared, tmp_path)


TRAINED = re.compile("resume: (?!(no run|a folder|another|other))|name: letters|report: (a finished|the figures|other)"
                     "|leave unreadable|explorer of: other")   # what trains, or draws a whole report


def marks_of(name):
    return [pytest.mark.slow] if TRAINED.search(name) else []


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=marks_of(name)) for name, case in CASES.items()])
def test_bad_input_gets_its_sentence_and_good_input_its_answer(case, shop):
    kind, said = judge(case, shop)
    assert kind in GOOD, f"{kind}: {said}"


def test_there_are_as_many_cases_as_were_first_counted(): assert len(CASES) >= 439


TAKEN = [(option, value, more) for option, (values, more) in numbers.OPTIONS.items() for value in values.split()]


@pytest.mark.slow
@pytest.mark.parametrize("option,value,more", TAKEN, ids=str)
def test_a_run_with_a_number_at_the_edge_ends_with_finite_numbers(option, value, more, shop):
    no_llb = dict(num_objects=None, num_layers=None, target_layer=None) if "visual" in more else {}
    shop.train(*more.split(), **{option: value}, **no_llb)
    assert numbers.is_finite(json.loads((shop.here / "runs/run/metrics.json").read_text()))

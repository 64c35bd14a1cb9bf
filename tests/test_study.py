"""A study that is killed, shared among processes or tampered with ends with the same table, or says what is wrong."""
import json
import sys
import time
from dataclasses import replace

import pytest

from llb.core.errors import InputError
from llb.models.llb import LLB
from llb.cli import main
from llb.study.compare import check_study, compare
from llb.study.plan import read_study
from llb.study.records import read_records

STUDY = """
question = "Do more objects help?"
baseline = "linear"
seeds = [0, 1]
[options]
backbone = "test_vit"
random_backbone = true
image_size = 32
target_layer = 3
epochs = 3
batch_size = 16
selection_fraction = 0.3
[search]
lr = [1e-3, 1e-2]
[data.shapes]
dataset = "ImageFolder"
data_dir = "{images}"
[arms]
linear = {{head = "linear"}}
few = {{num_objects = 4, num_layers = 2}}
many = {{num_objects = 16, num_layers = 2}}
"""


@pytest.fixture(scope="module")
def study_file(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "objects.toml"
    path.write_text(STUDY.format(images=images))
    return path


@pytest.fixture(scope="module")
def uninterrupted(study_file):
    return compare(study_file)


def numbers(comparison):
    "Everything in the records but when, where and how long."
    return {r.name: (r.metrics, r.images, {k: v for k, v in r.chosen.items()}) for r in comparison.records}


def run(start, file, *flags):
    code = "import sys; from llb.cli import main; main(['compare', *sys.argv[1:]])"
    return start(sys.executable, "-c", code, str(file), "--device", "cpu", *map(str, flags))


@pytest.mark.slow
def test_a_study_killed_three_times_ends_with_the_same_numbers(study_file, uninterrupted, start, tmp_path):
    for wanted in 1, 2, 4:
        process = run(start, study_file, "--folder", tmp_path)
        deadline = time.monotonic() + 120
        while len([*tmp_path.glob("records/*/*/seed-*.json")]) < wanted and time.monotonic() < deadline:
            time.sleep(.02)
        process.kill()
    assert len(read_records(tmp_path / "records")) < len(uninterrupted.records)
    again = compare(study_file, tmp_path)
    assert numbers(again) == numbers(uninterrupted) and not again.missing


@pytest.mark.slow
def test_processes_that_share_a_study_find_the_same_numbers(study_file, uninterrupted, tmp_path):
    assert numbers(compare(study_file, tmp_path, jobs=2)) == numbers(uninterrupted)


def test_records_and_tables_are_checked_against_each_other(study_file, uninterrupted, tmp_path, capsys):
    main(["compare", str(study_file), "--check"])
    assert capsys.readouterr().out.strip() == uninterrupted.markdown().strip()
    folder = study_file.with_suffix("")
    path = next((folder / "records").rglob("seed-0.json"))
    kept = path.read_text()
    record = json.loads(kept)
    record["metrics"]["fused"]["top1"] += .01
    try:
        path.write_text(json.dumps(record))
        with pytest.raises(InputError, match="but its images give"): check_study(read_study(study_file), folder)
    finally: path.write_text(kept)


def test_a_seed_that_one_arm_lacks_is_named(study_file, uninterrupted):
    from llb.study.compare import Comparison
    study = read_study(study_file)
    records = [r for r in uninterrupted.records if (r.arm, r.seed) != ("many", 1)]
    with pytest.raises(InputError, match="'many' has no record of seed 1"): Comparison(study, records)
    with pytest.raises(InputError, match="different ones"): replace(study, seeds=(1, 1))


def test_other_settings_under_the_same_name_are_refused_and_lose_nothing(study_file, uninterrupted):
    study, folder = read_study(study_file), study_file.with_suffix("")
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    with pytest.raises(InputError, match="epochs 3, now 4"):
        compare(replace(study, options={**study.options, "epochs": 4}), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_an_arm_of_ones_own_takes_part_without_a_file(study_file, uninterrupted, tmp_path):
    def sharp(backbone, num_classes):
        return LLB(backbone, num_objects=4, num_layers=2, target_layer=3, temperature=.02, num_classes=num_classes)
    study = replace(read_study(study_file), seeds=(0,), arms={"linear": {"head": "linear"}})
    found = compare(study, tmp_path, arms={"sharp": sharp})
    assert [r.arm for r in found.records] == ["linear", "sharp"] and not found.missing
    assert found.records[0].images == next(r for r in uninterrupted.records if r.name == "shapes/linear/seed-0").images
    softer = lambda backbone, num_classes: sharp(backbone, num_classes)
    with pytest.raises(InputError, match="source"): compare(study, tmp_path, arms={"sharp": softer})

"""One process, two or three: the same gradients and the same evaluation."""
import json
import math

import numpy as np
import pytest
import ranks
from PIL import Image
from running import Forked

pytestmark = pytest.mark.slow
TERMS = ("loss", "cross_entropy", "entropy", "patch_entropy", "visual_cross_entropy")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "What each process of 1, 2 and 3 found, by world size."
    folder = tmp_path_factory.mktemp("ranks")
    for i in range(11): Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    for i in 3, 4, 10: (folder / f"{i}.png").write_bytes(b"not an image")
    for n in 1, 2, 3:
        run = Forked(folder / "log.txt", *[(ranks.main, folder)] * n)
        assert run.finish(120) == [0] * n, run.text
    return {n: [json.loads((folder / f"{n}-{r}.json").read_text()) for r in range(n)] for n in (1, 2, 3)}


def distance(a, b):
    "Largest difference of two sets of gradients, relative to the largest gradient."
    pairs = [(np.array(a[k]), np.array(b[k])) for k in a]
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)


@pytest.mark.parametrize("uneven", [0, 1], ids=["even", "uneven"])
@pytest.mark.parametrize("micro", [1, 2], ids=["whole", "micro"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_gradients_do_not_depend_on_processes(processes, micro, uneven, results):
    wanted = results[1][0]["gradients"]["0-1-0"]
    for rank in results[processes]:
        found = rank["gradients"][f"{uneven}-{micro}-0"]
        assert found["gradients"].keys() == wanted["gradients"].keys() and "visual_head.weight" in wanted["gradients"]
        assert distance(found["gradients"], wanted["gradients"]) < 1e-6
    for term in TERMS:   # averaged over processes, the terms are those of the whole batch
        mean = np.mean([r["gradients"][f"{uneven}-{micro}-0"]["terms"][term] for r in results[processes]])
        assert math.isclose(mean, wanted["terms"][term], rel_tol=1e-9), term


@pytest.mark.parametrize("processes", [2, 3])
def test_local_diversity_is_the_mean_over_processes(processes, results):
    whole = results[1][0]["gradients"]["0-1-1"]
    cases = [rank["gradients"]["0-1-1"] for rank in results[processes]]
    for case in cases: assert math.isclose(case["terms"]["entropy"], case["own_entropy"], rel_tol=1e-9)
    assert distance(cases[0]["gradients"], whole["gradients"]) > 1e-4    # it does depend on the number of processes ...
    mean = np.mean([c["own_entropy"] for c in cases])
    assert mean < whole["terms"]["entropy"]                              # ... and is smaller, as entropy is concave
    terms = [c["terms"] for c in cases]
    rest = np.mean([t["loss"] - t["cross_entropy"] - t["visual_cross_entropy"] for t in terms])
    assert math.isclose(rest, -.5 * mean, rel_tol=1e-9)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_does_not_depend_on_processes(processes, results):
    wanted = results[1][0]["evaluation"]
    for found in (rank["evaluation"] for rank in results[processes]):   # every process knows all
        assert found["scores"]["index"] == list(range(11))
        for name in "label", "top1", "in_top5": assert found["scores"][name] == wanted["scores"][name]
        for name in "label_probability", "confidence", "squares":
            np.testing.assert_allclose(found["scores"][name], wanted["scores"][name], rtol=1e-12)
        for alpha, numbers in wanted["metrics"].items():
            assert found["metrics"][alpha] == pytest.approx(numbers, rel=1e-12)
        for name, value in wanted["usage"].items(): assert math.isclose(found["usage"][name], value, rel_tol=1e-12)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_checks_its_fraction_of_the_images(processes, results):
    found = [rank["corrupt"] for rank in results[processes]]
    assert all(f["found"] == ["10.png", "3.png", "4.png"] for f in found) and sum(f["read"] for f in found) == 11
    assert max(f["read"] for f in found) - min(f["read"] for f in found) <= 1

"""Count what comes of all cases: `python -m bad_input [WORDS IN THEIR NAMES] [--all]` in `tests`."""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from . import SUITES
from .workshop import GOOD, judge, KINDS, Shared, Workshop


def main(*words):
    every, words = "--all" in words, [word for word in words if word != "--all"]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["LLB_CACHE"] = str(folder / "cache")
        shared, counts = Shared(folder), {}
        for suite, cases in SUITES.items():
            counts[suite] = dict.fromkeys(KINDS, 0)
            for i, (name, case) in enumerate(cases.items()):
                if not all(word in f"{suite}: {name}" for word in words):
                    continue
                here, began = folder / f"{suite[:5]}-{i}", time.monotonic()
                here.mkdir()
                kind, said = judge(case, Workshop(shared, here))
                counts[suite][kind] += 1
                took = time.monotonic() - began
                if every or kind not in GOOD:
                    print(f"{kind:<16} {took:4.1f} s  {suite}: {name}\n    {said.strip()[-260:]}")
    print(f"{'suite':<50} tried " + " ".join(f"{kind:>16}" for kind in KINDS))
    for suite, found in counts.items():
        print(f"{suite:<50} {sum(found.values()):>5} " + " ".join(f"{n:>16}" for n in found.values()))
    total = [sum(found[kind] for found in counts.values()) for kind in KINDS]
    print(f"{'sum':<50} {sum(total):>5} " + " ".join(f"{n:>16}" for n in total))


main(*sys.argv[1:])

"""Bad input, and good input that looks bad: what is tried, and what must happen. `python -m bad_input` counts.

A case is a name, what is tried in a workshop, and what must happen: a pattern that the one sentence of a refusal has to
match, `None` where the input is to be accepted, or `TypeError` where Python itself may refuse an argument.
"""

from . import apps, folders, numbers, settings, weights

SUITES = {
    "numbers": numbers.CASES,
    "folders and images": folders.CASES,
    "weights and saved models": weights.CASES,
    "configuration, names, devices, resume, evaluate": settings.CASES,
    "reports, explorer, launch, Python": apps.CASES,
}
CASES = {f"{suite}: {name}": case for suite, cases in SUITES.items() for name, case in cases.items()}

"""`--spread`: few cases of each test that together show what its many do, for slow machines."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--spread",
        action="append",
        metavar="[TEST=]N",
        help="of each test, or of one, the fewest cases that take every value of every parameter once, at most N",
    )


def _spread(cases: list[pytest.Item], most: int) -> list[pytest.Item]:
    values = {item: set(item.callspec.indices.items()) for item in cases}  # type: ignore[attr-defined]
    missing, kept = set().union(*values.values()), []
    while missing and len(kept) < most:
        best = max(cases, key=lambda item: len(values[item] & missing))
        missing -= values[best]
        kept.append(best)
    return kept


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--spread")
    if asked is None:
        return
    most = {name: int(number) for name, _, number in (each.rpartition("=") for each in asked)}
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(f"{item.path}::{getattr(item, 'originalname', item.name)}", []).append(item)
    kept = set()
    for name, cases in tests.items():
        number = most.get(name.partition("::")[2], most.get("", len(cases)))
        kept.update(_spread(cases, number) if hasattr(cases[0], "callspec") else cases)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]

"""The tables of docs/privacy.md are what the code says; `python -m tests.test_privacy_docs` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedseg.algorithms import ALGORITHMS
from fedseg.federation.contract import Guarantee, Transform
from fedseg.privacy.accounting import Account, gaussian_event
from fedseg.privacy.build import build_transforms
from fedseg.privacy.settings import Compression, Privacy
from tests.world import build

PAGE = Path(__file__).parent.parent / "docs" / "privacy.md"
KINDS = {
    "`site`": (Privacy(mechanism="site"), Compression()),
    "`patient`": (Privacy(mechanism="patient"), Compression()),
    "`sparse`": (Privacy(mechanism="sparse"), Compression()),
    "`masked`": (Privacy(aggregation="masked"), Compression()),
    "`encrypted`": (Privacy(aggregation="encrypted"), Compression()),
    "`top_k`": (Privacy(), Compression(top_k=0.1)),
    "`cast`": (Privacy(), Compression(cast="float16")),
}
REASONS = {
    "holds all data in one place": "no update",
    "shares nothing": "no update",
    "(introduces)": "introduces",
    "(per_site)": "per_site",
    "(adapts)": "adapts",
    "(reads_updates)": "reads_updates",
    "normalises over batches": "statistics",
    "second model": "second model",
    "(merge)": "merge",
    "(soup)": "soup",
    "(learns_unlabelled)": "no labels",
    "(perturbation)": "perturbation",
    "(exact_groups)": "exact_groups",
    "shows whole tensors": "per_site",
    "peers hand on whole models": "peers",
}


def verdict(transform: Transform, name: str, norm: str) -> str:
    algorithm = build(name, norm=norm)  # type: ignore[arg-type]
    try:
        transform.check(algorithm)
    except ValueError as error:
        first, *others = sorted({short for text, short in REASONS.items() if text in str(error)})
        return f"no: {', '.join([first, *others])}"
    return "yes"


def methods() -> list[str]:
    chains = {name: build_transforms(*settings, 1.0)[0] for name, settings in KINDS.items()}
    rows = []
    for name in ALGORITHMS:
        # SiloBN exists with running statistics only
        norms = {kind: "group" if kind == "`patient`" and name != "silobn" else "batch" for kind in chains}
        rows.append([f"`{name}`", *(verdict(chain, name, norms[kind]) for kind, chain in chains.items())])
    return table(["method", *chains], rows)


def account() -> list[str]:
    keeper = Account(Guarantee("site", 1e-5))
    rates = {"every site": 1.0, "`poisson`, fraction 0.5": 0.5, "`poisson`, fraction 0.1": 0.1}
    rows = [
        [f"{noise:g}", *(f"{keeper.epsilon({gaussian_event(noise, rate): 100}):.1f}" for rate in rates.values())]
        for noise in (1.0, 2.0, 4.0, 8.0)
    ]
    return table(["noise", *rates], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)


TABLES = {"methods": methods, "account": account}


@pytest.mark.slow
def test_the_tables_are_what_the_code_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        found = block(name).search(page)
        assert found is not None, name
        assert found[2].splitlines() == make(), "python -m tests.test_privacy_docs"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for title, maker in TABLES.items():
        text = block(title).sub(lambda m, maker=maker: m[1] + "\n".join(maker()) + m[3], text)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")

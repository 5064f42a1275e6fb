"""Published figures beside ours, and what a device's constants do to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from effops.pim import Device
from effops.systems.report import Table, Verdict

NEAR = 0.25  # a figure is seen if it lies within this share of the published one
STEP = 0.2  # by which sensitivity moves a constant


@dataclass(frozen=True)
class Claim:
    """One figure of a paper and ours for the same configuration."""

    what: str
    published: float
    ours: float

    @property
    def near(self) -> bool:
        return abs(self.ours / self.published - 1) <= NEAR


def claims_table(claims: Sequence[Claim], title: str = "figures of the paper, constants as they were frozen") -> Table:
    rows = [(c.what, c.published, c.ours, c.ours / c.published, "yes" if c.near else "no") for c in claims]
    columns = ("figure", "paper", "ours", "ours / paper", f"within {NEAR:.0%}")
    return Table(title, columns, rows)


ALONE, TOGETHER, OWN = "one of the paper's settings", "settings moved together", "a setting that is not published"


@dataclass(frozen=True)
class Moved:
    """A claim with settings moved inside their published range, or one that has none."""

    claim: Claim
    setting: str
    kind: str = ALONE


def nearest(claim: Claim, **settings: Mapping[str, float]) -> list[Moved]:
    """For each setting, moved alone, that one of its values with which ours is nearest to the published figure."""
    moved = []
    for setting, by_value in settings.items():
        value, ours = min(by_value.items(), key=lambda item: abs(item[1] / claim.published - 1))
        moved.append(Moved(Claim(claim.what, claim.published, ours), f"{setting}: {value}"))
    return moved


def moved_table(moved: Sequence[Moved]) -> Table:
    rows = [
        (m.claim.what, m.setting, m.kind, m.claim.published, m.claim.ours, m.claim.ours / m.claim.published,
         "yes" if m.claim.near else "no")
        for m in moved
    ]  # fmt: skip
    columns = ("figure", "moved", "which is", "paper", "ours", "ours / paper", f"within {NEAR:.0%}")
    return Table("settings moved, one at a time where the row does not say otherwise", columns, rows)


def closing(moved: Sequence[Moved]) -> str:
    """For every figure, which published settings alone bring ours within reach of it, or that none does."""
    found: dict[str, list[str]] = {}
    for m in moved:
        settings = found.setdefault(m.claim.what, [])
        if m.kind == ALONE and m.claim.near:
            settings.append(m.setting)
    return "; ".join(f"{what}: {' or '.join(settings) or 'none'}" for what, settings in found.items())


def verdict(claims: Sequence[Claim]) -> Verdict:
    seen = sum(c.near for c in claims)
    return "seen" if seen == len(claims) else "partly seen" if seen else "not seen"


def sensitivity(
    title: str,
    constants: Mapping[str, Sequence[str]],
    measure: Callable[[Mapping[str, Device]], Mapping[str, float]],
) -> Table:
    """``measure`` of the devices with each constant 20 % lower and higher; ``constants`` lists, for each, the devices
    that have it. Whole numbers stay whole and move by one at least."""
    devices = {name: Device.load(name) for names in constants.values() for name in names}
    plain = measure(devices)
    rows: list[tuple[str | float | None, ...]] = [("as published", *(v for v in plain.values() for _ in range(2)))]
    for constant, names in constants.items():
        found = []
        for factor in (1 - STEP, 1 + STEP):
            changed = dict(devices)
            for name in names:
                value = devices[name][constant]
                moved = value * factor
                if isinstance(value, int):
                    step = max(1, round(abs(moved - value)))
                    moved = value + step if factor > 1 else value - step
                changed[name] = devices[name].replace(constant, moved)
            found.append(measure(changed))
        rows.append((constant, *(f[key] for key in plain for f in found)))
    columns = ("constant", *(f"{key}, {sign}{STEP:.0%}" for key in plain for sign in "-+"))
    return Table(title, columns, rows)

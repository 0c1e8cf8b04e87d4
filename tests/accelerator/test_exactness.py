"""The same bits from every placement, whatever the order in which devices happen to work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from distorch import vgpu
from tests.accelerator.make import FORMS, distributed, examples, same

NUM_SEEDS = 20
DONORS = ("cpu", "peer", "disk", "all")


@dataclass(frozen=True)
class Case:
    """A placement, and how the devices behave."""

    num_devices: int
    donors: str
    resident: int
    form: str
    enqueued: bool

    @property
    def compute(self) -> str:
        """The last of the devices computes, the others lend."""
        return f"vgpu:{self.num_devices - 1}"

    @property
    def donor_names(self) -> list[str]:
        peers = [f"vgpu:{index}" for index in range(self.num_devices - 1)]
        every = ["cpu", *peers, "disk"]
        return {"cpu": ["cpu"], "peer": peers, "disk": ["disk"], "all": every}[self.donors]

    @property
    def line(self) -> str:
        names = self.donor_names
        shares = [(100 - self.resident) // len(names)] * len(names)
        shares[0] = 100 - self.resident - sum(shares[1:])
        entries = zip([self.compute, *names], [self.resident, *shares], strict=True)
        return ";".join(f"{name},{share}%" for name, share in entries)

    def __str__(self) -> str:
        how = "enqueued" if self.enqueued else "eager"
        return f"{self.num_devices} devices-{self.donors}-{self.resident}%-{self.form}-{how}"


CASES = [
    case
    for case in (
        Case(*parts) for parts in product((1, 2, 3), DONORS, (0, 30, 100), FORMS, (False, True))
    )
    if case.donor_names
]


def compute_and_compare(case: Case, seed: int) -> None:
    pairs = examples(case.form)
    with vgpu.settings(enqueued=case.enqueued, races="raise", delay_seconds=5e-4, seed=seed):
        module, handle = distributed(case.form, case.line, compute=case.compute)
        donors = set(handle.plan.bytes_by_tier) - {case.compute}
        assert donors == (set(case.donor_names) if case.resident < 100 else set())
        with torch.inference_mode():
            found = [module(x.to(case.compute)) for x, _ in pairs]
        assert all(same(y, expected) for y, (_, expected) in zip(found, pairs, strict=True))
        handle.remove()


@pytest.mark.parametrize(
    ("case", "seed"), [(case, number % NUM_SEEDS) for number, case in enumerate(CASES)], ids=str
)
def test_every_placement_gives_the_bits_of_the_cpu(case: Case, seed: int) -> None:
    compute_and_compare(case, seed)


@pytest.mark.parametrize("enqueued", [False, True], ids=["eager", "enqueued"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_delay_gives_the_bits_of_the_cpu(seed: int, form: str, enqueued: bool) -> None:  # noqa: FBT001
    compute_and_compare(Case(3, "all", 30 * (seed % 2), form, enqueued), seed)

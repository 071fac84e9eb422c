"""The simulation of data loss: against the closed form, where both can be had; and that it would notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulation.__main__ import main
from simulation.driver import DAY, Rates
from simulation.experiment import YEAR, Settings, simulate
from simulation.markov import loss_rate, mean_time_to_loss
from simulation.report import probability
from simulation.statistics import of_batches, of_count
from storage.replication import parse_replication
from storage.standing import Standing

SMALL = Settings(
    hosts=24,
    domains=0,
    sectors=48,
    rates=Rates(host_life=1000 * DAY, domain_life=0.0, away_every=30 * DAY, away_for=1200.0, replace_after=DAY),
    grace=3600.0,
    data=1e12,
    disk=4e12,
    repair_rate=50e6,
    speeds=(1000.0,),
    deaths=60,
    seed=7,
)


def test_the_closed_form_is_the_chain_solved_by_hand() -> None:
    # Two copies: (3L + M) / 2L^2, as in Gibson's thesis; one copy: 1 / L.
    life, repair = 1 / 1000.0, 2.0
    assert mean_time_to_loss(2, 1, life, repair) == pytest.approx((3 * life + 1 / repair) / (2 * life**2))
    assert mean_time_to_loss(1, 0, life, repair) == pytest.approx(1000.0)
    # To first order: n over the number of ways times L^(m+1) T^m, whatever the spec.
    assert loss_rate(parse_replication("4+2"), life, 0.01) == pytest.approx(6 * 10 * life**3 * 0.01**2, rel=1e-3)
    assert loss_rate(parse_replication("3"), life, 0.01) == pytest.approx(3 * life**3 * 0.01**2, rel=1e-3)


def test_intervals_are_those_of_the_tables() -> None:
    assert of_count(0, 1.0).high == pytest.approx(3.689, abs=1e-3)
    ten = of_count(10, 2.0)
    assert (ten.mean, ten.low, ten.high) == (5.0, pytest.approx(4.795 / 2, abs=1e-3), pytest.approx(18.391 / 2, abs=1e-3))
    three = of_batches([1.0, 2.0, 3.0])
    assert (three.mean, three.low, three.high) == (2.0, 0.0, pytest.approx(2.0 + 4.303 / 3**0.5))
    assert probability(1e-9, 1000) == pytest.approx(1e-6)


@pytest.mark.parametrize("spec", ["2", "2+2"])
def test_the_real_code_loses_as_little_as_the_closed_form_says(spec: str) -> None:
    (point,) = simulate(spec, SMALL)
    assert point.deaths >= 50
    # The grace, and not much more, until a shard is made again.
    assert 1.0 <= point.repair_hours < 1.5
    assert point.counted.contains(point.closed_form), point
    assert point.expected.contains(point.closed_form), point
    assert point.expected.low > 0.0


def test_the_same_seed_gives_the_same_numbers() -> None:
    settings = replace(SMALL, hosts=8, sectors=8, deaths=10)
    assert simulate("2", settings) == simulate("2", settings)
    assert simulate("2", settings) != simulate("2", replace(settings, seed=8))


@pytest.mark.parametrize("blind", [False, True])
def test_copies_are_apart_in_failure_domains(blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole domains die, no host by itself. Placement that does not see domains loses something each time."""
    if blind:
        monkeypatch.setattr(Standing, "domain", lambda _self, number: str(number))
    rates = replace(SMALL.rates, host_life=0.0, domain_life=1000 * DAY, away_every=0.0)
    (point,) = simulate("2", replace(SMALL, domains=6, sectors=24, rates=rates))
    dying = SMALL.speeds[0] / (1000 * DAY)
    apart = loss_rate(parse_replication("2"), dying, point.repair_hours * 3600.0) * YEAR
    assert point.expected.contains(apart) != blind, point
    assert (point.expected.low > 1.5 * apart) == blind, point


def test_the_command_prints_the_table_and_writes_the_numbers(tmp_path: Path) -> None:
    arguments = ["--spec", "2", "--hosts", "6", "--fast-hosts", "6", "--speed", "1000", "--deaths", "5", "--away-every", "0"]
    done = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "numbers.json")])
    assert done.exit_code == 0, done.output
    assert "closed form" in done.stdout
    assert "a volume of 250,000 sectors on 20 hosts" in done.stdout
    # What a person sees meanwhile, apart from the numbers.
    assert "spec 2: placing 6 sectors on 6 hosts, 0%" in done.stderr
    assert "days of 6 hosts at speed 1000, " in done.stderr
    again = CliRunner().invoke(main, ["--redraw", str(tmp_path / "numbers.json")])
    assert again.stdout.splitlines()[1] == done.stdout.splitlines()[1]
    points = json.loads((tmp_path / "numbers.json").read_text())["points"]
    assert [(point["spec"], point["speed"], point["hosts"]) for point in points] == [("2", 1.0, 6), ("2", 1000.0, 6)]
    refused = CliRunner().invoke(main, ["--spec", "10+4", "--hosts", "6"])
    assert refused.exit_code == 2
    assert "needs 14 hosts" in refused.output

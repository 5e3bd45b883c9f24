"""ComBat: sites are made alike, by what was fitted on other people."""

from __future__ import annotations

import numpy as np
import pytest

from neurojepa.downstream import study
from neurojepa.downstream.features import harmonised
from neurojepa.downstream.harmonise import Combat, _shrunk
from neurojepa.downstream.study import Design
from tests.helpers.embedded import cohort, people

pytestmark = pytest.mark.usefixtures("few_draws")


def scanned_at_sites(number: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, 12] as they are and as two sites with other people show them, sites, ages."""
    rng = np.random.default_rng(0)
    site = np.where(rng.random(number) < 0.4, "x", "y")
    age = rng.normal(50, 10, number) + 8 * (site == "x")  # x has older people
    true = rng.normal(size=(number, 12)) + age[:, None] * rng.normal(0.05, 0.02, 12)
    shown = true + (site == "x")[:, None] * rng.normal(3, 1, 12)
    shown *= np.where(site == "x", 1.6, 1)[:, None]
    return true, shown, site, age


def test_sites_are_made_alike_and_ages_are_kept() -> None:
    true, shown, site, age = scanned_at_sites()
    fitted = Combat.fit(shown[:160], site[:160], age[:160, None])
    alike = fitted.apply(shown, site, age[:, None])[160:]  # people who taught nothing
    x, differ = site[160:] == "x", (alike - true[160:])
    assert np.abs(differ[x].mean(0) - differ[~x].mean(0)).mean() < 0.35  # 3 before
    assert np.abs(np.log(alike[x].std(0) / alike[~x].std(0))).mean() < 0.2  # .5 before
    # without ages, what x's people owe to their age is taken for the site
    blind = Combat.fit(shown, site, np.zeros((240, 0))).apply(shown, site, np.zeros((240, 0)))
    assert np.allclose(blind[site == "x"].mean(0), blind[site == "y"].mean(0), atol=0.15)


def test_a_site_that_taught_nothing_or_too_few_stays_as_it_is() -> None:
    _, shown, site, _ = scanned_at_sites()
    none = np.zeros((240, 0))
    fitted = Combat.fit(shown[:200], np.where(np.arange(200) < 2, "z", site[:200]), none[:200])
    assert set(fitted.shift) == {"x", "y"}
    there = np.array(["z", "new"] * 120)
    assert np.allclose(fitted.apply(shown, there, none), shown)


def test_shrinkage_follows_the_published_equations() -> None:
    """At the fixed point of Johnson et al. 2007, and towards the mean of all features."""
    rng = np.random.default_rng(0)
    rest = rng.normal(rng.normal(1, 0.3, 50), rng.uniform(0.8, 1.4, 50), (8, 50))
    shift, scale = _shrunk(rest)
    own, variance = rest.mean(0), rest.var(0, ddof=1)
    spread, middle = own.var(ddof=1), own.mean()
    level, varies = variance.mean(), variance.var(ddof=1)
    a, b = (2 * varies + level**2) / varies, (level * varies + level**3) / varies
    assert np.allclose(shift, (8 * spread * own + scale * middle) / (8 * spread + scale), atol=1e-3)
    squares = np.square(rest - shift).sum(0)
    assert np.allclose(scale, (squares / 2 + b) / (8 / 2 + a - 1), atol=1e-3)
    assert shift.std() < own.std() and scale.std() < variance.std()


def test_harmonised_features_are_fitted_on_who_teaches_alone() -> None:
    _, shown, site, _ = scanned_at_sites(90)
    train, test = np.arange(60), np.arange(60, 90)
    spoilt = shown.copy()
    spoilt[60:] *= 100
    once, again = (harmonised(values, site)(train, test)[0] for values in (shown, spoilt))
    assert np.array_equal(once, again)


def test_the_site_is_told_no_more_after_combat() -> None:
    values, truth = cohort(120)
    site = np.array(["x", "y"])[np.random.default_rng(1).permutation(np.arange(120) % 2)]
    values += 2 * (site == "x")[:, None]
    found = study.study(people(values, dx=truth, site=site), "dx", Design(
        folds=3, repeats=1, site="site"))
    assert found.site_told.low > 0.8 and found.site_told_alike.value < 0.65
    assert found.rows[study.ALIKE].scores["auroc"].low > 0.8

"""The page of rescans: how alike they are, before and after sites were made alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream import stats
from neurojepa.downstream.labels import People
from neurojepa.downstream.output import Figures, how_done, new_plot
from neurojepa.downstream.reliability import Measure, Reliability
from neurojepa.downstream.stats import Score
from neurojepa.report import BLUE, ORANGE, grid, page, paragraph, section, table, tiles


def reliability_page(found: Reliability, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    lead = (f"{record['embeddings']}, {record['modality']}: {found.scans} scans of {found.units} "
            f"{record['rescans']} ({found.people} people)")
    first = found.measures[0]
    facts = [(f"{first.icc.value:.2f}", "ICC of the embedding", ""),
             (f"{first.same.value:.0%}" if first.same else "", "scans whose nearest is a rescan",
              "")]
    for each in found.measures:
        if each.name == "embedding" and each.site:
            facts.append((f"{each.site.value:.2f}", "balanced accuracy of telling the site"
                          + (", after ComBat" if each.alike else ""), ""))
    parts = [tiles(facts)]  # type: ignore[arg-type]
    parts.append(section("Rescans", *(
        paragraph(f"Look out: {each}.") for each in found.warnings), table(
        ["of", "sites", "ICC", "features, median (5 to 95 %)", "nearest is a rescan",
         "site is told"], [_row(each) for each in found.measures]), paragraph(_legend(found))))
    parts.append(section("Figures", grid([
        figures.show("icc", _together(found), "ICC of each measure with its 95 % interval: 1 where "
                     "rescans are equal, 0 where they differ as much as people do."),
        figures.show("features", _features(found), "Share of the embedding's features that have "
                     "at most such an ICC" + (", before and after ComBat." if any(
                         each.alike for each in found.measures) else "."))])))
    parts.append(how_done(record))
    return page("How alike rescans are", lead, parts)


def _row(each: Measure) -> list[str]:
    middle, low, high = (np.nanpercentile(each.features, q) for q in (50, 5, 95))
    return [each.name, "after ComBat" if each.alike else "as they are", str(each.icc),
            f"{middle:.2f} ({low:.2f} to {high:.2f})" if len(each.features) > 1 else "",
            _told(each.same), _told(each.site)]


def _told(score: Score | None) -> str:
    return str(score) if score else ""


def _legend(found: Reliability) -> str:
    chance = (f" Chance of telling the site is {1 / found.told_apart:.2f}." if found.told_apart > 1
              else " All scans are of one site." if len(found.sites) < 2
              else " Sites are not compared: some scans do not say theirs." if "" in found.sites
              else " Sites were not told apart: fewer than two have enough people.")
    return ("ICC: share of variance that lies between people, with a 95 % interval over families "
            "and people; of the embedding and of volumes over all features at once." + chance)


def _together(found: Reliability) -> Any:
    plot, axis = new_plot(height=1.2 + 0.45 * len(found.measures))
    for place, each in enumerate(reversed(found.measures)):
        axis.plot([each.icc.low, each.icc.high], [place, place],
                  color=ORANGE if each.alike else BLUE)
        axis.plot(each.icc.value, place, "s" if each.alike else "o",
                  color=ORANGE if each.alike else BLUE)
    axis.set_yticks(range(len(found.measures)), [
        each.name + (", ComBat" if each.alike else "") for each in reversed(found.measures)])
    axis.set(xlabel="ICC", xlim=(min(0, *(each.icc.low for each in found.measures)), 1.02))
    return plot


def _features(found: Reliability) -> Any:
    plot, axis = new_plot()
    for each in found.measures:
        if each.name == "embedding":
            values = np.sort(each.features[np.isfinite(each.features)])
            axis.plot(values, np.arange(1, len(values) + 1) / len(values),
                      "--" if each.alike else "-", color=ORANGE if each.alike else BLUE,
                      label="after ComBat" if each.alike else "as they are")
    axis.set(xlabel="ICC", ylabel="share of features", ylim=(0, 1.01))
    axis.legend(frameon=False)
    return plot


def predictions_of(found: Reliability, scans: People) -> list[list[str]]:
    """Rows of predictions.csv, with a header: what is read out of each scan."""
    lines = [["scan_id", "participant", "session", "label", "readout"]]
    assert scans.sessions is not None
    for label, values in found.readouts.items():
        lines += [[scan, who, visit, label, f"{value:.6g}"] for scan, who, visit, value in zip(
            scans.ids, scans.participant, scans.sessions, values, strict=True)
            if not np.isnan(value)]
    return lines


def methods(found: Reliability, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    sites = (f" Scans came from {len(found.sites)} sites. Harmonisation was ComBat (Johnson et al. "
             "2007, Fortin et al. 2018), fitted in each of five folds on the scans of other "
             "families; sites were told apart by multinomial logistic regression in nested "
             "cross-validation." if any(each.alike for each in found.measures) else "")
    read = (" Readouts were predicted in nested cross-validation by people who taught nothing, "
            "members of a family in one fold." if found.readouts else "")
    return (f"Frozen embeddings of {record['modality']} scans (neurojepa {record['version']}) of "
            f"{found.units} {record['rescans']} with {found.scans} scans were compared between "
            "rescans by ICC(1,1) of a one-way analysis of variance (Shrout & Fleiss 1979); over "
            "all features at once sums of squares were added up first (I2C2, Shou et al. 2013). "
            f"Intervals are 95 % percentile intervals of {stats.DRAWS:,} bootstrap draws of "
            "families and people."
            + read + sites)


def record_of(found: Reliability) -> dict[str, Any]:
    """What results.json says of it."""
    def score(value: Score | None) -> dict[str, float] | None:
        return value.as_dict() if value else None

    return {"scans": found.scans, "units": found.units, "people": found.people,
            "sites": found.sites, "sites_told_apart": found.told_apart,
            "measures": [{
                "of": each.name, "after_combat": each.alike, "icc": score(each.icc),
                "median_of_features": float(np.nanmedian(each.features)),
                "nearest_is_rescan": score(each.same), "site_told": score(each.site)}
                for each in found.measures],
            "warnings": found.warnings}

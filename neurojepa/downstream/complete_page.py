"""The pages of a completion: how good it is on people who taught nothing, and what it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurojepa.downstream.complete import GUESSES, LATENT, PLAIN, Found
from neurojepa.downstream.completed import Completed
from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, new_plot
from neurojepa.downstream.scoring import gains_record, scores_record
from neurojepa.downstream.teacher import LEFT_OUT
from neurojepa.report import BLUE, ORANGE, grid, page, paragraph, section, table, tiles

SHOWN = 6  # scans on the page of apply
NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM in the brain"}


def record_of(found: Found) -> dict[str, Any]:
    """results.json, but for what the command says."""
    return {
        "people": {part: len(set(found.visits.participant[found.visits.of(part)].tolist()))
                   for part in ("train", "val", "test")},
        "visits": {part: len(found.visits.of(part)) for part in ("train", "val", "test")},
        "scores": scores_record(found.rows), "gains": gains_record(found.gains),
        "latents": {name: score.as_dict() for name, score in found.latent_scores.items()},
        "losses": found.losses, "kept": LATENT if found.latents else PLAIN,
        "warnings": found.warnings}


def predictions_of(found: Found) -> list[list[str]]:
    """Rows of predictions.csv: scores of each visit tested, by its pseudonym."""
    names = list(found.rows)
    lines = [["participant", *(f"psnr {name}" for name in names),
              *(f"ssim {name}" for name in names)]]
    for number, k in enumerate(found.visits.of("test")):
        lines.append([str(found.visits.participant[k]),
                      *(_figure(found.rows[name].psnr[number], 3) for name in names),
                      *(_figure(found.rows[name].ssim[number], 4) for name in names)])
    return lines


def _figure(value: float, places: int) -> str:
    """Empty where a visit was not tested so."""
    return f"{value:.{places}f}" if np.isfinite(value) else ""


def complete_page(found: Found, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    kept, target, source = record["kept"], record["to"], record["from"]
    told = [(f"{found.rows[name].scores['psnr'].value:.1f} dB", f"PSNR, {name}", "")
            for name in (kept, "polynomial and mean map", "polynomial", "mean map")]
    rows = [[name, *map(str, row.scores.values())] for name, row in found.rows.items()]
    visits = record["visits"]
    words = (f"Mean over {visits['test']} visits tested [95 % interval over families and people], "
             "at voxels that are brain in the target and in all sources that a visit has. "
             f"{visits['train']} visits taught, {visits['val']} chose epoch and network: kept is "
             f"the {kept}.{_of_several(record)}")
    tokens, whole = found.latent_scores.values()
    return page(f"{target} completed from {source}",
                f"{record['input']}, weights {record['weights']}", [
        tiles(told),  # type: ignore[arg-type]
        section("Synthetic images against true ones",
                *(paragraph(f"Look out: {each}.") for each in found.warnings),
                table(["by", *NAMES.values()], rows), paragraph(words),
                *gains_table(record["gains"], NAMES["psnr"])),
        section("Latents", paragraph(
            f"Of what the tokens of {target} differ by from their place and head size, those of "
            f"{source} tell a share of {tokens}; of what its embedding differs by, {whole}. 0 is "
            "what place and head size tell alone.")),
        section("Figures", grid([
            figures.show("slices", _slices(found, record), (
                f"A person tested, middle slice: {source} and {target} as they were acquired, and "
                f"{target} as it was made (synthetic).")),
            figures.show("epochs", _epochs(found), (
                "Error on val by epoch, of the network without latents (orange) and with (blue); "
                "epoch 0 is the first guess."))])),
        how_done(record)])


def _of_several(record: dict[str, Any]) -> str:
    """What is to be said where there are several sources."""
    if len(record["sources"]) == 1:
        return ""
    return (" Visits may lack sources: of those that taught, chose and were tested, "
            + ", ".join(f"{number} had {name}" for name, number in record["visits_with"].items())
            + ". The rows of one source alone are of the network that is kept, without the others, "
            "on visits that have that source; paired differences to them are of visits that have "
            "all.")


def _slices(found: Found, record: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {**{name: name for name in found.visits.names}, "true": record["to"],
             "polynomial": "synthetic: polynomial", record["kept"]: f"synthetic: {record['kept']}"}
    columns = -(-len(names) // 2)
    plot, axes = plt.subplots(2, columns, figsize=(2.3 * columns, 5.4), layout="constrained")
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, (name, title) in zip(axes.flat, names.items(), strict=False):
        _slice(axis, found.shown[name][..., found.shown[name].shape[2] // 2], title)
    return plot


def _slice(axis: Any, image: np.ndarray, title: str) -> None:
    axis.imshow(image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("left · right", fontsize=8)


def _epochs(found: Found) -> Any:
    plot, axis = new_plot()
    for (name, losses), colour, style in zip(found.losses.items(), (ORANGE, BLUE), ("s--", "o-"),
                                             strict=True):
        axis.plot(losses, style, color=colour, label=name)
    axis.set(xlabel="epoch", ylabel="mean squared error on val")
    axis.legend(frameon=False)
    return plot


def methods(found: Found, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    return (
        f"{record['to']} was completed from {record['from']} (neurojepa {record['version']}, "
        f"weights {record['weights']}). Latents: ridge regression of what tokens differ by from "
        "what is usual at their place, its penalty chosen on val. Voxels: a cubic in the "
        "intensities of the sources with the target's mean map, corrected by three convolutions of "
        "16 channels, with and without the predicted latents as 8 more channels; AdamW on crops, "
        f"the best epoch on val. {_methods_of_several(record)}Compared are "
        f"{', '.join(GUESSES)}. Families shared a part; people tested taught nothing. PSNR has a "
        "peak of 1, SSIM (Wang et al. 2004) windows of 7 voxels. " + bootstrap())


def _methods_of_several(record: dict[str, Any]) -> str:
    if len(record["sources"]) == 1:
        return ""
    return ("Maps and polynomials are fitted apart for each set of sources that show brain at a "
            "voxel or patch; the network sees a mask of each source beside it, and learns from "
            f"{LEFT_OUT:.0%} of visits with a part of their sources left out. ")


# ---- apply ---------------------------------------------------------------------------------------

def applied_page(made: Sequence[Completed], record: dict[str, Any], figures: Figures) -> str:
    """What was made, and what it is not."""
    target, source = record["to"], record["from"]
    parts = [tiles([(str(len(made)), f"synthetic {target}", "")]),
             section("Look out", paragraph(
                 f"These images are synthetic: a network made them from {source}. They were not "
                 "acquired, and show no finding that their sources do not show. Their names have "
                 "desc-synthetic, their headers and sidecars say so, too. predictions.csv lists "
                 "them, with the sources of each."))]
    if len(record["sources"]) > 1:
        parts.append(section("Sources", table(["made from", "images"], [
            [name, str(number)] for name, number in record["images_with"].items()])))
    if made:
        parts.append(section("Slices", grid([figures.show("slices", _pairs(made, record), (
            f"The middle slice of {source} as acquired, above, and of {target} as it was made, "
            f"below: the first {min(SHOWN, len(made))}. An empty place is a source that the visit "
            "lacks."))])))
    return page(f"Synthetic {target} from {source}", str(record["model"]), [*parts,
                                                                            how_done(record)])


def _pairs(made: Sequence[Completed], record: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number, sources = min(SHOWN, len(made)), record["sources"]
    plot, axes = plt.subplots(len(sources) + 1, number, squeeze=False,
                              figsize=(1.6 * number + 0.4, 2.1 * len(sources) + 2.1),
                              layout="constrained")
    for column, each in zip(axes.T, made, strict=False):
        images = dict(zip([*each.names, record["to"]], each.slices, strict=True))
        for axis, name in zip(column, [*sources, record["to"]], strict=True):
            if name in images:
                _slice(axis, images[name], f"synthetic {name}" if name == record["to"] else name)
            else:
                axis.axis("off")
    return plot


def applied_methods(record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    return (f"Synthetic {record['to']} images were made from {record['from']} by {record['model']} "
            f"(neurojepa {record['version']}). They were used as "
            "[say what for]; no finding was read from them.")

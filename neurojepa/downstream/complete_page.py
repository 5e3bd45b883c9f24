"""The pages of a completion: how good it is on people who taught nothing, and what it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurojepa.downstream.complete import GUESSES, LATENT, PLAIN, Found
from neurojepa.downstream.completed import Completed
from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, new_plot
from neurojepa.downstream.scoring import gains_record, scores_record
from neurojepa.report import BLUE, ORANGE, grid, page, paragraph, section, table, tiles

SHOWN = 6  # scans on the page of apply
NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM in the brain"}


def record_of(found: Found) -> dict[str, Any]:
    """results.json, but for what the command says."""
    return {
        "people": {part: len(set(found.pairs.participant[found.pairs.of(part)].tolist()))
                   for part in ("train", "val", "test")},
        "visits": {part: len(found.pairs.of(part)) for part in ("train", "val", "test")},
        "scores": scores_record(found.rows), "gains": gains_record(found.gains),
        "latents": {name: score.as_dict() for name, score in found.latent_scores.items()},
        "losses": found.losses, "kept": LATENT if found.latents else PLAIN,
        "warnings": found.warnings}


def predictions_of(found: Found) -> list[list[str]]:
    """Rows of predictions.csv: scores of each visit tested, by its pseudonym."""
    names = list(found.rows)
    lines = [["participant", *(f"psnr {name}" for name in names),
              *(f"ssim {name}" for name in names)]]
    for number, k in enumerate(found.pairs.of("test")):
        lines.append([str(found.pairs.participant[k]),
                      *(f"{found.rows[name].psnr[number]:.3f}" for name in names),
                      *(f"{found.rows[name].ssim[number]:.4f}" for name in names)])
    return lines


def complete_page(found: Found, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    kept, target, source = record["kept"], record["to"], record["from"]
    told = [(f"{found.rows[name].scores['psnr'].value:.1f} dB", f"PSNR, {name}", "")
            for name in (kept, "polynomial and mean map", "polynomial", "mean map")]
    rows = [[name, *map(str, row.scores.values())] for name, row in found.rows.items()]
    visits = record["visits"]
    words = (f"Mean over {visits['test']} visits tested [95 % interval over families and people], "
             f"at voxels that are brain in both scans. {visits['train']} visits taught, "
             f"{visits['val']} chose epoch and network: kept is the {kept}.")
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


def _slices(found: Found, record: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"source": record["from"], "true": record["to"],
             "polynomial": "synthetic: polynomial", record["kept"]: f"synthetic: {record['kept']}"}
    plot, axes = plt.subplots(2, 2, figsize=(4.6, 5.4), layout="constrained")
    for axis, (name, title) in zip(axes.flat, names.items(), strict=True):
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
        "source's intensity with the target's mean map, corrected by three convolutions of 16 "
        "channels, with and without the predicted latents as 8 more channels; AdamW on crops, the "
        "best epoch on val. Compared are "
        f"{', '.join(GUESSES)}. Families shared a part; people tested taught nothing. PSNR has a "
        "peak of 1, SSIM (Wang et al. 2004) windows of 7 voxels. " + bootstrap())


# ---- apply ---------------------------------------------------------------------------------------

def applied_page(made: Sequence[Completed], record: dict[str, Any], figures: Figures) -> str:
    """What was made, and what it is not."""
    target, source = record["to"], record["from"]
    parts = [tiles([(str(len(made)), f"synthetic {target}", "")]),
             section("Look out", paragraph(
                 f"These images are synthetic: a network made them from {source}. They were not "
                 "acquired, and show no finding that the source does not show. Their names have "
                 "desc-synthetic, their headers and sidecars say so, too. predictions.csv lists "
                 "them."))]
    if made:
        parts.append(section("Slices", grid([figures.show("slices", _pairs(made, record), (
            f"The middle slice of {source} as it was acquired, above, and of {target} as it was "
            f"made, below: the first {min(SHOWN, len(made))} scans."))])))
    return page(f"Synthetic {target} from {source}", str(record["model"]), [*parts,
                                                                            how_done(record)])


def _pairs(made: Sequence[Completed], record: dict[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number = min(SHOWN, len(made))
    plot, axes = plt.subplots(2, number, squeeze=False, figsize=(1.6 * number + 0.4, 4.2),
                              layout="constrained")
    for column, each in zip(axes.T, made, strict=False):
        for axis, image, title in zip(column, each.slices, (
                record["from"], f"synthetic {record['to']}"), strict=True):
            _slice(axis, image, title)
    return plot


def applied_methods(record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    return (f"Synthetic {record['to']} images were made from {record['from']} by {record['model']} "
            f"(neurojepa {record['version']}). They were used as "
            "[say what for]; no finding was read from them.")

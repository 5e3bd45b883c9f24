"""Quality figures: against what was put in, and worse with every kind of damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.qc import FIGURES, describe, flags, outliers, quality, rejection
from data_prep.qc.judge import DEFAULT, load_rules
from data_prep.volumes.reading.volume import Volume
from neurojepa.errors import ConfigError

MM = 2.0
SIGNAL = {"T1w": (150, 420, 650, 800), "T2w": (900, 500, 320, 500), "FLAIR": (100, 520, 420, 500)}
# fluid, grey, white, scalp


def regions() -> dict[str, np.ndarray]:
    """A head of ellipsoids with a folded cortex, ventricles, a dark skull, and a face."""
    shape = (96, 120, 104)
    x, y, z = (np.arange(n) * MM - n * MM / 2 for n in shape)
    x, y, z = np.meshgrid(x, y + 4, z - 14, indexing="ij")

    def radius(a: float, b: float, c: float) -> np.ndarray:
        return np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)

    ball = radius(64, 82, 66)
    folds = 0.035 * (np.sin(x / 6) + np.sin(y / 7) + np.sin(z / 6))
    brain = (ball < 1) & ((z > -26) | (y < 40))
    head = radius(78, 96, 80) < 1
    nose = (np.abs(x) < 26) & (y > 20) & (y < 96) & (z > -80) & (z < -32)
    return {"brain": brain, "white": brain & (ball + folds < 0.80),
            "fluid": brain & ((radius(14, 30, 12) < 1) | (ball > 0.975)),
            "scalp": (head & (radius(74, 92, 76) >= 1)) | (nose & ~brain)}


def head(modality: str = "T1w", noise: float = 12.0, bias: float = 0.0, motion: float = 0.0
         ) -> tuple[Volume, np.ndarray]:
    """The head with Rayleigh air, a bias field of so much range, and shifted k-space lines."""
    parts, random = regions(), np.random.default_rng(1)
    fluid, grey, white, scalp = SIGNAL[modality]
    signal = np.zeros(parts["brain"].shape)
    signal[parts["scalp"]] = scalp
    signal[parts["brain"]] = grey
    signal[parts["white"]] = white
    signal[parts["fluid"]] = fluid
    ramp = np.linspace(-0.5, 0.5, signal.shape[1])[None, :, None]
    signal *= np.exp(bias * ramp)
    if motion:  # mm of movement along y at random lines: blur and ghosts
        frequency = np.fft.fftfreq(signal.shape[1])
        moved = motion / MM * random.standard_normal(signal.shape[1])
        lines = np.fft.fft(signal, axis=1) * np.exp(-2j * np.pi * frequency * moved)[None, :, None]
        signal = np.fft.ifft(lines, axis=1)
    real, imaginary = (random.normal(0, noise, signal.shape) for _ in range(2))
    data = np.abs(signal + real + 1j * imaginary)
    affine = np.diag([MM, MM, MM, 1.0])
    return Volume("head", data.astype(np.float32), affine), parts["brain"]


def figure(name: str, **damage: float) -> float:
    value = quality(*head(**damage))[name]  # type: ignore[arg-type]
    assert isinstance(value, float), name
    return value


@pytest.fixture(scope="module")
def series() -> dict[str, list[dict]]:
    """Figures of one head under growing damage of one kind."""
    levels = {"noise": (6, 12, 30, 60, 90), "motion": (0, 1, 2, 4), "bias": (0, 0.4, 0.8, 1.2)}
    return {kind: [quality(*head(**{kind: level})) for level in steps]
            for kind, steps in levels.items()}


WORSE = [("noise", "qc_snr", -1), ("noise", "qc_snr_tissue", -1), ("noise", "qc_cnr", -1),
         ("noise", "qc_cjv", 1), ("noise", "qc_efc", 1), ("noise", "qc_fber", -1),
         ("noise", "qc_air_level", 1), ("noise", "qc_fwhm_mm", -1),
         ("motion", "qc_efc", 1), ("motion", "qc_fber", -1), ("motion", "qc_ghost", 1),
         ("motion", "qc_cjv", 1), ("motion", "qc_snr", -1),
         ("bias", "qc_inhomogeneity", 1), ("bias", "qc_cjv", 1)]


@pytest.mark.parametrize(("kind", "name", "sign"), WORSE)
def test_figures_worsen_with_damage(series, kind: str, name: str, sign: int) -> None:
    values = np.array([row[name] for row in series[kind]], float)
    assert (np.diff(values) * sign > 0).all(), values


def test_figures_are_what_was_put_in() -> None:
    volume, brain = head(noise=12.0)
    found = quality(volume, brain)
    assert found["qc_mask_ml"] == pytest.approx(brain.sum() * 8 / 1000)
    assert found["qc_snr"] == pytest.approx(np.median(volume.data[brain]) / 12, rel=0.05)
    # folds of the cortex count as noise where a voxel is as wide as they are
    assert found["qc_snr_tissue"] == pytest.approx(650 / 12, rel=0.2)
    assert found["qc_cnr"] == pytest.approx((650 - 420) / 12, rel=0.2)
    assert found["qc_cjv"] == pytest.approx((12 + 12) / (650 - 420), rel=0.25)
    assert found["qc_inhomogeneity"] < 0.03 and found["qc_cut_cm2"] == 0
    # exp of -0.4 .. 0.4 along the head, most of it inside the brain's ellipsoid
    assert figure("qc_inhomogeneity", bias=1.0) == pytest.approx(0.5, abs=0.15)
    assert all(found[f"{name}_reason"] is None for name in FIGURES)


@pytest.mark.parametrize("modality", ["T2w", "FLAIR"])
def test_the_classes_follow_the_contrast(modality: str) -> None:
    _, grey, white, _ = SIGNAL[modality]
    found = quality(*head(modality), modality=modality)
    assert found["qc_snr_tissue"] == pytest.approx(white / 12, rel=0.2)
    assert found["qc_cnr"] == pytest.approx(abs(white - grey) / 12, rel=0.25)


def test_a_label_map_decides_the_classes() -> None:
    volume, brain = head()
    parts = regions()
    codes = np.where(parts["white"], 2, np.where(brain, 3, 0)) * ~parts["fluid"]
    found = quality(volume, brain, tissue=codes)
    assert found["qc_cjv"] == pytest.approx((12 + 12) / (650 - 420), rel=0.05)
    nothing = quality(volume, brain, tissue=np.zeros_like(codes))
    assert nothing["qc_cjv"] is None
    assert nothing["qc_cjv_reason"] == "grey or white matter is missing"


def test_what_cannot_be_measured_is_null_with_a_reason() -> None:
    volume, brain = head()
    air = ("qc_snr", "qc_efc", "qc_fber", "qc_ghost", "qc_air_level")

    def reasons(data: np.ndarray, mask: np.ndarray, modality: str = "T1w") -> set:
        found = quality(Volume("x", data, volume.affine), mask, modality=modality)
        assert all(found[name] is None for name in air)
        return {found[f"{name}_reason"] for name in air}

    whole = regions()["scalp"] | brain
    assert reasons(np.where(brain, volume.data, 0), brain) == {"the image is a stripped brain"}
    near = np.pad(whole, 4)[4:-4, 4:-4, 4:-4]
    assert reasons(np.where(near, volume.data, 0), brain) == {"air was set to a constant"}
    box = tuple(slice(low, high + 1) for low, high in
                zip(np.argwhere(brain).min(0), np.argwhere(brain).max(0), strict=True))
    assert reasons(volume.data[box], brain[box]) == {"no air in the field of view"}
    assert reasons(volume.data, brain, "PET") == {"not defined for PET"}


def test_an_intercept_below_zero_changes_nothing() -> None:
    volume, brain = head()
    shifted = Volume("shifted", volume.data - volume.data.min() - 50, volume.affine)
    plain, moved = quality(volume, brain), quality(shifted, brain)
    for name in ("qc_snr", "qc_cjv", "qc_fwhm_mm"):
        assert moved[name] == pytest.approx(plain[name], rel=0.03)


@pytest.mark.parametrize(("share", "told"), [(0.015, False), (0.1, True)])
def test_a_ghost_is_told_by_what_it_does_to_the_brain(share: float, told: bool) -> None:
    """In air that is almost empty, as 8-bit storage leaves it, all is far above the noise."""
    volume, brain = head(noise=1.0)
    ghost = share * np.roll(volume.data, volume.data.shape[1] // 2, axis=1)
    found = quality(Volume("ghost", volume.data + ghost, volume.affine), brain)
    assert ("high_ghost" in flags(found, "T1w")) is told


def test_a_brain_on_the_edge_is_a_cut() -> None:
    volume, brain = head()
    top = int(np.argwhere(brain)[:, 2].max()) - 5
    found = quality(Volume("cut", volume.data[..., :top], volume.affine), brain[..., :top])
    assert found["qc_cut_cm2"] == pytest.approx(brain[..., top - 1].sum() * 0.04)
    assert "high_cut_cm2" in flags(found, "T1w")


# ---- description ---------------------------------------------------------------------------------

def test_the_header_wins_over_the_spacing_and_unknown_is_null() -> None:
    volume, _ = head()
    thick = Volume("thick", volume.data, np.diag([1.0, 1.0, 5.0, 1.0]))
    said = describe(thick, {"MRAcquisitionType": "3D", "SliceThickness": "5.5", "Defaced": True,
                            "ContrastBolusIngredient": "Gadolinium"})
    assert (said["acquisition"], said["acquisition_source"]) == ("3D", "header")
    assert said["slice_thickness_mm"] == 5.5 and said["voxel_z_mm"] == 5
    assert said["contrast_agent"] == "gadolinium"
    assert (said["defaced"], said["defaced_source"]) == ("yes", "header")
    bare = describe(thick, None)
    assert (bare["acquisition"], bare["slice_thickness_mm"]) == ("2D", 5)
    assert bare["contrast_agent"] is None and bare["defaced"] is None


def test_free_text_of_a_header_is_not_passed_on() -> None:
    volume, _ = head()
    facts = {"ContrastBolusIngredient": "10 ml, Mrs Miller 3.4.1950", "SliceThickness": "n/a"}
    said = describe(volume, facts)
    assert said["contrast_agent"] == "other" and said["slice_thickness_mm"] is None


def test_a_face_set_to_zero_is_seen() -> None:
    volume, brain = head()
    assert describe(volume, {}, brain)["defaced"] == "no"
    data = volume.data.copy()
    data[:, 70:, :52][~brain[:, 70:, :52]] = 0
    assert describe(Volume("defaced", data, volume.affine), {}, brain)["defaced"] == "yes"
    stripped = Volume("stripped", np.where(brain, volume.data, 0), volume.affine)
    assert describe(stripped, {}, brain)["defaced"] is None


# ---- thresholds ----------------------------------------------------------------------------------

def test_thresholds_flag_and_reject_by_modality() -> None:
    assert flags({"qc_snr": 5.0, "qc_cjv": 3.0}, "T1w") == ["low_snr", "high_cjv"]
    assert flags({"qc_snr": None}, "T1w") == [] and flags({"qc_snr": 1.0}, "PET") == []
    code, message = rejection({"qc_snr": 1.0}, "T1w") or ("", "")
    assert code == "low_snr" and "qc_snr is 1, the limit 2" in message
    assert rejection({"qc_snr": 5.0}, "T1w") is None


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.update(extra=1), "extra: unknown"),
    (lambda t: t["thresholds"].update(T3w={}), "thresholds.T3w: unknown"),
    (lambda t: t["thresholds"]["T1w"].update(qc_snrr={}), "thresholds.T1w.qc_snrr: unknown"),
    (lambda t: t["thresholds"]["T1w"]["qc_snr"].update(flag_under=1), "flag_under: unknown"),
    (lambda t: t["thresholds"]["T1w"]["qc_snr"].update(flag_below="8"), "'8' is not a number"),
    (lambda t: t["figures"]["qc_snr"].update(worse="left"), "figures.qc_snr.worse: left"),
    (lambda t: t["outliers"].update(robust_z=0), "outliers.robust_z: 0"),
    (lambda t: t.pop("outliers"), "outliers is missing"),
])
def test_a_wrong_key_or_value_is_named(tmp_path: Path, change, words: str) -> None:
    tree = yaml.safe_load(DEFAULT.read_text())
    change(tree)
    path = tmp_path / "qc.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=words):
        load_rules(path)


def test_a_harmless_value_is_no_outlier_however_alike_the_others_are() -> None:
    values = np.array([1e-5 * n for n in range(30)] + [0.01, 0.05])
    assert np.flatnonzero(outliers(values, "qc_ghost")).tolist() == [31]

"""Pooling: hand-worked fits, what may teach them, and that head size does not move an embedding."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurojepa.downstream import embed as embedding
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.stats import participation_ratio
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, open_feed
from neurojepa.objective.views import make_views, patch_numbers
from neurojepa.weights import untrained
from tests.helpers.batches import GRID, make_config
from tests.helpers.feeds import tiny_config, write_feed

T1W, T2W = MODALITIES.index("T1w"), MODALITIES.index("T2w")


def tokens(values: list[list[float]], shares: list[list[float]], modality: int = T1W) -> Tokens:
    """Scans of tokens of one number at patches 0, 1, ..."""
    z_BND = torch.tensor(values)[..., None]
    B, N = z_BND.shape[:2]
    return Tokens(z_BND, torch.arange(N).expand(B, N), torch.tensor(shares),
                  torch.full((B,), modality))


def fitted(batches: list[Tokens], num_patches: int) -> Places:
    return Places.fit(lambda: batches, num_patches)


def test_a_scan_is_the_mean_of_what_its_tokens_differ_by() -> None:
    taught = tokens([[1.0, 10.0], [3.0, 30.0]], [[1.0, 0.9], [1.0, 0.9]])  # means 2 and 20
    pooled = fitted([taught], 2).pool(tokens([[5.0, 14.0], [2.0, 23.0]], [[1.0, 0.9], [1.0, 0.9]]))
    assert pooled.flatten().tolist() == pytest.approx([(3 - 6) / 2, (0 + 3) / 2])


def test_edges_air_and_places_that_were_seen_once_are_left_out() -> None:
    places = fitted([tokens([[1.0, 5.0, 9.0, 9.0], [3.0, 5.0, 9.0, 0.0]],
                            [[1.0, 1.0, 0.0, 0.8], [1.0, 0.0, 1.0, 0.8]])], 4)
    scan, moved = ([[4.0, value, value, value]] for value in (0.0, 100.0))
    pooled = [places.pool(tokens(each, [[1.0, 1.0, 0.0, 0.8]])) for each in (scan, moved)]
    assert pooled[0].item() == pooled[1].item() == pytest.approx(2.0)
    assert places.pool(tokens(scan, [[0.0, 1.0, 1.0, 0.8]])).item() == 0.0  # nothing to compare


def test_what_follows_head_size_is_taken_and_the_rest_stays() -> None:
    """One place is all brain in every head, another fills up as heads grow."""
    rng = np.random.default_rng(0)
    shares = torch.tensor(np.stack([np.ones(200), rng.uniform(0.1, 0.8, 200)], 1)).float()
    rest = torch.tensor(rng.normal(0, 1, 200)).float()
    log_size = shares.sum(1).log()
    heads = Tokens((20 * log_size + rest)[:, None, None].expand(200, 2, 1),
                   torch.arange(2).expand(200, 2), shares, torch.full((200,), T1W))
    pooled = fitted([heads], 2).pool(heads)[:, 0]
    before, after = (np.corrcoef(heads.z_BND[:, 0, 0], log_size)[0, 1],
                     np.corrcoef(pooled, log_size)[0, 1])
    assert before > 0.9 and abs(after) < 0.1
    assert np.corrcoef(pooled, rest)[0, 1] > 0.9


def test_batches_add_up_and_modalities_stay_apart() -> None:
    one, two = (tokens([[float(v), 2.0 * v] for v in values], [[1.0, 0.95]] * 2)
                for values in ((1, 4), (2, 7)))
    both = Tokens(*(torch.cat([getattr(each, name) for each in (one, two)])
                    for name in vars(one)))
    other = tokens([[90.0, 80.0], [70.0, 60.0]], [[1.0, 0.95]] * 2, T2W)
    together, apart = fitted([both], 2), fitted([one, other, two], 2)
    assert torch.equal(together.pool(both), apart.pool(both))
    assert not torch.equal(apart.pool(both), apart.pool(Tokens(
        both.z_BND, both.patch_BN, both.share_BN, torch.full((4,), T2W))))
    with pytest.raises(DataError, match=r"no T2w scan to compare with.*T1w"):
        together.pool(other)


def test_a_region_is_the_mean_over_its_part_of_each_patch_less_a_line_at_each() -> None:
    rng = np.random.default_rng(1)
    size = rng.uniform(0.5, 0.85, 300)  # a third patch, of the edge, alone tells the size
    shares = torch.tensor(np.stack([np.ones(300), np.ones(300), size], 1)).float()
    log_size, rest = shares.sum(1).log(), torch.tensor(rng.normal(0, 1, (300, 2))).float()
    z_BN = torch.stack([10 * log_size + rest[:, 0], -4 * log_size + rest[:, 1], log_size], 1)
    heads = Tokens(z_BN[..., None], torch.arange(3).expand(300, 3), shares,
                   torch.full((300,), T1W))
    places = fitted([heads], 3)
    share_nR = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    rows, seen = places.pool_regions(heads, share_nR)
    assert torch.allclose(seen[0], torch.tensor([1.0, 1.0, 0.0])) and not rows[:, 2].any()
    for region, wanted in ((0, rest[:, 0]), (1, rest.mean(1))):
        assert abs(np.corrcoef(rows[:, region, 0], log_size)[0, 1]) < 0.1
        assert np.corrcoef(rows[:, region, 0], wanted)[0, 1] > 0.99


def test_places_are_the_same_after_storing() -> None:
    one, two = tokens([[1.0, 4.0], [3.0, 5.0]], [[1.0, 0.95], [1.0, 1.0]]), tokens(
        [[9.0, 8.0], [7.0, 6.0]], [[1.0, 1.0], [1.0, 0.9]], T2W)
    places = fitted([one, two], 5)  # three patches were not seen
    tensors = places.tensors()
    assert tensors["T1w.token_nD"].shape == (2, 1) and len(tensors["T1w.scans_n"]) == 5
    once = tensors | {f"{name}.{field}": getattr(places.sums[modality], field) for name, modality
                      in (("T1w", T1W), ("T2w", T2W)) for field in ("token_nD", "sized_nD")}
    share_nR = torch.ones(5, 1)
    for again in map(Places.from_tensors, (tensors, once)):  # with all patches, as it once was
        for each in (one, two):
            assert torch.equal(again.pool(each), places.pool(each))
            assert torch.equal(again.pool_regions(each, share_nR)[0],
                               places.pool_regions(each, share_nR)[0])
        assert again.variance() == places.variance()
        assert again.num_patches == 5


def test_variance_by_place_and_modality_by_hand() -> None:
    places = fitted([tokens([[1.0, 3.0]], [[1.0, 1.0]]),
                     tokens([[1.0, 7.0]], [[1.0, 1.0]], T2W)], 2)
    # tokens 1, 3, 1, 7 around 3; places 1 and 5
    assert places.variance() == pytest.approx((24.0, 16.0, 24.0))


def test_only_train_teaches(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = open_feed(write_feed(str(tmp_path / "feed")))
    split = np.where(np.arange(24) % 3 == 2, "test", "train")
    feed = SimpleNamespace(**{**vars(feed), "index": feed.index.set_column(
        feed.index.schema.get_field_index("split"), "split", [split.tolist()])})
    config = tiny_config(str(tmp_path / "feed"), tmp_path / "run")
    model = untrained(config, feed.grid).model
    read, tokens_of = [], embedding.tokens_of

    def noted(*arguments, **how):
        read.append(arguments[3])
        return tokens_of(*arguments, **how)

    monkeypatch.setattr(embedding, "tokens_of", noted)
    rows = np.arange(24)
    everyone = embedding.embed(model, config, feed, rows)
    assert (split[read[0]] == "train").all() and len(read[0]) == 16
    tested = embedding.embed(model, config, feed, rows[split == "test"])
    assert np.allclose(everyone.values[split == "test"], tested.values, atol=1e-6)


def test_a_modality_without_train_scans_is_compared_with_its_own(
        tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    feed = open_feed(write_feed(str(tmp_path / "feed")))
    modality = np.array(feed.index["modality"].to_pylist())
    split = np.where(modality == "T2w", "test", "train")
    feed = SimpleNamespace(**{**vars(feed), "index": feed.index.set_column(
        feed.index.schema.get_field_index("split"), "split", [split.tolist()])})
    rows = np.flatnonzero(np.arange(24) > 5)
    assert set(embedding.reference_rows(feed, rows)) == set(range(24))
    assert "no T2w scan in split train" in capsys.readouterr().out
    assert set(embedding.reference_rows(feed, rows[modality[rows] == "T1w"])) == set(
        np.flatnonzero(modality == "T1w"))
    assert not capsys.readouterr().out
    lonely = feed.index.set_column(feed.index.schema.get_field_index("modality"), "modality",
                                   [["PET", *["T1w"] * 23]])
    with pytest.raises(DataError, match=r"1 PET scan to compare with.*--modality"):
        embedding.reference_rows(SimpleNamespace(**{**vars(feed), "index": lonely}), np.arange(24))


def first_component(values: np.ndarray) -> np.ndarray:
    """What the first principal component is of each row."""
    people, spectrum, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    return people[:, 0] * spectrum[0]


def test_head_size_does_not_move_an_embedding() -> None:
    """Balls of one texture in two sizes of head; a person's brightness is what is to be seen."""
    num, config = 40, make_config(budget=None)
    model = untrained(config, GRID).model
    rng = np.random.default_rng(0)
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape), indexing="ij"), -1)
    size = rng.uniform(0.7, 0.95, num)
    bright = rng.normal(0, 8, num)
    texture = 128 + 40 * np.sin(axes @ [5.0, 3.0, 0.0]) + 40 * np.cos(4 * axes[..., 2])
    radius = np.linalg.norm(axes, axis=-1)
    voxels = np.where(radius < size[:, None, None, None],
                      (texture + bright[:, None, None, None]).clip(1, 254), 0).astype(np.uint8)
    views = make_views(SimpleNamespace(
        voxels=torch.from_numpy(voxels), modality=torch.zeros(num, dtype=torch.int64),
        position=torch.zeros(num, dtype=torch.int64), weight=torch.ones(num),
        target_voxels=None, target_modality=None, all_scanned=False),
        embedding.without_augmentation(config), GRID, 0)
    found = Tokens(model.latents(views), patch_numbers(views.coords_BN3, GRID, 3),
                   views.foreground_BN, views.modality_B)
    plain = first_component(model.embed(views).numpy())
    pooled = first_component(fitted([found], 8 * 10 * 8).pool(found).numpy())
    assert abs(np.corrcoef(plain, size)[0, 1]) > 0.8
    assert abs(np.corrcoef(pooled, size)[0, 1]) < 0.3
    assert abs(np.corrcoef(pooled, bright)[0, 1]) > 0.9


def test_participation_ratio_by_hand() -> None:
    square = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert participation_ratio(square) == pytest.approx(2)
    assert participation_ratio(square * [1, 0]) == pytest.approx(1)


def test_atoms_are_pooled_by_the_same_rule_and_only_where_one_code_reads_all_tokens(
        tmp_path: Path) -> None:
    feed = open_feed(write_feed(str(tmp_path / "feed"), 8))
    config = tiny_config(feed.uri, tmp_path / "run")
    rows = np.arange(8)
    with pytest.raises(ConfigError, match=r"objective\.sparse\.visible = 0"):
        embedding.embed(untrained(config, feed.grid).model, config, feed, rows, atoms=True)
    sparse = config.objective.sparse.model_copy(update={"visible": 1.0})
    config = config.model_copy(update={
        "objective": config.objective.model_copy(update={"sparse": sparse})})
    model = untrained(config, feed.grid).model
    found = embedding.embed(model, config, feed, rows, atoms=True)
    assert found.values.shape == (8, 4 * 96) and np.isfinite(found.values).all()
    assert embedding.embed(model, config, feed, rows).values.shape == (8, 96)
    h_BNA = next(embedding.tokens_of(model, config, feed, rows, atoms=True)).z_BND
    assert h_BNA.min() >= 0 and h_BNA.max() > 0
    of_latents = embedding.fit_places(model, config, feed, rows)
    with pytest.raises(DataError, match="places tell of 96 features and tokens have 384"):
        embedding.embed(model, config, feed, rows, of_latents, atoms=True)

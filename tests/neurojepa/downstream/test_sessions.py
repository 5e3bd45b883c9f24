"""What teaches a session code, and the command ``code``: weights whose embeddings are h."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import neurojepa
from neurojepa.downstream import atoms, sessions
from neurojepa.downstream.__main__ import main
from neurojepa.downstream.atoms import observe
from neurojepa.downstream.code_command import add_code
from neurojepa.downstream.depart import region_means
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.pooling import Tokens
from neurojepa.downstream.regions import load_regions
from neurojepa.downstream.sessions import (
    drop_rare,
    learn,
    means_of_sessions,
    rows_of_sessions,
    session_tokens,
)
from neurojepa.errors import NeurojepaError
from neurojepa.feed.format import INDEX_SCHEMA, LABELS_SCHEMA, Feed, commit_feed, open_feed
from neurojepa.model.build import build_model
from neurojepa.model.session_code import SessionCode
from neurojepa.weights import hashed, load
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tests.helpers.tuning import write_weights


def tokens(num_scans: int = 4, num_tokens: int = 6) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    patch_BN = torch.stack([torch.randperm(8, generator=generator)[:num_tokens]
                            for _ in range(num_scans)])
    return Tokens(torch.randn(num_scans, num_tokens, 5, generator=generator), patch_BN,
                  torch.rand(num_scans, num_tokens, generator=generator),
                  torch.zeros(num_scans, dtype=torch.int64))


@pytest.mark.parametrize("session_B", [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]])
def test_a_token_is_paired_with_the_mean_at_its_patch_in_its_session(session_B: list[int]) -> None:
    given = tokens()
    given.share_BN[::2, ::2] = 0  # not scanned
    found = list(zip(*means_of_sessions(given, np.array(session_B)), strict=True))
    expected = []
    for b in range(4):
        for n in range(6):
            patch = given.patch_BN[b, n]
            there = [given.z_BND[c, m] for c in range(4) for m in range(6)
                     if session_B[c] == session_B[b] and given.patch_BN[c, m] == patch
                     and given.share_BN[c, m] > 0]
            if len(there) > 1 and given.share_BN[b, n] >= sessions.LEAST_SHARE:
                expected.append((given.z_BND[b, n], torch.stack(there).mean(0),
                                 given.share_BN[b, n]))
    assert 0 < len(found) == len(expected)
    for (z, mean, share), (z_expected, mean_expected, share_expected) in zip(
            found, expected, strict=True):
        assert torch.equal(z, z_expected) and share == share_expected
        torch.testing.assert_close(mean, mean_expected)


@pytest.mark.parametrize(("people", "expected"), [(1, [0, 2, 3]), (2, [0, 2, 3, 5, 6]), (9, [
    0, 2, 3, 5, 6])])
def test_scans_that_share_a_session_with_another_teach(people: int, expected: list[int]) -> None:
    class Index:
        index = pa.table({"participant": list("bbbbaccd"), "session": list("11112112")})

    rows = np.array([0, 2, 3, 4, 5, 6, 7])  # of b three, of a and d one, of c two
    found = rows_of_sessions(Index(), rows, people)  # type: ignore[arg-type]
    assert found.tolist() == expected


def two_contrasts(num: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one of two contrasts, and the mean that both have."""
    generator = torch.Generator().manual_seed(1)
    common_QD = torch.randn(num, 4, generator=generator)
    contrast_Q1 = torch.randint(2, (num, 1), generator=generator)
    z_QD = torch.cat([common_QD * (2 * contrast_Q1 - 1), contrast_Q1.float()], 1)
    return z_QD, torch.cat([common_QD, torch.full((num, 1), 0.5)], 1)


def learnt(z_QD: torch.Tensor, mean_QD: torch.Tensor, l1: float = 2e-3, seed: int = 0
           ) -> SessionCode:
    return learn(lambda: SessionCode.sized(5, 64, 96), z_QD, mean_QD, l1=l1, seed=seed)


def test_a_code_tells_sparsely_what_contrasts_have_in_common(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "STEPS", 300)
    monkeypatch.setattr(sessions, "BATCH", 256)
    z_QD, mean_QD = two_contrasts()
    code, more = learnt(z_QD, mean_QD), learnt(z_QD, mean_QD, l1=2e-2)
    assert (code.told(code(z_QD)) - mean_QD).square().mean() < 0.15  # of 0.8
    active, fewer = ((each(z_QD) > 0).float().mean() for each in (code, more))
    assert fewer < 0.7 * active < 0.35
    assert not any(parameter.requires_grad for parameter in code.parameters())


def test_a_seed_makes_a_code_and_other_draws_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "STEPS", 3)
    z_QD, mean_QD = two_contrasts(50)
    state, shown = torch.get_rng_state(), []
    codes = [learnt(z_QD, mean_QD, seed=seed)(z_QD) for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    learn(lambda: SessionCode.sized(5, 6, 7), z_QD, mean_QD, l1=0.1, seed=0,
          progress=lambda done, of: shown.append((done, of)))
    assert torch.equal(torch.get_rng_state(), state) and shown == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("least", [0.2, 0.45])
def test_atoms_that_few_tokens_use_are_dropped(monkeypatch: pytest.MonkeyPatch,
                                               least: float) -> None:
    monkeypatch.setattr(sessions, "LEAST_USE", least)
    z_QD, _ = two_contrasts(500)
    code = SessionCode.sized(5, 16, 40).requires_grad_(False)
    h = code(z_QD)
    kept = (h > 0).float().mean(0) >= least
    active = drop_rare(code, z_QD)
    assert 0 < kept.sum() < 40
    torch.testing.assert_close(code(z_QD), h[:, kept])
    assert active == pytest.approx(float((h[:, kept] > 0).float().mean()), abs=1e-5)


def test_a_penalty_that_leaves_no_atom_is_too_high() -> None:
    code = SessionCode.sized(5, 16, 40).requires_grad_(False)
    code.encode[2].bias -= 100
    with pytest.raises(NeurojepaError, match=r"no atom of the code is active .*lower .*--l1"):
        drop_rare(code, two_contrasts(50)[0])


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feed of eight people with two scans each, six of them in split train, and weights, which
    have seen someone called early."""
    root = tmp_path_factory.mktemp("code")
    write_feed(str(root / "feed"), 16, per_session=2)
    change_rows(root / "feed", lambda number, row: {
        **row, "split": "train" if number < 12 else "test"})
    write_weights(root / "weights", str(root / "feed"), seen=("early",))
    return root


def change_rows(feed: Path, changed: Callable[[int, dict[str, object]], dict[str, object]]) -> None:
    rows = [changed(*each) for each in enumerate(open_feed(str(feed)).index.to_pylist())]
    commit_feed(str(feed), GRID, rows=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
                labels=LABELS_SCHEMA.empty_table())


def run(folder: Path, out: Path, *more: str) -> None:
    main(["code", "--weights", str(folder / "weights"), "--feed", str(folder / "feed"),
          "--out", str(out), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def coded(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sessions, "STEPS", 20)
        run(folder, folder / "coded", "--people", "4", "--seed", "1")
    return folder / "coded"


def test_defaults_are_those_that_were_measured() -> None:
    parser = argparse.ArgumentParser()
    add_code(parser.add_subparsers())
    given = parser.parse_args(["code", "--weights", "w", "--feed", "f", "--out", "o"])
    assert (given.people, given.l1) == (sessions.PEOPLE, sessions.L1)


@pytest.fixture
def feed(folder: Path) -> Feed:
    return open_feed(str(folder / "feed"))


def test_embeddings_of_weights_with_a_code_are_h_less_what_is_usual(folder: Path, coded: Path,
                                                                    feed: Feed) -> None:
    found, before = load(str(coded)), load(str(folder / "weights"))
    code, places = found.model.session_code, found.places
    assert code is not None and places is not None and places.width == code.atoms
    e = neurojepa.load(str(coded), "cpu").embed(str(folder / "feed"))
    assert e.values.shape == (16, code.atoms)
    latents = tokens_of(before.model, before.config, feed, np.arange(16))
    for row, of_scan in zip(e.values, latents, strict=True):
        h_ND, modality = code(of_scan.z_BND[0]), int(of_scan.modality_B[0])
        sums = places.sums[modality]
        used = (of_scan.share_BN[0] >= 0.9) & (sums.scans_n[of_scan.patch_BN[0]] >= 2)
        usual = sums.token_nD[of_scan.patch_BN[0, used]] / sums.scans_n[
            of_scan.patch_BN[0, used], None]
        line = places.lines[modality](of_scan.log_size_B()[0])
        expected = (h_ND[used] - usual).mean(0) - line
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    seen = dict(zip(e.table["participant"].to_pylist(), e.table["seen"].to_pylist(), strict=True))
    assert seen == {f"p{number}": number < 6 for number in range(8)}


def test_the_folder_says_what_it_is(folder: Path, coded: Path, feed: Feed) -> None:
    record = json.loads((coded / "config.json").read_text())
    code = record["code"]
    assert {name: code[name] for name in ("people", "scans", "l1", "seed", "steps", "feed")} == {
        "people": 4, "scans": {"T1w": 4, "T2w": 4}, "l1": sessions.L1, "seed": 1, "steps": 20,
        "feed": feed.fingerprint}
    assert record["pooling"]["scans"] == {"T1w": 6, "T2w": 6}
    text = (coded / "README.md").read_text()
    assert f"a session code of {code['atoms']} atoms" in text and "the atoms of tokens" in text
    assert "not for what one contrast alone shows" in text
    before, after = load(str(folder / "weights")), load(str(coded))
    assert all(torch.equal(tensor, after.model.state_dict()[name])
               for name, tensor in before.model.state_dict().items())
    assert after.seen == {hashed("early"), *(
        hashed(name) for column in ("participant", "scan_id")
        for name in feed.index[column].to_pylist()[:12])}


def test_a_seed_gives_the_same_files(folder: Path, coded: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "STEPS", 20)
    run(folder, tmp_path / "again", "--people", "4", "--seed", "1")
    for path in coded.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_damaged_code_is_not_read(coded: Path, tmp_path: Path) -> None:
    for path in coded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (coded / "code.safetensors").read_bytes()
    (tmp_path / "code.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(NeurojepaError, match=r"code.safetensors: does not match the sha256"):
        load(str(tmp_path))


def test_atoms_of_the_code_are_shown_where_there_is_brain(coded: Path, feed: Feed) -> None:
    weights = load(str(coded))
    seen = observe(weights.model, weights.config, feed, np.array([0, 13]), batch_size=1)
    assert seen.atoms is not None and weights.model.session_code is not None
    assert seen.atoms.active_F.shape == (weights.model.session_code.atoms,)
    total = torch.zeros_like(seen.atoms.total_nF)
    for of_scan in tokens_of(weights.model, weights.config, feed, np.array([0, 13]), batch_size=1):
        brain = of_scan.share_BN[0] >= sessions.LEAST_SHARE
        total.index_add_(0, of_scan.patch_BN[0, brain], of_scan.z_BND[0, brain])
    torch.testing.assert_close(seen.atoms.total_nF, total)
    regions = load_regions(feed.grid, weights.config.model.patch_voxels)
    (means_RA,) = region_means(weights, feed, np.array([13]), regions)
    assert means_RA.shape == (len(regions.names), weights.model.session_code.atoms)
    assert np.isfinite(means_RA).all(1).any() and np.nanmax(means_RA) > 0
    with pytest.raises(NeurojepaError, match="its atoms already; leave --atoms out"):
        neurojepa.load(str(coded), "cpu").embed(feed.uri, atoms=True)


def test_a_scan_without_a_patch_of_brain_shows_no_atoms(
        coded: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atoms, "LEAST_SHARE", 1.1)
    weights = load(str(coded))
    seen = observe(weights.model, weights.config, feed, np.array([0]))
    assert seen.atoms is not None and not seen.atoms.tokens_n.any()
    regions = load_regions(feed.grid, weights.config.model.patch_voxels)
    assert np.isnan(region_means(weights, feed, np.array([0]), regions)).all()


@pytest.mark.parametrize(("more", "words"), [
    (("--people", "0"), "--people 0, --l1 0.002: both have to be above 0"),
    (("--l1", "nan"), "--l1 nan: both"),
    (("--weights", "coded"), "coded: has a session code already"),
    (("--weights", "nowhere"), "nowhere: no exported weights"),
    (("--out", "coded"), r"--out coded: holds README.md; choose a folder that is empty"),
    (("--feed", "lone"), "lone: no two scans of a session have a patch in common in split train"),
    (("--feed", "pet"), "pet: no scan of a modality that .*weights knows"),
    (("--feed", "val"), "val: no scan with split train"),
    (("--device", "abacus"), "--device abacus: cannot be used")])
def test_what_cannot_be_learnt_from_is_refused(
        folder: Path, coded: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...],
        words: str) -> None:
    monkeypatch.chdir(folder)
    changes = {"lone": lambda number, row: {**row, "session": str(number)},
               "pet": lambda number, row: {**row, "modality": "PET"},
               "val": lambda number, row: {**row, "split": "val"}}
    if more[0] == "--feed":
        write_feed(more[1], 4, per_session=2)
        change_rows(Path(more[1]), changes[more[1]])
    with pytest.raises(NeurojepaError, match=words):
        run(folder, folder / "new", *more)
    assert not (folder / "new").exists()


def test_other_grids_and_cnns_are_refused(folder: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((folder / "weights" / "config.json").read_text())
    for path in (folder / "weights").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record["grid"]["centre_mm"][0] += 6
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(NeurojepaError, match=r"--feed .* is packed at grid tiny, the weights were"):
        run(folder, tmp_path / "new", "--weights", str(tmp_path))

    def cnn(uri: str, device: str | None = None) -> object:
        from neurojepa.downstream import api
        from neurojepa.weights import untrained

        config = tiny_config(str(folder / "feed"), "unused")
        config = config.model_copy(update={"objective": config.objective.model_copy(
            update={"method": "cnn"})})
        return api.Model(untrained(config, GRID), uri, device)

    monkeypatch.setattr("neurojepa.downstream.api.load_model", cnn)
    with pytest.raises(NeurojepaError, match="weights: a cnn has no tokens to read"):
        run(folder, tmp_path / "new")


def test_a_session_without_a_common_patch_teaches_nothing(
        folder: Path, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "means_of_sessions", lambda *_: (torch.empty(0, 5),) * 3)
    config = tiny_config(feed.uri, "unused")
    with pytest.raises(NeurojepaError, match="feed: no two scans of a session have a patch"):
        session_tokens(build_model(config, feed.grid), config, feed, np.arange(4))

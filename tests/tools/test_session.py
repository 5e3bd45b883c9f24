"""A code that tells what the scans of a session have in common, on tokens made up here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurojepa.downstream.pooling import Tokens
from neurojepa.errors import DataError
from tools.bench import _session, compare
from tools.bench._session import (
    KINDS,
    Code,
    Kind,
    learnt,
    means_of_sessions,
    read_through,
    remember,
    without_rare,
)


def tokens(num_scans: int = 4, num_tokens: int = 6) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    patch_BN = torch.stack([torch.randperm(8, generator=generator)[:num_tokens]
                            for _ in range(num_scans)])
    return Tokens(torch.randn(num_scans, num_tokens, 5, generator=generator), patch_BN,
                  torch.rand(num_scans, num_tokens, generator=generator),
                  torch.zeros(num_scans, dtype=torch.int64))


@pytest.mark.parametrize("session_B", [[0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]])
def test_a_token_is_paired_with_the_mean_at_its_patch_in_its_session(session_B):
    given = tokens()
    found = list(zip(*means_of_sessions(given, np.array(session_B)), strict=True))
    expected = []
    for b in range(4):
        for n in range(6):
            patch = given.patch_BN[b, n]
            there = [given.z_BND[c, m] for c in range(4) for m in range(6)
                     if session_B[c] == session_B[b] and given.patch_BN[c, m] == patch]
            if len(there) > 1 and given.share_BN[b, n] >= _session.LEAST_SHARE:
                expected.append((given.z_BND[b, n], torch.stack(there).mean(0),
                                 given.share_BN[b, n]))
    assert 0 < len(found) == len(expected)
    for (z, mean, share), (z_expected, mean_expected, share_expected) in zip(
            found, expected, strict=True):
        assert torch.equal(z, z_expected) and share == share_expected
        torch.testing.assert_close(mean, mean_expected)


def test_a_feed_of_lone_scans_is_refused_by_name(tmp_path, monkeypatch):
    from neurojepa.feed.format import open_feed
    from neurojepa.model.build import build_model
    from tests.helpers.feeds import tiny_config, write_feed

    feed = open_feed(write_feed(str(tmp_path / "feed")))
    config = tiny_config(feed.uri, tmp_path)
    monkeypatch.setattr(_session, "means_of_sessions", lambda *_: (torch.empty(0, 5),) * 3)
    with pytest.raises(DataError, match="feed: no two scans of a session have a patch in common"):
        _session.session_tokens(build_model(config, feed.grid), config, feed)


def two_contrasts(num: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of one of two contrasts, what they have in common, and the contrast."""
    generator = torch.Generator().manual_seed(1)
    common_QD = torch.randn(num, 4, generator=generator)
    contrast_Q = torch.randint(2, (num,), generator=generator)
    own_QD = torch.where(contrast_Q[:, None] == 1, common_QD, -common_QD)
    return torch.cat([own_QD, contrast_Q[:, None].float()], 1), common_QD, contrast_Q


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("STEPS", 300), ("BATCH", 256), ("TOP_WARMUP", 150)):
        monkeypatch.setattr(_session, name, value)


@pytest.mark.parametrize("name", ["sparse", "dense", "wide"])
def test_a_code_tells_what_contrasts_have_in_common(quick, name):
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.full((len(z_QD), 1), 0.5)], 1)
    code = learnt(z_QD, target_QD, KINDS[name], seed=0)
    h = code(z_QD)
    assert (code.told(h) - target_QD).square().mean() < 0.15  # of 0.8
    assert not any(parameter.requires_grad for parameter in code.parameters())
    if code.kind.sparse:
        assert h.min() == 0 and (h > 0).float().mean() < 0.5
    else:
        assert h.min() < 0 and h.shape[-1] == (code.kind.atoms or z_QD.shape[1])


@pytest.mark.parametrize(("top", "own_top"), [(4, 2), (12, 6)])
def test_thresholds_leave_so_many_atoms_of_each_part(quick, top, own_top):
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.zeros(len(z_QD), 1)], 1)
    code = learnt(z_QD, target_QD, Kind(atoms=64, top=top, own_atoms=32, own_top=own_top), 0)
    active = (code(z_QD) > 0).float()
    assert active[:, :64].sum(1).mean() == pytest.approx(top, rel=0.35)
    assert active[:, 64:].sum(1).mean() == pytest.approx(own_top, rel=0.35)


def test_own_atoms_tell_what_is_left_of_the_scans_own_token(quick):
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.full((len(z_QD), 1), 0.5)], 1)
    code = learnt(z_QD, target_QD, Kind(atoms=64, top=8, own_atoms=32, own_top=4), 0)
    h = code(z_QD)
    assert (code.told(h) - target_QD).square().mean() < 0.15
    own_QD = code.told(h) + code.rest(h)
    assert (own_QD - z_QD).square().mean() < 0.2 * (code.told(h) - z_QD).square().mean()


def test_a_higher_penalty_leaves_fewer_atoms(monkeypatch):
    monkeypatch.setattr(_session, "STEPS", 120)
    monkeypatch.setattr(_session, "L1_WARMUP", 20)
    monkeypatch.setattr(_session, "BATCH", 256)
    z_QD, _, _ = two_contrasts()
    active = []
    for l1 in (1e-4, 2e-2):
        active.append((learnt(z_QD, z_QD, Kind(l1=l1), seed=0)(z_QD) > 0).float().mean().item())
    assert active[1] < active[0] / 2


@pytest.mark.parametrize("least", [0.2, 0.4])
@pytest.mark.parametrize("kind", [Kind(), Kind(top=99, own_atoms=40, own_top=9)])
def test_atoms_that_few_tokens_use_are_left_out(monkeypatch, least, kind):
    monkeypatch.setattr(_session, "LEAST_USE", least)
    z_QD = two_contrasts(1000)[0]
    code = Code(5, kind).requires_grad_(False)
    code.least_A += 0.05
    h = code(z_QD)
    kept_A = (h > 0).float().mean(0) >= least
    some = without_rare(code, z_QD)
    assert 0 < kept_A.sum() < len(kept_A)
    torch.testing.assert_close(some(z_QD), h[:, kept_A])
    assert some.active == pytest.approx(float((some(z_QD) > 0).float().mean()), abs=1e-5)
    assert some.told(some(z_QD)).shape == z_QD.shape
    assert some.num_shared == kept_A[:kind.atoms].sum()


def test_seeds_make_a_code_and_leave_other_draws_alone(monkeypatch):
    monkeypatch.setattr(_session, "STEPS", 3)
    z_QD = two_contrasts(50)[0]
    state = torch.get_rng_state()
    codes = [learnt(z_QD, z_QD, KINDS["split"], seed=seed)(z_QD) for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_read_through_its_code():
    class Model:
        def latents(self, views):
            return views * torch.ones(2, 3, 5)

    model, code = Model(), Code(5, KINDS["sparse"])
    read_through(model, code)
    assert torch.equal(model.latents(2.0), code(2 * torch.ones(2, 3, 5)))


def test_latents_are_kept_for_other_codes_of_the_same_weights(tmp_path):
    class Model:
        calls = 0

        def latents(self, views):
            self.calls += 1
            return views.tokens_BNP * 2

    def views(*scans: int) -> SimpleNamespace:
        tokens = torch.stack([torch.full((3, 5), float(scan)) for scan in scans])
        return SimpleNamespace(tokens_BNP=tokens, coords_BN3=torch.ones(len(scans), 3, 3))

    found = []
    for _ in range(2):  # two runs of the same weights
        model = Model()
        kept = remember(model, tmp_path / "latents")
        found.append([model.latents(views(*scans)) for scans in ((1, 2), (3,), (2, 3), (4, 1))])
        assert model.calls == (3 if len(found) == 1 else 0)
        assert kept.saved_s > 0  # the third batch has scans of the first two
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    moved = views(1)
    moved.coords_BN3 += 1
    model.latents(moved)
    assert model.calls == 1  # the same voxels elsewhere are another scan


def test_codes_of_a_seed_share_their_first_stage(tmp_path):
    jobs = [compare.jobs_of(compare.FULL, tmp_path, name, 1)
            for name, arm in compare.ARMS.items() if arm.code]
    assert len({first.folder for first, _ in jobs}) == 1
    assert len({second.folder for _, second in jobs}) == len(jobs) > 1
    for first, second in jobs:
        assert first.first and second.teacher == first.folder / "weights"
        assert first.seconds + 30 == compare.FULL.seconds and not second.arm.trained

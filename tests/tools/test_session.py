"""A code that tells what the scans of a session have in common, on tokens made up here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurojepa.downstream.pooling import Tokens
from neurojepa.errors import DataError
from tools.bench import _session, compare
from tools.bench._session import learnt, means_of_sessions, read_through, without_rare


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


@pytest.mark.parametrize("sparse", [True, False])
def test_a_code_tells_what_contrasts_have_in_common(monkeypatch, sparse):
    monkeypatch.setattr(_session, "STEPS", 300)
    monkeypatch.setattr(_session, "BATCH", 256)
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.full((len(z_QD), 1), 0.5)], 1)
    code = learnt(z_QD, target_QD, sparse, seed=0)
    h = code(z_QD)
    assert (code.told(h) - target_QD).square().mean() < 0.1  # of 0.8
    assert not any(parameter.requires_grad for parameter in code.parameters())
    if sparse:
        assert h.min() == 0 and (h > 0).float().mean() < 0.5


def test_a_higher_penalty_leaves_fewer_atoms(monkeypatch):
    monkeypatch.setattr(_session, "STEPS", 120)
    monkeypatch.setattr(_session, "L1_WARMUP", 20)
    monkeypatch.setattr(_session, "BATCH", 256)
    z_QD, _, _ = two_contrasts()
    active = []
    for l1 in (1e-4, 2e-2):
        monkeypatch.setattr(_session, "L1", l1)
        active.append((learnt(z_QD, z_QD, True, seed=0)(z_QD) > 0).float().mean().item())
    assert active[1] < active[0] / 2


@pytest.mark.parametrize("least", [0.2, 0.4])
def test_atoms_that_few_tokens_use_are_left_out(monkeypatch, least):
    monkeypatch.setattr(_session, "LEAST_USE", least)
    z_QD = two_contrasts(1000)[0]
    code = _session.Code(5, sparse=True).requires_grad_(False)
    h = code(z_QD)
    kept_A = (h > 0).float().mean(0) >= least
    some = without_rare(code, z_QD)
    assert 0 < kept_A.sum() < len(kept_A)
    torch.testing.assert_close(some(z_QD), h[:, kept_A])
    assert some.active == pytest.approx(float((some(z_QD) > 0).float().mean()), abs=1e-5)
    assert some.told(some(z_QD)).shape == z_QD.shape


def test_seeds_make_a_code_and_leave_other_draws_alone(monkeypatch):
    monkeypatch.setattr(_session, "STEPS", 3)
    z_QD = two_contrasts(50)[0]
    state = torch.get_rng_state()
    codes = [learnt(z_QD, z_QD, True, seed=seed)(z_QD) for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_read_through_its_code():
    class Model:
        def latents(self, views):
            return views * torch.ones(2, 3, 5)

    model, code = Model(), _session.Code(5, sparse=True)
    read_through(model, code)
    assert torch.equal(model.latents(2.0), code(2 * torch.ones(2, 3, 5)))


def test_codes_of_a_seed_share_their_first_stage(tmp_path):
    jobs = [compare.jobs_of(compare.FULL, tmp_path, name, 1)
            for name, arm in compare.ARMS.items() if arm.code]
    assert len({first.folder for first, _ in jobs}) == 1
    assert len({second.folder for _, second in jobs}) == len(jobs) > 1
    for first, second in jobs:
        assert first.first and second.teacher == first.folder / "weights"
        assert first.seconds + 30 == compare.FULL.seconds and not second.arm.trained

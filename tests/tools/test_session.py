"""The kinds of code that the session code is compared with, on tokens made up here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neurojepa.downstream import sessions
from neurojepa.downstream.pooling import Tokens
from neurojepa.model.session_code import SessionCode
from tools.bench import _session, compare
from tools.bench._session import (
    KINDS,
    Code,
    Kind,
    learnt,
    read_through,
    remember,
    without_rare,
)


def two_contrasts(num: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of one of two contrasts, what they have in common, and the contrast."""
    generator = torch.Generator().manual_seed(1)
    common_QD = torch.randn(num, 4, generator=generator)
    contrast_Q = torch.randint(2, (num,), generator=generator)
    own_QD = torch.where(contrast_Q[:, None] == 1, common_QD, -common_QD)
    return torch.cat([own_QD, contrast_Q[:, None].float()], 1), common_QD, contrast_Q


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("STEPS", 300), ("BATCH", 256)):
        monkeypatch.setattr(sessions, name, value)
    monkeypatch.setattr(_session, "TOP_WARMUP", 150)


@pytest.mark.parametrize("name", ["dense", "wide"])
def test_a_code_tells_what_contrasts_have_in_common(quick, name):
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.full((len(z_QD), 1), 0.5)], 1)
    code = learnt(z_QD, target_QD, KINDS[name], seed=0)
    h = code(z_QD)
    assert (code.told(h) - target_QD).square().mean() < 0.15  # of 0.8
    assert not any(parameter.requires_grad for parameter in code.parameters())
    assert h.min() < 0 and h.shape[-1] == (code.kind.atoms or z_QD.shape[1])


def test_the_sparse_kind_is_the_packages_code_to_the_bit(monkeypatch):
    monkeypatch.setattr(sessions, "STEPS", 20)
    z_QD = two_contrasts(400)[0]
    monkeypatch.setattr(_session, "HIDDEN", 10)
    ours = learnt(z_QD, z_QD, Kind(atoms=20, l1=1e-3), seed=3)
    theirs = sessions.learn(lambda: SessionCode.sized(5, 10, 20), z_QD, z_QD, l1=1e-3, seed=3)
    assert torch.equal(ours(z_QD), theirs(z_QD))
    assert sessions.drop_rare(theirs, z_QD) == without_rare(ours, z_QD).active
    assert torch.equal(ours(z_QD), theirs(z_QD))


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


@pytest.mark.parametrize("least", [0.2, 0.4])
@pytest.mark.parametrize("kind", [Kind(), Kind(top=99, own_atoms=40, own_top=9), Kind(jump=0.1)])
def test_atoms_that_few_tokens_use_are_left_out(monkeypatch, least, kind):
    monkeypatch.setattr(sessions, "LEAST_USE", least)
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
    assert some.atoms == kept_A[:kind.atoms].sum()


def test_thresholds_go_with_a_code_to_its_device():
    assert Code(5, KINDS["sparse"]).to("meta").least_A.is_meta


def test_seeds_make_a_code_and_leave_other_draws_alone(monkeypatch):
    monkeypatch.setattr(sessions, "STEPS", 3)
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


def test_codes_of_a_seed_share_their_first_stage_where_it_is_trained_alike(tmp_path):
    jobs = [compare.jobs_of(compare.FULL, tmp_path, name, 1)
            for name, arm in compare.ARMS.items() if arm.code]
    assert len({second.folder for _, second in jobs}) == len(jobs) > 1
    trained_as = {(json.dumps([first.arm.recipe, first.arm.changes]), first.folder)
                  for first, _ in jobs}
    assert len({folder for _, folder in trained_as}) == len(trained_as) == 5
    assert len({how for how, _ in trained_as}) == len(trained_as)
    for first, second in jobs:
        assert first.first and second.teacher == first.folder / "weights"
        assert first.seconds + 30 == compare.FULL.seconds and not second.arm.trained
        assert first.arm.changes == second.arm.changes | {"unread": True}


def test_a_code_of_one_modality_learns_from_its_scans_of_the_same_people(monkeypatch):
    rows, read = np.arange(10, 16), []
    monkeypatch.setattr(_session, "rows_of_sessions", lambda feed, found: rows)
    monkeypatch.setattr(_session, "select_rows", lambda feed, modality, cohort, split: (
        np.arange(0, 20, 2) if modality == "T1w" else np.arange(20)))

    def views_of(model, config, feed, found, *, batch_size):
        read.append(found.tolist())
        yield from found

    def tokens_in(model, config, feed, row):
        z_BND = torch.full((1, 3, 2), float(row))
        return Tokens(z_BND, torch.arange(3)[None], torch.tensor([[1.0, 0.5, 0.4]]),
                      torch.zeros(1))

    monkeypatch.setattr(_session, "views_of", views_of)
    monkeypatch.setattr(_session, "tokens_in", tokens_in)
    z_QD, target_QD, share_Q = _session.taught(None, None, None, "T1w")
    assert read == [[10, 12, 14]] and torch.equal(z_QD, target_QD)
    assert z_QD[:, 0].tolist() == [10, 10, 12, 12, 14, 14]
    assert share_Q.tolist() == [1, 0.5] * 3


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_jumprelu_leaves_so_many_atoms_and_tells_what_contrasts_have_in_common(quick, share):
    z_QD, common_QD, _ = two_contrasts()
    target_QD = torch.cat([common_QD, torch.full((len(z_QD), 1), 0.5)], 1)
    code = learnt(z_QD, target_QD, Kind(atoms=64, l1=0.1, jump=share), seed=0)
    h = code(z_QD)
    assert float((h > 0).float().mean()) == pytest.approx(share, rel=0.35)
    assert (code.told(h) - target_QD).square().mean() < 0.2  # of 0.8
    least = code.thresholds()
    assert (torch.where(h > 0, h, torch.inf).amin(0) > least).all()  # and it shrinks none


def test_thresholds_of_jumprelu_get_the_gradient_of_a_ramp():
    wide = _session.BANDWIDTH
    x = torch.tensor([[1.0 - wide, 1 - wide / 4, 1 + wide / 4, 1 + wide]], requires_grad=True)
    least = torch.ones(4, requires_grad=True)
    h, active = _session._Jump.apply(x, least)
    assert active.tolist() == [[0, 0, 1, 1]]
    assert torch.equal(h, x * active)
    (3 * h + 5 * active).sum().backward()
    assert x.grad.tolist() == [[0, 0, 3, 3]]
    assert least.grad.tolist() == pytest.approx([0, -8 / wide, -8 / wide, 0])

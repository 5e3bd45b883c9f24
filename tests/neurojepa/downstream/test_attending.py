"""The attentive readout: it finds what few tokens show, begins as the linear probe, and is refused
tokens of other weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from neurojepa.downstream.attending import Tokens, attentive, by_number, read_tokens
from neurojepa.downstream.attentive import Scan
from neurojepa.downstream.crossval import plan_folds
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import Runner
from neurojepa.downstream.study import ALONE, ATTENTIVE, Design, study
from neurojepa.downstream.targets import target_of
from neurojepa.errors import NeurojepaError
from tests.helpers import embedded

pytestmark = pytest.mark.usefixtures("few_draws")


def hidden(number: int = 80, tokens: int = 20) -> tuple[People, Tokens, np.ndarray]:
    """People whose truth one token of many shows, which its own channels tell from the others; the
    mean of all hardly shows it."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(number) % 2)
    scans = {}
    for k in range(number):
        z = rng.normal(size=(tokens, 12))
        z[:, 0] = -2
        at = rng.integers(tokens)
        z[at, 0] = 6  # here is something to see
        value = rng.normal(size=(tokens, 12))
        value[at, 1] = 4 * (2 * truth[k] - 1)
        scans[f"s{k}"] = Scan(torch.from_numpy(z).float(), torch.from_numpy(value).float(), 0)
    means = np.stack([scan.value_TD.mean(0).numpy() for scan in scans.values()])
    people = embedded.people(means, dx=np.where(truth, "AD", "CN"))
    ids = np.empty(number, object)
    ids[:] = [(name,) for name in scans]
    return replace(people, scans=ids), Tokens(scans, 3), truth


@pytest.mark.slow(4)
def test_what_one_token_shows_is_found_and_the_row_stands_beside_the_probe() -> None:
    people, tokens, _ = hidden()
    found = study(people, "dx", Design(folds=3, repeats=1, positive=("AD",)), tokens)
    linear, attending = (found.rows[name].scores["auroc"] for name in (ALONE, ATTENTIVE))
    assert attending.value > 0.95 and attending.value > linear.value + 0.05
    gain = next(each for each in found.gains if each.row == ATTENTIVE)
    assert gain.over == ALONE and gain.score.value > 0.05


@pytest.mark.parametrize("values", [["c", "a", "b"], [1.5, 2.5, 7]])
def test_classes_and_numbers_have_predictions_of_everyone(values: list[object]) -> None:
    people, tokens, _ = hidden(24, 4)
    one = tokens.scans["s0"]  # of whom no token is pooled
    tokens = replace(tokens, scans={**tokens.scans, "s0": replace(
        one, z_TD=one.z_TD[:0], value_TD=one.value_TD[:0])})
    target = target_of("x", np.array([values[k % 3] for k in range(24)]).astype(str))
    plan = plan_folds(target, people.family, 3, 1)
    row = Runner(target, people, plan)(by_number(people), attentive(tokens, people))
    assert np.isfinite(row.predicted).all()
    if target.kind == "multiclass":
        assert np.allclose(row.predicted.sum(-1), 1)
    else:
        assert 1 < row.predicted.mean() < 7


def test_shuffled_labels_are_not_told() -> None:
    people, tokens, truth = hidden(60)
    dealt = np.random.default_rng(3).permutation(truth)
    target = target_of("dx", dealt.astype(str))
    plan = plan_folds(target, people.family, 3, 1)
    row = Runner(target, people, plan)(by_number(people), attentive(tokens, people))
    assert abs(row.scores["auroc"].value - 0.5) < 0.2


def test_a_label_of_one_token_is_not_read_from_those_who_are_tested() -> None:
    """Predictions of a fold are the same whatever the tested people's labels are."""
    people, tokens, truth = hidden(30, 6)
    read = attentive(tokens, people)
    numbers = np.arange(30.0)[:, None]
    target = target_of("dx", truth.astype(str))
    first = read(target, numbers[:20], numbers[20:], target.truth[:20], people.family[:20])
    again = read(replace(target, truth=1 - target.truth), numbers[:20], numbers[20:],
                 target.truth[:20], people.family[:20])
    assert np.array_equal(first, again)
    with pytest.raises(KeyError):
        attentive(Tokens({}, 3), people)


@pytest.mark.slow(3)
def test_tokens_are_of_the_weights_that_embedded(tmp_path) -> None:
    from neurojepa.downstream.api import Model
    from neurojepa.feed.format import open_feed
    from neurojepa.weights import load
    from tests.helpers.tuning import write_tuning

    write_tuning(tmp_path, people=8, without=1)
    weights, feed = load(str(tmp_path / "weights")), open_feed(str(tmp_path / "feed"))
    table = Model(weights, "W", "cpu").embed(feed.uri, modality="T1w").table
    tokens = read_tokens(weights, feed, table)
    assert len(tokens.scans) == 7 and {scan.modality for scan in tokens.scans.values()} == {0}
    with torch.no_grad():
        weights.model.target.norm.weight.mul_(1 + torch.linspace(0, 1, 96))
    with pytest.raises(NeurojepaError, match="its embedding is not what these weights make of it"):
        read_tokens(weights, feed, table)
    objective = weights.config.objective.model_copy(update={"method": "cnn"})
    cnn = weights.config.model_copy(update={"objective": objective})
    with pytest.raises(NeurojepaError, match="a cnn has no tokens"):
        read_tokens(replace(weights, config=cnn, places=None), feed, table)
    with pytest.raises(NeurojepaError, match="were exported without what tokens are compared"):
        read_tokens(replace(weights, places=None), feed, table)

"""Which checkpoints and exported models were trained on people who have withdrawn since.

A checkpoint's manifest and an export's config.json name the fingerprint of the feed and the part of
it that was used.  A feed's audit log names, for every withdrawal, the fingerprint before it and
what the people had: so a model of some fingerprint saw everyone withdrawn from then on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from data_prep.withdrawal.audit import Event
from neurojepa.errors import DataError
from neurojepa.feed.format import open_feed
from neurojepa.storage import join, read_bytes, walk


def checkpoints_that_saw(runs: Sequence[str],
                         feeds: dict[str, list[Event]]) -> dict[str, set[str] | None]:
    """Checkpoint or export -> the withdrawn people whose samples were in its training data.

    Parameters
    ----------
    runs
        Run directories, or folders of exported weights.
    feeds
        Audit events of each feed that people were withdrawn from.

    Returns
    -------
    dict
        Only those that saw somebody; None where the feed is one of these, but of a fingerprint
        that was never logged, so that it cannot be told.

    Raises
    ------
    DataError
        A run holds no checkpoint and no export, or one that cannot be read.
    """
    current = {feed: open_feed(feed).fingerprint for feed in feeds}
    found: dict[str, set[str] | None] = {}
    for run in runs:
        for name, record in _records(run):
            data, fingerprint = record["config"]["data"], record["feed"]
            known = {feed: later for feed, events in feeds.items()
                     if (later := _withdrawn_since(events, fingerprint))}
            people = {sample["participant"] for samples in known.values() for sample in samples
                      if _used(sample, data)}
            if people:
                found[name] = people
            elif not known and data["feed"] in feeds and current[data["feed"]] != fingerprint:
                found[name] = None
    return found


def _records(run: str) -> Iterator[tuple[str, Event]]:
    """Every committed checkpoint and every export at or below a folder."""
    paths = [join(run, path) for path in walk(run)
             if path.rsplit("/", 1)[-1] in ("manifest.json", "config.json")]
    if not paths:
        raise DataError(f"{run}: no checkpoint and no exported weights there; name a run directory")
    for path in paths:
        try:
            record = json.loads(read_bytes(path))
            yield path.rpartition("/")[0], {key: record[key] for key in ("config", "feed")}
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: not a record of a checkpoint or export ({error})") from error


def _withdrawn_since(events: list[Event], fingerprint: str) -> list[Event]:
    """What people withdrawn from a feed of this fingerprint, or from its successors, had in it."""
    withdrawals = [event for event in events if event["event"] == "withdrawn"]
    first = next((number for number, event in enumerate(withdrawals)
                  if event["fingerprint"] == fingerprint), len(withdrawals))
    return [sample for event in withdrawals[first:] for sample in event["samples"]]


def _used(sample: Event, data: Event) -> bool:
    """Whether a run with this data config trains on such a sample, as feed/order.py chooses."""
    weights = data.get("weights") or {}
    return (sample["split"] == data["split"]
            and (not data.get("modalities") or sample["modality"] in data["modalities"])
            and (not weights or f"{sample['cohort']}/{sample['modality']}" in weights))

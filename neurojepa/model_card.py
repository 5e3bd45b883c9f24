"""The model card of exported weights: README.md, told from config.json alone.

What it says of data and splits is counted at the export.  Results, a licence and what else there is
to say come from ``neurojepa weights card``, which writes them into config.json too, so that the
page can always be made again.  Weights that learnt a task on top have its ``purpose`` there.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow.compute as pc

from neurojepa.config import validate
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.methods import METHODS
from neurojepa.storage import join, read_bytes, write_bytes

SPLITS = ("train", "val", "test")
USE = """```bash
neurojepa embed SCANS --weights DIR --out OUT
```

In Python: `neurojepa.load("DIR").embed("t1.nii.gz")`."""
NOT_MEASURED = """None yet. `neurojepa probe --weights DIR --feed FEED --out P` measures some, and
`neurojepa weights card DIR --results P/results.json` writes them here."""
NO_LICENCE = """Not stated. The code is under Apache-2.0; weights follow the terms of the data they
learnt from. `neurojepa weights card DIR --licence NAME` states one."""
LIMITS = """- Not a medical device. Check on your own scanners and people first.
- Scans have to be prepared as those of the training were (`embed --preset`).
- People and scans of split train stand in `seen.json` as hashes, where the feed was at hand;
  `neurojepa probe` does not test them.
- What follows from head size is taken out of embeddings; brain volume stands beside them."""


OFFICIAL_DATA = """Not known here; see the page of the checkpoint. Who taught it is not known
either, so no one can be left out of a test."""
OFFICIAL_LIMITS = """- Not a medical device. Check on your own scanners and people first.
- What follows from head size is taken out of embeddings; brain volume stands beside them.
- It is not trained further here: there is no predictor and no loss."""
OFFICIAL_LICENCE = """Not stated. The official repository gives released weights under
CC BY-NC-ND 4.0: not for commercial use, and altered copies are not to be shared, which a
converted one may be. `neurojepa weights card DIR --licence NAME` states another."""


def describe_feed(feed: Feed) -> dict[str, Any]:
    """What the card says of a feed: cohorts, and people and scans by split and modality."""
    splits = {}
    for split in SPLITS:
        rows = feed.index.filter(pc.equal(feed.index["split"], split))
        if rows.num_rows:
            splits[split] = {"people": len(pc.unique(rows["participant"])),
                             "scans": dict(sorted(Counter(rows["modality"].to_pylist()).items()))}
    return {"feed": feed.fingerprint, "splits": splits,
            "cohorts": sorted(set(feed.index["cohort"].to_pylist()))}


def complete_card(uri: str, *, results: str | None = None, licence: str | None = None,
                  about: str | None = None) -> None:
    """Add to the card of exported weights; what is None stays as it was.

    Parameters
    ----------
    uri : folder of the weights
    results : results.json that ``probe --feed`` wrote with these weights
    licence : its name, such as apache-2.0
    about : file with a text of your own, which comes first

    Raises
    ------
    DataError
        A file is not there, is none of these, or tells results of other weights.
    """
    place = join(uri, "config.json")
    record = read_record(place, "an export's config.json", "sha256")
    if results is not None:
        found = read_record(results, "a results.json of probe --feed", "results")
        for name in ("step", "feed"):
            # what official weights learnt from is not known
            if found.get(name) != record[name] and record[name] is not None:
                raise DataError(f"{results}: is of {name} {found.get(name)}, the weights of "
                                f"{record[name]}; probe these weights on the feed they learnt from")
        own = identity(record)
        other = found.get("identity", own)  # earlier versions wrote none
        if differing := [name for name in own | other if own.get(name) != other.get(name)]:
            raise DataError(f"{results}: is of the same step and feed but of other weights: "
                            f"{', '.join(differing)} differ; probe these weights")
        record["results"] = {name: found.get(name)
                             for name in ("modality", "cohort", "feed", "results")}
    if licence is not None:
        record["licence"] = licence
    if about is not None:
        try:
            record["about"] = read_bytes(about).decode().strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{about}: is no text in UTF-8 ({error})") from error
    write_bytes(join(uri, "README.md"), card(record).encode())
    write_bytes(place, json.dumps(record, indent=1).encode())


def identity(record: dict[str, Any]) -> dict[str, str]:
    """sha256 by name of all in exported weights that an embedding depends on."""
    return {"model": record["sha256"], **{name: record[name]["sha256"]
                                          for name in ("pooling", "code") if name in record}}


def read_record(uri: str, what: str, key: str) -> dict[str, Any]:
    """A JSON object that has this key.

    Raises
    ------
    DataError
        It is not there, or something else; the message says that it is not ``what``.
    """
    try:
        record = json.loads(read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: is not {what} ({error})") from error
    if not isinstance(record, dict) or not record.get(key):
        raise DataError(f"{uri}: is not {what}: it has no {key!r}")
    return record


def card(record: dict[str, Any]) -> str:
    """The page: front matter as model hubs read it, then sections."""
    config, grid, official = record["config"], record["grid"], "official" in record
    head = ["---", "library_name: neurojepa", "tags: [neuroimaging, MRI, self-supervised]",
            *([f"license: {json.dumps(record['licence'])}"] if "licence" in record else []), "---"]
    centre = ", ".join(f"{value:g}" for value in grid["centre_mm"])
    patch = config["model"]["patch_voxels"]
    sections = {
        "Model": f"""- {_origin(record)}
- encoder: {config['model']['size']}, {record.get('parameters', 'unknown number of')} parameters
- patches of {patch} x {patch} x {patch} voxels of {grid['spacing_mm']:g} mm; grid
  {' x '.join(map(str, grid['shape']))}, centred at MNI {centre} mm, x y z in RAS
{_trained(record)}{_code(record)}- an embedding says how {_read(record)} differ from what is usual \
at the same places,
  adjusted for head size; {_pooling(record)}""",
        **({"Purpose": record["purpose"]} if "purpose" in record else {}),
        "Use": USE,
        "Data and splits": ("Of the pretraining. " * ("purpose" in record)) + _data(record),
        "Results": _results(record["results"]) if "results" in record else NOT_MEASURED,
        **({"Conversion": _conversion(record)} if official else {}),
        "Limits": OFFICIAL_LIMITS if official else LIMITS,
        "Licence": record.get("licence", OFFICIAL_LICENCE if official else NO_LICENCE)}
    parts = ["\n".join(head), "# neurojepa weights",
             *([record["about"]] if "about" in record else []),
             *(f"## {title}\n\n{text}" for title, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def _origin(record: dict[str, Any]) -> str:
    if "official" in record:
        source = record["official"]["source"]
        return (f"the encoder of the official Neuro-JEPA code, converted from {source['file']} "
                f"(sha256\n  {source['sha256']}), part {source['part']}")
    objective = validate(record["config"], where="config.json").objective
    return METHODS[objective.method].describe(objective)


def _trained(record: dict[str, Any]) -> str:
    if "official" in record:
        return f"- trained for {record['step']} steps\n" if record["step"] else ""
    return (f"- trained for {record['step']} steps of "
            f"{record['config']['train']['global_batch']} scans\n")


def _conversion(record: dict[str, Any]) -> str:
    """What became of the tensors, and what differs."""
    official = record["official"]
    # which is not beside weights that learnt a task on top
    beside = "" if "purpose" in record else " `conversion.txt` has each of them."
    return "\n".join([
        f"{official['mapped']} tensors were mapped, all that the network has; left out: "
        f"{official['left_out']}.{beside}", "",
        "What differs from the official code:", "",
        *(f"- {each}" for each in official["differences"])])


def _read(record: dict[str, Any]) -> str:
    if "code" in record:
        return "the atoms of tokens"
    return "the encoder's tokens" if "official" in record else "the target encoder's tokens"


def _code(record: dict[str, Any]) -> str:
    if (code := record.get("code")) is None:
        return ""
    return (f"- tokens are read through a session code of {code['atoms']} atoms, of which\n"
            f"  {code['active']:.0%} are active in a token; learnt from {code['people']} people "
            f"({_counts(code['scans'])}) of feed {code['feed']}, penalty\n  {code['l1']:g}\n")


def _counts(scans: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(scans.items()))


def _pooling(record: dict[str, Any]) -> str:
    if "pooling" not in record:
        return "usual is what split train of the embedded feed has"
    if "scans" not in record["pooling"]:  # learnt with a task, as the weights had none
        return "usual is what scans of the people who taught it have"
    return f"usual is what these scans of split train have: {_counts(record['pooling']['scans'])}"


def _data(record: dict[str, Any]) -> str:
    if "official" in record:
        return OFFICIAL_DATA
    if "data" not in record:
        return (f"Feed {record['feed']}, which was out of reach at the export. Export again with "
                "`--feed FEED` to have it counted here.")
    data = record["data"]
    rows = [f"| {split} | {each['people']} | {_counts(each['scans'])} |"
            for split, each in data["splits"].items()]
    return "\n".join([f"Feed {data['feed']}; cohorts: {', '.join(data['cohorts'])}. No person is "
                      "in two splits.", "", "| split | people | scans |", "|---|---|---|", *rows])


def _results(found: dict[str, Any]) -> str:
    of = ", ".join(found[name] for name in ("modality", "cohort") if found[name])
    feed = f" of feed {found['feed']}" if found.get("feed") else ""  # earlier versions wrote none
    rows = [f"| {label} | {metric} | {name} | {value['value']:.3f} | {value['low']:.3f} to "
            f"{value['high']:.3f} | {value['num_people']} |"
            for name, labels in found["results"].items() for label, scores in labels.items()
            for metric, value in scores.items() if isinstance(value, dict)]
    return "\n".join([
        "Linear probes on frozen embeddings, fitted on split train and scored on split test"
        f"{feed}{f' ({of})' if of else ''}. Random init is the same network untrained.", "",
        "| label | metric | weights | value | 95 % interval | test people |",
        "|---|---|---|---|---|---|", *sorted(rows)])

"""UK Biobank's bulk imaging packages to Scans.

A package EID_FIELD_INSTANCE_ARRAY is a zip, or a folder of that name with the zip's content.
Packages lie flat, or below two-digit folders as on the research platform (``Bulk/Brain MRI/T1/10/
1000001_20252_2_0.zip``), kinds beside each other.  The instance is the visit and becomes the
session.  ukb.yaml says which member of a package is taken and what belongs to it; a companion may
lie in another package of the same visit.  Zips are listed, never unpacked.

Tables (CSV, TSV, Parquet with a column eid) may lie anywhere outside the packages.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from data_prep.cohorts.source import Findings, Found, Source
from data_prep.cohorts.ukb.packages import Package, listing, packaged, sorted_out, survey
from data_prep.cohorts.ukb.tables import UkbTables
from data_prep.filenames import image_ending
from data_prep.scan import Scan

_AHEAD = 32  # people whose packages are opened at once on an object store


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """Scans, ages, sexes, centres, diagnoses and relatives of UK Biobank participants.

    Raises
    ------
    DataError
        The source cannot be listed, or one of its tables is damaged.
    """
    table = yaml.safe_load(Path(__file__).with_name("ukb.yaml").read_text())
    reader = _Reader(source, cohort, table)
    roots, tables = survey(source)
    for uri in [*source.tables, *tables]:
        source.used(uri, reader.people.add(uri), "a column eid")
    # Every root comes in the order of the first two digits: one hundredth of the people is held.
    found = merge(*(packaged(source, root) for root in roots), key=lambda pair: pair[0][:2])
    for _, group in groupby(found, key=lambda pair: pair[0][:2]):
        packages: dict[str, list[tuple[re.Match[str], Found]]] = defaultdict(list)
        for eid, match, file in group:
            packages[eid].append((match, file))
        eids = sorted(packages)
        for first in range(0, len(eids), _AHEAD):
            batch = eids[first:first + _AHEAD]
            source.open_ahead([file for eid in batch for match, file in packages[eid]
                               if match[5] and match[2] in reader.served], listing)
            for eid in batch:
                yield reader.person(eid, packages[eid])


class _Reader:
    """One reading: people as the tables know them, scans as the packages hold them."""

    def __init__(self, source: Source, cohort: str, table: dict[str, Any]) -> None:
        self.source, self.cohort, self.table = source, cohort, table
        self.notes = source.notes
        self.people = UkbTables(table, source)
        # fields whose packages are opened
        self.served = {*table["packages"], *table["companions"],
                       *(product.get("dicom") for products in table["packages"].values()
                         for product in products)}
        self._unusable = re.compile(rf"(^|/)({'|'.join(table['unusable'])})/")

    def person(self, eid: str, files: list[tuple[re.Match[str], Found]]) -> Findings:
        """All visits of one participant."""
        visits: dict[str, dict[tuple[str, str], Package]] = defaultdict(dict)
        for (fieldnumber, visit, array), package in self._packages(files).items():
            if visit in self.table["visits"]:
                visits[visit][fieldnumber, array] = package
            else:
                self.notes["not taken: instance that is no imaging visit"] += 1
        ties = self.people.ties.get(eid, [])
        if self.people.related(eid) and not ties:
            self.notes["people with relatives that no table of pairs names: not tied"] += 1
        if not self.people.known(eid):
            self.notes["people without a row in a table"] += 1
        person = Findings(eid, ties=list(ties))
        for visit, packages in sorted(visits.items()):
            scans = self._visit(packages)
            age, sex = self.people.age(eid, visit), self.people.sex(eid)
            person.scans += [replace(scan, participant=eid, session=visit, age_at_scan=age, sex=sex,
                                     site=self.people.site(eid, visit)) for scan in scans]
            labels = {"age": age, "sex": sex, **self.people.labels(eid)}
            person.labels += [(visit, name, str(value)) for name, value in labels.items()
                              if scans and value is not None]
        return person

    def _packages(self, files: list[tuple[re.Match[str], Found]]
                  ) -> dict[tuple[str, str, str], Package]:
        """Packages by field, instance and array; zips are listed here."""
        packages: dict[tuple[str, str, str], Package] = {}
        ignored = set()
        for match, found in sorted(files, key=lambda pair: (not pair[0][5], pair[1].path)):
            key = match[2], match[3], match[4]
            if match[2] not in self.served:
                ignored.add(match[0].removesuffix(".zip"))
            elif match[5] and key in packages:
                self.notes["not taken: second copy of a package"] += 1
            elif match[5]:
                packages[key] = Package(found, **self.source.opened(found, listing))
            else:
                self._add_unpacked(packages, key, match[0], found)
        for name in ignored:
            number = name.split("_")[1]
            kind = self.table["not_taken"].get(number, "unknown")
            self.notes[f"not taken: field {number} ({kind})"] += 1
        for package in packages.values():
            if package.unpacked:
                inside = sorted_out(list(package.unpacked))
                package.names, package.dicom = inside["names"], inside["dicom"]
        return packages

    def _add_unpacked(self, packages: dict[tuple[str, str, str], Package],
                      key: tuple[str, str, str], name: str, found: Found) -> None:
        package = packages.setdefault(key, Package(found))
        start, _, inside = found.path.partition(f"{name}/")
        if package.first.path.startswith(f"{start}{name}/"):
            package.unpacked[inside] = found
        elif image_ending(inside) or inside.endswith(".dcm"):
            self.notes["not taken: file of a second copy of a package"] += 1

    # ---- scans

    def _visit(self, packages: dict[tuple[str, str], Package]) -> list[Scan]:
        """The scans of one visit, in the order of fields and arrays."""
        fields = {number for number, _ in packages}
        scans: list[Scan] = []
        for (number, array), package in sorted(packages.items()):
            products = [product for product in self.table["packages"].get(number, [])
                        if not fields & {*product.get("unless", [])}]
            if not products and number in self.table["packages"]:
                self.notes[f"not taken: field {number}, the same scan is there as a volume"] += 1
            scans += self._take(package, products, packages)
            for twin, product in self._twins(number):
                if twin in fields:
                    self.notes["not taken: DICOM of a scan that is there as NIfTI"] += 1
                else:
                    scans.append(self._dicom(package, product))
            if array != "0":
                self.notes["package of another array than 0: taken beside it"] += 1
        return scans

    def _twins(self, number: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for twin, products in self.table["packages"].items():
            yield from ((twin, product) for product in products if product.get("dicom") == number)

    def _take(self, package: Package, products: list[dict[str, Any]],
              packages: dict[tuple[str, str], Package]) -> list[Scan]:
        """The wanted images of a package; a row with a reason where it has none of them."""
        if not products:
            return []
        if package.fault:
            return [self._scan(package, products[0], reason=package.fault)]
        scans = []
        for product in products:
            image, member = self._image(package, product)
            if member is None:
                continue
            if self._unusable.search(member):
                scans.append(self._scan(package, product, member, reason="cohort_unusable"))
                continue
            companions: dict[str, Any] = {
                f"{kind}_uri": uri for kind in ("mask", "label", "transform", "confounds")
                if (uri := self._companion(kind, product, package, packages))}
            scans.append(replace(self._scan(package, product, member), **companions,
                                 processing=image.get("processing")))
        if not scans:
            wanted = products[0]["images"][0]["member"]
            return [self._scan(package, products[0], wanted, reason="missing_member")]
        if len(scans) < len(products):
            self.notes["package without one of its images"] += len(products) - len(scans)
        return scans

    def _image(self, package: Package, product: dict[str, Any]
               ) -> tuple[dict[str, Any], str | None]:
        """The preferred image that is there; one ruled out is not replaced by a lesser one."""
        for image in product["images"]:
            if member := package.find(image["member"]):
                return image, member
            for name in package.names:
                if fnmatchcase(self._unusable.sub(r"\1", name), image["member"]):
                    return image, name
        return {}, None

    def _companion(self, kind: str, product: dict[str, Any], package: Package,
                   packages: dict[tuple[str, str], Package]) -> str | None:
        """URI of a companion, which may lie in another package of the visit."""
        wanted = product.get(kind)
        if not wanted:
            return None
        number, separator, pattern = wanted.rpartition("::")
        others = [other for (field, _), other in sorted(packages.items()) if field == number]
        for holder in others if separator else [package]:
            if member := holder.find(pattern):
                return "::".join(filter(None, holder.place(member)))
        if kind != "label":
            self.notes[f"{product['modality']} without its {kind}"] += 1
        return None

    def _dicom(self, package: Package, product: dict[str, Any]) -> Scan:
        if package.fault or not package.dicom:
            return self._scan(package, product, reason=package.fault or "missing_member")
        folder = max(package.dicom, key=lambda name: (package.dicom[name], name))
        if len(package.dicom) > 1:
            self.notes["DICOM package with several folders: the fullest is taken"] += 1
        return self._scan(package, product, folder)

    def _scan(self, package: Package, product: dict[str, Any], member: str = "",
              reason: str | None = None) -> Scan:
        uri, inside = package.place(member)
        file = package.unpacked.get(member, package.first)
        return Scan(uri=uri, member=inside or None, cohort=self.cohort, participant="", family="",
                    split="", session="", modality=product["modality"], reason=reason,
                    scanner=self.table["scanner"], field_strength=self.table["field_strength"],
                    facts=json.dumps(product.get("facts", {}), sort_keys=True),
                    size_bytes=file.size_bytes, modified=file.modified)

"""ADNI as LONI delivers it: names and columns are exact, people and numbers are invented."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from data_prep.cohorts.adni.reader import plain, read_cohort
from data_prep.cohorts.adni.tables import AdniPerson, Visit, parse_day
from data_prep.cohorts.source import Findings, Source
from data_prep.scan import Scan
from neurojepa.errors import DataError
from tests.helpers.dicom import slice_of
from tests.helpers.trees import write

OLD, NEW = "941_S_0901", "942_S_10902"
COLLECTION = ('"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description",'
              '"Type","Acq Date","Format","Downloaded"\n')
MERGE = ("RID,PTID,VISCODE,SITE,COLPROT,ORIGPROT,EXAMDATE,DX_bl,AGE,PTGENDER,PTEDUCAT,APOE4,MMSE,"
         "ABETA,DX\n")


def file_name(ptid: str, kind: str, series: str, numbers: str, ending: str = "nii") -> str:
    return f"ADNI_{ptid}_{kind}_{series}_Br_20070212141516000_{numbers}.{ending}"


def place(ptid: str, series: str, day: str, numbers: str, kind: str = "MR") -> str:
    """A NIfTI file in the tree: numbers are S..._I..."""
    image = numbers.split("_")[-1]
    return (f"ADNI/{ptid}/{series}/{day}_08_20_30.0/{image}/"
            f"{file_name(ptid, kind, series, numbers)}")


def slices(ptid: str, series: str, day: str, numbers: str, count: int = 3) -> dict[str, str]:
    folder = f"ADNI/{ptid}/{series}/{day}_08_20_30.0/{numbers.split('_')[-1]}"
    return {f"{folder}/ADNI_{ptid}_MR_{series}__br_raw_20060418193538653_{n}_{numbers}.dcm": "xx"
            for n in range(1, count + 1)}


def read(root: Path | str, tables: tuple[str, ...] = ()) -> tuple[list[Findings], Counter[str]]:
    source = Source(str(root), tables=tables)
    return list(read_cohort(source, "adni")), source.notes


def by_number(findings: list[Findings]) -> dict[str, Scan]:
    """Scans by the number of their image, which ends a file's name or its folder's."""
    return {re.findall(r"[_/]I(\d+)", scan.member or scan.uri)[-1]: scan
            for person in findings for scan in person.scans}


def labels(findings: list[Findings]) -> dict[tuple[str, str], str]:
    return {(session, name): value for person in findings
            for session, name, value in person.labels}


TREE: dict[str, str | bytes] = {
    **slices(OLD, "MP-RAGE", "2006-04-18", "S71_I101"),
    place(OLD, "MPR__GradWarp__B1_Correction__N3__Scaled", "2006-04-18", "S71_I102"): "x",
    place(OLD, "MP-RAGE_REPEAT", "2006-04-18", "S72_I103"): "x",
    place(OLD, "MPR-R__GradWarp__N3", "2006-04-18", "S72_I104"): "x",
    place(OLD, "MPR__GradWarp__N3", "2007-04-20", "S73_I105"): "x",
    place(OLD, "MPR__GradWarp", "2007-04-20", "S73_I106"): "x",
    place(OLD, "B1-calibration_Head", "2006-04-18", "S74_I107"): "x",
    place(OLD, "3-plane_localizer", "2006-04-18", "S75_I108"): "x",
    place(OLD, "Axial_PD_T2_FSE", "2006-04-18", "S76_I109"): "x",
    place(OLD, "Hippocampal_Mask", "2006-04-18", "S77_I110"): "x",
    place(OLD, "Water_Phantom", "2006-04-18", "S78_I111"): "x",
    f"ADNI/{OLD}/MP-RAGE/2006-04-18_08_20_30.0/I101/notes.xml": "x",
    # older layout: the series' number in place of the image's
    f"ADNI/{NEW}/Accelerated_Sagittal_MPRAGE/2018-03-02_10_00_00.0/S81/"
    + file_name(NEW, "MR", "Accelerated_Sagittal_MPRAGE", "S81_I201"): "x",
    place(NEW, "Accelerated_Sagittal_MPRAGE_ND", "2018-03-02", "S82_I202"): "x",
    place(NEW, "Sagittal_3D_FLAIR", "2018-03-02", "S83_I203"): "x",
    place(NEW, "Sagittal_3D_FLAIR_MPR_Cor", "2018-03-02", "S84_I204"): "x",
    place(NEW, "Axial_rsfMRI__Eyes_Open_", "2018-03-02", "S85_I205"): "x",
    "ADNI/README.pdf": "x",
}
TABLES: dict[str, str | bytes] = {
    "T1_collection_3_14_2024.csv": "\ufeff" + COLLECTION
    + f'"I101","{OLD}","MCI","F","70","sc","MRI","MP-RAGE","Original","4/18/2006","DCM","x"\n'
    + f'"102","{OLD}","MCI","F","70","sc","MRI","MPR; GradWarp; B1 Correction; N3; Scaled",'
      '"Processed","4/18/2006","NiFTI","x"\n'
    + f'"I105","{OLD}","MCI","F","71","m12","MRI","MPR; GradWarp; N3","Processed","4/20/2007",'
      '"NiFTI","x"\n'
    + f'"I201","{NEW}","CN","M","65","sc","MRI","Accelerated Sagittal MPRAGE","Original",'
      '"3/02/2018","NiFTI","x"\n'
    + f'"I999","{NEW}","CN","M","65","sc","MRI","Axial T2 FLAIR","Original","3/02/2018","DCM",""\n',
    "Study_data/ADNIMERGE_14Mar2024.csv": MERGE
    + f"901,{OLD},bl,5,ADNI1,ADNI1,2006-05-02,LMCI,70.4,Female,16,1,27,>1700,MCI\n"
    + f"901,{OLD},m12,5,ADNI1,ADNI1,2007-05-03,LMCI,70.4,Female,16,1,-4,200.5,MCI to Dementia\n"
    + f"901,{OLD},uns1,5,ADNI1,ADNI1,2007-07-03,LMCI,70.4,Female,16,1,30,,MCI\n"
    + f"10902,{NEW},bl,6,ADNI3,ADNI3,2018-02-20,CN,65.1,Male,12,0,30,,CN\n",
    "Study_data/DXSUM_PDXCONV_14Mar2024.csv": "Phase,PTID,RID,VISCODE,VISCODE2,EXAMDATE,DIAGNOSIS\n"
    + f"ADNI1,{OLD},901,m24,m24,20080501.0,3\n",
    "Study_data/MRILIST_14Mar2024.csv":
        "TYPE,SUBJECT,VISIT,MAGSTRENGTH,SEQUENCE,SCANDATE,STUDYID,SERIESID,IMAGEUID\n"
    + f"Original,{OLD},ADNI Screening,1.5,MP-RAGE,2006-04-18,61,71,101\n"
    + f"Processed,{OLD},ADNI Screening,1.5,MPR-R; GradWarp,2006-04-18,61,72,150\n"
    + f"Original,{NEW},ADNI3 Screening,3.0,Sagittal 3D FLAIR,2018-03-02,62,83,203\n",
    "Study_data/Dictionary_14Mar2024.csv": "FLDNAME,TEXT\nRID,caf\xe9\n".encode("latin-1"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("adni"), {**TREE, **TABLES})


def test_originals_repeats_and_versions(tree: Path):
    findings, notes = read(tree)
    scans = by_number(findings)
    assert [person.participant for person in findings] == [OLD, NEW]
    assert set(scans) == {"101", "103", "106", "201", "203", "205"}
    first = scans["101"]  # a DICOM series is its folder
    assert first.uri == f"{tree}/ADNI/{OLD}/MP-RAGE/2006-04-18_08_20_30.0/I101/"
    assert (first.size_bytes, first.modality, first.processing) == (6, "T1w", None)
    assert first.modified == max(file.stat().st_mtime for file in Path(first.uri).iterdir()
                                 if file.suffix == ".dcm")
    assert scans["103"].processing is None  # a repeat is a scan of its own
    assert scans["106"].processing == "gradwarp"  # where the original is not there
    assert (scans["203"].modality, scans["205"].modality) == ("FLAIR", "BOLD")
    assert notes["not taken: another version of an acquisition"] == 3  # 102, 104, 105
    assert notes["not taken: uncorrected twin of an image"] == 1  # 202
    for kind, count in {"localiser": 1, "calibration or phantom": 2, "hippocampus alone": 1,
                        "two echoes in one series": 1, "planes through a volume": 1}.items():
        assert notes[f"not taken: {kind}"] == count
    assert notes["not taken: xml file"] == notes["not taken: pdf file"] == 1
    assert notes["images of the download's list that are not in the source"] == 1
    assert notes["table of no known kind: not used"] == 1
    assert all(scan.reason is None for scan in scans.values())


def test_sessions_ages_and_labels(tree: Path):
    findings, notes = read(tree)
    scans, told = by_number(findings), labels(findings)
    # several scans a day are one session, screening belongs to baseline
    assert {scans[n].session for n in ("101", "103")} == {"bl"} and scans["106"].session == "m12"
    assert {scans[n].session for n in ("201", "203", "205")} == {"bl"}
    assert scans["101"].age_at_scan == pytest.approx(70.4 - 14 / 365.25, abs=0.01)
    assert scans["106"].age_at_scan == pytest.approx(70.4 + 353 / 365.25, abs=0.01)
    assert (scans["101"].sex, scans["203"].sex) == ("F", "M")
    assert (scans["101"].site, scans["203"].site) == ("941", "942")
    assert (scans["101"].field_strength, scans["203"].field_strength) == (1.5, 3.0)
    assert scans["103"].field_strength is None
    old = {key: value for key, value in told.items() if key[0] == "m12"}
    assert old["m12", "diagnosis"] == "AD" and "MMSE" not in {name for _, name in old}
    assert old["m12", "ABETA"] == "200.5" and old["m12", "days_since_baseline"] == "353"
    first = {name: value for session, name, value in findings[0].labels if session == "bl"}
    assert (first["diagnosis"], first["MMSE"]) == ("MCI", "27") and "ABETA" not in first
    assert (first["progression"], first["progression_horizon_months"]) == ("pMCI", "36")
    assert first["days_since_baseline"] == "-14"
    assert notes["ABETA that is no number: unknown"] == 1
    assert any("uns1" in note for note in notes)


def test_scan_far_from_any_visit_is_placed_by_days(tmp_path: Path):
    write(tmp_path, {**TABLES, place(OLD, "MPRAGE", "2006-09-09", "S1_I1"): "x",
                     place(OLD, "MPRAGE", "2006-07-31", "S2_I2"): "x"})
    findings, _ = read(tmp_path)
    scans = by_number(findings)
    assert (scans["1"].session, scans["2"].session) == ("day130", "bl")
    assert scans["1"].age_at_scan == pytest.approx(70.4 + 130 / 365.25, abs=0.01)
    assert ("day130", "diagnosis") not in labels(findings)


def test_no_dates_or_ids_in_labels_sessions_and_notes(tree: Path):
    findings, notes = read(tree)
    said = " ".join([*notes, *(str(person.labels) for person in findings),
                     *(scan.session for person in findings for scan in person.scans)])
    for secret in (OLD, NEW, "2006", "2018", "901", "I101"):
        assert secret not in said


def test_without_tables_labels_are_unknown_and_nothing_is_lost(tmp_path: Path):
    findings, notes = read(write(tmp_path, TREE))
    scans = by_number(findings)
    assert set(scans) == {"101", "103", "106", "201", "203", "205"}
    assert {scans[n].session for n in ("101", "103")} == {"day0"}
    assert scans["106"].session == "day367"
    assert {scan.age_at_scan for scan in scans.values()} == {None}
    assert {scan.sex for scan in scans.values()} == {None} and labels(findings) == {}
    assert notes["images that no table lists: known by their folders"] == 16


def test_tables_that_lie_elsewhere(tmp_path: Path):
    write(tmp_path / "tables", TABLES)
    tables = tuple(str(file) for file in sorted((tmp_path / "tables").rglob("*.csv")))
    findings, _ = read(write(tmp_path / "source", TREE), tables)
    assert by_number(findings)["101"].sex == "F"
    assert labels(findings)["bl", "diagnosis"] in ("MCI", "CN")


def test_damaged_table_stops_with_its_name(tmp_path: Path):
    write(tmp_path, {**TREE, "a.csv": COLLECTION + "I1,941_S_0901\n"})
    with pytest.raises(DataError, match=r"a\.csv"):
        read(tmp_path)


def test_zips_of_a_download_and_the_tree_give_the_same(tree: Path, tmp_path: Path):
    write(tmp_path, {name: content for name, content in TABLES.items()})
    files = sorted(TREE.items())
    for part in range(2):  # one participant's images are spread over both
        with zipfile.ZipFile(tmp_path / f"T1_collection{part}.zip", "w") as archive:
            for name, content in files[part::2]:
                archive.writestr(name, content)
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 cut")
    packed, notes = read(tmp_path)
    scans, unpacked = by_number(packed), by_number(read(tree)[0])
    assert set(scans) == set(unpacked)
    for number, scan in scans.items():
        assert scan.uri.endswith(".zip") and unpacked[number].uri.endswith(scan.member or "?")
        assert (scan.session, scan.age_at_scan) == (unpacked[number].session,
                                                    unpacked[number].age_at_scan)
    assert notes["zip that cannot be read (truncated): not used"] == 1
    assert labels(packed) == labels(read(tree)[0])


def test_from_an_object_store(tree: Path, s3):
    import s3fs

    s3fs.S3FileSystem().put(str(tree), f"{s3.uri}/adni", recursive=True)
    remote, notes = read(f"{s3.uri}/adni")
    local, expected = read(tree)
    assert notes == expected and labels(remote) == labels(local)
    assert ({scan.uri.removeprefix(f"{s3.uri}/adni") for person in remote for scan in person.scans}
            == {scan.uri.removeprefix(str(tree)) for person in local for scan in person.scans})


PET = {
    place(OLD, "Co-registered__Averaged", "2006-05-10", "S91_I301", "PT"): "x",
    place(OLD, "Coreg__Avg__Std_Img_and_Vox_Siz__Uniform_Resolution", "2006-05-10", "S91_I302",
          "PT"): "x",
    place(OLD, "ADNI_Brain_PET__Raw_FDG", "2006-05-10", "S91_I303", "PT"): "x",
    place(OLD, "AV45_Coreg__Avg__Std_Img_and_Vox_Siz__Uniform_6mm_Res", "2006-05-12", "S92_I304",
          "PT"): "x",
    place(OLD, "AV45_Coreg__Avg__Std_Img_and_Vox_Siz__Uniform_Resolution", "2006-05-12",
          "S92_I305", "PT"): "x",
    place(OLD, "AV45_Early_Co-registered__Averaged", "2006-05-12", "S92_I306", "PT"): "x",
    place(OLD, "AV1451_Co-registered_Dynamic", "2006-05-13", "S93_I307", "PT"): "x",
    place(OLD, "ADNI_Brain_PET__Raw", "2006-05-14", "S94_I308", "PT"): "x",
    place(OLD, "Brain_Study", "2006-05-15", "S95_I309", "PT"): "x",
    place(OLD, "Some_later_level", "2006-05-15", "S96_I310", "PT"): "x",
}


def test_one_pet_level_for_each_visit_and_tracer(tmp_path: Path):
    write(tmp_path, {**PET, **TABLES, "pet.csv": COLLECTION + f'"I309","{OLD}","MCI","F","70","bl",'
                     '"PET","Amyloid PET with Florbetaben","Original","5/15/2006","DCM",""\n'
                     f'"I310","{OLD}","MCI","F","70","bl","PET","AV45 later level","Processed",'
                     '"5/15/2006","NiFTI",""\n'})
    findings, notes = read(tmp_path)
    found = {number: (scan.tracer, scan.processing) for number, scan in by_number(findings).items()}
    assert found == {"302": ("FDG", "uniform_8mm"), "304": ("AV45", "uniform_6mm"),
                     "307": ("AV1451", "dynamic"), "308": (None, None), "309": ("FBB", None)}
    assert notes["not taken: another level of a PET"] == 3
    assert notes["not taken: first minutes of a tracer"] == 1
    assert notes["not taken: description of no modality that is used"] == 1
    assert {scan.session for scan in by_number(findings).values()} == {"bl"}


def test_tracers_are_spelled_as_preparation_knows_them():
    from data_prep.cohorts.adni.tables import RULES
    from data_prep.volumes.functional.pet_table import PET_TRACERS

    assert set(RULES["tracers"]) <= set(PET_TRACERS)


QUALITY = ("RID,loni_study,loni_series,loni_image,series_date,series_type,series_quality,"
           "series_selected\n")


@pytest.mark.parametrize(("rows", "rejected"), [
    ("901,61,S71,I101,20060418,T1,4,0\n", {"101"}),
    ("901,61,S71,I101,20060418,T1,4,1\n", set()),  # the readers chose it all the same
    ("901,61,S71,101,20060418,T1,3,0\n", set()),
    ("901,61,S71,I101,20060418,T1,-1,0\n", set()),  # not done
    ("901,61,S73,I105,20070420,T1,4,0\n", {"106"}),  # under the number of another version
    ("901,61,S72,I150,20060418,T1,4,0\n", {"103"}),  # of one that only a list of images has
])
def test_readers_quality(tmp_path: Path, rows: str, rejected: set[str]):
    write(tmp_path, {**TREE, **TABLES, "MAYOADIRL_MRI_IMAGEQC_12_08_15.csv": QUALITY + rows})
    findings, _ = read(tmp_path)
    assert {number for number, scan in by_number(findings).items()
            if scan.reason == "cohort_excluded"} == rejected


def test_failed_series_of_mriquality_and_withdrawn_people(tmp_path: Path):
    gone = "381_S_10001"
    write(tmp_path, {**TREE, place(gone, "MPRAGE", "2019-01-01", "S99_I501"): "x",
                     "MRIQUALITY.csv": "RID,VISCODE,LONIUID,PASS\n901,sc,S72,0\n901,sc,S71,1\n"})
    scans = by_number(read(tmp_path)[0])
    assert {number for number, scan in scans.items() if scan.reason} == {"103", "501"}


def test_scans_without_a_day_keep_the_visit_that_a_table_gives_them(tmp_path: Path):
    lines = [f'I{number},{OLD},MCI,F,70,{visit},MRI,MP-RAGE,{kind},,DCM,""'
             for number, visit, kind in ((1, "sc", "Original"), (2, "m12", "Processed"),
                                         (3, "ADNI1/GO Month 24", "Original"))]
    write(tmp_path, {"list.csv": COLLECTION + "\n".join(lines), **{
        f"ADNI/{OLD}/MP-RAGE/I{number}/scan_I{number}.nii": "x" for number in (1, 2, 3)}})
    scans = by_number(read(tmp_path)[0])
    assert {number: (scan.session, scan.processing) for number, scan in scans.items()} == {
        "1": ("bl", None), "2": ("m12", "processed"), "3": ("1", None)}


def test_contradictory_age_sex_and_diagnosis_are_unknown(tmp_path: Path):
    csv = COLLECTION + (f'"I101","{OLD}","MCI","M","61","sc","MRI","MP-RAGE","Original",'
                        '"4/18/2006","DCM",""\n')
    dxsum = (f"Phase,PTID,RID,VISCODE,VISCODE2,EXAMDATE,DIAGNOSIS\nADNI1,{OLD},901,bl,bl,,1\n")
    write(tmp_path, {**TREE, **TABLES, "T1_collection_3_14_2024.csv": csv, "dx.csv": dxsum})
    findings, notes = read(tmp_path)
    scan = by_number(findings)["101"]
    assert scan.age_at_scan is None and scan.sex is None
    assert not {"diagnosis", "sex"} & {name for s, name, _ in findings[0].labels if s == "bl"}
    assert notes["age at a scan differs between tables: unknown"] == 1
    assert notes["people whose sex differs between rows or tables: unknown"] == 1
    assert notes["visits whose diagnosis differs between rows or tables: unknown"] == 1


def test_files_in_wrong_places_and_copies(tmp_path: Path):
    one = place(OLD, "MPRAGE", "2010-01-01", "S1_I1")
    folder, mixed = f"ADNI/{OLD}/MPRAGE", f"2011-01-01_08_20_30.0/S3/ADNI_{OLD}_MR_MPRAGE_br_raw_1"
    write(tmp_path, {
        one: "x", one.replace("ADNI/", "ADNI 2/"): "x",
        f"{folder}/2010-01-01_08_20_30.0/I2/{file_name(NEW, 'MR', 'MPRAGE', 'S2_I2')}": "x",
        "ADNI/loose.nii": "x",
        f"{folder}/{mixed}_1_S3_I3.dcm": "x",
        f"{folder}/{mixed}_2_S3_I4.dcm": "x",
        "list.csv": COLLECTION + f'I3,{OLD},CN,F,70,bl,MRI,MPRAGE,Original,1/1/2011,DCM,""',
        f"ADNI/{OLD}/t\u00eate ax\u00e9e T1/2012-01-01_08_20_30.0/I5/a scan_I5.nii": "x",
    })
    findings, notes = read(tmp_path)
    assert [scan.uri.removeprefix(f"{tmp_path}/").split("/")[3] for scan in findings[0].scans] == [
        "2010-01-01_08_20_30.0", "2011-01-01_08_20_30.0", "2012-01-01_08_20_30.0"]
    assert findings[0].scans[1].age_at_scan is None  # of two images in one folder, no row is theirs
    assert notes["not taken: second copy of an image"] == 1
    assert notes["not taken: file name and folder name different people"] == 1
    assert notes["not taken: image outside a participant's folder"] == 1


def test_scanner_and_field_strength_of_dicom_headers(tmp_path: Path):
    for name in slices(OLD, "MP-RAGE", "2006-04-18", "S71_I101"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        slice_of(0.0, 0, MagneticFieldStrength=1.5).save_as(tmp_path / name)
    source = Source(str(tmp_path))
    scan = next(read_cohort(source, "adni")).scans[0]
    assert (scan.scanner, scan.field_strength) == ("SIEMENS Prisma", 1.5)
    assert [uri.rpartition("/")[0] + "/" for uri in source.seen] == [scan.uri]  # type: ignore
    # where the table of images has both, no file is opened
    write(tmp_path, {"list.csv": COLLECTION.replace("Downloaded", "Imaging Protocol") + (
        f'I101,{OLD},MCI,F,70,sc,MRI,MP-RAGE,Original,4/18/2006,DCM,"Field Strength=3.0;'
        'Manufacturer=Acme;Mfg Model=One"\n')})
    source = Source(str(tmp_path))
    scan = next(read_cohort(source, "adni")).scans[0]
    assert (scan.scanner, scan.field_strength, source.seen) == ("Acme One", 3.0, {})


def test_content_that_is_not_downloaded(tmp_path: Path):
    write(tmp_path, {place(OLD, "MPRAGE", "2010-01-01", "S1_I1"):
                     "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"})
    linked = tmp_path / place(OLD, "MPRAGE", "2011-01-01", "S2_I2")
    linked.parent.mkdir(parents=True)
    linked.symlink_to("../.git/annex/objects/none")
    findings, _ = read(tmp_path)
    assert [scan.reason for scan in findings[0].scans] == ["not_downloaded"] * 2


@pytest.mark.parametrize(("course", "expected"), [
    ("bl MCI m12 MCI m36 MCI", "sMCI"),
    ("bl MCI m12 MCI m24 MCI", None),  # not followed for long enough
    ("bl MCI m12 MCI m36 AD", "pMCI"),
    ("bl MCI m12 AD m24 AD m60 AD", "pMCI"),
    ("bl MCI m12 AD m24 MCI", None),  # came back
    ("bl MCI m12 CN m24 AD", None),
    ("bl MCI m48 AD", None),  # later than the horizon
    ("bl MCI m12 CN m48 MCI", None),
    ("bl CN m12 MCI m24 AD", None),  # of another visit: at baseline there is nothing to progress
    ("bl AD m12 AD", None),
])
def test_stable_and_progressive_impairment(course: str, expected: str | None):
    words = course.split()
    person = AdniPerson({code: Visit(diagnoses={dx})
                     for code, dx in zip(words[::2], words[1::2], strict=True)})
    assert person.progression("bl") == expected


@pytest.mark.parametrize("text", ["2011-06-02", "6/2/2011", "06/02/11", "20110602", "20110602.0",
                                  "2011-06-02 09:30:00.0", "2011-06-02_09_30_00.0"])
def test_dates_as_adni_writes_them(text: str):
    day = parse_day(text)
    assert day is not None and day.isoformat() == "2011-06-02"


def test_descriptions_are_compared_plainly():
    assert plain("Coreg, Avg, Std Img and Vox Siz, Uniform 6mm Res") == plain(
        "Coreg__Avg__Std_Img_and_Vox_Siz__Uniform_6mm_Res")
    assert plain("Axial T2* GRE") == "axial t2 star gre"

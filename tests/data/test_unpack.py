"""Archives made to do harm, broken ones, and ordinary ones in every format."""

import io
import stat
import tarfile
import zipfile

import pytest

from stages.data import unpack
from stages.data.verify import DataError

NOISE = bytes((i * i * 7919) >> 5 & 255 for i in range(60_000))
CONTENTS = {"a/one.txt": b"one", "a/b/two.bin": bytes(range(256)) * 300, "three": b""}


def make_zip(path, contents=CONTENTS, links=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in contents.items():
            file.writestr(name, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, target)
    return path


def make_tar(path, contents=CONTENTS, links=None, kind=tarfile.SYMTYPE):
    with tarfile.open(path, "w:gz") as file:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            file.addfile(info)
    return path


@pytest.fixture(params=["archive.whl", "archive.tar.gz"])
def make(request, tmp_path):
    """Makes an archive in the format under test and returns its path."""
    maker = make_zip if request.param.endswith("whl") else make_tar
    return lambda **what: maker(tmp_path / request.param, **what)


def everything_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_names_members_and_member_agree_with_what_was_packed(make):
    archive = make()
    assert unpack.names(archive) == sorted(CONTENTS)
    assert unpack.members(archive, reversed(CONTENTS)) == CONTENTS
    assert unpack.member(archive, "a/b/two.bin") == CONTENTS["a/b/two.bin"]


def test_extract_writes_the_targets_and_nothing_else(make, tmp_path):
    unpack.extract(make(), {"a/one.txt": "first.txt", "a/b/two.bin": "deep/er/two"}, tmp_path / "out")
    assert everything_below(tmp_path / "out") == {"first.txt", "deep/er/two"}
    assert (tmp_path / "out/deep/er/two").read_bytes() == CONTENTS["a/b/two.bin"]


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil", "C:evil", "", "."]
)
def test_a_path_out_of_the_folder_is_refused_before_anything_is_written(make, tmp_path, name):
    hostile = make(contents={"good": b"good", name or "empty": b"evil"})
    with pytest.raises(DataError, match="leaves the folder"):
        unpack.extract(hostile, {"good": "good", name: name}, tmp_path / "inner" / "out")
    assert everything_below(tmp_path) == {hostile.name}


def test_a_link_already_in_the_folder_is_not_followed_out_of_it(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "out/door").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="through a link"):
        unpack.extract(make(), {"a/one.txt": "door/one.txt"}, tmp_path / "out")
    assert everything_below(tmp_path / "outside") == set()


def test_symbolic_links_are_no_members(make, tmp_path):
    archive = make(links={"secret": "/etc/passwd"})
    assert "secret" not in unpack.names(archive)
    with pytest.raises(DataError, match="no ordinary file 'secret'"):
        unpack.extract(archive, {"three": "three", "secret": "secret"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_hard_links_pipes_devices_and_folders_are_no_members(tmp_path, kind):
    archive = make_tar(tmp_path / "archive.tgz", links={"odd": "three"}, kind=kind)
    with pytest.raises(DataError, match="no ordinary file 'odd'"):
        unpack.member(archive, "odd")


def test_a_link_that_shadows_a_file_of_the_same_name_is_refused(tmp_path):
    archive = make_tar(tmp_path / "archive.tgz", links={"three": "/etc/passwd"})
    with pytest.raises(DataError, match="link or device under the name 'three'"):
        unpack.member(archive, "three")


def test_a_missing_member_is_named_with_its_archive(make):
    archive = make()
    with pytest.raises(DataError, match="no ordinary file 'four'") as error:
        unpack.member(archive, "four")
    assert str(archive) in str(error.value)


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(DataError, match="gone.zip is missing"):
        unpack.names(tmp_path / "gone.zip")


@pytest.mark.parametrize("damage", ["cut short", "not an archive", "empty"])
def test_a_broken_archive_is_an_error_of_the_data(make, damage):
    archive = make(contents={"noise": NOISE})
    data = archive.read_bytes()
    broken = {"cut short": data[: len(data) // 2], "not an archive": b"<html>", "empty": b""}
    archive.write_bytes(broken[damage])
    with pytest.raises(DataError, match="fetch it anew"):
        unpack.member(archive, "noise")


def test_a_flipped_bit_in_a_zip_is_an_error_of_the_data(tmp_path):
    """A tar has no checksum of its contents: there the digest of the whole archive has to do."""
    archive = make_zip(tmp_path / "archive.zip", contents={"noise": NOISE})
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match="fetch it anew"):
        unpack.member(archive, "noise")


def test_a_bomb_is_refused_by_its_declared_size_before_anything_is_written(make, tmp_path, monkeypatch):
    archive = make(contents={"small": b"small", "bomb": bytes(3_000_000)})
    assert archive.stat().st_size < 30_000
    monkeypatch.setattr(unpack, "LIMIT_BYTES", 2_000_000)
    with pytest.raises(DataError, match="would unpack to 3000005 bytes"):
        unpack.extract(archive, {"small": "small", "bomb": "bomb"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert unpack.member(archive, "small") == b"small", "what is not asked for does no harm"


def test_a_zip_that_holds_more_than_it_declares_gives_no_more(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "archive.zip", contents={"bomb": bytes(3_000_000)})
    declared, lie = (3_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little")
    assert archive.read_bytes().count(declared) == 2, "in the entry's own header and in the directory"
    archive.write_bytes(archive.read_bytes().replace(declared, lie))
    monkeypatch.setattr(unpack, "LIMIT_BYTES", 2_000)
    with pytest.raises(DataError, match="fetch it anew"):
        unpack.member(archive, "bomb")


def test_a_zip_whose_last_entry_of_a_name_is_a_link_has_no_such_file(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(tmp_path / "archive.zip", links={"three": "/etc/passwd"})
    with pytest.raises(DataError, match="no ordinary file 'three'"):
        unpack.member(archive, "three")


def test_a_link_and_then_a_file_through_it_stay_in_the_folder(make, tmp_path):
    """The link is never made, so the file lands beside it, in a folder of its name."""
    (tmp_path / "outside").mkdir()
    archive = make(contents={"door/one.txt": b"one"}, links={"door": str(tmp_path / "outside")})
    unpack.extract(archive, {"door/one.txt": "door/one.txt"}, tmp_path / "out")
    assert everything_below(tmp_path / "outside") == set()
    assert (tmp_path / "out/door/one.txt").read_bytes() == b"one" and not (tmp_path / "out/door").is_symlink()

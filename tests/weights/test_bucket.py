"""Folders at gs://: what is copied, and what a failure leaves."""

import shutil
from pathlib import Path

import pytest
import twins
from clouds import cloud_in
from cogi2v_convert.__main__ import main
from etils.epath import gpath
from folders import left, one_line

from cogi2v_jax.disk import replace_when_done
from cogi2v_jax.loading import load
from cogi2v_jax.weights import bucket
from cogi2v_jax.weights.checkpoint import MANIFEST
from cogi2v_jax.weights.hub import locate


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """gs:// as a local folder, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cloud"
    folder.mkdir()
    with cloud_in(folder):
        yield folder


def test_only_the_needed_files_of_a_bucket_are_copied_and_once(cloud, monkeypatch):
    shutil.copytree(twins.TINY, cloud / "models/tiny")
    (cloud / "models/tiny/README.md").write_text("not needed")
    said = []
    folder = locate("gs://models/tiny/", said.append)
    assert (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        == twins.FILES
    )
    assert said == [f"copying gs://models/tiny into {folder}"]
    assert locate("gs://models/tiny", said.append) == folder
    assert len(said) == 1
    config = cloud / "models/tiny/vae/config.json"
    config.write_text(config.read_text() + "\n")
    (cloud / "models/tiny/model_index.json").unlink()
    assert locate("gs://models/tiny", said.append) == folder
    assert (folder / "vae/config.json").read_bytes() == config.read_bytes()
    assert left(folder) == left(cloud / "models/tiny") - {"README.md", "loss.png"}


def test_a_conversion_is_written_to_a_bucket_its_manifest_last_and_read_from_it(
    cloud, monkeypatch, capsys
):
    order = []
    copy = shutil.copyfileobj
    monkeypatch.setattr(
        shutil,
        "copyfileobj",
        lambda here, there, *rest: (order.append(here.name), copy(here, there, *rest)),
    )
    shutil.copytree(twins.TINY, cloud / "models/tiny")
    assert main(["to-flax", "gs://models/tiny", "gs://models/flax/tiny"]) == 0
    assert capsys.readouterr().out == "gs://models/flax/tiny\n"
    assert Path(order[-1]).name == MANIFEST
    assert (cloud / "models/flax/tiny" / MANIFEST).is_file()
    assert load("gs://models/flax/tiny", say=lambda line: None).config.name == "cogi2v-tiny"
    assert main(["check", "gs://models/flax/tiny"]) == 0
    assert capsys.readouterr().out == "gs://models/flax/tiny: whole: every file and every tensor\n"


def test_an_upload_that_fails_leaves_nothing(cloud, monkeypatch, capsys):
    copy = shutil.copyfileobj

    def fail(here, there, *rest):
        if here.name.endswith(MANIFEST):
            raise OSError("no quota")
        copy(here, there, *rest)

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    line = one_line(capsys, ["to-flax", twins.TINY, "gs://models/flax"])
    assert "cannot use gs://models/flax: no quota; gcloud auth" in line
    assert left(cloud / "models") == set()


def test_a_bucket_s_folder_that_exists_is_refused_before_the_work(cloud, capsys):
    (cloud / "models").mkdir()
    (cloud / "models/mine.txt").write_text("mine")
    line = one_line(capsys, ["to-flax", twins.TINY, "gs://models"])
    assert "gs://models must not exist yet: found mine.txt in it" in line
    assert left(cloud / "models") == {"mine.txt"}


def test_a_bucket_without_a_checkpoint_and_one_that_can_not_be_reached_are_one_line(
    cloud, monkeypatch
):
    with pytest.raises(
        FileNotFoundError, match=r"folder: found neither a diffusers nor a converted folder there$"
    ):
        locate("gs://models/nothing")
    monkeypatch.setattr(
        gpath._GPath,
        "is_dir",
        lambda path: (_ for _ in ()).throw(ImportError("Please install gcsfs")),
    )
    with pytest.raises(
        FileNotFoundError,
        match=r"^cannot reach gs://models/nothing: a library is missing; pip install gcsfs$",
    ):
        locate("gs://models/nothing")
    with (
        pytest.raises(FileNotFoundError, match="pip install gcsfs"),
        bucket.uploading("gs://models/new", MANIFEST),
    ):
        pass


def test_what_another_process_is_copying_stays(cloud):
    shutil.copytree(twins.TINY, cloud / "models/tiny")
    folder = locate("gs://models/tiny", lambda line: None)
    (folder / "vae/old.bin").write_text("of an earlier state")
    (folder / "vae/config.json").unlink()  # copied again
    with replace_when_done(folder / "vae/new.bin") as part:
        part.write_text("half of")
        locate("gs://models/tiny", lambda line: None)
        assert part.read_text() == "half of"
    assert (folder / "vae/new.bin").exists()
    assert not (folder / "vae/old.bin").exists()


def test_a_file_that_can_not_be_removed_from_the_cache_is_left(cloud, monkeypatch):
    shutil.copytree(twins.TINY, cloud / "models/tiny")
    folder = locate("gs://models/tiny", lambda line: None)
    (folder / "old.bin").write_text("of an earlier state")

    def fail(path, missing_ok=False):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", fail)
    assert locate("gs://models/tiny", lambda line: None) == folder
    assert left(folder) - left(cloud / "models/tiny") == {"old.bin"}

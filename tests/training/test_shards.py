"""Prepared clips on disk: what is read is what was written, and what is damaged is named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cogi2v_jax.training import shards
from cogi2v_jax.training.clips import Bucket, Clip
from cogi2v_jax.training.shards import LATENTS, MANIFEST, PIXELS, Plan

BUCKETS = [Bucket(9, 32, 48), Bucket(9, 48, 32)]
WEIGHTS = {"vae": "a", "text_encoder": "b"}


def listed(folder: Path, count: int = 35) -> list[Clip]:
    clips = [Clip(f"{k}.mp4", folder / f"{k}.mp4", f"caption {k % 70}") for k in range(count)]
    for number, clip in enumerate(clips):
        clip.path.write_bytes(bytes(number))
    return clips


def planned(folder: Path, count: int = 35, kind: str = LATENTS) -> Plan:
    model = {"title": "cogi2v-tiny", "weights": WEIGHTS}
    return Plan(kind, listed(folder, count), BUCKETS, 8.0, "bfloat16", model)


def values(plan: Plan, number: int) -> dict[str, np.ndarray]:
    """The tensors of a clip."""
    rng = np.random.default_rng(number)
    if plan.kind == PIXELS:
        return {"pixels": rng.integers(0, 256, (9, 32, 48, 3), np.uint8)}
    moments = rng.normal(size=(3, 4, 6, 32)).astype(ml_dtypes.bfloat16)
    return {"moments": moments, "image": rng.integers(0, 256, (32, 48, 3), np.uint8)}


def text(number: int) -> np.ndarray:
    return np.full((10, 8), number, ml_dtypes.bfloat16)


def write(plan: Plan, folder: Path, skipped: tuple[int, ...] = (3,)) -> None:
    """All of a plan, but for clips that are skipped."""
    folder.mkdir(exist_ok=True)
    for shard in plan.texts:
        shards.write_shard(folder, shard, {str(number): text(number) for number in shard.numbers})
    for shard in plan.videos:
        used = [number for number in shard.numbers if number not in skipped]
        tensors = {f"{n}.{name}": v for n in used for name, v in values(plan, n).items()}
        reasons = {number: "there is no such file" for number in shard.numbers if number in skipped}
        shards.write_shard(folder, shard, tensors, {number: number % 2 for number in used}, reasons)
    shards.write_manifest(folder, plan, {})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return planned(tmp_path)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    write(plan, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_what_is_read_is_what_was_written(plan: Plan, folder: Path) -> None:
    names = ["text-00000", *(f"clips-0000{index}" for index in range(3))]
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST,
        *(f"{name}.safetensors" for name in names),
    }
    prepared = shards.open(folder, check=True)
    assert prepared.kind == LATENTS
    assert (prepared.buckets, prepared.fps) == (tuple(BUCKETS), 8.0)
    assert sorted(prepared.clips) == [number for number in range(35) if number != 3]
    assert list(prepared.skipped) == [{"video": "3.mp4", "reason": "there is no such file"}]
    assert prepared.model == plan.model
    for number, clip in prepared.clips.items():
        assert (clip.video, clip.bucket) == (f"{number}.mp4", number % 2)
        assert prepared.captions[clip.caption] == f"caption {number}"
        read = prepared.read(number)
        expected = values(plan, number) | {"text": text(clip.caption)}
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert np.array_equal(read[name], tensor)
    assert prepared.captions[0] == ""
    assert np.array_equal(prepared.empty_text, text(0))


def test_bfloat16_is_read_without_jax(folder: Path) -> None:
    program = """
import sys
from pathlib import Path
from cogi2v_jax.training import shards
print(shards.open(Path(sys.argv[1])).read(0)["moments"].dtype, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    assert done.stdout == "bfloat16 False\n", done.stderr


def test_captions_fill_several_files_and_each_is_there_once(tmp_path: Path) -> None:
    plan = planned(tmp_path, count=100)
    assert [shard.numbers for shard in plan.texts] == [range(64), range(64, 71)]
    write(plan, tmp_path / "prepared")
    prepared = shards.open(tmp_path / "prepared")
    assert len(prepared.captions) == 71
    assert prepared.clips[99].caption == prepared.clips[29].caption
    assert np.array_equal(prepared.read(69)["text"], text(70))


def test_data_for_the_vae_are_frames_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, count=3, kind=PIXELS)
    write(plan, tmp_path / "prepared", skipped=())
    prepared = shards.open(tmp_path / "prepared")
    assert sorted(prepared.files) == ["clips-00000.safetensors", "clips-00001.safetensors"]
    read = prepared.read(2)
    assert read.keys() == {"pixels"}
    assert np.array_equal(read["pixels"], values(plan, 2)["pixels"])


def all_files(plan: Plan) -> list[shards.Shard]:
    return [*plan.texts, *plan.videos]


def test_what_is_there_is_kept_and_the_rest_is_still_to_be_made(plan: Plan, folder: Path) -> None:
    assert plan.remaining(folder, all_files(plan)) == []
    for shard in (plan.texts[0], plan.videos[1]):
        (folder / shard.name).unlink()
    assert plan.remaining(folder, all_files(plan)) == [plan.texts[0], plan.videos[1]]


def newer(plan: Plan) -> Plan:
    plan.clips[20].path.write_bytes(b"another")
    return plan


def renamed(plan: Plan) -> Plan:
    return replace(plan, clips=[plan.clips[0]._replace(name="x.mp4"), *plan.clips[1:]])


def with_weights(part: str):
    return lambda plan: replace(plan, model={"weights": WEIGHTS | {part: "c"}})


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (newer, "clips-00001"),
        (renamed, "clips-00000"),
        (lambda plan: replace(plan, clips=plan.clips[:16]), "clips-00001"),
        (lambda plan: replace(plan, buckets=BUCKETS[:1]), "clips-00000"),
        (lambda plan: replace(plan, fps=16.0), "clips-00000"),
        (lambda plan: replace(plan, dtype="float32"), "clips-00000"),
        (lambda plan: replace(plan, kind=PIXELS), "clips-00000"),
        (with_weights("vae"), "clips-00000"),
        (with_weights("text_encoder"), "text-00000"),
    ],
)
def test_a_folder_of_other_clips_or_settings_is_refused_in_one_line(
    change, file: str, plan: Plan, folder: Path
) -> None:
    other = change(replace(plan))
    with pytest.raises(ValueError, match=rf"\A.*got {file}.*delete these files.*\Z"):
        other.remaining(folder, all_files(other))


def test_a_folder_of_anything_else_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / ".DS_Store").touch()
    shards.check_folder(folder)
    shards.check_folder(tmp_path / "new")
    site = tmp_path / "site"
    site.mkdir()
    for name, text in (("manifest.json", '{"name": "an app"}'), ("clips-00000.txt", "")):
        (site / name).write_text(text)
        with pytest.raises(
            ValueError, match=f"must be new, empty, or of prepared clips: got {name}"
        ):
            shards.check_folder(site)
        (site / name).unlink()


def test_a_corrected_caption_leaves_the_clips_as_they_are(plan: Plan, folder: Path) -> None:
    clips = [plan.clips[0]._replace(caption="another"), *plan.clips[1:]]
    other = replace(plan, clips=clips)
    assert other.videos == plan.videos
    with pytest.raises(ValueError, match=r"got text-00000\.safetensors of others"):
        other.remaining(folder, all_files(other))


def test_sums_show_a_flipped_bit(folder: Path) -> None:
    path = folder / "clips-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shards.open(folder)
    with pytest.raises(ValueError, match=r"\A.*got clips-00001\.safetensors missing or with other"):
        shards.open(folder, check=True)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut short")])
def test_a_file_that_is_missing_or_cut_short_is_named(damage, folder: Path) -> None:
    damage(folder / "text-00000.safetensors")
    with pytest.raises(ValueError, match=r"\A.*got text-00000\.safetensors missing.*again\Z"):
        shards.open(folder)


def test_a_file_that_breaks_while_it_is_in_use_is_named(plan: Plan, folder: Path) -> None:
    prepared = shards.open(folder)
    path = folder / "clips-00000.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"\A.*clips-00000\.safetensors must be a whole shard"):
        prepared.read(0)
    with pytest.raises(ValueError, match=r"\A.*clips-00000\.safetensors must be a whole shard"):
        plan.remaining(folder, all_files(plan))


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"clips": [{}]}, {"clips": 3}, {"files": []}, {"buckets": [[1]]}]
)
def test_a_manifest_of_anything_else_is_refused_in_one_line(change: dict, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=r"\A.*must be .*again\Z"):
        shards.open(folder)


def test_where_no_clip_can_be_used_nothing_of_them_is_left(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    with pytest.raises(ValueError, match=r"got 35 skipped; 0\.mp4: there is no such file"):
        write(plan, folder, skipped=tuple(range(35)))
    assert [path.name for path in folder.iterdir()] == ["text-00000.safetensors"]

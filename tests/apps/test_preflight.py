"""The preflight's judgement, on machines that we make up, and what it finds on this one."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogi2v_jax import loading
from cogi2v_jax.apps import preflight
from cogi2v_jax.apps.preflight import Machine, Unfit, Weights, check, faults
from cogi2v_jax.devices import plan
from cogi2v_jax.weights import hub

MODEL = "cogvideox-5b-i2v"
V5E_1 = Machine("TPU v5 lite", 1, 15.75, "0.0.52", 47.0, 100.0)
V5E_8 = V5E_1._replace(chips=8)
LAPTOP = Machine("cpu", 1, None, None, 16.0, 200.0)
WEIGHTS = Weights(20.0, 20.0)
SAME = {
    "model": MODEL,
    "height": 480,
    "width": 720,
    "num_frames": 49,
    "steps": 50,
    "guided": True,
    "dtype": "bfloat16",
    "attention": "splash",
}


NEWER = "libtpu must be 0.0.42 or newer for this jax"
INSTALL = 'run: pip install "libtpu==0.0.42.*", then this cell again'


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """A table in which all stages fit eight chips, and one chip until a test changes a row."""
    table = [
        {
            **SAME,
            "stage": stage,
            "mesh": mesh,
            "fits": True,
            "peak_gib": 9.0,
            "static_seconds": 1.0,
        }
        for mesh in ("v5e-1", "v5e-8")
        for stage in plan.STAGES
    ]
    monkeypatch.setattr(plan, "table", lambda: table)
    monkeypatch.setattr(preflight, "required_libtpu", lambda: ("0.0.42", "0.0.42.*"))
    return table


@pytest.fixture
def on(monkeypatch):
    """Puts us on another machine: `on(machine)`. Returns what is said there."""

    def move(machine: Machine, weights: Weights = WEIGHTS) -> list[str]:
        monkeypatch.setattr(preflight, "look", lambda: machine)
        monkeypatch.setattr(preflight, "weights", lambda model, say: weights)
        return []

    return move


# the judgement


@pytest.mark.parametrize("machine", [V5E_1, V5E_8, V5E_1._replace(ram_gib=12.7, disk_gib=60.0)])
def test_a_released_checkpoint_passes_on_a_notebooks_tpu(machine):
    assert faults(MODEL, machine, WEIGHTS) == []


def test_without_an_accelerator_a_released_checkpoint_is_refused_with_the_way_out():
    (fault,) = faults(MODEL, LAPTOP, WEIGHTS)
    assert fault == (
        "cogvideox-5b-i2v must run on an accelerator: got a CPU, which would take days; switch "
        "the machine to a TPU, or take cogi2v-tiny"
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"ram_gib": 6.0},
            "memory must be 8 GiB for cogvideox-5b-i2v: got 6.0; choose a machine with more of it",
        ),
        (
            {"disk_gib": 41.0},
            "disk must have 42 GiB free for cogvideox-5b-i2v (20 to fetch, 20 to convert): got 41; "
            "delete something, or set HF_HOME and XDG_CACHE_HOME to folders on a larger disk",
        ),
        (
            {"libtpu": "0.0.17"},
            f"{NEWER}: got 0.0.17; {INSTALL}",
        ),
        (
            {"libtpu": None},
            f"{NEWER}: got none; {INSTALL}",
        ),
        (
            {"kind": "TPU v2", "hbm_gib": 7.5},
            "cogvideox-5b-i2v must fit the device's memory: got 1 x 7.5 GiB, less than the 10.5 "
            "of its transformer alone; "
            "choose v5e-1 or v5e-8, or take cogi2v-tiny",
        ),
    ],
)
def test_what_a_machine_lacks_is_named_with_its_remedy(change, fault):
    assert faults(MODEL, V5E_1._replace(**change), WEIGHTS) == [fault]


def test_a_machine_on_which_the_compiler_saw_a_phase_overflow_is_refused(rows):
    rows[3]["fits"] = False
    assert faults(MODEL, V5E_1, WEIGHTS) == [
        "cogvideox-5b-i2v must fit the device's memory: got decode, too large for 1 x TPU v5 "
        "lite; choose v5e-8, or take cogi2v-tiny"
    ]
    assert faults(MODEL, V5E_8, WEIGHTS) == []


def test_everything_that_is_lacking_is_said_at_once(rows):
    rows[3]["fits"] = False
    assert (
        len(faults(MODEL, V5E_1._replace(ram_gib=6.0, disk_gib=5.0, libtpu="0.0.17"), WEIGHTS)) == 4
    )


def test_what_is_already_on_the_disk_needs_no_room():
    assert faults(MODEL, V5E_1._replace(disk_gib=2.5), Weights(0.0, 0.0)) == []


@pytest.mark.parametrize("version", ["0.0.42", "0.0.42.1", "0.0.100", "0.1.0.dev20260101+nightly"])
def test_a_newer_library_is_no_fault(version):
    assert faults(MODEL, V5E_1._replace(libtpu=version), WEIGHTS) == []


def test_the_tpus_library_is_no_matter_on_a_gpu():
    assert faults(MODEL, Machine("NVIDIA L4", 1, 22.0, None, 47.0, 100.0), WEIGHTS) == []


# the choice


def test_auto_takes_the_released_checkpoint_where_it_fits_and_says_that_nobody_ran_it(on, capsys):
    on(V5E_1)
    assert check() == MODEL
    assert capsys.readouterr().out.splitlines() == [
        "this machine: 1 x TPU v5 lite of 15.8 GiB, libtpu 0.0.52, 47.0 GiB of memory, 100 GiB of "
        "disk free",
        "cogvideox-5b-i2v: fits, by ahead-of-time compiles for v5e-1; nobody has run it there yet",
    ]


def test_auto_takes_the_embedded_model_without_an_accelerator_and_says_why(on, capsys):
    on(LAPTOP)
    assert check() == "cogi2v-tiny"
    assert capsys.readouterr().out.splitlines() == [
        "this machine: no accelerator, 16.0 GiB of memory, 200 GiB of disk free",
        "there is no accelerator, so this takes cogi2v-tiny, a small model that knows only flat "
        "shapes",
    ]


def test_auto_takes_the_embedded_model_where_the_disk_is_too_small_and_says_so(on, capsys):
    on(V5E_1._replace(disk_gib=30.0))
    assert check() == "cogi2v-tiny"
    out = capsys.readouterr().out
    assert "disk must have 42 GiB free" in out
    assert "so this takes cogi2v-tiny" in out


@pytest.mark.parametrize(
    ("machine", "word"), [(LAPTOP, "accelerator"), (V5E_1._replace(disk_gib=30.0), "disk must")]
)
def test_a_released_checkpoint_that_was_chosen_stops_where_it_does_not_fit(on, machine, word):
    on(machine)
    with pytest.raises(Unfit, match=word):
        check(MODEL, say=lambda line: None)


@pytest.mark.parametrize("wanted", ["auto", MODEL, "cogi2v-tiny"])
def test_a_library_that_is_too_old_stops_every_choice(on, wanted):
    on(V5E_1._replace(libtpu="0.0.17"))
    with pytest.raises(Unfit, match="pip install"):
        check(wanted, say=lambda line: None)


@pytest.mark.parametrize("wanted", ["cogi2v-tiny", "someone/a-finetune"])
def test_the_embedded_model_and_strangers_are_taken_as_they_are(on, wanted):
    on(LAPTOP._replace(disk_gib=0.1))
    assert check(wanted, say=lambda line: None) == wanted


def test_what_training_takes_is_said_where_it_was_compiled(on, rows, capsys):
    step = {"stage": "train", "method": "lora", "rank": 16, "int8": False, "kept": "host"}
    rows.append({**SAME, **step, "mesh": "v5e-1", "fits": True, "peak_gib": 13.0})
    rows[-1] |= {"static_seconds": 12.5, "jax": "1", "libtpu": "2", "date": "2030-01-01"}
    on(V5E_1)
    preflight.say_training(MODEL)
    assert "LoRA of rank 16, host kept" in capsys.readouterr().out
    on(V5E_8)
    preflight.say_training(MODEL)
    assert "not compiled for it; compiled for v5e-1" in capsys.readouterr().out
    for machine, model in ((LAPTOP, MODEL), (V5E_1._replace(chips=3), MODEL), (V5E_1, "a/b")):
        on(machine)
        preflight.say_training(model)
        assert capsys.readouterr().out == ""


def test_a_machine_for_which_nothing_was_compiled_is_told_so(on, capsys):
    on(V5E_1._replace(chips=4))
    assert check(MODEL) == MODEL
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"{MODEL}: was not compiled for this machine, so whether it fits is not known"
    )


# the facts


def test_this_machine_is_found_as_it_is():
    machine = preflight.look()
    assert machine.kind == "cpu"
    assert 0.5 < machine.ram_gib < 10_000
    assert 0 < machine.disk_gib < 1e6


def test_a_tpu_whose_library_is_too_old_is_not_woken(monkeypatch):
    monkeypatch.setattr(preflight, "has_tpu", lambda: True)
    monkeypatch.setattr(preflight, "installed", lambda package: "0.0.17")
    machine = preflight.look()
    assert machine[:4] == ("TPU", 0, None, "0.0.17")
    assert preflight.describe(machine).startswith("this machine: TPU, libtpu 0.0.17, ")


def test_an_old_library_without_a_tpu_hides_no_device(monkeypatch):
    monkeypatch.setattr(preflight, "has_tpu", lambda: False)
    monkeypatch.setattr(preflight, "installed", lambda package: "0.0.17")
    assert preflight.look().kind == "cpu"


def test_the_library_that_jax_needs_is_read_off_jax_itself(monkeypatch):
    monkeypatch.undo()
    needed, pin = preflight.required_libtpu()
    assert pin == f"{needed}.*"
    assert preflight.numbers(needed) >= [0, 0, 42]


def test_the_hub_is_asked_for_sizes_alone(monkeypatch):
    asked = []

    def ask(repository):
        asked.append(repository)
        return SimpleNamespace(missing=4 * 2**30, size=8 * 2**30)

    monkeypatch.setattr(hub, "ask", ask)
    assert preflight.weights(MODEL) == Weights(4.0, 8.0)
    assert asked == ["zai-org/CogVideoX-5b-I2V"]
    monkeypatch.setattr(preflight, "is_converted", lambda model: True)
    assert preflight.weights(MODEL) == Weights(4.0, 0.0)


def test_a_hub_that_does_not_answer_is_said_and_stops_nothing(capsys):
    assert preflight.weights(MODEL) == Weights(0.0, 0.0)  # the tests have no network
    assert capsys.readouterr().out.startswith(
        "the hub does not say how large cogvideox-5b-i2v is ("
    )


def test_a_conversion_in_the_cache_is_found_by_its_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Compilations stay where the other tests have theirs.
    monkeypatch.setattr(loading, "keep_compilations", lambda: None)
    assert not preflight.is_converted("cogi2v-tiny")
    models = loading.load("cogi2v-tiny", say=lambda line: None)
    assert Path(models.folder).is_relative_to(tmp_path)
    assert preflight.is_converted("cogi2v-tiny")
    assert not preflight.is_converted(MODEL)


@pytest.mark.parametrize("name", ["numpy", "jax"])
def test_a_library_of_another_version_than_the_installed_one_is_refused(name, monkeypatch):
    preflight.check_imports("restart")
    now = preflight.installed(name)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="0.7.2"))
    got = "got 0.7.2, which was imported before pip replaced it; restart"
    with pytest.raises(Unfit, match=re.escape(f"{name} must be {now} in this session: {got}")):
        preflight.check_imports("restart")

"""The tables of docs/craft.md, of a few steps."""

from pathlib import Path

import craft
import pytest

pytestmark = pytest.mark.slow


def test_every_table_is_written_into_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "craft.md"
    marks = (
        f"<!-- benchmarks/craft.py --tables {name} -->\n<!-- end -->\n" for name in craft.TABLES
    )
    page.write_text("before\n" + "between\n".join(marks) + "after\n")
    monkeypatch.setattr(craft, "PAGE", page)
    monkeypatch.setattr(craft, "EXACT", 5)
    monkeypatch.setattr(craft, "STEPS", (4, 5))
    monkeypatch.setattr(craft, "SEGMENTS", 2)
    few = {"num_inference_steps": 2}
    monkeypatch.setattr(craft, "GUIDANCE", {"defaults": few, "motion": few | {"motion": 1.0}})
    monkeypatch.setattr("sys.argv", ["craft.py", "--scenes", "1", "--write"])
    craft.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    heads, defaults, motion = lines[2], lines[4], lines[5]
    assert heads == ["", *craft.COLUMNS]
    assert (defaults[0], motion[0]) == ("defaults", "motion")
    assert 5 < float(defaults[heads.index("moved")]) < 30  # pixels
    four, five = (line for line in lines if line[:1] in (["4"], ["5"]))
    # Five steps of DDIM are what counts as exact here; DPM adds noise.
    assert five[1] == "0.000"
    assert float(four[1]) > 0
    assert four[4] == five[4] == ""
    assert "8 scenes" in text
    assert "defaults" in capsys.readouterr().out

from __future__ import annotations

import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice_convert.card import copy_licences, model_card
from tests.tiny import tiny_checkpoint


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        ("apache-2.0", "apache-2.0"),
        ("llama3.1", "llama3.1"),
        ("The Licence: of\nsomebody ---", "other"),
        (None, None),
        ("apache-2.0\nlicense: mit", "other"),
    ],
)
def test_the_licence_is_found_again(tmp_path, licence, found):
    folder = tiny_checkpoint(tmp_path / "m")
    (folder / "README.md").write_text(model_card({"name": "A", "licence": licence}, "org/a", ["LICENSE"], {"x": 1}))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.about()["licence"] == found


def test_what_a_card_says():
    yaml = pytest.importorskip("yaml")
    licences = ["LICENSE", "NOTICE.txt"]
    card = model_card({"name": "A\nb", "licence": "Mine: 1"}, "org/a", licences, {"text | hash": "a|b\nc", "bits": 4.5})
    start, front, body = card.split("---\n", 2)
    assert not start and yaml.safe_load(front) == {
        "license": "other",
        "license_name": "Mine: 1",
        "license_link": "LICENSE",
        "base_model": "org/a",
        "library_name": "ondevice",
        "pipeline_tag": "text-generation",
        "tags": ["ondevice"],
    }
    assert "# A b\n" in body and "| text \\| hash | a\\|b c |\n| bits | 4.5 |\n" in body
    assert "Mine: 1, as the source states. See [LICENSE](LICENSE), [NOTICE.txt](NOTICE.txt)." in body


def test_what_is_unknown_is_not_invented():
    card = model_card({"name": None, "licence": None}, "a file a.gguf")
    assert "license" not in card and "base_model" not in card
    assert "Licence: unknown, the source does not state one." in card and "from a file a.gguf." in card


def test_licence_files_of_a_folder_are_copied(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "m"
    source.mkdir(), folder.mkdir()
    for name in ("LICENSE", "LICENCE.md", "Notice", "USE_POLICY.md", "licensed.txt", "a.txt"):
        (source / name).write_text(name)
    (source / "COPYING").mkdir()
    wanted = ("LICENCE.md", "LICENSE", "Notice", "USE_POLICY.md")
    assert copy_licences(source, folder) == wanted
    assert sorted(path.name for path in folder.iterdir()) == sorted(wanted)
    assert (folder / "LICENSE").read_text() == "LICENSE"
    assert copy_licences(source / "a.txt", folder) == ()

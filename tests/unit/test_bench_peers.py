"""Ours against a peer: runners, turns, ratios, the picture and disturbances."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from ondevice.errors import OndeviceError
from ondevice_bench import contenders, disturb, peers, run_ours
from ondevice_bench.cases import Case
from ondevice_bench.contenders import Contender, llamas
from ondevice_bench.picture import svg
from ondevice_bench.ratios import compare
from ondevice_bench.traffic import model_bytes


def test_ratios_are_of_medians_against_the_best_variant():
    variants = {"slow": [[1, 1], [1, 1]], "fast": [[10, 12], [8, 10]], "lucky": [[1, 90], [1, 1]]}
    c = compare("quiet", "tg1", [[20, 22], [30, 32]], variants)
    assert c.peer == "fast" and c.ours == 26 and c.theirs == 10
    assert c.ratio == 2.6 and c.low == pytest.approx(21 / 11) and c.high == pytest.approx(31 / 9)


def test_rounds_that_did_not_run_in_pairs_are_not_compared():
    with pytest.raises(ValueError, match="zip"):
        compare("quiet", "tg1", [[1], [1]], {"peer": [[1]]})


def test_the_picture_is_xml_with_a_bar_and_an_error_bar_each():
    found = [compare(c, "tg<1>", [[2.0], [3.0]], {"p": [[1.0], [1.0]]}) for c in ("quiet", "nice")]
    root = ElementTree.fromstring(svg(found, "a & b"))
    kinds = [element.get("class") for element in root.iter()]
    assert kinds.count("bar") == 2 and kinds.count("error") == 6 and kinds.count("axis") == 1
    texts = [element.text for element in root.iter() if element.text]
    assert "a & b" in texts and "tg<1>, nice" in texts and "2.50" in texts


def fake(tmp_path, name, code):
    path = tmp_path / name
    path.write_text(code)
    return Contender(name, (sys.executable, str(path)))


SPEAKING = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
samples = {test[-1]: [%d.0 + (options["--cold"] != "0")] * int(options["--repetitions"])
           for test in json.loads(options["--tests"])}
print("noise"); print(json.dumps({"samples": samples, "bytes": 500, "parameters": 1000, "version": "v1"}))
"""


def test_peers_run_in_turn(tmp_path, monkeypatch, tiny_path):
    model = tmp_path / "m.gguf"
    model.touch()
    turns = []
    run = Contender.run
    monkeypatch.setattr(Contender, "run", lambda self, *rest: turns.append(self.name) or run(self, *rest))
    monkeypatch.setattr(peers, "ours", lambda model: fake(tmp_path, contenders.OURS, SPEAKING % 3))
    monkeypatch.setattr(peers, "llamas", lambda *given: [fake(tmp_path, "llama.cpp", SPEAKING % 2)])
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    args = [str(tiny_path), "--llama-python", sys.executable, "--llama-model", str(model), "--rounds", "2", "--cold"]
    args += ["--tests", "tg4,pp8@d2", "-t", "1", "--json", str(out), "--picture", str(picture)]
    result = CliRunner().invoke(peers.peers, args)
    assert result.exit_code == 0, result.output
    assert turns == [contenders.OURS, "llama.cpp"] * 4
    assert "1.50" in result.stdout and "133 % / 150 %" in result.stdout and "4.00" in result.stdout
    document = json.loads(out.read_text())
    assert [c["ratio"] for c in document["comparisons"]] == pytest.approx([1.5, 1.5, 4 / 3, 4 / 3])
    assert document["samples"][0]["rounds"] == [[3.0, 3.0], [3.0, 3.0]]
    assert document["contenders"]["llama.cpp"]["bits_per_weight"] == 4.0
    assert picture.read_text().startswith("<svg")


def test_a_peer_that_fails_is_named_with_its_reason(tmp_path):
    with pytest.raises(OndeviceError, match=r"bad\.py: ended with code 3: out of luck"):
        code = "import sys; print('first\\nout of luck', file=sys.stderr); sys.exit(3)"
        fake(tmp_path, "bad.py", code).run([Case("tg", 1)], 1, 1, 0)
    with pytest.raises(OndeviceError, match="does not start"):
        Contender("absent", (str(tmp_path / "absent"),)).run([Case("tg", 1)], 1, 1, 0)


def test_every_variant_of_the_peer_is_a_contender(tmp_path):
    found = llamas(tmp_path / "python", [tmp_path / "a.gguf", tmp_path / "b.gguf"], ["on", "off"], ["on"])
    assert len({c.name for c in found}) == 4 and found[1].name == "llama.cpp a.gguf, flash off, repack on"
    assert found[1].command[-4:] == ("--flash", "off", "--repack", "on")


def test_peers_without_a_gguf_file_say_so(tiny_path):
    result = CliRunner().invoke(peers.peers, [str(tiny_path), "--llama-python", sys.executable])
    assert result.exit_code == 1 and "--llama-model" in result.stderr


def test_peers_without_a_peer_say_how_to_get_one(tiny_path):
    result = CliRunner().invoke(peers.peers, [str(tiny_path)])
    assert result.exit_code == 2 and "--llama-python PATH" in result.stderr
    assert "pip install llama-cpp-python gguf" in CliRunner().invoke(peers.peers, ["--help"]).stdout


def test_our_runner_answers_like_the_others(tiny_cpu, tiny_path, monkeypatch, capsys):
    tests = json.dumps([["tg", 3, 2, 1, "one"], ["pp", 4, 0, 2, "two"]])
    options = ["--tests", tests, "--threads", "2", "--repetitions", "2", "--cold", "4096"]
    monkeypatch.setattr(sys, "argv", ["run_ours", str(tiny_path), *options])
    run_ours.main()
    answer = json.loads(capsys.readouterr().out)
    assert {name: len(samples) for name, samples in answer["samples"].items()} == {"one": 2, "two": 2}
    assert answer["bytes"] == model_bytes(tiny_cpu.decoder)
    assert answer["bytes"] * 8 / answer["parameters"] == pytest.approx(32, rel=0.02)


@pytest.mark.parametrize("kind", disturb.KINDS)
def test_a_disturbance_works_meanwhile_and_ends(kind, monkeypatch):
    started = []

    def popen(*args, **more):
        started.append(subprocess.Popen(*args, **more))
        return started[-1]

    monkeypatch.setattr(disturb, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
    with disturb.disturbed(kind):
        assert started[0].poll() is None
    assert started[0].poll() is not None

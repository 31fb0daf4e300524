"""The command line, on a tiny random model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import ondevice
from cpu_kernels.integer_dots import instruction_set
from ondevice.cli import COMMANDS, cli

GREEDY = ["--temp", "0", "--backend", "reference"]


@pytest.fixture
def ondevice_cli(tmp_path, monkeypatch):
    """Runs the command line in this process with an empty store; returns click's result."""
    monkeypatch.setenv("ONDEVICE_HOME", str(tmp_path / "store"))

    def run(*args, **extra):
        return CliRunner().invoke(cli, [str(arg) for arg in args], **extra)

    return run


def python(*args, timeout=60, **extra):
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **extra)


def answered(result):
    """The answer on stdout; generate ends it with a line break if the model has not."""
    return result.stdout.rstrip("\n")


def test_help_lists_all_commands_without_importing_them():
    code = (
        "import sys\nfrom ondevice.cli import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "print(sorted({'numpy', 'numba', 'rich', 'tokenizers', 'prompt_toolkit', 'jinja2'} & sys.modules.keys()))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    for name, (_, line) in COMMANDS.items():
        assert f"{name} " in done.stdout and line[:30] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(ondevice_cli, name):
    result = ondevice_cli(name, "--help")
    assert result.exit_code == 0 and f"{name} [OPTIONS]" in result.output


def test_module_and_version():
    done = python("-m", "ondevice", "--version")
    assert done.stdout.strip() == f"ondevice, version {ondevice.__version__}"


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["generat"], "Did you mean 'generate'?"),
        (["fly"], "Commands: chat, generate"),
        (["generate", "--max-token", "5"], "--max-tokens"),
        (["generate"], "Give a prompt with -p"),
        (["generate", "-p", "x", "--backend", "tpu"], "'tpu' is not one of"),
        (["generate", "-p", "x", "--top-k", "many"], "not a valid integer"),
        (["generate", "-p", "-", "-p", "-"], "there is one stdin"),
        (["generate", "-p", "x", "--logprobs", "3"], "with --json only"),
        (["generate", "-p", "x", "-t", "0"], "0 is not in the range"),
        (["eval", "--text", "/nowhere/at/all"], "does not exist"),
        (["chat"], "The prompt is empty"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(ondevice_cli, args, hint):
    result = ondevice_cli(*args)
    assert result.exit_code == 2 and hint in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "-p", "x", "--temp", "nan"], "error: temperature is nan"),
        (["generate", "-p", "x", "--stop", ""], "error: stop is"),
        (["generate", "smolm2", "-p", "x"], "did you mean smollm2?"),
        (["show", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["rm", "smollm2", "-y"], "no such model"),
        (["pull", "not a name"], "no such model"),
    ],
)
def test_errors_exit_1_with_one_line_and_no_traceback(ondevice_cli, args, message):
    result = ondevice_cli(*args)
    assert result.exit_code == 1 and message in result.stderr and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_generate_streams_the_answer_to_stdout_and_rates_to_stderr(ondevice_cli, tiny, tiny_path):
    result = ondevice_cli("generate", tiny_path, "-p", "Why is the sky blue?", "-n", 12, *GREEDY)
    answer = tiny.generate("Why is the sky blue?", temperature=0, max_tokens=12)
    assert result.exit_code == 0, result.output
    assert result.stdout == answer.text + ("" if answer.text.endswith("\n") else "\n")
    assert f"prompt {answer.stats.prompt_tokens} tokens, " in result.stderr
    assert f"answer {len(answer.tokens)} tokens, " in result.stderr


def test_generate_reads_a_prompt_from_stdin_and_takes_options(ondevice_cli, tiny, tiny_path):
    fields = {"max_tokens": 9, "seed": 4, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    fields |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    args = [part for key, value in fields.items() for part in (f"--{key.replace('_', '-')}", value)]
    args += ["--temp", "1.2", "--system", "S", "--backend", "reference"]
    result = ondevice_cli("generate", tiny_path, "-p", "-", *args, input="Hi")
    assert answered(result) == tiny.generate("Hi", system="S", temperature=1.2, **fields).text.rstrip("\n")


def test_generate_json_is_one_document_with_the_contracts_keys(ondevice_cli, tiny, tiny_path):
    args = ["generate", tiny_path, "-p", "Hi", "-p", "Ho", "-n", "4", "--json", "--logprobs", "2", *GREEDY]
    first, second = json.loads(ondevice_cli(*args).stdout)
    answers = tiny.generate(["Hi", "Ho"], temperature=0, max_tokens=4, logprobs=2)
    for document, answer in zip((first, second), answers):
        assert document["text"] == answer.text and document["tokens"] == answer.tokens
        assert document["finish_reason"] == answer.finish_reason
        assert {"prompt_tps", "generation_tps"} <= document.keys()
        assert document["stats"]["generated_tokens"] == len(answer.tokens)
        assert [entry["token"] for entry in document["logprobs"]] == answer.tokens
        assert len(document["logprobs"][0]["top"]) == 2


def test_generate_prints_a_batch_in_order(ondevice_cli, tiny, tiny_path):
    result = ondevice_cli("generate", tiny_path, "-p", "Hi", "-p", "Ho\nand more", "-n", 4, *GREEDY)
    one, two = tiny.generate(["Hi", "Ho\nand more"], temperature=0, max_tokens=4)
    assert result.stdout == f"[1] Hi\n{one.text.rstrip()}\n\n[2] Ho\n{two.text.rstrip()}\n\n"


def test_generate_raw_sends_the_text_as_it_is(ondevice_cli, tiny, tiny_path):
    result = ondevice_cli("generate", tiny_path, "-p", "The quick", "--raw", "-n", 5, *GREEDY)
    assert answered(result) == tiny.generate("The quick", raw=True, temperature=0, max_tokens=5).text.rstrip("\n")
    refused = ondevice_cli("generate", tiny_path, "-p", "x", "--context", 100_000, *GREEDY)
    assert refused.exit_code == 1 and "context of 128" in refused.stderr


def test_options_have_twins_in_the_environment(ondevice_cli, tiny, tiny_path):
    twins = {
        "ONDEVICE_MODEL": str(tiny_path),
        "ONDEVICE_BACKEND": "reference",
        "ONDEVICE_GENERATE_MAX_TOKENS": "5",
        "ONDEVICE_GENERATE_TEMP": "0",
        "ONDEVICE_GENERATE_PROMPT": "Why is it so?",
        "ONDEVICE_VERSION": "1",
    }
    result = ondevice_cli("generate", env=twins)
    assert answered(result) == tiny.generate("Why is it so?", temperature=0, max_tokens=5).text.rstrip("\n")


def test_chat_answers_a_piped_prompt_and_exits(ondevice_cli, tiny, tiny_path):
    answer = tiny.generate("Hi\nthere", temperature=0, max_tokens=6).text.rstrip("\n")
    piped = ondevice_cli("chat", tiny_path, "-n", 6, *GREEDY, input="Hi\nthere\n")
    given = ondevice_cli("chat", tiny_path, "-n", 6, *GREEDY, "-p", "Hi\nthere")
    assert answered(piped) == answered(given) == answer


def test_stdin_that_is_not_text_is_refused(ondevice_cli):
    refused = ondevice_cli("generate", "-p", "-", input=b"caf\xe9 au lait")
    assert refused.exit_code == 1 and "stdin: not utf-8 at byte 3" in refused.stderr


def test_the_store_from_empty_to_empty(ondevice_cli, tiny_path, tmp_path):
    assert ondevice_cli("ls", "--json").stdout == "[]\n"
    empty = ondevice_cli("ls")
    assert empty.stdout == "" and "No models" in empty.stderr
    home = tmp_path / "store" / "hub" / "some"
    home.mkdir(parents=True)
    (home / "model").symlink_to(tiny_path)
    (entry,) = json.loads(ondevice_cli("ls", "--json").stdout)
    assert entry["name"] == "some/model" and entry["format"] == "hub"
    assert "some/model" in ondevice_cli("ls").stdout
    about = json.loads(ondevice_cli("show", "some/model", "--json").stdout)
    assert about["architecture"] == "llama" and about["layers"] == 3
    assert "architecture" in ondevice_cli("show", "some/model").stdout
    kept = ondevice_cli("rm", "some/model", input="n\n")
    assert kept.exit_code == 130 and "Delete some/model" in kept.stderr
    assert ondevice_cli("rm", "some/model", "-y").exit_code == 0
    assert ondevice_cli("ls", "--json").stdout == "[]\n" and (tiny_path / "config.json").exists()


def test_doctor_reports_this_machine(ondevice_cli, monkeypatch):
    monkeypatch.setattr("ondevice.machine.BANDWIDTH_BYTES", 1 << 22)
    report = json.loads(ondevice_cli("doctor", "--json").stdout)
    assert report["machine"]["threads"] >= 1 and report["machine"]["read_gbs_all_threads"] > 0
    assert report["kernels"]["instruction_set"] == instruction_set()
    assert report["backends"]["cuda"].startswith(("ready on the", "no: "))
    assert report["backends"]["mlx"].startswith(("ready on the", "no: it"))
    assert report["store"]["models"] == 0
    assert report["kernels"]["amx"] == "yes" or report["kernels"]["amx"].startswith("no: ")
    text = ondevice_cli("doctor").stdout
    assert "bandwidth" in text and "GB/s" in text


def test_doctor_compiles_ahead_for_the_store(ondevice_cli, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("ondevice.machine.BANDWIDTH_BYTES", 1 << 22)
    assert "no model in the store" in ondevice_cli("doctor", "--warm").stderr
    folder = tmp_path / "store" / "hub" / "some"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(tiny_path)
    warmed = ondevice_cli("doctor", "--warm", "--json")
    assert "kernels for some/model are compiled" in warmed.stderr
    assert json.loads(warmed.stdout)["kernels"]["compiled"] > 0


WITHOUT_A_COMPILER = """
import sys, ondevice
from cpu_kernels import compile
def refuse(function, signature, name):
    raise SystemExit(f"{name} was not compiled ahead")
compile._machine_code = refuse
model = ondevice.load("some/model", backend="cpu")
model.generate(["Hello", "a long prompt " * 3], max_tokens=3)
print("answered")
"""


def test_doctor_compiles_everything_ahead(tiny_path, tmp_path):
    folder = tmp_path / "store" / "hub" / "some"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(tiny_path)
    env = {**os.environ, "ONDEVICE_HOME": str(tmp_path / "store"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert "not compiled ahead" in python("-c", WITHOUT_A_COMPILER, env=env).stderr
    warmed = python("-m", "ondevice", "doctor", "--warm", env=env, timeout=300)
    assert warmed.returncode == 0 and "compiling" in warmed.stderr
    done = python("-c", WITHOUT_A_COMPILER, env=env)
    assert (done.stdout, done.stderr) == ("answered\n", "")


def test_interrupting_exits_130():
    # A shell that runs the tests in the background has switched the signal off, and children inherit that.
    code = "import signal; signal.signal(2, signal.default_int_handler); from ondevice.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "generate", "-p", "-"], stdin=subprocess.PIPE)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "ONDEVICE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ondevice", "ls", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")

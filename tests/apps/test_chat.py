"""The chat's conversation, commands and loop: exact transcripts on a tiny random model."""

from __future__ import annotations

import re

import pytest

from ondevice.errors import ContextLengthError, OptionError
from ondevice.generation.sampling import SamplingParams
from ondevice_chat.conversation import Conversation
from ondevice_chat.loop import chat, read_message
from ondevice_chat.slash import Leave, run

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def conversation(tiny):
    return Conversation(tiny, GREEDY)


def transcript(conversation, *lines):
    """What the terminal shows; an exception in `lines` is raised where a line is asked for."""
    shown, waiting = [], iter([*lines, EOFError()])

    def read_line(prompt):
        line = next(waiting)
        if isinstance(line, BaseException):
            shown.append(f"{prompt}{type(line).__name__}\n")
            raise line
        shown.append(f"{prompt}{line}\n")
        return line

    chat(conversation, read_line, shown.append)
    return "".join(shown)


def expected(tiny, *turns, system=None):
    """The model's greedy answer to a list of alternating turns, computed afresh."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return tiny.generate(messages, system=system, temperature=0, max_tokens=8, ignore_eos=True).text


CUT = "[cut off after 8 tokens: /set max_tokens N allows more]\n"


def line(text):
    return text if text.endswith("\n") else text + "\n"


def test_two_turns_and_goodbye(tiny, conversation):
    one = expected(tiny, "Hi")
    two = expected(tiny, "Hi", one, "Why?")
    shown = transcript(conversation, "Hi", "", "Why?", "/exit", "never read")
    assert shown == f"> Hi\n{line(one)}{CUT}> \n> Why?\n{line(two)}{CUT}> /exit\n"
    assert [m["content"] for m in conversation.messages] == ["Hi", one, "Why?", two]


def test_a_turn_computes_only_what_is_new(conversation, tiny):
    list(conversation.ask("Hi"))
    assert conversation.stats.reused_tokens == 0
    list(conversation.ask("Why?"))
    held = len(tiny.encode("Hi")) - 1
    assert conversation.stats.reused_tokens >= held
    assert re.search(r"\(\+\d+ reused\)", run("/stats", conversation))


def test_ctrl_c_keeps_what_was_answered(tiny, conversation):
    answers = conversation.ask("Hi")
    part = next(answers) + next(answers) + next(answers)
    answers.close()
    assert conversation.note == "stopped"
    assert conversation.messages[1] == {"role": "assistant", "content": part}
    two = expected(tiny, "Hi", part, "Why?")
    assert "".join(conversation.ask("Why?")) == two


def test_ctrl_c_while_text_is_shown_stops_the_answer_and_the_chat_goes_on(tiny, conversation):
    shown = []

    def write(text):
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    lines = iter(["Hi", "/stats"])

    def read_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat(conversation, read_line, write)
    assert "[stopped]\n" in shown
    assert conversation.messages[1]["content"] == "".join(shown[:2])
    assert "ended by stopped" in shown[-1]


def test_a_turn_stopped_before_its_first_text_is_forgotten(conversation, tiny, monkeypatch):
    list(conversation.ask("Hi"))
    before = list(conversation.messages)

    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(conversation.session, "stream", interrupted)
    shown = transcript(conversation, "Why?")
    assert shown == "> Why?\n\n[stopped before the answer began; the message is forgotten]\n> EOFError\n"
    assert conversation.messages == before


def test_ctrl_c_twice_at_the_prompt_leaves(conversation):
    stop = KeyboardInterrupt
    assert transcript(conversation, stop(), stop(), "never read") == (
        "> KeyboardInterrupt\nCtrl+C again, or /exit, leaves.\n> KeyboardInterrupt\n"
    )
    assert transcript(conversation, stop(), "", stop(), "/exit").count("leaves.") == 2


def test_several_lines_between_triple_quotes():
    def message(*lines):
        waiting = iter(lines)
        return read_message(lambda _: next(waiting))

    assert message("plain") == "plain"
    assert message('"""one', "", 'two"""') == "one\n\ntwo"
    assert message('"""', "one", '"""') == "one"
    assert message('"""all in one"""') == "all in one"
    assert message('say """hi"""') == 'say """hi"""'


def test_an_end_inside_triple_quotes_leaves(conversation):
    assert transcript(conversation, '"""one') == '> """one\n. EOFError\n'


def test_commands(tiny, conversation):
    shown = transcript(
        conversation, "/stats", "/set temp 0.5", "/system Be brief.", "/system", "/system none", "/clear"
    )
    assert shown == (
        "> /stats\nnothing answered yet; context 0 of 128 tokens used\n"
        "> /set temp 0.5\nmax_tokens 8, temperature 0.5, top_k 0, top_p 1, min_p 0, repetition_penalty 1, "
        "presence_penalty 0, frequency_penalty 0, seed random\n"
        "> /system Be brief.\nsystem message: Be brief.\n"
        "> /system\nsystem message: Be brief.\n"
        "> /system none\nno system message\n"
        "> /clear\nthe conversation starts anew\n"
        "> EOFError\n"
    )


def test_help_names_every_command(conversation):
    text = run("/help", conversation)
    for name in ("/help", "/clear", "/system TEXT", "/set KEY VALUE", "/stats", "/exit", '"""'):
        assert f"\n{name}" in f"\n{text}"


def test_the_system_message_is_used_and_clear_keeps_it(tiny, conversation):
    run("/system Be brief.", conversation)
    text = expected(tiny, "Hi", system="Be brief.")
    assert "".join(conversation.ask("Hi")) == text
    run("/clear", conversation)
    assert conversation.messages == []
    assert "".join(conversation.ask("Hi")) == text != expected(tiny, "Hi")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/claer", r"no command /claer; did you mean /clear\? known are /help /clear /system /set /stats /exit"),
        ("/etc/passwd", "a space before the slash"),
        ("/", "no command /;"),
        ("/clear now", "/clear takes nothing"),
        ("/set", None),
        ("/set heat 1", "no setting 'heat'; known are max_tokens, temperature"),
        ("/set temp", "/set temp needs a value"),
        ("/set temp warm", "temperature is 'warm'; it must be a number"),
        ("/set temp nan", "temperature is nan"),
        ("/set top_p 2", "top_p is 2.0; it must be a number between 0 and 1"),
        ("/set max_tokens 1.5", "max_tokens is '1.5'; it must be a whole number"),
        ("/set seed -1", "seed is -1"),
    ],
)
def test_what_is_not_known_is_refused_and_changes_nothing(conversation, command, message):
    before = conversation.params
    if message is None:
        run(command, conversation)
    else:
        with pytest.raises(OptionError, match=message):
            run(command, conversation)
    assert conversation.params == before


def test_optional_settings_can_be_taken_away(conversation):
    conversation.set("seed", "5")
    conversation.set("stop", "###")
    assert conversation.settings().endswith("seed 5, stop '###'")
    conversation.set("seed", "none")
    conversation.set("stop", "none")
    assert conversation.settings().endswith("seed random")


def test_exit_leaves(conversation):
    with pytest.raises(Leave):
        run("/exit", conversation)


def test_a_space_before_the_slash_sends_text(tiny, conversation):
    assert transcript(conversation, " /exit").startswith(f">  /exit\n{line(expected(tiny, ' /exit'))}")


def test_a_full_context_says_how_to_go_on(tiny):
    room = len(tiny.encode("Hi")) + 4
    conversation = Conversation(tiny, GREEDY, context=room)
    list(conversation.ask("Hi"))
    assert conversation.note == f"the context of {room} tokens is full: /clear starts anew, --context N makes room"
    before = list(conversation.messages)
    with pytest.raises(ContextLengthError, match=f"of {room} tokens; /clear starts anew, and .*--context N"):
        list(conversation.ask("Why?"))
    assert conversation.messages == before
    assert "error: the conversation would take" in transcript(conversation, "Why?")
    run("/clear", conversation)
    assert "".join(conversation.ask("Hi"))


def test_a_model_without_a_chat_template_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    with pytest.raises(OptionError, match=r"has no chat template.*--raw"):
        Conversation(tiny, GREEDY)

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pagewire_core.chat_template import ChatTemplate, load_chat_template
from pagewire_core.errors import InvalidRequest, StartupError

USER = [{"role": "user", "content": "<b>hi</b>"}]
TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)
ONLY_SYSTEM = (
    "{% for m in messages %}{% if m.role not in ['system', 'user'] %}{{ raise_exception('role ' + m.role) }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}"
)


def test_messages_become_a_prompt() -> None:
    template = ChatTemplate("{{ bos_token }}" + TURNS, bos_token="<s>")
    assert template.render(USER) == "<s>[user]<b>hi</b>\n[me]"
    assert template.render(USER, add_generation_prompt=False) == "<s>[user]<b>hi</b>\n"


def test_extra_variables_and_tojson_leave_html_alone() -> None:
    template = ChatTemplate("{{ messages | tojson }}{{ mood }}{{ tools is none }}")
    assert template.render(USER, kwargs={"mood": "é"}) == json.dumps(USER) + "éTrue"


def test_tools_and_documents_are_there_and_none_where_nobody_gave_any() -> None:
    """Templates are written for transformers, which always gives them both."""
    template = ChatTemplate("{% if documents is not none %}{{ documents[0].text }}{% endif %}{{ tools is none }}")
    assert template.render([{"role": "user", "content": "hi"}]) == "True"
    assert template.render([{"role": "user", "content": "hi"}], kwargs={"documents": [{"text": "T"}]}) == "TTrue"


def test_generation_tags_and_loop_controls_are_understood() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert template.render([*USER, *USER]) == "<b>hi</b>"


def test_the_last_message_can_be_left_open() -> None:
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    text = ChatTemplate(TURNS).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "[user]<b>hi</b>\n[assistant]Well, "
    with pytest.raises(InvalidRequest, match="exclude each other"):
        ChatTemplate(TURNS).render(messages, continue_final_message=True)


def test_a_developer_speaks_as_system_where_only_that_is_known() -> None:
    """Also where the template would not refuse it: most leave out what a role says that they do not know."""
    messages = [{"role": "developer", "content": "be brief"}, *USER]
    assert ChatTemplate(ONLY_SYSTEM).render(messages).startswith("system:be brief;")
    assert ChatTemplate(TURNS).render(messages).startswith("[system]be brief\n")
    assert ChatTemplate("{# developer #}" + TURNS).render(messages).startswith("[developer]be brief\n")


# As Mistral's and Gemma's are: turns alternate, and the system speaks first, or not at all.
ALTERNATING = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and (not loop.first or no_system) %}{{ raise_exception('system') }}{% endif %}"
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('in a row') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}"
)
AGENTS = [("developer", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("system", "e"), ("assistant", "f"),
          ("system", "g")]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TURNS, "[system]a\n[system]b\n[user]c\n[user]d\n[system]e\n[assistant]f\n[system]g\n"),
        (ALTERNATING, "system:a\n\nb;user:c\n\nd\n\ne;assistant:f;user:g;"),
        ("{% set no_system = true %}" + ALTERNATING, "user:a\n\nb\n\nc\n\nd\n\ne;assistant:f;user:g;"),
    ],
)
def test_what_agents_say_is_said_in_the_roles_that_a_template_takes(source: str, expected: str) -> None:
    messages = [{"role": role, "content": content} for role, content in AGENTS]
    assert ChatTemplate(source).render(messages, add_generation_prompt=False) == expected


def test_a_message_is_left_open_in_whatever_role_it_is_said() -> None:
    messages = [{"role": "system", "content": "a"}, *USER, *USER, {"role": "assistant", "content": "Well, "}]
    template = ChatTemplate("{% set no_system = true %}" + ALTERNATING)
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "user:a\n\n<b>hi</b>\n\n<b>hi</b>;assistant:Well, "


@pytest.mark.parametrize(
    "source",
    [
        ONLY_SYSTEM,
        "{{ messages[7].content.x }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.mro() }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(source).render([{"role": "tool", "content": "x"}])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": [{"name": name, "template": name} for name in ("rag", "default", "tool_use")]})
    )
    assert _rendered(tmp_path) == "default" and _rendered(tmp_path, tools=[{}]) == "tool_use"
    assert _rendered(tmp_path, "{{ tools | length }}", tools=[{}]) == "1"
    config.write_text(json.dumps({"chat_template": "S{{ eos_token }}", "eos_token": {"content": "</s>"}}))
    assert _rendered(tmp_path) == "S</s>"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert _rendered(tmp_path) == "F"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    assert _rendered(tmp_path) == "F" and _rendered(tmp_path, tools=[{}]) == "U"
    (tmp_path / "mine.jinja").write_text("M")
    assert _rendered(tmp_path, str(tmp_path / "mine.jinja")) == "M"
    assert _rendered(tmp_path, "{{ 'inline' }}") == "inline"


@pytest.mark.parametrize("given", ["/nowhere.jinja", "{% for %}"])
def test_a_bad_template_ends_the_start_with_a_sentence(tmp_path: Path, given: str) -> None:
    with pytest.raises(StartupError, match="template"):
        load_chat_template(tmp_path, given)


def test_a_template_that_wants_parts_gets_them(tmp_path: Path) -> None:
    """Llama Guard's, and those of models that see: of a string they would make nothing, or its characters."""
    parts = "{% for m in messages %}{% for part in m.content %}{{ m.role }}={{ part.text }};{% endfor %}{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    rendered = ChatTemplate(parts).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == "user=<b>hi</b>;assistant=Well"
    either = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert ChatTemplate(either + "{{ messages[0].content is string }}").render(USER) == "<b>hi</b>True"


def _rendered(path: Path, given: str | None = None, **variables: object) -> str:
    template = load_chat_template(path, given)
    assert template is not None
    return template.render(USER, kwargs=variables)

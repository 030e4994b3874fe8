"""Structural tags as grammars: free text in which certain parts must have a form.

Both of vLLM's shapes: `{"structures": [{begin, schema, end}], "triggers": [...]}`, and xgrammar's
`{"type": "structural_tag", "format": {"type": ...}}` with its formats const_string, json_schema, regex, grammar,
any_text, sequence, or, tag, triggered_tags (ours also with `last_tags`, after which nothing comes) and
tags_with_separator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pagewire_core.errors import InvalidRequest

_PARAM = "structural_tag"
_TEXT = "/(?s:.*)/"
_MAX_DEPTH = 32


def regex_escaped(text: str) -> str:
    """For a regex between slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&\-~/]", r"\\\g<0>", text).replace("\n", r"\n").replace("\r", r"\r")


def lark_literal(text: str, specials: Mapping[str, int]) -> str:
    """`text` in a rule; the tokens in it that stand for no text by their ids."""
    if not specials or not any(token in text for token in specials):
        return json.dumps(text, ensure_ascii=False)
    longest_first = sorted(specials, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    quoted = (f"<[{specials[p]}]>" if p in specials else json.dumps(p, ensure_ascii=False) for p in parts if p)
    return " ".join(quoted)


class StructuralTag:
    """Collects the rules of one grammar. json_options: of every schema in it; the functions read schemas and EBNF."""

    def __init__(
        self,
        specials: Mapping[str, int],
        json_options: Mapping[str, Any],
        json_schema: Callable[[object], dict[str, Any]],
        lark: Callable[[str], str],
    ) -> None:
        self._specials, self._json_options = specials, json_options
        self._json_schema, self._lark = json_schema, lark
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []

    def grammar(self, tag: object) -> str:
        """llguidance's form of the whole. Raises InvalidRequest."""
        rule = self._format(_new_shape(tag), 0)
        top = "\n".join([f"start: {rule}", *self._rules])
        return json.dumps({"grammars": [{"name": "structural_tag", "lark_grammar": top}, *self._grammars]})

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _format(self, form: object, depth: int) -> str:
        """The name of a rule for it."""
        kind = _field(form, "type", str)
        if depth > _MAX_DEPTH:
            raise InvalidRequest("the structural tag is nested too deeply", _PARAM)
        match kind:
            case "const_string":
                return self._rule(lark_literal(_field(form, "value", str), self._specials))
            case "json_schema":
                return self._rule(self._json(_any_field(form, "json_schema")))
            case "regex":
                return self._rule(_regex(_field(form, "pattern", str)))
            case "grammar":
                return self._subgrammar(_field(form, "grammar", str))
            case "any_text":
                return self._rule(_TEXT)
            case "sequence":
                return self._rule(" ".join(self._format(part, depth + 1) for part in _parts(form, "elements")))
            case "or":
                return self._rule(" | ".join(self._format(part, depth + 1) for part in _parts(form, "elements")))
            case "tag":
                return self._tag(form, "", depth)
            case "triggered_tags":
                return self._triggered(form, depth)
            case "tags_with_separator":
                return self._separated(form, depth)
        raise InvalidRequest(f"structural tags of type {kind!r} are not supported", _PARAM)

    def _json(self, schema: object) -> str:
        return "%json " + json.dumps({**self._json_schema(schema), "x-guidance": dict(self._json_options)})

    def _subgrammar(self, text: str) -> str:
        name = f"g{len(self._grammars)}"
        self._grammars.append({"name": name, "lark_grammar": self._lark(text)})
        return self._rule(f"@{name}")

    def _tag(self, tag: object, trigger: str, depth: int) -> str:
        """trigger: the beginning of the tag that is there already."""
        begin, end, content = _field(tag, "begin", str), _field(tag, "end", str), _any_field(tag, "content")
        begin = lark_literal(begin[len(trigger) :], self._specials) if len(begin) > len(trigger) else ""
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            return self._rule(f"{begin} {self._text_until(end)}")
        body = self._format(content, depth + 1)
        return self._rule(f"{begin} {body} {lark_literal(end, self._specials) if end else ''}")

    def _text_until(self, end: str) -> str:
        """Any text up to the first `end`, with it."""
        if any(token in end for token in self._specials):
            return self._rule(f"{_TEXT} {lark_literal(end, self._specials)}")
        return self._rule(f"/(?s:.*){regex_escaped(end)}/", "[lazy]")

    def _triggered(self, form: object, depth: int) -> str:
        """Free text until a trigger, and then one of the tags that begin with it; again and again."""
        triggers = [t for t in _parts(form, "triggers") if isinstance(t, str) and t]
        last = _parts(form, "last_tags") if _has(form, "last_tags") else []
        tags = _parts(form, "tags") if _has(form, "tags") or not last else []
        if any(not _field(tag, "begin", str).startswith(tuple(triggers)) for tag in (*tags, *last)) or not triggers:
            raise InvalidRequest("every tag must begin with a trigger, and every trigger must not be empty", _PARAM)
        free = {trigger: self._text_until(trigger) for trigger in triggers}
        once, at_least_once = _flag(form, "stop_after_first"), _flag(form, "at_least_one")
        end = " | ".join([_TEXT, *self._dispatched(last, free, depth)])
        if not tags:
            return self._rule(end)
        again = self._rule(" | ".join(self._dispatched(tags, free, depth)))
        first = self._rule(" | ".join(self._tag(tag, "", depth) for tag in tags))
        if at_least_once:
            return first if once else self._rule(f"{first} {again}* ({end})")
        return self._rule(f"{again} | {end}" if once else f"{again}* ({end})")

    def _dispatched(self, tags: list[Any], free: Mapping[str, str], depth: int) -> list[str]:
        """For each trigger that some of the tags begin with: the text up to it, and what may follow."""
        dispatched = []
        for trigger, text in free.items():
            if of_it := [tag for tag in tags if _field(tag, "begin", str).startswith(trigger)]:
                bodies = " | ".join(self._tag(tag, trigger, depth) for tag in of_it)
                dispatched.append(f"{text} ({bodies})")
        return dispatched

    def _separated(self, form: object, depth: int) -> str:
        tag = self._rule(" | ".join(self._tag(tag, "", depth) for tag in _parts(form, "tags")))
        if not _flag(form, "stop_after_first"):
            separator = _field(form, "separator", str)
            between = lark_literal(separator, self._specials) if separator else ""
            tag = self._rule(f"{tag} ({between} {tag})*")
        return tag if _flag(form, "at_least_one") else self._rule(f'{tag} | ""')


def _new_shape(tag: object) -> object:
    """The older of vLLM's shapes as the newer one's format."""
    if isinstance(tag, dict) and "structures" in tag:
        tags = [
            {"begin": s.get("begin"), "end": s.get("end"),
             "content": {"type": "json_schema", "json_schema": s.get("schema", {})}}
            for s in _parts(tag, "structures") if isinstance(s, dict)
        ]  # fmt: skip
        return {"type": "triggered_tags", "tags": tags, "triggers": tag.get("triggers")}
    return _any_field(tag, "format")


def _any_field(form: object, name: str) -> Any:
    if not isinstance(form, dict) or name not in form:
        raise InvalidRequest(f"a part of the structural tag lacks `{name}`", _PARAM)
    return form[name]


def _field(form: object, name: str, kind: type) -> Any:
    value = _any_field(form, name)
    if not isinstance(value, kind):
        raise InvalidRequest(f"`{name}` in a structural tag must be a {kind.__name__}", _PARAM)
    return value


def _parts(form: object, name: str) -> list[Any]:
    parts: list[Any] = _field(form, name, list)
    if not parts:
        raise InvalidRequest(f"`{name}` in a structural tag must not be empty", _PARAM)
    return parts


def _has(form: object, name: str) -> bool:
    return isinstance(form, dict) and bool(form.get(name))


def _flag(form: object, name: str) -> bool:
    return isinstance(form, dict) and form.get(name) is True


def _regex(pattern: str) -> str:
    """Between slashes, as Lark writes it."""
    return "/" + re.sub(r"(\\.)|/", lambda m: m[1] or r"\/", pattern.replace("\n", r"\n"), flags=re.DOTALL) + "/"

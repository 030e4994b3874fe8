"""The documents say what the code does: their lists of routes, methods, flags, fields and metrics are compared."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pagewire.v1 import decode_pb2, inference_pb2, kv_channel_pb2, prefill_pb2, worker_pb2
from pagewire_bridge.app import ROUTES
from pagewire_bridge.error_shapes import error_shape
from pagewire_bridge.familiar_metrics import TGI, VLLM
from pagewire_bridge.ollama.schema import Options
from pagewire_bridge.openai.schema import ChatBody, CompletionBody
from pagewire_bridge.openai.unsupported import _UNSUPPORTED
from pagewire_bridge.openapi.headers import HEADERS
from pagewire_bridge.tgi.schema import Parameters
from pagewire_cli import main as command
from pagewire_cli import tgi_flags
from pagewire_cli.vllm_flags import NOT_IMPLEMENTED, SO_ANYWAY
from pagewire_core import errors
from pagewire_core.command_line import Parser
from pagewire_core.flags import BRIDGE_FLAGS, ROUTER_FLAGS, WORKER_FLAGS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SERVICES = (decode_pb2, inference_pb2, kv_channel_pb2, prefill_pb2, worker_pb2)

# docker compose's, valkey's, helm's; TGI's, which pagewire-launch translates
_OF_OTHERS = {"--scale", "--appendonly", "--wait", *(f"--{name}" for name in tgi_flags._KNOWN)}


@functools.cache
def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def rows(text: str, *head: str) -> Iterator[list[str]]:
    """Cells of every table whose first columns have this head."""
    in_table = meant = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and not in_table:
            meant = cells[: len(head)] == list(head)
        elif cells and meant and not set(cells[0]) <= set("-: "):
            yield cells
        in_table = bool(cells)


def flags(cells: Iterable[str]) -> list[str]:
    """Names of the flags that these cells are of, without their dashes."""
    return [span.lstrip("-") for cell in cells for span in code_spans(cell) if span.startswith("-")]


@functools.cache
def options() -> dict[str, set[str]]:
    """What each command takes: `pagewire serve` and the like, and the services."""
    parser = Parser(prog="pagewire")
    subcommands = parser.add_subparsers()
    for module in vars(command).values():
        if hasattr(module, "add_subcommand"):
            parameters = inspect.signature(module.add_subcommand).parameters.values()
            needed = [p for p in parameters if p.default is p.empty]  # completion wants to know of all others
            module.add_subcommand(*(subcommands, parser)[: len(needed)])
    found = {f"pagewire {name}": set(p._option_string_actions) for name, p in subcommands.choices.items()}
    for name, flags_of in {"router": ROUTER_FLAGS, "worker": WORKER_FLAGS, "bridge": BRIDGE_FLAGS}.items():
        found[f"pagewire-{name}"] = {"--config", *(f"--{flag}" for flag in flags_of)}
    return found


def commands(text: str) -> Iterator[str]:
    """Command lines of ours, in blocks and in spans."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in (*lines, *re.findall(r"^    (\S.*)$", text, re.MULTILINE), *code_spans(text)):
        if re.match(r"(\.venv/bin/)?pagewire(-router|-worker|-bridge)? [\w-]", line):
            yield line.partition(" #")[0].partition(" &")[0].removeprefix(".venv/bin/")


def anchors(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            found = (document.parent / path).resolve() if path else document
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken


def test_files_and_tests_that_are_named_are_there() -> None:
    """A path of this repository, or a test of a file: `tests/e2e/test_x.py::test_y`."""
    folders, lost = "benchmarks|deploy|docs|examples|protos|services|tests", []
    for document in DOCUMENTS:
        for span in code_spans(document.read_text()):
            if not re.fullmatch(rf"(?:{folders})/[\w./:-]+", span):
                continue
            path, _, test = span.partition("::")
            file = ROOT / path
            if not file.exists() or (test and not re.search(rf"^(async )?def {test}\(", file.read_text(), re.M)):
                lost.append(f"{document.relative_to(ROOT)}: {span}")
    assert not lost


def test_commands_are_taken_as_they_are_shown() -> None:
    wrong, known = [], options()
    for document in DOCUMENTS:
        for line in commands(document.read_text()):
            words = line.split()
            name = " ".join(words[:2]) if words[0] == "pagewire" else words[0]
            given = {re.split("[=\\[]", word)[0] for word in words if re.match(r"--?[a-z]", word)}
            if name not in known or not given <= known[name]:
                wrong.append(f"{document.name}: {line}: {given - known.get(name, set())}")
    assert not wrong


def test_flags_that_are_named_exist() -> None:
    ours = set().union(*options().values()) | {"--live"}  # pagewire-health's
    wrong = []
    for document in DOCUMENTS:
        if document.name.startswith("migrating-from") or document.parent.name == "decisions":
            continue
        for span in code_spans(document.read_text()):
            name = re.split("[ =]", span)[0]
            if span.startswith("--") and name not in {*ours, *_OF_OTHERS} and not name.endswith("-*"):
                wrong.append(f"{document.name}: {span}")
    assert not wrong


def test_every_command_is_in_the_operating_guide() -> None:
    text = text_of("operating.md")
    missing = [name for name in options() if f"`{name}`" not in text]
    assert not missing, f"docs/operating.md does not say what these are for: {missing}"


def test_every_document_is_in_the_index() -> None:
    named = set(re.findall(r"\]\(([^)#\s]+)\)", text_of("README.md")))
    ours = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert ours <= named, f"docs/README.md does not name {ours - named}"


def test_every_route_is_in_the_reference_and_nothing_else_is() -> None:
    documented = [tuple(cells[0].strip("`").split(" ")) for cells in rows(text_of("api.md"), "route")]
    registered = {
        (method, route.path_format)
        for route in ROUTES
        for method in (route.methods or set()) - {"HEAD"}
    }  # fmt: skip
    assert len(documented) == len(set(documented))
    assert set(documented) == registered


def test_every_header_is_in_the_reference() -> None:
    documented = {name for cells in rows(text_of("api.md"), "header", "what it says") for name in code_spans(cells[0])}
    assert documented == set(HEADERS)


def test_every_method_of_every_service_is_in_the_reference() -> None:
    services = {s.name: set(s.methods_by_name) for m in SERVICES for s in m.DESCRIPTOR.services_by_name.values()}
    text = text_of("api.md")
    clients = {name for cells in rows(text, "`InferenceService`") for name in code_spans(cells[0])}
    others = {cells[0].strip("`"): set(code_spans(cells[2])) for cells in rows(text, "service", "of", "methods")}
    assert {"InferenceService": clients, **others} == services


def test_every_error_has_the_status_of_the_reference_in_every_api() -> None:
    paths = {"OpenAI": "/v1/completions", "TGI": "/generate", "Ollama": "/api/chat", "Anthropic": "/v1/messages"}
    table = list(rows(text_of("api.md"), "what is wrong", *paths, "gRPC"))
    for what, *statuses, grpc_status in table:
        error: errors.PagewireError = getattr(errors, what.partition(":")[0])("it went wrong")
        assert [int(s) for s in statuses] == [error_shape(p).error_response(error).status_code for p in paths.values()]
        assert grpc_status == errors.STATUS[error.code][0].name
    assert len(table) == 7


def test_flags_of_vllm_are_taken_or_refused_as_its_users_are_told() -> None:
    text = text_of("migrating-from-vllm.md")
    taken = flags(cells[0] for cells in rows(text, "flag", "what differs"))
    assert set(taken) <= {option.lstrip("-") for option in options()["pagewire serve"]} - {*SO_ANYWAY}
    assert len(taken) > 30
    so_anyway = {flags([cells[0]])[0]: tuple(code_spans(cells[1])) for cells in rows(text, "so anyway", "with")}
    assert so_anyway == SO_ANYWAY
    refused = flags(cells[0] for cells in rows(text, "not implemented"))
    assert sorted(refused) == sorted(NOT_IMPLEMENTED)


def test_flags_of_tgi_are_taken_as_its_users_are_told() -> None:
    text = text_of("migrating-from-tgi.md")
    taken = {flags([cells[0]])[0]: flags([cells[1]])[0] for cells in rows(text, "TGI's flag", "taken as")}
    others = {"quantize": "quantization", "cors-allow-origin": "allowed-origins", "json-output": "log-format"}
    assert taken == {**tgi_flags._RENAMED, **others}
    methods = {code_spans(cells[0])[0]: code_spans(cells[1])[0] for cells in rows(text, "`--quantize`")}
    assert methods == tgi_flags._QUANTIZE
    assert set(flags(cells[0] for cells in rows(text, "without effect"))) == tgi_flags._WITHOUT_EFFECT
    assert set(flags(cells[0] for cells in rows(text, "refused"))) == tgi_flags._UNSUPPORTED


def test_fields_are_taken_or_refused_as_users_are_told() -> None:
    vllm = text_of("migrating-from-vllm.md")
    assert {span for cells in rows(vllm, "refused") for span in code_spans(cells[0])} == set(_UNSUPPORTED)
    taken = code_spans(vllm.partition("Taken, beside OpenAI's:")[2].partition("\n\n")[0])
    assert len(taken) > 15 and set(taken) <= {*ChatBody.model_fields, *CompletionBody.model_fields}
    tgi = text_of("migrating-from-tgi.md").partition("All of TGI's parameters are taken")[2].partition("\n\n")[0]
    assert set(code_spans(tgi)) == set(Parameters.model_fields)
    ollama = rows(text_of("migrating-from-ollama.md"), "option")
    assert {span for cells in ollama for span in code_spans(cells[0])} == set(Options.model_fields)


def test_metrics_of_others_are_made_as_their_users_are_told() -> None:
    usage = ("pagewire_engine_free_blocks", "pagewire_engine_total_blocks")
    vllm = {f"vllm:{name.theirs}": name.ours for name in VLLM} | {"vllm:kv_cache_usage_perc": usage}
    tgi = {f"tgi_{name.theirs}": name.ours for name in TGI}
    for document, made in (("migrating-from-vllm.md", vllm), ("migrating-from-tgi.md", tgi)):
        told = {code_spans(cells[0])[0]: tuple(code_spans(cells[1])) for cells in rows(text_of(document), "metric")}
        assert told == made


def told(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def figure(one: Any, *path: str) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path, one)


def test_figures_of_roles_are_those_of_the_results() -> None:
    """docs/when-to-disaggregate.md: the median of the rounds, with the least and the greatest."""
    results = json.loads((ROOT / "benchmarks/results/roles.json").read_text())
    figures = {
        "first token, p50": ("ttft_ms", "p50"), "between tokens, p50": ("itl_ms", "p50"),
        "between tokens, p99": ("itl_ms", "p99"), "tokens a second": ("output_tokens_per_s",),
    }  # fmt: skip
    loads = ("chat, 8 in flight", "long prompts, 4 in flight")
    sides = [results[load][side] for load in loads for side in ("1P1D", "2 x both")]
    for name, *cells in rows(text_of("when-to-disaggregate.md"), "", "chat, 8 in flight: 1 + 1"):
        path = figures.pop(name)
        for rounds, cell in zip(sides, cells, strict=True):
            least, median, greatest = map(told, sorted(figure(one["results"], *path) for one in rounds))
            assert cell.strip("*") == f"{median} ({least}-{greatest})", name
    assert not figures


def test_figures_of_one_worker_are_those_of_the_results() -> None:
    """docs/when-to-disaggregate.md: every round."""
    rounds = json.loads((ROOT / "benchmarks/results/compare-smol135.json").read_text())["results"]["bf16"]["rounds"]
    table = list(rows(text_of("when-to-disaggregate.md"), "load", "tokens a second: `both`"))
    for load, *cells in table[:-1]:
        figures = (("output_tokens_per_s",), ("ttft_ms", "p50"), ("itl_ms", "p50"), ("itl_ms", "p99"))
        paths = [path for path in figures for _ in "12"]
        for path, side, cell in zip(paths, ("pagewire both", "pagewire 1P1D") * 4, cells, strict=True):
            assert cell.strip("*") == ", ".join(told(figure(one, *path)) for one in rounds[side][load]), load
    assert len(table) == 5

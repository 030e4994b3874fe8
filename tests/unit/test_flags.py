from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire_core.command_line import Parser, add_flags, run_main, shown_flags, to_command_line
from pagewire_core.errors import StartupError
from pagewire_core.flags import BRIDGE_FLAGS, FLAGS, ROUTER_FLAGS, WORKER_FLAGS, size

# One value per flag that is not its default: as typed, as parsed.
VALUES: dict[str, tuple[str, Any]] = {
    "model": ("org/model", "org/model"),
    "tokenizer": ("/a dir/with space", "/a dir/with space"),
    "revision": ("main", "main"),
    "download-dir": ("/models", "/models"),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cpu", "cpu"),
    "tensor-parallel-size": ("2", 2),
    "pipeline-parallel-size": ("3", 3),
    "quantization": ("int4", "int4"),
    "served-model-name": ("a,b", "a,b"),
    "chat-template": ("{% for m in messages %}\n--{{ m }}", "{% for m in messages %}\n--{{ m }}"),
    "default-chat-template-kwargs": ('{"enable_thinking": false}', '{"enable_thinking": false}'),
    "trust-request-chat-template": ("", True),
    "max-model-len": ("4096", 4096),
    "max-input-tokens": ("100", 100),
    "generation-config": ("vllm", "vllm"),
    "override-generation-config": ('{"top_k": 5}', '{"top_k": 5}'),
    "max-logprobs": ("50", 50),
    "seed": ("7", 7),
    "block-size": ("32", 32),
    "gpu-memory-utilization": ("0.5", 0.5),
    "kv-cache-memory-bytes": ("1.5G", 1610612736),
    "kv-cache-dtype": ("fp8", "fp8"),
    "enforce-eager": ("", True),
    "max-num-seqs": ("7", 7),
    "max-num-batched-tokens": ("512", 512),
    "max-prefill-delay-ms": ("0", 0.0),
    "enable-prefix-caching": ("", True),
    "enable-chunked-prefill": ("", True),
    "speculative-config": ('{"method": "ngram"}', '{"method": "ngram"}'),
    "speculate": ("4", 4),
    "lanes": ("gloo,grpc", "gloo,grpc"),
    "threads": ("3", 3),
    "cpus": ("0,2-3", (0, 2, 3)),
    "cpu-lending": ("/dev/shm/cores", "/dev/shm/cores"),
    "role": ("decode", "decode"),
    "worker-id": ("w1", "w1"),
    "host": ("[::1]", "::1"),
    "port": ("9000", 9000),
    "redis-url": ("redis://:p=w@h:1/2", "redis://:p=w@h:1/2"),
    "router": ("h:1", "h:1"),
    "api-key": ("a,b", "a,b"),
    "api-keys-file": ("/etc/keys.yaml", "/etc/keys.yaml"),
    "response-store-ttl": ("600", 600.0),
    "allowed-origins": ('["https://a.example"]', ("https://a.example",)),
    "ollama-port": ("11434", 11434),
    "enable-force-include-usage": ("", True),
    "enable-tokenizer-info-endpoint": ("", True),
    "disable-fastapi-docs": ("", True),
    "root-path": ("/llm/v2/", "/llm/v2"),
    "own-port": ("20001", 20001),
    "api-server-rank": ("0", 0),
    "ssl-keyfile": ("/edge.key", "/edge.key"),
    "ssl-certfile": ("/edge.crt", "/edge.crt"),
    "ssl-ca-certs": ("/clients.crt", "/clients.crt"),
    "ssl-cert-reqs": ("2", 2),
    "tls-cert": ("/tls/worker.crt", "/tls/worker.crt"),
    "tls-key": ("/tls/worker.key", "/tls/worker.key"),
    "tls-ca": ("/tls/ca.crt", "/tls/ca.crt"),
    "workers": ("h:1,h:2", "h:1,h:2"),
    "max-queued-requests": ("9", 9),
    "max-queued-tokens": ("9000", 9000),
    "send-timeout": ("2.5", 2.5),
    "tool-call-parser": ("hermes", "hermes"),
    "enable-auto-tool-choice": ("", True),
    "reasoning-parser": ("qwen3", "qwen3"),
    "routing-policy": ("llm_d", "llm_d"),
    "request-timeout": ("1.5", 1.5),
    "transfer-timeout": ("0.25", 0.25),
    "graceful-termination-timeout": ("0", 0.0),
    "log-format": ("json", "json"),
    "otlp-traces-endpoint": ("https://collector:4317", "https://collector:4317"),
    "otlp-service-name": ("chat", "chat"),
    "enable-log-requests": ("", True),
    "max-log-len": ("0", 0),
    "log-level": ("debug", "debug"),
}


def _parser(names: tuple[str, ...] = tuple(FLAGS), environ: dict[str, str] | None = None) -> Parser:
    parser = Parser(prog="prog", environ=environ or {})
    add_flags(parser, names)
    return parser


def _attribute(name: str) -> str:
    return name.replace("-", "_")


def test_the_options_are_exactly_these() -> None:
    """An option is a promise: adding or dropping one must be a decision that shows in a test."""
    assert set(FLAGS) == set(VALUES)
    assert set(ROUTER_FLAGS) | set(WORKER_FLAGS) | set(BRIDGE_FLAGS) == set(FLAGS)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_flag_survives_being_passed_to_another_process(name: str) -> None:
    text, value = VALUES[name]
    first = _parser().parse_args([f"--{name}={text}" if text else f"--{name}"])
    assert getattr(first, _attribute(name)) == value
    assert _parser().parse_args(to_command_line(first, tuple(FLAGS))) == first


def test_administrators_are_shown_flags_without_secrets() -> None:
    typed = ["--redis-url=redis://:p@ss@h:1/2", "--api-key=secret", "--no-enable-prefix-caching", "--cpus=0,2-3"]
    shown = shown_flags(_parser().parse_args(typed), tuple(FLAGS))
    assert (shown["redis-url"], shown["enable-prefix-caching"], shown["cpus"]) == (
        "redis://***@h:1/2",
        "false",
        "0,2,3",
    )
    typed = ["--redis-url=rediss://h:1?password=p@ss&db=3"]
    assert shown_flags(_parser().parse_args(typed), ("redis-url",)) == {"redis-url": "rediss://h:1?password=***&db=3"}
    assert shown["enable-chunked-prefill"] == "true" and shown["block-size"] == "16", "defaults, too"
    assert "api-key" not in shown and "tokenizer" not in shown


@pytest.mark.parametrize("name", ["served-model-name", "api-key"])
def test_several_values_stand_with_spaces_as_for_vllm_or_with_commas(name: str) -> None:
    for typed in ([f"--{name}", "a", "b"], [f"--{name}", "a,b"], [f"--{name}=a,b"]):
        parsed = _parser().parse_args([*typed, "--port=1"])
        assert (getattr(parsed, _attribute(name)), parsed.port) == ("a,b", 1), typed
        assert f"--{name}=a,b" in to_command_line(parsed, (name,))


def test_a_switch_that_is_off_stays_off_in_the_other_process() -> None:
    first = _parser().parse_args(["--no-enable-prefix-caching"])
    assert "--no-enable-prefix-caching" in to_command_line(first, WORKER_FLAGS)


def test_an_unset_flag_is_not_passed_on() -> None:
    assert not [a for a in to_command_line(_parser().parse_args([]), tuple(FLAGS)) if a.startswith("--redis-url")]


@pytest.mark.parametrize("name", sorted(name for name in VALUES if FLAGS[name].type is not None))
def test_the_environment_gives_a_default_and_the_command_line_wins(name: str) -> None:
    text, value = VALUES[name]
    environ = {f"PAGEWIRE_{_attribute(name).upper()}": text}
    assert getattr(_parser(environ=environ).parse_args([]), _attribute(name)) == value
    flag = FLAGS[name]
    others = {
        "allowed-origins": '["*"]', "otlp-traces-endpoint": "h:1", "root-path": "/a", "max-num-batched-tokens": "2",
    }  # fmt: skip
    other = flag.choices[0] if flag.choices else others.get(name, "1")
    expected = flag.type(other) if flag.type else None
    assert getattr(_parser(environ=environ).parse_args([f"--{name}={other}"]), _attribute(name)) == expected


YES, NO = ("1", "true", "Yes", "on"), ("0", "false", "No", "off")


@pytest.mark.parametrize(("text", "value"), [*((word, True) for word in YES), *((word, False) for word in NO)])
def test_a_switch_reads_the_words_for_yes_and_no_from_the_environment(text: str, value: bool) -> None:
    parser = _parser(environ={"PAGEWIRE_ENABLE_PREFIX_CACHING": text})
    assert parser.parse_args([]).enable_prefix_caching is value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PAGEWIRE_ENABLE_PREFIX_CACHING", "ture"),
        ("PAGEWIRE_ROLE", "encode"),
        ("PAGEWIRE_BLOCK_SIZE", "17"),
        ("PAGEWIRE_MAX_NUM_SEQS", "many"),
    ],
)
def test_a_bad_value_in_the_environment_is_refused(
    variable: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse checks no choices on a default: PAGEWIRE_ROLE=encode once started a worker without a role."""
    with pytest.raises(SystemExit) as exit_:
        _parser(environ={variable: text}).parse_args([])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"prog: {variable} is {text!r}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "argument",
    [
        "--unknown", "--max-num-seq=3", "--port=65536", "--port=x", "--max-num-seqs=0", "--block-size=24",
        "--gpu-memory-utilization=1.5", "--kv-cache-memory-bytes=lots", "--kv-cache-memory-bytes=1e999G",
        "--request-timeout=0", "--transfer-timeout=nan", "--dtype=int8", "--role=", "--model=", "--worker-id=\udcff",
        "stray",
    ],
)  # fmt: skip
def test_a_wrong_command_line_ends_with_one_line_and_exit_code_2(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        _parser().parse_args([argument])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("prog: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--api-kye=secret", "unknown flag --api-kye; did you mean --api-key?"),
        ("--max_num_seq=3", "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        ("--xyz", "unknown flag --xyz"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_what_is_no_flag_is_named_without_its_value_and_with_what_may_have_been_meant(
    argument: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args([argument])
    assert capsys.readouterr().err == f"prog: {sentence} (see prog --help)\n"


def test_a_service_runs_with_what_its_command_line_and_its_file_say_and_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flags.yaml").write_text("max-num-seqs: 7")
    monkeypatch.setattr("sys.argv", ["prog", f"--config={tmp_path}/flags.yaml", "--block-size=32"])
    for variable in ("GRPC_VERBOSITY", "GRPC_ENABLE_FORK_SUPPORT"):
        monkeypatch.setenv(variable, "")  # so that what the command sets is taken back
        monkeypatch.delenv(variable)
    seen: list[argparse.Namespace] = []

    def main(args: argparse.Namespace) -> None:
        seen.append(args)
        raise StartupError("no room")

    with pytest.raises(SystemExit) as exit_:
        run_main("prog", main, WORKER_FLAGS, "Does nothing.")
    assert exit_.value.code == 1 and capsys.readouterr().err == "prog: no room\n"
    assert [(args.max_num_seqs, args.block_size) for args in seen] == [(7, 32)]
    assert (os.environ["GRPC_VERBOSITY"], os.environ["GRPC_ENABLE_FORK_SUPPORT"]) == ("NONE", "false")


@given(st.integers(1, 1 << 50))
def test_a_size_in_bytes_is_exact(number: int) -> None:
    assert size(str(number)) == number


@pytest.mark.parametrize(
    ("text", "value"), [("512M", 512 << 20), ("4GiB", 4 << 30), ("1.5k", 1536), (" 2 TB", 2 << 40), ("10B", 10)]
)
def test_a_size_may_have_a_unit(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1X", "1GG1"])
def test_a_size_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize("text", ["3-1", "0,0", "0-2,1", "a", "-1", "0,,1", "1.5"])
def test_a_list_of_cores_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args([f"--cpus={text}"])
    assert "write 0,2-3" in capsys.readouterr().err


def test_what_kubernetes_says_of_a_service_is_no_port() -> None:
    add_flags(parser := Parser(environ={"PAGEWIRE_PORT": "tcp://10.0.0.1:80"}), ("port",))
    assert parser.parse_args([]).port == FLAGS["port"].default


def test_the_beginning_of_a_short_flag_is_not_the_flag() -> None:
    """`-p 8080` asked for 8080 pipeline stages."""
    parser = Parser(prog="pagewire-worker")
    add_flags(parser, WORKER_FLAGS)
    assert parser.parse_args(["-pp", "2"]).pipeline_parallel_size == 2
    for beginning in (["-p", "2"], ["-t=2"], ["-p2"]):
        with pytest.raises(SystemExit):
            parser.parse_args(beginning)

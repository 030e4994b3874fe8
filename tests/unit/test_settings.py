"""Flags from the environment and from a YAML file: one rule, the same for `pagewire serve` and every service."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire_cli import main, serve
from pagewire_cli.vllm_flags import SO_ANYWAY, WITHOUT_EFFECT
from pagewire_core.command_line import Parser, add_flags
from pagewire_core.flags import BRIDGE_FLAGS, FLAGS, ROUTER_FLAGS, WORKER_FLAGS


def _parser(environ: dict[str, str] | None = None, names: tuple[str, ...] = tuple(FLAGS)) -> Parser:
    parser = Parser(prog="prog", environ=environ or {})
    parser.add_config()
    add_flags(parser, names)
    return parser


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pagewire.yaml"


def _read(file: Path, text: str, *arguments: str, environ: dict[str, str] | None = None) -> argparse.Namespace:
    file.write_text(text)
    return _parser(environ).parse_args(["--config", str(file), *arguments])


@given(st.sets(st.sampled_from(["command line", "environment", "file"])))
def test_command_line_then_environment_then_file_then_default(said_by: set[str]) -> None:
    """Every combination: the first of them that says something is heard."""
    values = {"command line": 11, "environment": 12, "file": 13}
    environ = {"PAGEWIRE_MAX_NUM_SEQS": "12"} if "environment" in said_by else {}
    arguments = ["--max-num-seqs=11"] if "command line" in said_by else []
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("max-num-seqs: 13\n" if "file" in said_by else "max-model-len: 1\n")
        file.flush()
        parsed = _parser(environ).parse_args([f"--config={file.name}", *arguments])
    heard = next((values[source] for source in values if source in said_by), FLAGS["max-num-seqs"].default)
    assert parsed.max_num_seqs == heard


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("max-num-seqs: 7", "max_num_seqs", 7),
        ("max_num_seqs: 7", "max_num_seqs", 7),
        ("num-shard: 2", "tensor_parallel_size", 2),
        ("enable-prefix-caching: false", "enable_prefix_caching", False),
        ("no-enable-prefix-caching: true", "enable_prefix_caching", False),
        ("enforce-eager: yes", "enforce_eager", True),
        ("kv-cache-memory-bytes: 4G", "kv_cache_memory_bytes", 4 << 30),
        ("gpu-memory-utilization: 0.5", "gpu_memory_utilization", 0.5),
        ("cpus: [0, 2, 3]", "cpus", (0, 2, 3)),
        ("cpus: 0-2", "cpus", (0, 1, 2)),
        ("served-model-name: [a, b]", "served_model_name", "a,b"),
        ("api-key: [a, b]", "api_key", "a,b"),
        ("workers:\n- h:1\n- h:2", "workers", "h:1,h:2"),
        ('allowed-origins: ["https://a.example", "*"]', "allowed_origins", ("https://a.example", "*")),
        # YAML would make other things of these: the number 1.1, a boolean, base 60, octal.
        ("revision: 1.10", "revision", "1.10"),
        ("worker-id: no", "worker_id", "no"),
        ("worker-id: 12:30:45", "worker_id", "12:30:45"),
        ("worker-id: 007", "worker_id", "007"),
        ("redis-url: redis://:p@h:1/2  # ours", "redis_url", "redis://:p@h:1/2"),
    ],
)
def test_a_file_says_what_a_command_line_would(file: Path, text: str, name: str, value: Any) -> None:
    assert getattr(_read(file, text), name) == value


def test_a_mapping_is_json_with_its_types(file: Path) -> None:
    read = _read(file, "speculative-config:\n  method: ngram\n  num_speculative_tokens: 3\n").speculative_config
    assert json.loads(read) == {"method": "ngram", "num_speculative_tokens": 3}


def test_the_environment_may_name_the_file_and_the_command_line_another(file: Path, tmp_path: Path) -> None:
    file.write_text("port: 1\n")
    other = tmp_path / "other.yaml"
    other.write_text("port: 2\n")
    environ = {"PAGEWIRE_CONFIG": str(file)}
    assert _parser(environ).parse_args([]).port == 1
    assert _parser(environ).parse_args([f"--config={other}"]).port == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-num-seq: 7", "'max-num-seq' in {file} is no flag: unknown flag max-num-seq; did you mean max-num-seqs?"),
        ("max_num_seq: 7", "'max_num_seq' in {file} is no flag: unknown flag max-num-seq; did you mean max-num-seqs?"),
        ("config: other.yaml", "'config' in {file} is no flag"),
        ("frobnicate: 1", "'frobnicate' in {file} is no flag: unknown flag frobnicate"),
        ("max-num-seqs: 0", "'max-num-seqs' in {file} is '0': must be positive"),
        ("max-num-seqs: many", "'max-num-seqs' in {file} is 'many': not a valid whole number"),
        ("max-num-seqs: [1, 2]", "'max-num-seqs' in {file} is '1,2': not a valid whole number"),
        ("max-num-seqs:", "'max-num-seqs' in {file} has no value; leave it out to have the default"),
        ("role: encode", "'role' in {file} is 'encode'; choose from prefill, decode, both"),
        ("enforce-eager: maybe", "'enforce-eager' in {file} is 'maybe'; write one of 1, true"),
        ("workers: [[a]]", "'workers' in {file} may be a list of plain values alone"),
        ("port: 1\nrole: both\nport: 2", "'port' is in {file} twice: in lines 1 and 3"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "'max-num-seqs' in {file} and 'max_num_seqs' in {file} are the same flag"),
        ("num-shard: 1\ntensor-parallel-size: 2", "'num-shard' in {file} and 'tensor-parallel-size' in {file} are the"),
        ("a: &a {port: 1}\n<<: *a", "'<<' in {file} (line 2): mappings are not merged here; write the flags"),
        ("model: ''", "'model' in {file} is '': must not be empty"),
        ('worker-id: "\\ud800"', "argument --worker-id: this is no UTF-8 text"),
        ("- a", "{file} must have lines like max-num-seqs: 64"),
        ("a: [", "{file} is no YAML: while parsing"),
        ("a: !!python/object/apply:os.system [id]", "{file} is no YAML: could not determine a constructor"),
    ],
)
def test_what_a_file_may_not_say_is_one_sentence_with_file_and_key(
    file: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        _read(file, text)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith("prog: " + message.format(file=file))


def test_a_file_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["--config=/nowhere/a.yaml"])
    assert capsys.readouterr().err == "prog: cannot read /nowhere/a.yaml: No such file or directory (see prog --help)\n"


def test_secrets_are_neither_in_the_help_nor_in_errors(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--help once showed PAGEWIRE_API_KEY as the default of --api-key."""
    environ = {"PAGEWIRE_API_KEY": "s3cret", "PAGEWIRE_REDIS_URL": "redis://:s3cret@h:1"}
    file.write_text("api-key: s3cret\napi_keys: s3cret\n")
    for arguments in (["--help"], [f"--config={file}"], ["--unknown"]):
        with pytest.raises(SystemExit):
            _parser(environ).parse_args(arguments)
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err and "'api_keys'" in said.err


def _serve(*arguments: str, environ: dict[str, str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="pagewire")
    serve.add_subcommand(parser.add_subparsers(), environ or {})
    return serve.settle(parser.parse_args(["serve", *arguments]))


def test_serve_takes_its_own_flags_from_everywhere_too(file: Path) -> None:
    file.write_text("model: from-file\nprefill: 2\ndecode: 3\ntls: true\nport: 1\n")
    args = _serve(f"--config={file}", "--decode=4", environ={"PAGEWIRE_PREFILL": "5", "PAGEWIRE_VERBOSE": "1"})
    assert (args.model, args.prefill, args.decode, args.port) == ("from-file", 5, 4, 1)
    assert args.tls is args.verbose is True
    assert _serve(environ={"PAGEWIRE_PORT": "tcp://10.0.0.1:80"}).port == 8000


def test_a_model_on_the_command_line_wins_over_other_places(file: Path) -> None:
    """MODEL and PAGEWIRE_MODEL were once taken for a contradiction."""
    file.write_text("model: from-file\n")
    assert _serve("mine", f"--config={file}", environ={"PAGEWIRE_MODEL": "from-environment"}).model == "mine"
    assert _serve(f"--config={file}", environ={"PAGEWIRE_MODEL": "from-environment"}).model == "from-environment"


def test_a_flag_of_vllm_that_is_missing_is_named_in_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("swap-space: 4\n")
    with pytest.raises(SystemExit):
        main.main(["serve", "--config", str(file)])
    assert capsys.readouterr().err.startswith(
        f"pagewire serve: 'swap-space' in {file} is no flag: swap-space is not implemented yet"
    )


def test_the_environment_of_serve_does_not_hinder_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAGEWIRE_BLOCK_SIZE", "17")
    main.main(["version"])
    assert capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["serve"])
    assert capsys.readouterr().err.startswith("pagewire serve: PAGEWIRE_BLOCK_SIZE is '17'; choose from 8, 16, 32, 64")


@pytest.mark.parametrize(("program", "names"), [("router", ROUTER_FLAGS), ("bridge", BRIDGE_FLAGS)])
def test_a_service_of_its_own_takes_a_file(file: Path, program: str, names: tuple[str, ...]) -> None:
    """As a process: what it says of a file that has nothing but a misspelt key."""
    assert "config" not in names
    file.write_text("log-levle: debug\n")
    command = [sys.executable, "-m", f"pagewire_{program}.main", "--config", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""}, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"pagewire-{program}: 'log-levle' in {file} is no flag: unknown flag log-levle; did you mean log-level? "
        f"(see pagewire-{program} --help)\n"
    )


def test_help_shows_every_flag_in_one_group_and_no_line_is_too_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main.main(["serve", "--help"])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0].rstrip(",") for line in lines if line.startswith("  --")]
    own = {"config", "prefill", "decode", "both", "api-server-count", "tls", "verbose", "state-file"}
    flags = {*serve.SERVE_FLAGS, *SO_ANYWAY, *WITHOUT_EFFECT, *own}
    assert sorted(name.removeprefix("--").replace("[no-]", "") for name in shown) == sorted(flags)
    assert max(map(len, lines)) <= 110
    assert "  --max-num-seqs N          sequences that a worker runs at a time (default: 128)" in lines
    assert {"examples:", "the model:", "HTTP:"} <= set(lines) and set(WORKER_FLAGS) <= set(FLAGS)

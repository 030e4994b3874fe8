"""The all-in-one image: the commands that users have for vLLM's, TGI's and Ollama's, with another image name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from pagewire_cli import launch, serve
from pagewire_core.command_line import Parser
from pagewire_core.errors import StartupError


def served(arguments: list[str], environ: dict[str, str] | None = None) -> argparse.Namespace:
    """What `pagewire serve` makes of it."""
    command = launch.command_of(arguments, environ or {})
    parser = Parser(prog="pagewire")
    serve.add_subcommand(parser.add_subparsers(), environ or {}, command.defaults)
    return serve.settle(parser.parse_args(command.arguments))


def test_the_command_of_vllm() -> None:
    args = served("--model Qwen/Qwen3-0.6B --tensor-parallel-size 2 --max-model-len 4096 --api-key k".split())
    assert (args.model, args.tensor_parallel_size, args.max_model_len, args.api_key) == (
        "Qwen/Qwen3-0.6B",
        2,
        4096,
        "k",
    )
    assert (args.host, args.port, args.ollama_port) == ("0.0.0.0", 8000, 11434)
    assert served(["serve", "org/model", "--port", "8001"]).port == 8001


def test_the_command_of_tgi() -> None:
    given = "--model-id org/model --num-shard 2 --max-input-length 1000 --max-total-tokens 2048 --quantize bitsandbytes"
    args = served([*given.split(), "--json-output", "--sharded", "true", "--cors-allow-origin=https://a.example"])
    assert (args.model, args.tensor_parallel_size, args.port) == ("org/model", 2, 80)
    assert (args.max_input_tokens, args.max_model_len, args.quantization) == (1000, 2048, "int8")
    assert (args.log_format, args.allowed_origins) == ("json", ("https://a.example",))


def test_flags_of_tgi_that_we_would_read_otherwise() -> None:
    """-p was taken for the beginning of -pp, and 8080 stages were asked for."""
    args = served("--model-id org/model -p 8080 -e --kv-cache-dtype fp8_e4m3fn".split())
    assert (args.port, args.pipeline_parallel_size, args.kv_cache_dtype) == (8080, 1, "fp8_e4m3")


def test_the_environment_of_tgi_yields_to_its_flags() -> None:
    environ = {
        "MODEL_ID": "org/model", "NUM_SHARD": "2", "MAX_INPUT_LENGTH": "1000", "MAX_TOTAL_TOKENS": "2048",
        "QUANTIZE": "bitsandbytes-nf4", "PORT": "8080", "HOSTNAME": "3f2a", "JSON_OUTPUT": "false",
    }  # fmt: skip
    args = served(["--max-total-tokens", "4096"], environ)
    assert (args.model, args.tensor_parallel_size, args.max_input_tokens) == ("org/model", 2, 1000)
    assert (args.max_model_len, args.quantization, args.port, args.host) == (4096, "int4", 8080, "0.0.0.0")
    assert args.log_format == "auto"


def test_the_environment_of_tgi_says_nothing_without_its_model() -> None:
    args = served(["--model", "org/model"], {"PORT": "9", "QUANTIZE": "bitsandbytes"})
    assert (args.port, args.quantization) == (8000, None)


def test_without_anything_the_demo_model_is_served_on_ollamas_port() -> None:
    args = served([])
    assert (args.served_model_name, args.ollama_port, args.port) == ("pagewire-demo", 11434, 8000)


def test_a_kubernetes_service_called_pagewire_does_no_harm() -> None:
    assert served([], {"PAGEWIRE_PORT": "tcp://10.0.0.1:80"}).port == 8000
    assert served([], {"PAGEWIRE_PORT": "9000"}).port == 9000


def test_our_own_flags_go_along_with_those_of_tgi() -> None:
    args = served(["--model-id", "org/model", "--prefill", "2", "--decode=3", "--max-batch-size", "7"])
    assert (args.prefill, args.decode, args.max_num_seqs) == (2, 3, 7)


def test_what_has_no_effect_is_told_and_what_is_not_supported_refused() -> None:
    command = launch.command_of("--model-id m --max-waiting-tokens 20 --disable-custom-kernels".split(), {})
    assert command.ignored == ["--disable-custom-kernels", "--max-waiting-tokens"]
    for flags in (["--quantize", "awq"], ["--rope-factor", "2"], ["--lora-adapters", "a"]):
        with pytest.raises(StartupError, match="is not supported"):
            launch.command_of(["--model-id", "m", *flags], {})


def test_a_volume_that_cannot_be_written_is_told_before_hours_of_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    assert launch.cache_of([tmp_path / "none", tmp_path]) == tmp_path
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StartupError, match="--user"):
        launch.cache_of([tmp_path])

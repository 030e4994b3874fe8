"""`pagewire serve`: what it takes, what it refuses, and which processes it makes of it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from pagewire_cli import console, gpus, main, plan, serve
from pagewire_cli import copies as copies_
from pagewire_cli.vllm_flags import NOT_IMPLEMENTED, SO_ANYWAY, WITHOUT_EFFECT, without_effect
from pagewire_core.command_line import Parser, add_flags
from pagewire_core.errors import StartupError
from pagewire_core.flags import BRIDGE_FLAGS, FLAGS, ROUTER_FLAGS, WORKER_FLAGS
from pagewire_core.model_dir import ModelDir
from redis.asyncio.connection import parse_url

_FLAGS_OF = {"router": ROUTER_FLAGS, "bridge": BRIDGE_FLAGS}


def _args(*arguments: str, environ: dict[str, str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="pagewire")
    serve.add_subcommand(parser.add_subparsers(), environ or {})
    return serve.settle(parser.parse_args(["serve", *arguments]))


def _plan(tmp_path: Path, *arguments: str, environ: dict[str, str] | None = None) -> plan.Plan:
    """On a machine without GPUs, unless `environ` names some."""
    here = {"XDG_STATE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    return plan.make_plan(_args(*arguments), here | (environ or {}))


def _taken(spec: plan.ServiceSpec) -> argparse.Namespace:
    """A service's command line as the service itself would read it."""
    parser = Parser(prog=spec.name, environ=spec.environment)
    add_flags(parser, _FLAGS_OF.get(spec.role, WORKER_FLAGS))
    return parser.parse_args([a for a in spec.command if a.startswith("--")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-parallel-size", "2"], "--data-parallel-size is not implemented yet"),
        (["--load-format=dummy"], "argument --load-format: invalid choice: 'dummy'"),
        (["--allowed-methods", '["GET"]'], "argument --allowed-methods: invalid choice"),
        (["--enable-log-requests", "--disable-log-requests"], "--enable-log-requests and --disable-log-requests con"),
        (["--max-logprobs", "-1"], "argument --max-logprobs: must be 0 or more"),
        (["-dp", "2"], "-dp is not implemented yet"),
        (["--max-num-batched-tokens", "1"], "argument --max-num-batched-tokens: must be 2 or more"),
        (["-tp", "0"], "argument --tensor-parallel-size/-tp/--num-shard: must be positive"),
        (["--max_model_len=8.5"], "argument --max-model-len: invalid whole number value: '8.5'"),
        (["--max_model_len=1.5K"], "argument --max-model-len: '1.5K' has decimals of a power of 1024; write 1.5k"),
        (["--max_modellen=3"], "unknown flag --max-modellen; did you mean --max-model-len?"),
        (["--frobnicate"], "unknown flag --frobnicate"),
        (["a", "b"], "unexpected argument 'b'"),
        ([""], "argument MODEL: must not be empty"),
        (["--model", ""], "argument --model: must not be empty"),
        (["--served-model-name", "a", "b"], "--served-model-name takes all the words after it; give MODEL before it"),
        (["--api-key", "secret", "a"], "--api-key takes all the words after it; give MODEL before it, or commas"),
        (["a", "--model", "b"], "MODEL is a but --model is b; give one of them"),
        (["--decode", "0"], "no worker can decode"),
        (["--prefill", "-1"], "argument --prefill: must not be negative"),
        (["--role", "prefill"], "unknown flag --role"),
        (["--api-server-count", "0"], "argument --api-server-count/-asc: must be positive"),
        (["-asc", "2", "--seed", "1"], "--seed needs one router"),
        (["--root-path", "llm"], "argument --root-path: 'llm' is no path; write /llm"),
    ],
)
def test_what_cannot_be_served_is_refused_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main.main(["serve", *arguments])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"pagewire serve: {message}")


def test_no_flag_is_both_implemented_and_not() -> None:
    others = {*SO_ANYWAY, *WITHOUT_EFFECT}
    assert not NOT_IMPLEMENTED & {*FLAGS, *others} and not others & set(FLAGS)


def test_flags_of_vllm_may_say_what_is_so_anyway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No flag is accepted and then ignored: another value is refused, wherever it stands."""
    said = [f"--{name}={values[-1]}" if values else f"--{name}" for name, values in SO_ANYWAY.items()]
    assert _args(*said).response_role == "assistant"
    assert _args("-q", "int8").quantization == "int8"
    on, off = tmp_path / "on.yaml", tmp_path / "off.yaml"
    on.write_text("enable_prompt_tokens_details: true\nload-format: safetensors\n")
    off.write_text("enable_prompt_tokens_details: false\n")
    assert _args("--config", str(on)).load_format == "safetensors"
    with pytest.raises(SystemExit):
        _args("--config", str(off))
    assert "--enable-prompt-tokens-details cannot be turned off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "read"), [("8192", 8192), ("8K", 8192), ("32k", 32000), ("1.5k", 1500), ("25.6k", 25600), ("1M", 1 << 20)]
)
def test_numbers_of_tokens_may_be_short_as_vllms(typed: str, read: int) -> None:
    assert _args("--max_model_len", typed, f"--max_num_batched_tokens={typed}").max_model_len == read
    assert _args(f"--max-num-batched-tokens={typed}").max_num_batched_tokens == read


def test_flags_may_have_underscores_and_their_values_keep_them() -> None:
    args = _args("--served_model_name=my_model", "--chat_template", "a_b.jinja")
    assert (args.served_model_name, args.chat_template) == ("my_model", "a_b.jinja")


def test_a_flag_that_changes_nothing_is_taken_and_told() -> None:
    assert without_effect(_args("--trust-remote-code")) == [
        "--trust-remote-code changes nothing: code that comes with a model is never run"
    ]
    assert without_effect(_args("--no-trust-remote-code")) == without_effect(_args()) == []


@pytest.mark.parametrize(
    "arguments",
    [["org/m", "--served-model-name", "a", "b"], ["--served-model-name", "a", "b", "--model", "org/m"],
     ["--served-model-name", "a", "b", "--api-key", "k", "--model=org/m"], ["--served-model-name=a,b", "org/m"]],
)  # fmt: skip
def test_a_model_may_have_several_names(arguments: list[str]) -> None:
    args = _args(*arguments)
    assert (args.model, args.served_model_name) == ("org/m", "a,b")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["serve", "\udcff"], "MODEL"),
        (["explain", "--router=h:1", "\udcff"], "prompt"),
        (["role", "\udcff", "both"], "HOST:PORT"),
        (["bench", "--model=\udcff"], "--model"),
        (["key", "\udcff"], "NAME"),
        (["status", "--router=\udcff"], "--router"),
    ],
)
def test_bytes_that_are_no_text_are_refused_with_one_line(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell's $'\\xff' comes as a lone surrogate: it once ended in a traceback of whoever sent it on."""
    with pytest.raises(SystemExit) as exit_:
        main.main(arguments)
    assert exit_.value.code == 2
    asked = f"pagewire {arguments[0]}"
    assert capsys.readouterr().err == f"{asked}: argument {name}: this is no UTF-8 text (see {asked} --help)\n"


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["version"])
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "roles"),
    [
        ([], ["prefill", "decode"]),
        (["--prefill", "2"], ["prefill", "prefill", "decode"]),
        (["--both", "2"], ["both", "both"]),
        (["--both", "1", "--prefill", "1"], ["prefill", "both"]),
        (["--prefill", "0"], ["decode"]),
    ],
)
def test_the_number_of_workers_of_each_role_is_as_asked(tmp_path: Path, arguments: list[str], roles: list[str]) -> None:
    made = _plan(tmp_path, *arguments)
    assert [spec.role for spec in made.services] == ["redis", *roles, "router", "bridge"]
    assert len({spec.address for spec in made.services}) == len(made.services)


def test_every_service_takes_its_command_line_and_finds_the_others(tmp_path: Path) -> None:
    made = _plan(tmp_path, "some/model", "--served-model-name=a,b", "--port=0", "--max-num-seqs=3", "--workers=h:1")
    taken = {spec.name: _taken(spec) for spec in made.services if spec.role != "redis"}
    decode, router, bridge = taken["decode-0"], taken["router"], taken["bridge"]
    assert (decode.role, decode.model, decode.max_num_seqs) == ("decode", "some/model", 3)
    assert decode.redis_url == router.redis_url == f"redis://{made.address_of('redis')}/0"
    assert router.workers.split(",") == ["h:1", made.address_of("prefill"), made.address_of("decode")]
    assert router.served_model_name == "a,b" and made.model == "a"
    assert bridge.router == made.address_of("router")
    for spec in made.services[1:]:
        assert spec.address == f"{taken[spec.name].host}:{taken[spec.name].port}"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_several_http_servers_share_a_port_and_have_a_router_each(tmp_path: Path) -> None:
    made = _plan(tmp_path, "m", "--api-server-count=2", "--port=8123", "--host=0.0.0.0", "--ssl-certfile=c")
    assert [spec.name for spec in made.services[3:]] == ["router-0", "router-1", "bridge-0", "bridge-1"]
    assert made.base_url == "https://127.0.0.1:8123"
    assert len({spec.address for spec in made.services}) == len(made.services)
    routers, bridges = made.services[3:5], made.services[5:]
    for rank, (router, bridge) in enumerate(zip(routers, bridges, strict=True)):
        taken = _taken(bridge)
        assert (taken.host, taken.port, taken.router) == ("0.0.0.0", 8123, router.address)
        assert bridge.address == f"127.0.0.1:{taken.own_port}", "asked at the shared port, another might answer"
        assert (taken.api_server_rank, _taken(router).api_server_rank) == (rank, rank)
    assert len({_taken(spec).workers for spec in routers}) == 1
    (alone,) = [spec for spec in _plan(tmp_path, "m").services if spec.role == "bridge"]
    assert (_taken(alone).own_port, _taken(alone).api_server_rank) == (None, None)


def test_the_demo_model_is_served_under_its_short_name_by_default(tmp_path: Path) -> None:
    args = _args()
    assert Path(args.model).name in ("pagewire-demo", "demo_model")
    assert args.served_model_name == "pagewire-demo"
    assert _args("--model", "m").model == _args("m").model == _args(environ={"PAGEWIRE_MODEL": "m"}).model == "m"


def test_workers_divide_the_cores_and_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on one machine that each take 90 % of its memory would not both start."""
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _pid: set(range(9)), raising=False)
    made = _plan(tmp_path, "m", "--prefill=2", "--decode=2")
    assert [_taken(spec).threads for spec in made.services[1:5]] == [2, 2, 2, 3]
    for spec in made.services[1:5]:
        assert spec.environment["OMP_NUM_THREADS"] == "2"
        assert _taken(spec).gpu_memory_utilization == 0.225
    given = _plan(tmp_path, "m", "--threads=5").services[1]
    assert (_taken(given).threads, given.environment["OMP_NUM_THREADS"]) == (5, "5")


@pytest.mark.parametrize(
    ("arguments", "visible", "seen", "utilization"),
    [
        ("--prefill 1 --decode 2", "0,2,5", ["0", "2", "5"], 0.9),
        ("--prefill 1 --decode 2", "GPU-1,GPU-2", ["GPU-1", "GPU-2", "GPU-1"], 0.45),
        ("--prefill 1 --decode 1", "3", ["3", "3"], 0.45),
        ("--decode 1 --tensor-parallel-size 2", "0,1,2,3", ["0,1", "2,3"], 0.9),
        ("--decode 1 --tensor-parallel-size 2", "0,1,2", ["0,1,2", "0,1,2"], 0.45),
        ("--decode 1 --device cpu", "0,1", ["0,1", "0,1"], 0.45),
    ],
)
def test_workers_have_gpus_of_their_own_or_share_them_and_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, visible: str, seen: list[str], utilization: float
) -> None:
    monkeypatch.setattr(gpus, "torch_is_cpu_only", lambda: False)
    made = _plan(tmp_path, *arguments.split(), environ={"CUDA_VISIBLE_DEVICES": visible})
    workers = [spec for spec in made.services if spec.role in plan.WORKER_ROLES]
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in workers] == seen
    assert {_taken(spec).gpu_memory_utilization for spec in workers} == {utilization}


def test_a_torch_for_cpus_divides_memory_whatever_gpus_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "torch_is_cpu_only", lambda: True)
    made = _plan(tmp_path, "--prefill", "1", "--decode", "1", environ={"CUDA_VISIBLE_DEVICES": "0,1"})
    workers = [spec for spec in made.services if spec.role in plan.WORKER_ROLES]
    assert {_taken(spec).gpu_memory_utilization for spec in workers} == {0.45}


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus.available_gpus({}, tmp_path) == ["0", "1"]
    assert gpus.available_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == []


GIB = 1 << 30


def _model(tmp_path: Path, parameters: int, dtype: str = "bfloat16") -> ModelDir:
    """Of so many bf16 weights, none of which are there."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return ModelDir(tmp_path, "m", {"dtype": dtype}, {})


@pytest.mark.parametrize(
    ("billions", "flags", "dtype", "copies"),
    [
        (1, [], "bfloat16", 2), (2, [], "bfloat16", 2), (3, [], "bfloat16", 1), (7, [], "bfloat16", 1),
        (2, [], "float16", 1), (1, ["--dtype=float32"], "bfloat16", 2), (2, ["--dtype=float32"], "bfloat16", 1),
        (3, ["--quantization=int8"], "bfloat16", 2), (7, ["--quantization=int8"], "bfloat16", 1),
        (6, ["--quantization=int4"], "bfloat16", 2), (8, ["--quantization=int4"], "float16", 1),
    ],
)  # fmt: skip
def test_there_are_two_copies_of_the_weights_where_they_fit_half_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, billions: int, flags: list[str], dtype: str, copies: int
) -> None:
    """A laptop whose memory the second copy fills would serve nothing, where another system serves with one."""
    monkeypatch.setattr(copies_, "available_memory", lambda: 16 * GIB)
    why = copies_.why_one(_args("m", *flags), _model(tmp_path, billions * 10**9, dtype), {"CUDA_VISIBLE_DEVICES": ""})
    assert (1 if why else 2) == copies
    assert why is None or re.fullmatch(r"two copies of the weights would take [\d.]+ of 16.0 GiB of memory", why)


@pytest.mark.parametrize(
    ("visible", "flags", "why"),
    [
        ("0,1", [], None), ("0", [], "two workers want 2 GPUs and there are 1"), ("0", ["--device=cpu"], None),
        ("0,1", ["-tp=2"], "two workers want 4 GPUs and there are 2"), ("0,1,2,3", ["-tp=2"], None),
    ],
)  # fmt: skip
def test_a_gpu_has_one_copy_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, flags: list[str], why: str | None
) -> None:
    monkeypatch.setattr(gpus, "torch_is_cpu_only", lambda: False)
    model = _model(tmp_path, 10**6)
    assert copies_.why_one(_args("m", *flags), model, {"CUDA_VISIBLE_DEVICES": visible}) == why


def test_who_says_how_many_workers_has_them() -> None:
    assert _args("m").any_workers
    for flags in (["--prefill=1"], ["--decode=2"], ["--both=1"], ["--prefill=1", "--decode=1"]):
        assert not _args("m", *flags).any_workers


def test_the_supervisors_own_environment_does_not_reach_the_services(tmp_path: Path) -> None:
    """PAGEWIRE_PORT=8000 once made every worker fight for port 8000."""
    made = _plan(tmp_path, "m", environ={"PAGEWIRE_PORT": "8000", "PAGEWIRE_HOST": "h", "LANG": "C"})
    for spec in made.services:
        assert {key for key in spec.environment if key.startswith("PAGEWIRE_")} == {"PAGEWIRE_REDIS_URL"}
        assert spec.environment["LANG"] == "C"


def test_a_redis_password_does_not_show_in_the_process_list(tmp_path: Path) -> None:
    url = "redis://:secret@h:1/0"
    made = _plan(tmp_path, "m", f"--redis-url={url}")
    assert "redis" not in [spec.role for spec in made.services]
    assert not [word for spec in made.services for word in spec.command if "secret" in word]
    assert {_taken(spec).redis_url for spec in made.services if spec.role != "bridge"} == {url}


@pytest.mark.parametrize(
    ("host", "dialled"), [("0.0.0.0", "127.0.0.1:9"), ("::", "127.0.0.1:9"), ("::1", "[::1]:9"), ("box", "box:9")]
)
def test_the_address_to_try_is_one_that_can_be_dialled(tmp_path: Path, host: str, dialled: str) -> None:
    made = _plan(tmp_path, "m", f"--host={host}", "--port=9")
    assert made.base_url == f"http://{dialled}"


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_curl_line_survives_a_shell(is_chat: bool) -> None:
    words = shlex.split(console.curl_line("http://h:1", "o'brien/model", is_chat))
    assert words[0] == "curl"
    assert words[1] == "http://h:1/v1/" + ("chat/completions" if is_chat else "completions")
    assert json.loads(words[words.index("-d") + 1])["model"] == "o'brien/model"


def test_the_cores_a_user_names_are_shared_out_among_the_workers(tmp_path: Path) -> None:
    """Two workers whose threads are pinned to the same cores make each other wait at every layer."""
    made = _plan(tmp_path, "m", "--prefill=1", "--decode=1", "--cpus=2,3,6-7")
    workers = [_taken(spec) for spec in made.services[1:3]]
    assert [(w.cpus, w.threads) for w in workers] == [((2, 3), 2), ((6, 7), 2)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_workers_lend_each_other_cores_unless_they_are_told_how_many_threads_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _pid: set(range(3)), raising=False)
    made = _plan(tmp_path, "m", "--prefill=1", "--decode=1")
    workers = [_taken(spec) for spec in made.services[1:3]]
    assert [(w.cpus, w.threads) for w in workers] == [((0,), 1), ((1, 2), 2)]
    assert len({w.cpu_lending for w in workers}) == 1 and Path(workers[0].cpu_lending).exists()
    for flags in (["--prefill=1", "--decode=1", "--threads=1"], ["--both=1"], ["--prefill=2", "--decode=2"]):
        assert _taken(_plan(tmp_path, "m", *flags).services[1]).cpu_lending is None


def test_threads_that_are_fewer_than_the_cores_have_more_cores_to_choose_from(tmp_path: Path) -> None:
    made = _plan(tmp_path, "m", "--both=2", "--threads=1", "--cpus=0-4")
    assert [(w.cpus, w.threads) for w in map(_taken, made.services[1:3])] == [((0, 1), 1), ((2, 3, 4), 1)]


def test_cores_that_do_not_go_round_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--cpus names 1 cores; 2 workers with 1 threads each take 2"):
        _plan(tmp_path, "m", "--prefill=1", "--decode=1", "--cpus=0")


def test_with_tls_each_service_has_its_own_certificate_and_redis_no_port(tmp_path: Path) -> None:
    made = _plan(tmp_path, "m", "--tls", "--both=1", "--prefill=1")
    assert made.tls is not None and made.tls.cert.endswith("/tls/operator.crt")
    for spec in made.services[1:]:
        taken, role = _taken(spec), spec.role if spec.role in ("router", "bridge") else "worker"
        assert (Path(taken.tls_cert).name, Path(taken.tls_key).name) == (f"{role}.crt", f"{role}.key")
        assert taken.tls_ca == made.tls.ca
    redis = made.services[0]
    assert redis.address.endswith("/tls/redis.sock") and made.redis_url == f"unix://{redis.address}?db=0"
    assert redis.command[redis.command.index("--port") + 1] == "0"
    with pytest.raises(StartupError, match="too long a path for a socket"):
        _plan(tmp_path / ("x" * 100), "m", "--tls")


def test_the_socket_of_redis_is_found_wherever_the_state_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside the working directory, and in a folder whose name would mean something in a URL."""
    monkeypatch.setattr(plan, "_LONGEST_SOCKET_PATH", 1000)
    monkeypatch.chdir(tmp_path)
    for folder in ("state", "s %41?#ü"):
        made = _plan(Path(folder), "m", "--tls")
        assert made.services[0].address == str(tmp_path / folder / "pagewire" / "8000" / "tls" / "redis.sock")
        assert parse_url(made.redis_url)["path"] == made.services[0].address


def test_https_is_the_bridges_alone(tmp_path: Path) -> None:
    made = _plan(tmp_path, "m", "--ssl-certfile=/c", "--ssl-keyfile=/k")
    assert made.base_url.startswith("https://") and made.tls is None
    assert (_taken(made.services[-1]).ssl_certfile, _taken(made.services[-1]).ssl_keyfile) == ("/c", "/k")
    assert not [spec.name for spec in made.services[:-1] if "/k" in " ".join(spec.command)]

"""`pagewire completion`: what a real bash offers once it has read the script."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pagewire_cli.main import main
from pagewire_cli.serve import SERVE_FLAGS

_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function_of_pagewire=$(complete -p pagewire | grep -o -- '-F [^ ]*' | cut -d' ' -f2)
"$function_of_pagewire" pagewire "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def _script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["completion", shell])
    return capsys.readouterr().out


def test_bash_completes_commands_flags_values_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pagewire.bash"
    path.write_text(_script("bash", capsys))
    (tmp_path / "a.yaml").touch()

    def offered(line: str) -> set[str]:
        """For a line with the cursor at its end."""
        command = ["bash", "--norc", "--noprofile", "-c", _ASK, "bash", str(path), *line.split(" ")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path)
        return set(done.stdout.split())

    assert offered("pagewire s") >= {"serve", "status"}
    assert offered("pagewire ser") == {"serve"}
    assert offered("pagewire serve --max-num") == {"--max-num-seqs", "--max-num-batched-tokens"}
    assert {f"--{flag}" for flag in SERVE_FLAGS} | {"--config", "--prefill"} <= offered("pagewire serve --")
    assert offered("pagewire serve --dtype b") == {"bfloat16"}
    assert offered("pagewire serve --routing-policy ") >= {"pagewire", "llm_d"}
    assert offered("pagewire serve --config a") == {"a.yaml"}
    assert offered("pagewire completion ") >= {"bash", "zsh", "fish"}
    assert "--watch" in offered("pagewire status --router 127.0.0.1:1 --") and not offered("pagewire status --wat=")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_the_same_commands(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read by the shell where there is one."""
    script = _script(shell, capsys)
    assert all(word in script for word in ("serve", "status", "max-num-seqs", "bfloat16"))
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=30)


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_offers_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pagewire.fish").write_text(_script("fish", capsys))
    for line, offered in (("pagewire dra", "drain"), ("pagewire serve --max-num-s", "--max-num-seqs"),
                          ("pagewire serve --dtype b", "bfloat16")):  # fmt: skip
        command = f"source {tmp_path}/pagewire.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", command], capture_output=True, text=True, timeout=30)
        assert offered in done.stdout.split()


def test_a_shell_that_is_unknown_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "csh"])
    assert ended.value.code == 2 and "bash" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_is_no_fault_to_trace() -> None:
    """As in `pagewire explain ... | head`: the command ends as those of the shell do."""
    code = "from pagewire_cli.main import main; main(['completion', 'bash'])"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # long before anything is printed
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()

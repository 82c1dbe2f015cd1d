"""How every command line behaves, by example: mistakes, progress, worker processes, tables."""

import pytest

from plumbing import cli


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [(["--im=x"], "--images"), (["score", "--reference=x"], "--references"), (["--zzz"], "--help")],
)
def test_an_unknown_flag_names_the_nearest_known_one(arguments, advice, capsys):
    parser = cli.Parser(prog="tool.py")
    parser.add_argument("--images")
    parser.add_subparsers().add_parser("score").add_argument("--references")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.count("\n") == 1
    assert line.startswith("tool.py") and arguments[-1] in line and advice in line


def raising(error):
    def run(_):
        raise error

    return run


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b"), MemoryError("a b")])
def test_a_mistake_is_one_line_and_status_2(error, capsys):
    assert cli.guard("tool.py", raising(error), None) == 2
    assert capsys.readouterr() == ("", "tool.py: a b\n")


def test_a_defect_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        cli.guard("tool.py", raising(KeyError("x")), None)


def test_ctrl_c_is_status_130():
    assert cli.guard("tool.py", raising(KeyboardInterrupt()), None) == 130


def test_progress_off_a_terminal_is_a_line_every_thirty_seconds_at_most(monkeypatch, capsys):
    clock = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    show = cli.progress("cache", "images")
    for seconds in (1, 31, 40, 50):
        clock[0] = seconds
        show(2 * seconds, 100)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cache" in line and "62/100" in line and "images" in line


def test_parallel_keeps_the_order():
    assert list(cli.parallel(abs, range(-300, 0), workers=2)) == list(range(300, 0, -1))


def test_a_table_is_aligned_and_has_commas(capsys):
    cli.print_table([["name", "count"], ["images", 12345], ["none", ""]])
    assert capsys.readouterr().out.splitlines() == ["name     count", "images  12,345", "none"]


def test_a_wrong_number_of_the_ngram_ban_is_named(capsys):
    parser = cli.Parser(prog="tool.py")
    cli.add_decoding_flags(parser.add_argument)
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-repeat-ngram", "x"])
    assert "auto_or_int" in capsys.readouterr().err
    assert parser.parse_args(["--no-repeat-ngram", "3"]).no_repeat_ngram == 3

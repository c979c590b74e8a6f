"""Reading /server_info: keys, certificates, redirections, and answers that no server of ours would send."""

import shutil
import subprocess

import pytest

from sglang_macs import cli
from sglang_macs.errors import MacsError
from sglang_macs.observe import server_info
from sglang_macs.observe.server_info import API_KEY_ENV, Server
from tests.support.info_server import answering, body

STATE = {"version": "0", "rank": 0}


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch):
    for name in (API_KEY_ENV, "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def refused(server: Server) -> str:
    with pytest.raises(MacsError) as caught:
        server.states()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_key_opens_the_server_and_is_asked_for_by_name():
    with answering(body([STATE]), api_key="s3cret") as url:
        assert Server(url, api_key="s3cret").states() == [STATE]
        assert "no API key" in refused(Server(url)) and "--api-key" in refused(Server(url))
        wrong = refused(Server(url, api_key="other-key"))
        assert "--api-key" in wrong and API_KEY_ENV in wrong and "other-key" not in wrong
    with answering(lambda: 403) as url:
        assert "--api-key" in refused(Server(url))


def test_the_commands_take_the_key_from_the_flag_or_the_environment(monkeypatch, capsys):
    with answering(body([STATE]), api_key="s3cret") as url:
        assert cli.main(["top", url, "--once"]) == 2
        assert cli.main(["top", url, "--once", "--api-key", "s3cret"]) == 0
        monkeypatch.setenv(API_KEY_ENV, "s3cret\n")  # as it comes out of a file
        assert cli.main(["top", url, "--once"]) == 0
        assert cli.main(["top", url, "--once", "--api-key", "other"]) == 2  # the flag wins
    assert "s3cret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("key", ["two\nlines", "ключ", "\x1b[31m"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key):
    with pytest.raises(MacsError, match="--api-key") as caught:
        Server("http://127.0.0.1:1", api_key=key)
    assert key not in str(caught.value) and key not in repr(Server("http://h", api_key="k" + "ey"))
    assert "key'" not in repr(Server("http://h", api_key="the key"))


def test_a_mistyped_flag_does_not_print_its_value(capsys):
    with pytest.raises(SystemExit):
        cli.main(["top", "http://127.0.0.1:9", "--apikey", "s3cret", "--key=s3cret"])
    error = capsys.readouterr().err
    assert "--apikey --key" in error and "s3cret" not in error and len(error.splitlines()) == 1


def test_a_key_does_not_follow_a_redirection():
    asked = []
    with (
        answering(lambda: asked.append(1) or 404) as elsewhere,
        answering(b"", location=f"{elsewhere}/server_info") as url,
    ):
        error = refused(Server(url, api_key="s3cret"))
    assert elsewhere in error and not asked


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a self-signed certificate for 127.0.0.1 in one PEM file, and the certificate alone."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "9",
    ]
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text(key.read_text() + cert.read_text())
    return both, cert


def test_a_certificate_is_trusted_by_name_only(certificate):
    both, cert = certificate
    with answering(body([STATE]), certificate=both) as url:
        assert Server(url, cacert=str(cert)).states() == [STATE]
        assert "--cacert" in refused(Server(url))
        assert "Use the name" in refused(Server(url.replace("127.0.0.1", "localhost"), cacert=str(cert)))
        plain = url.replace("https", "http")
        assert "expected an SGLang server" in refused(Server(plain))
    with answering(body([STATE])) as url:
        assert "no TLS" in refused(Server(url.replace("http", "https")))


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(tmp_path, text):
    (tmp_path / "ca.pem").write_text(text)
    assert "--cacert" in refused(Server("https://127.0.0.1:9", cacert=str(tmp_path / "ca.pem")))


@pytest.mark.parametrize("path", ["/nowhere.pem", "/dev/zero", "/"])
def test_a_file_that_holds_no_certificates_is_refused(path):
    assert "--cacert" in refused(Server("https://127.0.0.1:9", cacert=path))


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:30000", "localhost:30000", "file:///etc/passwd", "ftp://h", "http://", "http://h:port", "http://h:0",
     "http://[", "http://h:99999", "http://a b", "http://h/\x1b[31m", "http://hé", "http://h\r\nX: y"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(MacsError, match="expected an address such as") as caught:
        Server(url)
    assert str(caught.value).isprintable()


def test_a_password_in_an_address_is_not_shown():
    with pytest.raises(MacsError) as caught:
        Server("http://user:pass@host")
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [b"", b"<html>", b"\xff\xfe", b"4", b"[]", b"null", b'{"internal_states": 4}', b'{"internal_states": null}',
     b'{"internal_states": [1, null, {"macs": 3}]}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000,
     b'{"internal_states": [{"macs": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}]}",
     500, 404, 204],
    ids=range(15),
)  # fmt: skip
def test_answers_of_other_servers_end_in_one_line(answer):
    with answering(answer if isinstance(answer, bytes) else lambda: answer) as url:
        assert url in refused(Server(url))


def test_no_more_is_read_than_a_server_of_ours_sends(monkeypatch):
    monkeypatch.setattr(server_info, "MAX_BYTES", 1 << 20)
    with answering(b" " * (3 << 20)) as url:
        assert "more than 1 MB" in refused(Server(url))


def test_no_escape_of_a_server_reaches_an_error():
    evil = "\x1b]0;title\x07\x1b[2J\u202e"
    with answering(b"", location=f"http://h/{evil}") as url:
        assert refused(Server(url)).isprintable()


def test_ranks_are_those_that_the_states_name():
    layers = {"0": {"rows_before": [1, 2, 3, 4]}}
    assert server_info.ranks([{"rank": 0, "layers": layers}, {"rank": 2, "layers": {}}]) == ([0, 2], 4)
    assert server_info.missing_ranks([{"rank": 0, "layers": layers}]) == "counters of 1 of 4 ranks"
    assert server_info.missing_ranks([{"rank": 0}]) == ""  # nobody says how many there are
    whole = {"rank": 0, "ranks": {"ep_size": 2, "answering": [0, 1]}}
    assert server_info.ranks([whole]) == ([0, 1], 2) and not server_info.missing_ranks([whole])
    assert server_info.missing_ranks([{"rank": 0, "ranks": {"ep_size": 2, "answering": [0]}}])
    for odd in ({"ranks": 3}, {"ranks": {"ep_size": "4", "answering": {}}}, {"layers": []}, {"layers": {"0": [1]}}):
        server_info.missing_ranks([odd])

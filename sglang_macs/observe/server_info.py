"""A running server over HTTP or HTTPS, with an API key where it asks for one: its counters, `GET /server_info`,
options, `POST /set_internal_state`, and what else `Server.ask` is told.

Nothing that a server answers is trusted: what is read is bounded, and whoever shows its texts passes them through
`errors.printable`.
"""

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .. import __version__, files
from ..errors import MacsError, printable

API_KEY_ENV = "SGLANG_API_KEY"
MAX_BYTES = 256 << 20  # of an answer: 128 ranks of 94 layers and 128 experts at infinite gamma take a tenth of it
WAIT_S = 30  # for a sign of life: a scheduler answers between batches
WHOLE_ANSWER_S = 120
MOST_OF_A_REFUSAL = 1 << 16  # bytes of its body that are read

State = dict[str, Any]


class RefusedError(MacsError):
    """A server refused one request for what is in it, and will the next time, too."""


@dataclass(frozen=True)
class Server:
    """Where a server is and how to be let in. Raises MacsError for an address, key or file that cannot be one.

    url: http or https; api_key: its --api-key (or --admin-api-key); cacert: certificates in PEM to trust, in place of
    the system's.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    cacert: str | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
        except ValueError:
            fits = False
        if not fits or not (self.url.isascii() and self.url.isprintable() and " " not in self.url):
            shown = "one with a user name" if "@" in self.url else repr(self.url)
            raise MacsError("server", shown, "an address such as http://127.0.0.1:30000")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise MacsError("--api-key or --admin-api-key", "characters that no HTTP header takes", "printable ASCII")

    def states(self) -> list[State]:
        """The `macs` state of every scheduler that answers. Raises MacsError where there is none."""
        try:
            info = json.loads(self.ask("/server_info"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, MacsError):
                raise
            raise self._error(f"no JSON: {error}") from error
        listed = info.get("internal_states") if isinstance(info, Mapping) else None
        if not isinstance(listed, list):
            raise self._error("no internal_states in its answer")
        found = [
            state["macs"] for state in listed if isinstance(state, Mapping) and isinstance(state.get("macs"), dict)
        ]
        if not _is_shallow(found):
            raise self._error("counters nested without end")
        if not found:
            fix = "Add --moe-a2a-backend macs."
            raise MacsError("server", f"{self.url} without MACS", "one launched with MACS", fix)
        return found

    def change(self, server_args: Mapping[str, float]) -> bool:
        """Asks for other options (`control.encode`); False where a scheduler refuses them. Raises MacsError."""
        raw = self.ask("/set_internal_state", {"server_args": server_args})
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._error(f"no JSON: {error}") from error
        return isinstance(answer, list) and all(updated is True for updated in answer)

    def ask(self, path: str, body: Mapping[str, Any] | None = None, wait_s: float = WAIT_S) -> bytes:
        """What it answers to GET, or with a body to POST. Raises RefusedError for a body that it does not take,
        MacsError for anything else.
        """
        url = f"{self.url.rstrip('/')}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers={"User-Agent": f"sglang-macs/{__version__}"})
        if data is not None:
            request.add_header("Content-Type", "application/json")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        handlers = [_NoRedirect]
        if url.startswith("https"):
            handlers.append(urllib.request.HTTPSHandler(context=self._trusted()))
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(request, timeout=wait_s) as answer:
                return self._body(answer)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, MacsError):
                raise
            raise self._unreachable(getattr(error, "reason", error)) from error

    def _body(self, answer: http.client.HTTPResponse) -> bytes:
        """The whole answer, at most MAX_BYTES of it and not for ever."""
        deadline, parts, size = time.monotonic() + WHOLE_ANSWER_S, [], 0
        while part := answer.read1(1 << 20):
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise self._error(f"more than {MAX_BYTES >> 20} MB")
            if time.monotonic() > deadline:
                raise self._error(f"no whole answer within {WHOLE_ANSWER_S} s")
        return b"".join(parts)

    def _trusted(self) -> ssl.SSLContext:
        if self.cacert is None:
            return ssl.create_default_context()
        pem = files.read(self.cacert, "--cacert")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=pem.decode("ascii"))
            return context
        except (ValueError, OSError) as error:
            raise MacsError("--cacert", f"{self.cacert} ({error})", "certificates in PEM") from error

    def _refused(self, error: urllib.error.HTTPError) -> MacsError:
        why = _reason(error)
        if error.code in (401, 403):
            fix = f"Pass the server's with --api-key, or in {API_KEY_ENV}."
            got = "another API key" if self.api_key else "no API key"
            return MacsError(
                "server", f"{got} for {self.url} (HTTP {error.code})", "the API key it was started with", fix
            )
        if 300 <= error.code < 400:
            return self._error(f"a redirection to {error.headers.get('Location')}", "Pass that address.")
        got = f"HTTP {error.code} {error.reason}{f': {why}' if why else ''}"
        if error.code in (400, 413, 422):
            return RefusedError("server", f"{self.url} ({got})", "a request that it takes")
        return self._error(got)

    def _unreachable(self, reason: object) -> MacsError:
        if isinstance(reason, ssl.SSLCertVerificationError):
            fix = "Pass the certificate of who signed it with --cacert."
            if reason.verify_code in (62, 64):  # of another host name, of another address
                fix = "Use the name that it is for; --cacert does not help."
            return self._error(f"a certificate that is not trusted: {reason.verify_message}", fix)
        if isinstance(reason, ssl.SSLError):
            return self._error(
                f"no TLS: {reason.reason}", "Is it http:// there? Or does --cacert name another server's?"
            )
        return self._error(reason)

    def _error(self, got: object, fix: str = "Is the server up, and is this its address?") -> MacsError:
        return MacsError("server", f"{self.url} ({got})", "an SGLang server's /server_info", fix)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection ends as an HTTPError: urllib would hand the key to whatever host it names."""

    def redirect_request(self, *_: object) -> None:
        return None


def _reason(error: urllib.error.HTTPError) -> str:
    """What a refusal says in its body: SGLang's and OpenAI's message, or nothing."""
    try:
        said = json.loads(error.read(MOST_OF_A_REFUSAL))
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        return ""
    finally:
        error.close()
    said = said.get("error", said) if isinstance(said, dict) else {}
    message = said.get("message") if isinstance(said, dict) else None
    return message if isinstance(message, str) else ""


def applied(state: Mapping[str, Any]) -> bool:
    """Whether every request for other options has taken effect."""
    return _control(state).get("applied") == _control(state).get("received")


def refusal(states: Sequence[Mapping[str, Any]]) -> str:
    """Why the last request for other options was refused."""
    return next((printable(why) for state in states if (why := _control(state).get("refused"))), "and no reason")


def changes(state: Mapping[str, Any]) -> list[Any]:
    """[request, pass] of the last changes."""
    found = _control(state).get("changes")
    return found if isinstance(found, list) else []


def _control(state: Mapping[str, Any]) -> Mapping[str, Any]:
    found = state.get("control")
    return found if isinstance(found, Mapping) else {}


def ranks(states: Sequence[Mapping[str, Any]]) -> tuple[list[int], int | None]:
    """The expert-parallel ranks whose counters `states` hold, and how many there are; None where no state says that."""
    answering: set[int] = set()
    sizes = []
    for state in states:
        said = state.get("ranks") if isinstance(state.get("ranks"), Mapping) else {}
        named = said.get("answering")
        answering.update(_whole(named if isinstance(named, list) else [state.get("rank")]))
        layers = state.get("layers") if isinstance(state.get("layers"), Mapping) else {}
        rows = [layer.get("rows_before") for layer in layers.values() if isinstance(layer, Mapping)]
        sizes += _whole([said.get("ep_size")]) or [len(r) for r in rows if isinstance(r, list)]
    return sorted(answering), max(sizes, default=None)


def missing_ranks(states: Sequence[Mapping[str, Any]]) -> str:
    """In words, whose counters are not in `states`; "" where nobody's are missing as far as they say."""
    answering, size = ranks(states)
    return "" if size is None or len(answering) >= size else f"counters of {len(answering)} of {size} ranks"


def _is_shallow(value: object, most: int = 16) -> bool:
    """Whether lists and tables are nested at most that deep: readers of counters call themselves."""
    level = [value]
    for _ in range(most):
        tables = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [inner for table in tables for inner in table]
        if not level:
            return True
    return False


def _whole(values: Sequence[object]) -> list[int]:
    return [value for value in values if type(value) is int and 0 <= value < 1 << 20]

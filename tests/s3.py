"""A real S3 API of this process, on loopback. It can be away, refuse, forget, or break off in mid-answer."""

import itertools
import socket
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import BaseWSGIServer, make_server

from selfalign.core.locations import Location, located

BUCKET = "runs"
Fault = Literal["none", "closed", "unavailable", "broken", "forbidden", "conflict", "taken", "cut", "forgetful"]
# As AWS answers, and for the name that is taken, as others do.
ANSWERS: Mapping[Fault, tuple[str, str, str]] = {
    "unavailable": ("503 Service Unavailable", "ServiceUnavailable", "Come back later"),
    "forbidden": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "conflict": ("409 Conflict", "ConditionalRequestConflict", "A conflicting operation is under way"),
    "cut": ("400 Bad Request", "IncompleteBody", "You did not provide the number of bytes specified"),
    "taken": ("412 Precondition Failed", "412", "Precondition Failed"),
}


class _Quiet(MotoRequestHandler):
    def log(self, *_: object) -> None: ...


class S3:
    """`fault`: none | closed (no answer) | broken (does as it is told, and sends half an answer) | forgetful (writes
    over what it is told to leave) | what it answers (`ANSWERS`) instead of doing as it is told.

    It sets in after `after` more requests, and lasts for `lasts` of them. `asked` counts all requests.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        # Its own check and its own write are two steps.
        self._one_at_a_time = threading.Lock()
        self._numbers = itertools.count()
        self._server: BaseWSGIServer | None = None
        self.port = 0
        self.asked = 0
        self.mend()
        self.open()
        self._backend.create_bucket(BUCKET, "us-east-1")

    @property
    def _backend(self) -> Any:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client's process must have."""
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "NO_PROXY": "127.0.0.1"}

    def folder(self) -> Location:
        """An empty one."""
        return located(f"s3://{BUCKET}/{next(self._numbers)}/run")

    def age(self, path: Location, age_s: float) -> None:
        """Make an object look as if it were written so long ago."""
        key = path.path.removeprefix(f"{BUCKET}/")
        self._backend.buckets[BUCKET].keys[key].last_modified = datetime.now(UTC).replace(tzinfo=None) - timedelta(
            seconds=age_s
        )

    def fail(self, fault: Fault, after: int = 0, lasts: int = 1 << 30) -> None:
        """See the class."""
        self._fault, self._after, self._lasts = fault, after, lasts

    def mend(self) -> None:
        """No fault from now on."""
        self.fail("none")

    def open(self) -> None:
        """Take connections."""
        self._server = make_server("127.0.0.1", self.port, self, threaded=True, request_handler=_Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Refuse connections. What was stored stays."""
        assert self._server is not None
        self.fail("closed")
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        with self._one_at_a_time:
            self.asked += 1
            fault = self._next_fault()
            if fault in ANSWERS:
                status, code, message = ANSWERS[fault]
                body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                start_response(status, [("Content-Length", str(len(body)))])
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
            if fault == "closed":
                return self._hang_up(environ)
            if fault == "forgetful":
                environ.pop("HTTP_IF_NONE_MATCH", None)
            answer = self._app(environ, start_response)
            if fault != "broken":
                return answer
            body = b"".join(answer)
            environ["werkzeug.socket"].sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body) + 9, body[: len(body) // 2])
            )
            return self._hang_up(environ)

    def _next_fault(self) -> Fault:
        if self._after > 0:
            self._after -= 1
            return "none"
        self._lasts -= 1
        return self._fault if self._lasts >= 0 else "none"

    def _hang_up(self, environ: Any) -> Iterable[bytes]:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

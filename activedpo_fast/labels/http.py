"""Requests to a server that answers in JSON: retried and bounded, without secrets in messages.

Through httpx2, which huggingface_hub speaks HTTP with. Its own InferenceClient reaches compatible
servers too, but it sends the saved Hugging Face token to any address when no key is given, and it
neither retries nor bounds a response.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import httpx2

from activedpo_fast._checks import check_at_least, fits
from activedpo_fast._files import first_line
from activedpo_fast._printable import one_line
from activedpo_fast.errors import ActiveDPOError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait
_LONGEST_BACKOFF = 60.0
_LONGEST_TIMEOUT = 86_400.0
_LONGEST_REASON = 300  # characters of a server's message
_TRY_AGAIN = frozenset({408, 425, 429})  # and all from 500
_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


class RequestRefused(ActiveDPOError):
    """The server refuses this request as it is; others may pass."""


class NotThere(ActiveDPOError):
    """The server has nothing at this address (status 404 or 405)."""


class Stopped(Exception):
    """The caller no longer wants the answer."""


class _Failed(Exception):
    """A request that may succeed if it is sent again; `after` is the server's wish in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class JsonServer:
    """A server that takes and gives JSON below `base_url`. May be used by several threads.

    Connection errors, timeouts and the statuses 408, 425, 429 and 5xx are tried again, after the
    time in `Retry-After`, or else after 1, 2, 4, ... seconds with up to a quarter more. Redirects
    are not followed: the key would go to another server.

    Args:
        base_url: http or https, without a user, a query or a fragment.
        name: what it is to the user, for messages, such as "judge".
        headers: sent with every request.
        secrets: texts that are blanked out in every message.
        timeout: seconds for one request, to the last byte of its response.
        retries: how often a request is sent again, from 0.
        max_mib: the most that is read of a response.

    Raises:
        ActiveDPOError: `base_url` is not such an address, bad numbers, or the proxy or the
            certificates that the environment names cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        name: str,
        headers: Mapping[str, str] | None = None,
        secrets: tuple[str, ...] = (),
        timeout: float = 120.0,
        retries: int = 5,
        max_mib: int = 4,
    ) -> None:
        self.base_url = checked_url(base_url)
        check_at_least(0, retries=retries)
        if not (fits(timeout, float) and 0 < timeout <= _LONGEST_TIMEOUT):
            raise ActiveDPOError(
                f"timeout: {timeout} is not above 0 and at most {_LONGEST_TIMEOUT:.0f} seconds"
            )
        self._name = name
        self._secrets = secrets
        self._timeout = timeout
        self._retries = retries
        self._max_bytes = max_mib * 2**20
        self._client = self._made_client(headers)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        stop: threading.Event | None = None,
        again: bool = True,
        text: bool = False,
    ) -> Any:
        """Return the JSON value that the server answers with.

        Args:
            path: what follows `base_url`, from "/".
            body: sent as JSON, unless it is None.
            stop: once it is set, nothing more is waited for or sent.
            again: it may be sent again after a failure; not so if it would be done twice.
            text: the answer is not JSON but text, which is returned.

        Raises:
            RequestRefused: status 400, 413 or 422.
            NotThere: status 404 or 405.
            Stopped: `stop` is set, before an attempt or between two.
            ActiveDPOError: the server cannot be reached, refuses the key, or fails in another way.
        """
        stop = stop or threading.Event()
        retries = self._retries if again else 0
        for attempt in range(retries + 1):
            if stop.is_set():
                raise Stopped
            try:
                return _within(self._timeout, lambda: self._once(method, path, body, params, text))
            except _Failed as failed:
                if attempt == retries:
                    tries = f" ({attempt + 1} attempts)" if attempt else ""
                    raise ActiveDPOError(f"{self._place}: {failed}{tries}") from None
                self._wait(failed, attempt, stop)
        raise AssertionError("unreachable")

    def _made_client(self, headers: Mapping[str, str] | None) -> httpx2.Client:
        timeout = httpx2.Timeout(self._timeout, connect=min(self._timeout, 10.0))
        try:
            return httpx2.Client(headers=headers, timeout=timeout)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL):
            # Its words may show a proxy's password.
            names = [name for name in _VARIABLES for one in (name, name.lower()) if os.getenv(one)]
            raise ActiveDPOError(
                f"{self._place}: the proxy or the certificates that the environment names cannot "
                f"be used: check {', '.join(dict.fromkeys(names)) or 'the system settings'}"
            ) from None

    @property
    def _place(self) -> str:
        return f"{self._name} {self.base_url}"

    def _wait(self, failed: _Failed, attempt: int, stop: threading.Event) -> None:
        seconds = failed.after
        if seconds is None:
            seconds = min(2.0 ** min(attempt, 9), _LONGEST_BACKOFF) * random.uniform(1, 1.25)
        elif seconds > _LONGEST_WAIT:
            raise ActiveDPOError(
                f"{self._place}: {failed}; it asks to wait {seconds:.0f} s: run again then"
            )
        logger.info(
            "%s: %s; trying again in %.1f s (%d of %d)",
            self._place,
            failed,
            seconds,
            attempt + 1,
            self._retries,
        )
        if stop.wait(seconds):
            raise Stopped

    def _once(
        self, method: str, path: str, body: Any, params: Mapping[str, str] | None, text: bool
    ) -> Any:
        ends = time.monotonic() + self._timeout
        given: dict[str, Any] = {} if body is None else {"json": body}
        try:
            with self._client.stream(
                method, self.base_url + path, params=params, **given
            ) as response:
                content = bytearray()
                for block in response.iter_bytes():
                    content += block
                    if len(content) > self._max_bytes:
                        raise ActiveDPOError(
                            f"{self._place}: a response of more than {self._max_bytes >> 20} MiB"
                        )
                    if time.monotonic() > ends:  # nobody waits for it any more
                        raise _too_late(self._timeout)
        except httpx2.TimeoutException:
            raise _too_late(self._timeout) from None
        except httpx2.HTTPError as error:
            raise _Failed(f"cannot be reached: {self.shown(first_line(error))}") from None
        if response.status_code != 200 and not 200 < response.status_code < 300:
            self._refuse(response, bytes(content))
        if text:
            return content.decode(errors="replace")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Failed(f"no JSON: {self.shown(content.decode(errors='replace'))}") from None

    def _refuse(self, response: httpx2.Response, content: bytes) -> None:
        status = response.status_code
        reason = f"status {status}: {self.shown(_message_of(content))}".removesuffix(": ")
        if status in _TRY_AGAIN or status >= 500:
            raise _Failed(reason, _retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            raise ActiveDPOError(
                f"{self._place}: the key is missing or refused ({reason}); api_key_env names the "
                "environment variable that holds it"
            )
        if status in (400, 413, 422):
            raise RequestRefused(f"{self._place}: {reason}")
        if status in (404, 405):
            raise NotThere(f"{self._place}: {reason}")
        if 300 <= status < 400:
            raise ActiveDPOError(
                f"{self._place}: it redirects to another address (status {status}); give that one"
            )
        raise ActiveDPOError(f"{self._place}: {reason}")

    def shown(self, text: str) -> str:
        """Return a text of the server for a message: one short line without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text[: 100 * _LONGEST_REASON].split())
        return one_line(text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ...")


def _within(seconds: float, work: Callable[[], Value]) -> Value:
    """Return `work()`, or fail after some seconds, whatever it is doing then.

    The timeouts of a client are for single reads: a server that sends a byte now and then never
    reaches them, and looking up a name has none. The work goes on in a thread that holds nothing
    up.
    """
    done: SimpleQueue[Value | BaseException] = SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, name="activedpo-request", daemon=True).start()
    try:
        result = done.get(timeout=seconds)
    except Empty:
        raise _too_late(seconds) from None
    if isinstance(result, BaseException):
        raise result
    return result


def _too_late(seconds: float) -> _Failed:
    return _Failed(f"no response in {seconds:g} s")


def checked_url(base_url: str) -> str:
    """Return an address without a final slash.

    Raises:
        ActiveDPOError: not http or https, without a host, or with a user, a query or a fragment; it
            is then not shown, as it may hold a password.
    """
    try:
        url = httpx2.URL(base_url)
        good = url.scheme in ("http", "https") and bool(url.host)
        plain = not (url.userinfo or url.query or url.fragment)
    except (httpx2.InvalidURL, TypeError):
        good = plain = False
    if not (good and plain):
        raise ActiveDPOError(
            "base_url: expected an address such as http://localhost:8000/v1, with http or https, "
            "and without a user, a query or a fragment"
        )
    return base_url.rstrip("/")


def key_from(variable: str) -> str:
    """Return the key in an environment variable. Its name is not shown: it may be a key itself.

    Raises:
        ActiveDPOError: it is not set, or no header can hold its value.
    """
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ActiveDPOError("api_key_env: expected the name of an environment variable")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ActiveDPOError("api_key_env: the environment variable that it names is not set")
    if not (key.isascii() and key.isprintable()):
        raise ActiveDPOError("api_key_env: the key has characters that no header can hold")
    return key


def _message_of(content: bytes) -> str:
    """Return the message in a server's error: OpenAI's form, others' usual ones, or the text."""
    text = content.decode(errors="replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header, which has seconds or a date; None without."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())

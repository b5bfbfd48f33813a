"""Headless Chromium, driven by its DevTools protocol over a pair of pipes."""

import contextlib
import json
import os
import select
import shutil
import tempfile
import time
from pathlib import Path

from .namespaces import within
from .processes import Invalid, Program

COMMAND = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--remote-debugging-pipe",
]
# The longest time for one answer or one page.
PATIENCE = 60.0


class Chromium:
    """A browser with an empty profile, which ends with the `with` statement."""

    def __init__(self, namespace, directory):
        self.profile = Path(tempfile.mkdtemp(dir=directory, prefix="chromium-"))
        # Chromium reads requests from descriptor 3 and writes answers to descriptor 4. The shell moves them there.
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        command = within(namespace, [*COMMAND, f"--user-data-dir={self.profile}", "about:blank"])
        moved = ["sh", "-c", 'exec 3<"/proc/self/fd/$1" 4>"/proc/self/fd/$2"; shift 2; exec "$@"', "sh"]
        log = directory / "chromium.log"
        for descriptor in (requests, answers):
            os.set_inheritable(descriptor, True)
        self.program = Program("chromium", [*moved, requests, answers, *command], log, pass_fds=(requests, answers))
        os.close(requests)
        os.close(answers)
        self.buffer, self.events, self.number = b"", [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.program.stop()
        os.close(self.requests)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)

    def load(self, url):
        """Loads a page with an empty cache and returns the numbers in the data attributes of its body."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        page = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.call("Page.enable", session)
        self.events.clear()
        failed = self.call("Page.navigate", session, url=url).get("errorText")
        if failed:
            raise Invalid(f"chromium: {failed}")
        self.await_event("Page.loadEventFired")
        text = self.call(
            "Runtime.evaluate", session, expression="JSON.stringify({ ...document.body.dataset })", returnByValue=True
        )["result"]["value"]
        self.call("Target.disposeBrowserContext", browserContextId=context)
        try:
            return {name: float(value) for name, value in json.loads(text).items()} | {"url": url}
        except ValueError as error:
            raise Invalid(f"chromium: the page shows {text}") from error

    def call(self, method, session=None, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if session:
            request["sessionId"] = session
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        answer = self.await_message(lambda message: message.get("id") == self.number)
        if "error" in answer:
            raise Invalid(f"chromium: {method}: {answer['error'].get('message')}")
        return answer["result"]

    def await_event(self, method):
        if method not in self.events:
            self.await_message(lambda message: message.get("method") == method)

    def await_message(self, wanted):
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.buffer:
                self.read(until)
            text, self.buffer = self.buffer.split(b"\0", 1)
            message = json.loads(text)
            # An event may arrive before the answer to the request that caused it.
            self.events.append(message.get("method"))
            if wanted(message):
                return message

    def read(self, until):
        ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise Invalid(f"chromium does not answer: {self.program.last_line()}")
        received = b""
        with contextlib.suppress(OSError):
            received = os.read(self.answers, 1 << 16)
        if not received:
            raise Invalid(f"chromium ended: {self.program.last_line()}")
        self.buffer += received
